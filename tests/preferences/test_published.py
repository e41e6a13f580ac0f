"""Pairs in the published schema: read from any file, checked row by row, split by speech."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psycho.config import PairsConfig
from psycho.errors import BadInput, BadRows
from psycho.preferences.build import import_pairs
from psycho.preferences.published import check_published, read_published
from psycho.preferences.shapes import RATINGS
from psycho.preferences.source import source_facts
from psycho.principles import STEMS
from psycho.schema import PREFERENCE_PAIR

Row = dict[str, Any]


def row(number: int, chosen: int = 4, rejected: int = 2, **more: Any) -> Row:
    """A row as published: no speech id, no gap, no history."""
    ratings = {f"{side}_{stem}_rating": r for side, r in (("chosen", chosen), ("rejected", rejected)) for stem in STEMS}
    texts = {"question": f"How do I sleep, case {number}?", "chosen": f"Warm {number}", "rejected": f"Cold {number}"}
    models = {"chosen_model": "m1", "rejected_model": "m2"}
    return {"ID": f"q{number}", "prefID": 0, **texts, **models, **ratings, **more}


def parquet(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def jsonl(path: Path, rows: list[Row]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def table(path: Path, rows: list[Row]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize(("write", "name"), [(parquet, "p.parquet"), (jsonl, "p.jsonl"), (table, "p.csv")])
def test_every_kind_of_file_reads_alike(tmp_path: Path, write: Any, name: str) -> None:
    rows = [row(n, history=json.dumps([{"role": "user", "content": "before"}])) for n in range(40)]
    found = read_published(PairsConfig(source=write(tmp_path / name, rows)), 0)
    assert not found.quarantine and len(found.pairs) == len(found.speeches) == 40
    first = found.pairs[0]
    assert (first["ID"], first["speech_id"], first["prefID"], first["gap"]) == ("q0", "q0", 0, 2.0)
    assert all(type(first[name]) is int for name in RATINGS)
    assert json.loads(first["history"])[0]["content"] == "before"
    assert found.speeches["q0"]["history"] == first["history"]


def test_without_a_split_a_share_of_the_speeches_is_held_out(tmp_path: Path) -> None:
    rows = [row(n) | {"prefID": k, "chosen": f"Warm {n} {k}"} for n in range(300) for k in range(3)]
    source = parquet(tmp_path / "p.parquet", rows)
    found = read_published(PairsConfig(source=source, test_share=0.2), 0)
    sides = {name: {p["ID"] for p in found.pairs if p["split"] == name} for name in ("train", "evaluation")}
    assert not sides["train"] & sides["evaluation"] and 30 < len(sides["evaluation"]) < 90
    assert read_published(PairsConfig(source=source, test_share=0.2), 0).speeches == found.speeches
    assert read_published(PairsConfig(source=source, test_share=0.2), 1).speeches != found.speeches


def _folder(tmp_path: Path) -> PairsConfig:
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [row(n) for n in range(6)])
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row(n) for n in range(6, 9)])
    parquet(tmp_path / "other" / "train-0.parquet", [{"a": 1}])  # beside data/, and not read
    return PairsConfig(source=str(tmp_path))


def _run_folder(tmp_path: Path) -> PairsConfig:
    parquet(tmp_path / "train" / "part-0.parquet", [row(n) for n in range(6)])
    parquet(tmp_path / "test" / "part-0.parquet", [row(n) for n in range(6, 9)])
    parquet(tmp_path / "groups" / "part-0.parquet", [{"a": 1}])
    return PairsConfig(source=str(tmp_path))


def _column(tmp_path: Path) -> PairsConfig:
    rows = [row(n, split="train" if n < 6 else "test") for n in range(9)]
    return PairsConfig(source=parquet(tmp_path / "p.parquet", rows))


def _two_files(tmp_path: Path) -> PairsConfig:
    train = parquet(tmp_path / "a.parquet", [row(n) for n in range(6)])
    return PairsConfig(source=train, test_source=parquet(tmp_path / "b.parquet", [row(n) for n in range(6, 9)]))


@pytest.mark.parametrize("where", [_folder, _run_folder, _column, _two_files])
def test_the_split_that_the_source_names(tmp_path: Path, where: Any) -> None:
    found = read_published(where(tmp_path), 0)
    assert {p["ID"] for p in found.pairs if p["split"] == "evaluation"} == {"q6", "q7", "q8"}
    assert {s for s, speech in found.speeches.items() if speech["split"] == "train"} == {f"q{n}" for n in range(6)}


@pytest.mark.parametrize("same", ["row", "words"])
def test_a_test_set_out_of_the_train_set_is_an_error(tmp_path: Path, same: str) -> None:
    """PEERS.md, bug 4; also where the very rows are there twice, which are no duplicates to drop."""
    again = row(2) if same == "row" else row(20, question=row(2)["question"].upper())
    train = parquet(tmp_path / "a.parquet", [row(n) for n in range(6)])
    test = parquet(tmp_path / "b.parquet", [row(9), again])
    with pytest.raises(
        BadInput, match=r"1 client speeches .* has ID q2\) are in both train and test.*resplit"
    ) as caught:
        read_published(PairsConfig(source=train, test_source=test), 0)
    assert "sleep" not in str(caught.value)
    found = read_published(PairsConfig(source=train, test_source=test, resplit=True, test_share=0.5), 0)
    assert len({speech["split"] for speech in found.speeches.values() if "CASE 2" in speech["question"].upper()}) == 1


BAD = {
    "no text in question or prompt, and chosen is no conversation": {"question": None},
    "no text in chosen": {"chosen": "  "},
    "no text in rejected": {"rejected": None},
    "chosen_safety_rating is not a whole number from 1 to 5": {"chosen_safety_rating": 6},
    "rejected_empathy_rating is not a whole number from 1 to 5": {"rejected_empathy_rating": None},
    "same text": {"rejected": "Warm 3 "},
    "rejected is rated higher": {f"chosen_{stem}_rating": 1 for stem in STEMS},
    "its ID belongs to another question": {"ID": "q0"},
    "half a character in chosen": {"chosen": "a\ud800"},
    "chosen_model is no name": {"chosen_model": ["m1"]},
    "history is no list of turns with role and content": {"history": "SECRET, no JSON"},
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_goes_to_quarantine_with_its_reason(tmp_path: Path, reason: str) -> None:
    rows = [row(n) for n in range(3)] + [row(3) | BAD[reason]] + [row(n) for n in range(4, 9)]
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows)), 0)
    assert found.quarantine == [{"row": 4, "reason": reason}]
    assert len(found.pairs) == 8


TURNS = [{"role": "user", "content": "befóre"}, {"role": "assistant", "content": "I see."}]


@pytest.mark.parametrize(
    ("given", "kept"), [(TURNS, TURNS), (json.dumps(TURNS), TURNS), ([], None), ("", None), ("[]", None), (None, None)]
)
def test_earlier_turns_as_a_list_or_as_json(tmp_path: Path, given: Any, kept: Any) -> None:
    rows = [row(number, history=given) for number in range(4)]
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows)), 0)
    assert not found.quarantine
    assert [pair["history"] and json.loads(pair["history"]) for pair in found.pairs] == [kept] * 4


@pytest.mark.parametrize(
    "given", ["[1]", '"SECRET"', '{"a": 1}', '[{"role": "user"}]', 7, "[" * 100_000, [{"role": "\ud800"}]]
)
def test_what_is_no_history_is_left_out(tmp_path: Path, given: Any) -> None:
    rows = [row(0), row(1, history=given), row(2)]
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows)), 0)
    assert [left["row"] for left in found.quarantine] == [2] and len(found.pairs) == 2


def test_whatever_numbers_stand_for_names_the_pairs_can_be_stored(tmp_path: Path) -> None:
    rows = [row(0, prefID=10**12), row(1, chosen_model=4, rejected_model=2.5), row(2, ID=7)]
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows)), 0)
    stored = pa.Table.from_pylist(found.pairs, schema=PREFERENCE_PAIR).to_pylist()
    assert [pair["prefID"] for pair in stored] == [1, 0, 0] and stored[2]["ID"] == "7"
    assert (stored[1]["chosen_model"], stored[1]["rejected_model"]) == ("4", "2.5")


def test_other_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        json.dumps(row(0)),
        "not json",
        json.dumps(row(0)),
        "[1]",
        "",
        json.dumps(row(1, chosen_safety_rating="4.0")),
    ]
    path.write_text("\n".join(lines))
    found = read_published(PairsConfig(source=str(path)), 0)
    assert [(r["row"], r["reason"]) for r in found.quarantine] == [
        (2, "not a JSON object"),
        (3, "exact duplicate"),
        (4, "not a JSON object"),
    ]
    assert found.pairs[1]["chosen_safety_rating"] == 4


def test_rows_without_id_or_models(tmp_path: Path) -> None:
    bare = [
        {k: v for k, v in row(n).items() if k not in ("ID", "prefID", "chosen_model", "rejected_model")} for n in (0, 1)
    ]
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", bare)), 0)
    assert len(set(found.speeches)) == 2 and {p["chosen_model"] for p in found.pairs} == {"unknown"}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: str(p / "none.parquet"), "does not exist"),
        (lambda p: str(p), "holds no file of rows"),
        (lambda p: jsonl(p / "p.txt", [row(0)]), "ends in '.txt'"),
        (
            lambda p: parquet(p / "p.parquet", [{"question": "x", "chosen": "y"}]),
            "no column rejected; its columns are question, chosen, and accepted are .* prompt .TRL.* score_chosen",
        ),
        (
            lambda p: parquet(p / "p.parquet", [{k: v for k, v in row(0).items() if "clarity" not in k}]),
            "no column chosen_clarity_rating and 1 more",
        ),
        (lambda p: jsonl(p / "p.jsonl", []), "holds no rows"),
        (
            lambda p: jsonl(p / "p.jsonl", [row(0) | {"chosen": ""}, row(1) | {"chosen": None}, row(2, 1, 2)]),
            r"3 rows and none that can be used \(2 no text in chosen, 1 rejected is rated higher\)",
        ),
    ],
)
def test_what_cannot_be_read_is_one_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        read_published(PairsConfig(source=make(tmp_path)), 0)


def test_windows_code_page_is_read_and_counted(tmp_path: Path) -> None:
    path = Path(table(tmp_path / "p.csv", [row(0), row(1) | {"chosen": "café"}]))
    path.write_bytes(path.read_text().encode("cp1252"))
    found = read_published(PairsConfig(source=str(path)), 0)
    assert found.pairs[1]["chosen"] == "café" and found.notes == {"cp1252_lines": 1}


def test_pairs_of_a_csv_that_would_be_cut_are_refused_with_their_rows(tmp_path: Path) -> None:
    rows = [f"How {n},Warm {n}" + (", and more" if n % 2 else "") + f",Cold {n}" for n in range(300)]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,chosen,rejected", *rows]))
    with pytest.raises(BadRows, match=r"150 of 300 rows of .* put quotes around") as caught:
        read_published(PairsConfig(source=str(tmp_path / "p.csv")), 0)
    assert isinstance(caught.value.left_out, list) and len(caught.value.left_out) == 150


def test_a_broken_parquet_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "p.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadInput, match=r"cannot be read as \.parquet"):
        read_published(PairsConfig(source=str(tmp_path / "p.parquet")), 0)


def test_pairs_on_an_object_store(bucket: Any, tmp_path: Path) -> None:
    local = parquet(tmp_path / "p.parquet", [row(number) for number in range(40)])
    bucket.put("one.parquet", Path(local).read_bytes())
    for side, numbers in (("train", range(6)), ("test", range(6, 9))):
        rows = parquet(tmp_path / f"{side}.parquet", [row(number) for number in numbers])
        bucket.put(f"set/data/{side}-00000-of-00001.parquet", Path(rows).read_bytes())
    one = read_published(PairsConfig(source="s3://speeches/one.parquet"), 0)
    assert one.pairs == read_published(PairsConfig(source=local), 0).pairs
    for address in ("s3://speeches/set", "s3://speeches/set/"):
        found = read_published(PairsConfig(source=address), 0)
        assert {pair["ID"] for pair in found.pairs if pair["split"] == "evaluation"} == {"q6", "q7", "q8"}
    before = source_facts("s3://speeches/one.parquet")
    bucket.put("one.parquet", b"other")
    assert source_facts("s3://speeches/one.parquet") != before
    with pytest.raises(BadInput, match="s3://speeches/none does not exist"):
        read_published(PairsConfig(source="s3://speeches/none"), 0)


def test_a_data_set_of_the_hub_is_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[str] = []

    def load(name: str) -> Any:
        asked.append(name)
        sides = {"train": [row(n) for n in range(6)], "test": [row(n) for n in range(6, 9)]}
        return datasets.DatasetDict({side: datasets.Dataset.from_list(rows) for side, rows in sides.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_published(PairsConfig(source="owner/pairs"), 0)
    assert asked == ["owner/pairs"]
    assert {p["ID"] for p in found.pairs if p["split"] == "evaluation"} == {"q6", "q7", "q8"}


def test_the_run_s_constraints_hold_for_imported_pairs_too(tmp_path: Path) -> None:
    less_safe = {"chosen_safety_rating": 2, "rejected_safety_rating": 4}
    rows = [row(n) for n in range(8)]
    rows += [row(8, 4, 4), row(9, 4, 4) | {"chosen_clarity_rating": 5}, row(10, 4, 2, **less_safe)]
    rows += [row(11, 5, 1), row(11) | {"prefID": 1, "chosen": "other"}]
    config = PairsConfig(source=parquet(tmp_path / "p.parquet", rows), test_share=0.2, max_pairs_per_speech=1)
    published = read_published(config, 3)
    for speech in published.speeches.values():  # so that the cases lie where the test needs them
        speech["split"] = "train" if int(speech["speech_id"][1:]) > 2 else "evaluation"
    found = import_pairs(published.pairs, published.speeches, config, 0)
    assert found.kept + len(found.left_out) == len(rows)
    assert found.counts["left_out"] == {
        "tie": 1,
        "gap under pairs.min_gap": 1,
        "less safe by 2": 1,
        "over pairs.max_pairs_per_speech": 1,
    }
    assert found.counts["less_safe"] == 1
    assert [p["gap"] for p in found.splits["train"] if p["ID"] == "q11"] == [4.0]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BEFORE = [user("I cannot sleep."), answer("Since when?")]
ASKED = "Since May, every night."
SIDES = {"chosen": "Warm", "rejected": "Cold"}
ANSWERS = {"chosen": [answer("Warm")], "rejected": [answer("Cold")]}
TWO_KINDS = "chosen is a text and rejected is none, or the other way round"
SHAPES: dict[str, Row] = {
    "TRL, text": {"prompt": ASKED, "chosen": "Warm", "rejected": "Cold"},
    "TRL, text with the prompt in it": {"prompt": f"{ASKED} ", "chosen": f"{ASKED} Warm", "rejected": f"{ASKED} Cold"},
    "TRL, messages": {"prompt": [user(ASKED)], "chosen": [answer("Warm")], "rejected": [answer("Cold")]},
    "TRL, several turns": {"prompt": [*BEFORE, user(ASKED)], "chosen": [answer("Warm")], "rejected": [answer("Cold")]},
    "TRL, implicit prompt": {
        "chosen": [*BEFORE, user(ASKED), answer("Warm")],
        "rejected": [*BEFORE, user(ASKED), answer("Cold")],
    },
    "UltraFeedback": {
        "prompt": ASKED,
        "prompt_id": "0a1b",
        "chosen": [{"role": "system", "content": "Be kind."}, user(ASKED), answer("Warm")],
        "rejected": [{"role": "system", "content": "Be kind."}, user(ASKED), answer("Cold")],
        "messages": [user(ASKED), answer("Warm")],
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    },
    "ratings of a whole": {"instruction": ASKED, **SIDES, "chosen_rating": 5, "rejected_rating": 0.5},
    "HH-RLHF": {
        "chosen": f"\n\nHuman: {BEFORE[0]['content']}\n\nAssistant: Since when?\n\nHuman: {ASKED}\n\nAssistant: Warm",
        "rejected": f"\n\nHuman: {BEFORE[0]['content']}\n\nAssistant: Since when?\n\nHuman: {ASKED}\n\nAssistant: Cold",
    },
    "our own text prompt": {"prompt": f"Client: {ASKED}\n\nTherapist:\n", "chosen": "Warm", "rejected": "Cold"},
    "published, without ratings": {"question": ASKED, **SIDES, "history": json.dumps(BEFORE)},
}  # fmt: skip
SCORED = {"UltraFeedback": 4.5, "ratings of a whole": 4.5}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("write", [parquet, jsonl, table])
def test_pairs_as_everyone_has_them(tmp_path: Path, name: str, write: Any) -> None:
    """What a set does not say is unknown, and nothing else is made of it."""
    given = SHAPES[name]
    if write is table:
        given = {k: json.dumps(v) if isinstance(v, list) else v for k, v in given.items()}
    suffix = {parquet: "parquet", jsonl: "jsonl", table: "csv"}[write]
    found = read_published(PairsConfig(source=write(tmp_path / f"p.{suffix}", [given])), 0)
    assert found.quarantine == []
    [pair] = found.pairs
    assert (pair["question"], pair["chosen"].strip(), pair["rejected"].strip()) == (ASKED, "Warm", "Cold")
    several = any(word in name for word in ("several", "implicit", "HH", "without ratings"))
    assert json.loads(pair["history"] or "[]") == (BEFORE if several else [])
    assert pair["gap"] == SCORED.get(name)
    assert {pair[column] for column in RATINGS} == {None} and pair["chosen_model"] == "unknown"
    assert found.speeches[pair["speech_id"]]["history"] == pair["history"]
    assert pa.Table.from_pylist(found.pairs, schema=PREFERENCE_PAIR).to_pylist()[0]["gap"] == pair["gap"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"prompt": ASKED, "chosen": [answer("Warm")], "rejected": "Cold"}, TWO_KINDS),
        ({"prompt": ASKED, "chosen": "Warm", "rejected": {"a": 1}}, TWO_KINDS),
        ({"prompt": [*BEFORE], **ANSWERS}, "the prompt does not end with a client turn"),
        (
            {"prompt": [{"role": "judge", "content": "x"}], **ANSWERS},
            "prompt: turn 1 has no role of a client or counsellor with a text",
        ),
        (
            {"chosen": [user(ASKED), answer("Warm")], "rejected": [user("Other"), answer("Cold")]},
            "chosen and rejected differ in more than their last answer",
        ),
        ({"chosen": [user(ASKED), answer("Warm")], "rejected": [user(ASKED), answer("Warm")]}, "same text"),
        (ANSWERS, "no prompt, and chosen and rejected hold no client turn"),
        (SIDES, "no text in question or prompt, and chosen is no conversation"),
        ({"prompt": ASKED, **SIDES, "score_chosen": 1, "score_rejected": 2}, "rejected is rated higher"),
        ({"prompt": 7, **SIDES}, "no text in prompt"),
    ],
)
def test_a_row_of_another_shape_is_left_out_with_its_reason(tmp_path: Path, given: Row, reason: str) -> None:
    found = read_published(PairsConfig(source=jsonl(tmp_path / "p.jsonl", [SHAPES["TRL, text"], given])), 0)
    assert found.quarantine == [{"row": 2, "reason": reason}] and len(found.pairs) == 1


def test_pairs_without_ratings_meet_what_is_known_of_them_alone(tmp_path: Path) -> None:
    rows = [{"prompt": f"Case {n}", "chosen": "Warm", "rejected": "Cold"} for n in range(40)]
    rows += [
        {"prompt": f"Case {n}", "chosen": "Warm", "rejected": "Cold", "score_chosen": n / 10, "score_rejected": 4}
        for n in range(40, 80)
    ]
    config = PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows))
    published = read_published(config, 0)
    found = import_pairs(published.pairs, published.speeches, config, 0)
    kept = [pair["gap"] for pair in found.splits["train"] if pair["gap"] is not None]
    assert found.kept + len(found.left_out) == 80 and kept and min(kept) >= 1.0
    assert sum(pair["gap"] is None for split in found.splits.values() for pair in split) == 40
    assert set(found.counts["left_out"]) == {"tie", "gap under pairs.min_gap"} and found.counts["less_safe"] == 0


def test_two_conversations_that_end_alike_are_two_speeches(tmp_path: Path) -> None:
    rows = [
        {"prompt": [user(f"Case {n}"), answer("Is it so?"), user("Yes.")], "chosen": [answer("Warm")],
         "rejected": [answer("Cold")], "split": "train" if n else "test"} for n in range(4)
    ]  # fmt: skip
    config = PairsConfig(source=jsonl(tmp_path / "p.jsonl", rows))
    found = read_published(config, 0)
    assert len(found.speeches) == 4 and len(found.pairs) == 4
    assert import_pairs(found.pairs, found.speeches, config, 0).kept == 4, "no overlap of train and test"


@pytest.mark.parametrize("name", ["p.json", "p.jsonl.gz", "p.csv.gz", "p.json.gz"])
def test_packed_files_and_json_lists(tmp_path: Path, name: str) -> None:
    rows = [row(n) for n in range(5)]
    plain = Path(table(tmp_path / "plain.csv", rows) if "csv" in name else jsonl(tmp_path / "plain.jsonl", rows))
    content = json.dumps(rows).encode() if "json." in f"{name}." else plain.read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read_published(PairsConfig(source=str(tmp_path / name)), 0)
    assert len(found.pairs) == 5 and found.quarantine == []


def test_the_first_rows_tell_a_dry_run_that_no_pair_can_be_made(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "good.jsonl", list(SHAPES["TRL, text"] | {"prompt": f"Case {n}"} for n in range(3)))
    check_published(PairsConfig(source=good))
    bad = jsonl(tmp_path / "bad.jsonl", [{"chosen": f"Warm {n}", "rejected": "Cold"} for n in range(500)])
    with pytest.raises(BadInput, match=r"begins with 200 rows and none that can be used \(200 no text in question or"):
        check_published(PairsConfig(source=bad))
    with pytest.raises(BadInput, match="has no column chosen and 1 more; its columns are a, and accepted are"):
        check_published(PairsConfig(source=jsonl(tmp_path / "other.jsonl", [{"a": 1}])))
