"""From a source to `speeches/`: every row is accounted for, clusters stay together, nothing personal is stored."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.prepare_scale import speeches as synthetic
from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput, BadRows
from psycho.run import StageResult
from psycho.schema import CLIENT_SPEECH
from psycho.speeches import pool as pooling
from psycho.speeches import prepare as preparing
from psycho.speeches.clean import Cleaned, clean_batch
from psycho.speeches.prepare import BATCH_ROWS, Batches, CleanAll, prepare_speeches

COUNSEL_CHAT = Path(__file__).parents[3] / "shared" / "data" / "counsel_chat_questions.csv"
SENTENCE = "the day my mother left and then I could not sleep for weeks because of all that was said at night"


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "in.jsonl"
    path.write_text("".join(json.dumps(row if isinstance(row, dict) else {"question": row}) + "\n" for row in rows))
    return path


def prepared(folder: Path, **settings: Any) -> tuple[StageResult, list[dict[str, Any]], list[dict[str, Any]]]:
    """The result, the speeches and the quarantine of `in.jsonl`, without the language filter unless it is set."""
    plain = {"source": str(folder / "in.jsonl"), "min_chars": 5, "languages": (), "evaluation": 2}
    result = prepare_speeches(SpeechesConfig.model_validate(plain | settings), 0, str(folder / "out"))
    table = storage.read_table(str(folder / "out" / "speeches"))
    left_out = [json.loads(line) for line in (folder / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert result.rows_in == result.rows_out + len(result.quarantine)
    assert (table.num_rows, len(left_out)) == (result.rows_out, len(result.quarantine))
    assert table.schema.equals(CLIENT_SPEECH) and not (folder / "out" / "work").exists()
    return result, table.to_pylist(), left_out


def distinct(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [
        " ".join(draw.choice(SENTENCE.split()) + str(draw.randrange(1000)) for _ in range(30)) for _ in range(count)
    ]


def test_every_row_comes_out_or_is_left_out_with_its_reason(tmp_path):
    texts = distinct(8)
    changed = texts[0].rsplit(" ", 2)[0] + " other end"
    write(tmp_path, [texts[0], {"question": None}, changed, *texts[1:], "abc", f" {texts[1]}\n"])
    result, speeches, left_out = prepared(tmp_path)
    assert [row["question"] for row in speeches] == texts
    assert left_out == [
        {"row": 2, "reason": "no text in this row"},
        {"row": 3, "reason": "near duplicate of row 1"},
        {"row": 11, "reason": "3 characters, under speeches.min_chars 5"},
        {"row": 12, "reason": "exact duplicate"},
    ]
    assert result.extra["duplicates"] == {"exact": 1, "near": 1}
    assert result.extra["left_out"] == {
        "no text in this row": 1,
        "near duplicate": 1,
        "under speeches.min_chars": 1,
        "exact duplicate": 1,
    }
    assert [row["cluster"] for row in speeches] == [row["speech_id"] for row in speeches]
    assert Counter(row["split"] for row in speeches) == {"train": 6, "evaluation": 2}


def test_near_duplicates_that_stay_share_a_cluster_and_a_side(tmp_path):
    texts = distinct(40)
    copies = [f"{text} and more {n}" for n, text in enumerate(texts)]
    write(tmp_path, [text for both in zip(texts, copies, strict=True) for text in both])
    _, speeches, left_out = prepared(tmp_path, near_duplicates="keep", evaluation=21, max_evaluation_share=0.5)
    assert len(speeches) == 80 and left_out == []
    for first, second in zip(speeches[::2], speeches[1::2], strict=True):
        assert first["cluster"] == second["cluster"] == first["speech_id"]
        assert first["split"] == second["split"]
    assert Counter(row["split"] for row in speeches)["evaluation"] == 20  # ten whole clusters; 21 would part one
    _, all_of_them, _ = prepared(tmp_path, near_duplicates="ignore")
    assert [row["cluster"] for row in all_of_them] == [row["speech_id"] for row in all_of_them]


def test_ids_limit_and_topics(tmp_path):
    texts = distinct(6)
    labels = ["sleep", "Depression", "nonsense", "sleep", "sleep", "sleep"]
    ids = ["1", "row-2", "1", "s3", "4", "5"]
    write(tmp_path, [{"question": t, "key": i, "label": x} for t, i, x in zip(texts, ids, labels, strict=True)])
    result, speeches, left_out = prepared(tmp_path, id_column="key", topic_column="label", limit=4)
    assert [row["speech_id"] for row in speeches] == ["1", "row-2", "s3", "4"]
    assert [row["topic"] for row in speeches] == ["sleep", "low_mood", "sleep", "sleep"]
    assert left_out == [{"row": 3, "reason": "id used twice"}, {"row": 6, "reason": "over speeches.limit 4"}]
    assert result.extra["topics"] == {"body": 3, "mood": 1}


def test_transcripts_keep_what_came_before(tmp_path):
    turns = [{"role": "user", "content": "I am sad."}, {"role": "assistant", "content": "Since when?"}]
    write(tmp_path, [{"messages": [*turns, {"role": "user", "content": text}]} for text in distinct(4)])
    _, speeches, _ = prepared(tmp_path, text_column="messages")
    assert [json.loads(row["history"]) for row in speeches] == [turns] * 4


def test_no_file_of_the_run_holds_what_was_masked(tmp_path):
    write(tmp_path, [f"{text} My mail is anna.berg@example.com" for text in distinct(5)])
    seen: list[bytes] = []
    real = preparing._decide

    def look(*arguments: Any) -> Any:
        seen.extend(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "_decide", look)
        result, speeches, _ = prepared(tmp_path)
    assert result.extra["personal_data"] == {"EMAIL": 5} and len(seen) > 20
    seen += [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"anna.berg" in content for content in seen)
    assert all(row["question"].endswith("My mail is [EMAIL]") for row in speeches)


@settings(deadline=None, max_examples=8)
@given(st.data())
def test_shards_and_batches_leave_no_trace(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("prepare")
    texts = distinct(20)
    rows = data.draw(st.lists(st.sampled_from([*texts, "abc", None]), min_size=30, max_size=60)) + texts
    write(folder, rows)
    whole = prepared(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "BATCH_ROWS", data.draw(st.integers(1, 9)))
        patch.setattr(pooling, "SHARD_ROWS", data.draw(st.integers(1, 30)))
        assert prepared(folder)[1:] == whole[1:]


def test_what_an_interrupted_run_left_is_not_mixed_in(tmp_path, monkeypatch):
    write(tmp_path, distinct(50))
    monkeypatch.setattr(pooling, "SHARD_ROWS", 10)
    monkeypatch.setattr(preparing, "BATCH_ROWS", 10)
    real = storage.write_rows

    def stop(table: Any, uri: str) -> None:
        if uri.endswith("part-00003.parquet"):
            raise KeyboardInterrupt
        real(table, uri)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "write_rows", stop)
        prepared(tmp_path)
    write(tmp_path, distinct(12, seed=1))
    _, speeches, _ = prepared(tmp_path)
    assert len(speeches) == 12


@pytest.mark.parametrize("stop_after", [0, 3, 27, 60])
def test_an_interrupted_run_goes_on_behind_its_last_shard(tmp_path, monkeypatch, stop_after):
    """Nothing that a shard holds is cleaned again, and the end is that of an unbroken run."""
    monkeypatch.setattr(pooling, "SHARD_ROWS", 10)
    monkeypatch.setattr(preparing, "BATCH_ROWS", 4)
    texts = distinct(54)
    near = texts[3].rsplit(" ", 2)[0] + " other end"
    rows = [*texts[:20], "abc", "Write to anna.berg@example.com, please.", *texts[20:], near, texts[5], None, texts[30]]
    path = write(tmp_path, rows)
    config = SpeechesConfig(source=str(path), min_chars=5, languages=(), evaluation=20)
    whole = prepare_speeches(config, 0, str(tmp_path / "whole"))
    asked: list[int] = []
    resumed: list[int] = []

    def clean_some(count: int) -> CleanAll:
        def clean_all(batches: Batches) -> Iterator[Cleaned]:
            for batch in batches:
                asked.extend(row.number for row in batch)
                if len(asked) > count:
                    raise KeyboardInterrupt
                yield clean_batch(batch, config, 0)

        return clean_all

    def again(count: int) -> StageResult:
        return prepare_speeches(config, 0, str(tmp_path / "broken"), clean_some(count), resumed.append)

    with pytest.raises(KeyboardInterrupt):
        again(min(stop_after, len(rows) - 1))
    kept = min(stop_after, len(rows) - 1) // 12 * 12  # shards end with a batch of four rows
    asked.clear()
    result = again(10**6)
    assert resumed == ([kept] if kept else [])
    assert asked == list(range(kept + 1, len(rows) + 1))
    assert result.extra == whole.extra and result.extra["duplicates"] == {"exact": 2, "near": 1}
    for name in ("quarantine.jsonl", "speeches"):
        ends = [tmp_path / folder / name for folder in ("broken", "whole")]
        first, second = ([f.read_bytes() for f in sorted({end, *end.rglob("*")}) if f.is_file()] for end in ends)
        assert first == second


@pytest.mark.parametrize("name", ["clean-00001.parquet", "keys.bin"])
def test_a_torn_file_begins_anew(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pooling, "SHARD_ROWS", 8)
    monkeypatch.setattr(preparing, "BATCH_ROWS", 4)
    write(tmp_path, distinct(30))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preparing, "_decide", Mock(side_effect=KeyboardInterrupt))
        prepared(tmp_path)
    torn = tmp_path / "out" / "work" / name
    torn.write_bytes(torn.read_bytes()[:-9])
    _, speeches, _ = prepared(tmp_path)
    assert [row["question"] for row in speeches] == distinct(30)


def test_an_id_that_may_be_somebodys_is_not_stored(tmp_path):
    ids = ["row-17", "anna.berg@example.com", "102", "anna.berg@example.com", "Anna Berg"]
    rows = [{"question": t, "key": i} for t, i in zip(distinct(5), ids, strict=True)]
    write(tmp_path, rows)
    result, speeches, left_out = prepared(tmp_path, id_column="key")
    stored = [row["speech_id"] for row in speeches]
    assert (stored[0], stored[2]) == ("row-17", "102") and result.extra["ids_replaced"] == 3
    assert left_out == [{"row": 4, "reason": "id used twice"}]
    files = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"anna" in content.lower() for content in files)
    _, alone, _ = prepared(tmp_path, id_column="key", limit=4)
    assert [row["speech_id"] for row in alone] == stored, "the same id is replaced by the same"
    _, as_given, _ = prepared(tmp_path, id_column="key", mask_personal_data=False)
    assert as_given[1]["speech_id"] == "anna.berg@example.com"


def refused(folder: Path, **settings: Any) -> tuple[str, list[dict[str, Any]]]:
    """The sentence that `prepare` refuses its source with, and the rows left out."""
    with pytest.raises(BadRows) as caught:
        prepared(folder, **settings)
    assert "\n" not in str(caught.value) and not (folder / "out" / "speeches").exists()
    assert caught.value.left_out == str(folder / "out" / "quarantine.jsonl")
    return str(caught.value), [json.loads(line) for line in Path(caught.value.left_out).read_text().splitlines()]


def test_too_few_speeches_is_a_sentence(tmp_path):
    write(tmp_path, distinct(1))
    said, left_out = refused(tmp_path)
    assert "only 1 speeches of" in said and "of its 1 rows, too few for two splits; give more" in said
    assert left_out == []


@pytest.mark.parametrize(
    ("rows", "why", "advice"),
    [
        ([{"question": None}] * 3 + [{"question": "ab"}], "3 no text in this row, 1 under speeches.min_chars",
         "check speeches.text_column or lower speeches.min_chars"),
        ([{"question": "ab"}, {"question": "abc"}], "2 under speeches.min_chars", "lower speeches.min_chars"),
        (distinct(1) * 60, "59 exact duplicate", "give more different speeches"),
        ([f"{text} {n}" for text in distinct(1) for n in range(20)], "19 near duplicate", "give more different"),
    ],
)  # fmt: skip
def test_too_little_left_names_every_cause_and_lists_the_rows(tmp_path, rows, why, advice):
    write(tmp_path, rows)
    said, left_out = refused(tmp_path)
    kept = len(rows) - len(left_out)
    assert f"only {kept} speeches of" in said and f"of its {len(rows)} rows ({why}), too few" in said
    assert said.endswith(advice) or "different speeches" in said
    assert kept in (0, 1) and all(row["reason"] for row in left_out)
    assert ("min_chars" in said) == ("min_chars" in why), "what is no cause is no advice"


def test_a_file_that_loses_text_is_refused_and_every_row_accounted_for(tmp_path):
    """Text with commas that nobody quoted: 13 of 28 such speeches were once cut at their first comma, and used."""
    texts = [f"{text}, and so on" if n % 2 else text for n, text in enumerate(distinct(300))]
    (tmp_path / "in.csv").write_text("\n".join(["question", *texts]) + "\n")
    said, left_out = refused(tmp_path, source=str(tmp_path / "in.csv"))
    assert "150 of 300 rows" in said and "put quotes around every text" in said
    assert [row["row"] for row in left_out] == list(range(2, 301, 2))
    assert {row["reason"] for row in left_out} == {"more cells than the header"}


def test_a_few_rows_that_do_not_fit_are_left_out(tmp_path):
    texts = [f'"{text}, and so on"' for text in distinct(300)]
    texts[7] = texts[7].strip('"')
    texts[100] = texts[100][:-1]
    (tmp_path / "in.csv").write_text("\n".join(["question", *texts]) + "\n")
    result, speeches, left_out = prepared(tmp_path, source=str(tmp_path / "in.csv"))
    assert left_out == [
        {"row": 8, "reason": "more cells than the header"},
        {"row": 101, "reason": "a quote that is not closed"},
    ]
    assert [row["question"] for row in speeches] == [
        text.strip('"') for n, text in enumerate(texts) if n not in (7, 100)
    ]
    assert result.extra["left_out"] == {"more cells than the header": 1, "a quote that is not closed": 1}


def test_an_unknown_language_code_is_a_sentence(tmp_path):
    write(tmp_path, distinct(3))
    with pytest.raises(BadInput, match="'english' is no language code"):
        prepared(tmp_path, languages=["english"])


def test_what_was_planted_is_found(tmp_path):
    planted = Counter(kind for kind, _ in synthetic(3000))
    write(tmp_path, [text for _, text in synthetic(3000)])
    result, _, _ = prepared(tmp_path, languages=("en",), evaluation=100)
    duplicates = result.extra["duplicates"]
    assert abs(duplicates["exact"] - planted["exact"]) <= 2
    assert abs(duplicates["near"] - planted["near"]) <= 0.03 * planted["near"]
    assert result.extra["languages"] == {"en": 3000}


def test_a_cluster_of_workers_gives_the_same_rows(tmp_path, local_ray):
    from psycho.speeches.parallel import clean_on_ray

    path = write(tmp_path, [text for _, text in synthetic(10 * BATCH_ROWS)])
    config = SpeechesConfig(source=str(path))
    here = prepare_speeches(config, 0, str(tmp_path / "here"))
    there = prepare_speeches(config, 0, str(tmp_path / "there"), lambda batches: clean_on_ray(batches, config, 0))
    assert (here.rows_in, here.rows_out, here.extra) == (there.rows_in, there.rows_out, there.extra)
    assert storage.read_table(str(tmp_path / "here" / "speeches")) == storage.read_table(
        str(tmp_path / "there" / "speeches")
    )


@pytest.mark.skipif(not COUNSEL_CHAT.is_file(), reason=f"{COUNSEL_CHAT} is not here; the project does not ship it")
def test_real_client_speeches(tmp_path):
    config = SpeechesConfig(
        source=str(COUNSEL_CHAT), text_column="questionText", id_column="questionID", topic_column="topic"
    )
    result = prepare_speeches(config, 0, str(tmp_path))
    rows = storage.read_table(str(tmp_path / "speeches")).to_pylist()
    assert result.rows_in == 500 == len(rows) + len(result.quarantine) and len(rows) > 300
    assert all(100 <= len(row["question"]) <= 1000 and "\u2019" not in row["question"] for row in rows)
    assert Counter(row["split"] for row in rows)["evaluation"] == min(150, int(0.35 * len(rows)))
    assert sum(bool(row["topic"]) for row in rows) > 0.9 * len(rows)
    assert result.extra["languages"].get("en", 0) >= 0.99 * len(rows)
    told = (tmp_path / "quarantine.jsonl").read_text()
    assert not any(row["question"][:20] in told for row in rows)


def test_clean_batch_takes_an_empty_batch():
    batch = clean_batch([], SpeechesConfig(), 0)
    assert batch.table.num_rows == 0 and batch.keys.shape == (0, 3) and batch.signature.shape[0] == 0
