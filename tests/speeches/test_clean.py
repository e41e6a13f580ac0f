"""Cleaning and the split: every row is accounted for, a quarantine row tells nothing, the split goes by speech."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.speeches.clean import clean_speeches, clean_text, split_speeches
from psycho.speeches.read import read_speeches

COUNSEL_CHAT = Path(__file__).parents[3] / "shared" / "data" / "counsel_chat_questions.csv"
SHORT = SpeechesConfig(source="some.csv", min_chars=3, max_chars=12)
RAW = st.lists(
    st.tuples(st.none() | st.text("ab  '\u2019", max_size=15), st.none() | st.sampled_from("xyz")), min_size=1
)


def numbered(rows: list[tuple[str | None, str | None]]) -> list[tuple[int, str | None, str | None]]:
    return [(number, text, given_id) for number, (text, given_id) in enumerate(rows, start=1)]


def cleaned(*texts: str | None, **settings: Any) -> tuple[list[str], list[dict[str, Any]]]:
    config = SHORT.model_copy(update=settings)
    kept, quarantine, _ = clean_speeches(numbered([(text, None) for text in texts]), config)
    return [speech["question"] for speech in kept], quarantine


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t b  ", "a b"),
        ("I can&#39;t &amp; won&rsquo;t", "I can't & won't"),
        ("\u201cquoted\u201d \u2018so\u2019", "\"quoted\" 'so'"),
        ("a\u00a0b", "a b"),
        ("\ufeffa", "a"),
        ("e\u0301", "\u00e9"),
        ("e\ufeff\u0301", "\u00e9"),
        ("a\x00b\x07", "a b"),
        ("a\ud800b", "a b"),
        ("\u0645\u06cc 🙂", "\u0645\u06cc 🙂"),
    ],
)
def test_clean_text(text, clean):
    assert clean_text(text) == clean


@settings(deadline=None)
@given(st.text())
def test_clean_text_is_composed_printable_and_without_double_spaces(text):
    clean = clean_text(text)
    assert unicodedata.is_normalized("NFC", clean)
    assert clean.isprintable() and "  " not in clean and clean == clean.strip()


@settings(deadline=None)
@given(RAW, st.none() | st.integers(2, 5))
def test_every_row_is_kept_or_left_out_with_a_reason(rows, limit):
    config = SHORT.model_copy(update={"limit": limit})
    kept, quarantine, count = clean_speeches(numbered(rows), config)
    assert count == len(rows) == len(kept) + len(quarantine)
    assert len({s["question"] for s in kept}) == len({s["speech_id"] for s in kept}) == len(kept) <= (limit or count)
    assert all(3 <= len(s["question"]) <= 12 for s in kept)
    assert len({row["row"] for row in quarantine}) == len(quarantine)
    # slow and obvious: a text that fits and is not kept equals one that is, shares its id, or came too late
    known = {s["question"] for s in kept}
    for number, text, _ in numbered(rows):
        reason = next((row["reason"] for row in quarantine if row["row"] == number), None)
        fits = text is not None and 3 <= len(clean_text(text)) <= 12
        assert fits or reason is not None
        if fits and reason is None:
            assert clean_text(text) in known
        if fits and reason is not None:
            assert reason == "exact duplicate" or reason.startswith(("id used twice", "over speeches.limit"))


@settings(deadline=None)
@given(st.lists(st.text("qwzk", min_size=2, max_size=20), min_size=1))
def test_a_quarantine_row_holds_nothing_that_a_client_said(texts):
    _, quarantine, _ = clean_speeches(numbered([(text, None) for text in texts]), SHORT)
    allowed = {"no text in this row", "exact duplicate", "id used twice"}
    for row in quarantine:
        assert set(row) == {"row", "reason"}
        stripped = "".join(c for c in row["reason"] if not c.isdigit())
        assert stripped in allowed | {
            " characters, under speeches.min_chars ",
            " characters, over speeches.max_chars ",
        }


def test_limits_are_inclusive_and_reasons_give_numbers():
    kept, quarantine = cleaned("abc", "ab", "a" * 12, "a" * 13, None, " ")
    assert kept == ["abc", "a" * 12]
    assert [row["reason"] for row in quarantine] == [
        "2 characters, under speeches.min_chars 3",
        "13 characters, over speeches.max_chars 12",
        "no text in this row",
        "0 characters, under speeches.min_chars 3",
    ]


def test_exact_duplicates_after_cleaning_and_ids_used_twice():
    assert cleaned("it\u2019s", "it's", " it's\n") == (
        ["it's"],
        [{"row": 2, "reason": "exact duplicate"}, {"row": 3, "reason": "exact duplicate"}],
    )
    kept, quarantine, _ = clean_speeches([(1, "first", "a"), (2, "other", "a"), (3, "third", "b")], SHORT)
    assert [s["speech_id"] for s in kept] == ["a", "b"]
    assert quarantine == [{"row": 2, "reason": "id used twice"}]


def test_over_the_limit_is_said_so():
    kept, quarantine = cleaned("aaa", "bbb", "ccc", limit=2)
    assert kept == ["aaa", "bbb"] and quarantine == [{"row": 3, "reason": "over speeches.limit 2"}]


def test_an_id_is_derived_from_the_clean_text():
    ids = {clean_speeches([(n, text, None)], SHORT)[0][0]["speech_id"] for n, text in enumerate(["it\u2019s", " it's"])}
    assert len(ids) == 1


def speeches(count: int) -> list[dict[str, str]]:
    return [{"speech_id": f"s{n}", "question": f"question {n}"} for n in range(count)]


def held_out(rows: list[dict[str, str]], seed: int = 0, **settings: Any) -> set[str]:
    config = SHORT.model_copy(update={"evaluation": 10, "max_evaluation_share": 0.35} | settings)
    split = split_speeches(rows, config, seed)
    assert [row["speech_id"] for row in split] == [row["speech_id"] for row in rows]
    assert {row["split"] for row in split} == {"train", "evaluation"}
    return {row["speech_id"] for row in split if row["split"] == "evaluation"}


@settings(deadline=None)
@given(st.permutations(range(40)), st.integers(0, 5))
def test_the_split_does_not_depend_on_the_order_of_the_rows(order, seed):
    rows = speeches(40)
    assert held_out([rows[i] for i in order], seed) == held_out(rows, seed)


@settings(deadline=None)
@given(st.integers(3, 60), st.integers(1, 60), st.integers(0, 5))
def test_more_speeches_move_no_more_than_they_must(count, more, seed):
    before, after = held_out(speeches(count), seed), held_out(speeches(count + more), seed)
    old = after & {row["speech_id"] for row in speeches(count)}
    # old speeches keep their order by hash: held out are as many of the first as there is room for
    assert old <= before or before <= old
    assert len(before - after) <= max(0, len(after - old))


@settings(deadline=None)
@given(st.integers(2, 200), st.integers(1, 60), st.floats(0.01, 0.99))
def test_the_share_held_out_is_bounded(count, evaluation, share):
    expected = min(evaluation, int(count * share))
    arguments = {"evaluation": evaluation, "max_evaluation_share": share}
    if expected < 1:
        with pytest.raises(BadInput, match=f"only {count} speeches"):
            held_out(speeches(count), **arguments)
    else:
        assert len(held_out(speeches(count), **arguments)) == expected < count


def test_another_seed_is_another_split():
    assert held_out(speeches(60), 0) != held_out(speeches(60), 1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_too_few_speeches_is_a_sentence(count):
    with pytest.raises(BadInput, match=f"only {count} speeches of some.csv are left after cleaning; give more"):
        split_speeches(speeches(count), SHORT, 0)


@pytest.mark.skipif(not COUNSEL_CHAT.is_file(), reason=f"{COUNSEL_CHAT} is not here; the project does not ship it")
def test_real_client_speeches():
    config = SpeechesConfig(source=str(COUNSEL_CHAT), text_column="questionText", id_column="questionID")
    kept, quarantine, rows = clean_speeches(read_speeches(config), config)
    assert rows == 500 == len(kept) + len(quarantine) and len(kept) > 300
    assert all(100 <= len(s["question"]) <= 1000 and "\u2019" not in s["question"] for s in kept)
    split = Counter(row["split"] for row in split_speeches(kept, config, 0))
    assert split["evaluation"] == min(150, int(0.35 * len(kept)))
    told = json.dumps(quarantine)
    assert not any(s["question"][:20] in told for s in kept)
