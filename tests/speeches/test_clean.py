"""Cleaning: every row comes out with a text or a reason, a reason tells nothing a client said, masking comes first."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.config import SpeechesConfig
from psycho.speeches.clean import clean_batch, is_plain_id, one_line, plain_text
from psycho.speeches.read import RawSpeech

SHORT = SpeechesConfig(source="some.csv", min_chars=3, max_chars=12, languages=(), near_duplicates="ignore")


def cleaned(*texts: Any, **settings: Any) -> list[dict[str, Any]]:
    config = SHORT.model_copy(update=settings)
    return clean_batch([RawSpeech(n, text) for n, text in enumerate(texts, 1)], config, 0).table.to_pylist()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t b  ", "a b"),
        ("I can&#39;t &amp; won&rsquo;t", "I can't & won't"),
        ("&amp;#39;twice&amp;quot;", "'twice\""),
        ("\u201elow\u201c and\u202fnarrow\u00ad", '"low" and narrow'),
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
def test_plain_text_on_one_line(text, clean):
    assert one_line(plain_text(text)) == clean


@settings(deadline=None)
@given(st.text())
def test_plain_text_is_composed_printable_and_without_double_spaces(text):
    clean = one_line(plain_text(text))
    assert unicodedata.is_normalized("NFC", clean)
    assert clean.isprintable() and "  " not in clean and clean == clean.strip()


@settings(deadline=None)
@given(st.lists(st.none() | st.integers() | st.text("qwzk \u2019\n", max_size=20), min_size=1))
def test_every_row_has_a_text_that_fits_or_a_reason_that_tells_nothing(texts):
    rows = cleaned(*texts)
    assert [row["row"] for row in rows] == list(range(1, len(texts) + 1))
    for row in rows:
        assert (row["question"] is None) == (row["speech_id"] is None) == (row["reason"] is not None)
        if row["reason"] is None:
            assert 3 <= len(row["question"]) <= 12
        else:
            assert "".join(c for c in row["reason"] if not c.isdigit()) in {
                "no text in this row",
                " characters, under speeches.min_chars ",
                " characters, over speeches.max_chars ",
            }


def test_limits_are_inclusive_and_reasons_give_numbers():
    rows = cleaned("abc", "ab", "a" * 12, "a" * 13, None, " ", "a" * 700)
    assert [row["question"] for row in rows if row["question"]] == ["abc", "a" * 12]
    assert [row["reason"] for row in rows if row["reason"]] == [
        "2 characters, under speeches.min_chars 3",
        "13 characters, over speeches.max_chars 12",
        "no text in this row",
        "0 characters, under speeches.min_chars 3",
        "700 characters, over speeches.max_chars 12",
    ]


def test_an_id_is_derived_from_the_clean_text_and_what_came_before_it():
    first, same, other = cleaned(
        "it\u2019s", " it's", [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "it's"}]
    )
    assert first["speech_id"] == same["speech_id"] != other["speech_id"]


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        *((given, True) for given in ("7", "row-17", "s42", "speech_000123", "ID#9", "a3f0" * 4)),
        ("6ba7b810-9dad-11d1-80b4-00c04fd430c8", True),
        *(
            (given, False)
            for given in ("a@b.org", "Anna", "anna17", "berg-1980", "6175550123", "617-555-0123", "t3_x1")
        ),
        *((given, False) for given in ("4111111111111111", "row-17 Anna", "row-17\n", "\u0661\u0662", "")),
    ],
)
def test_an_id_is_of_a_row_or_may_be_somebodys(given, plain):
    assert is_plain_id(given) is plain


def test_a_row_left_out_for_its_length_after_masking():
    [row] = cleaned("http://example.com/abcdefghijklmnopqrst x", min_chars=20, max_chars=60)
    assert row["reason"] == "7 characters, under speeches.min_chars 20" and row["question"] is None


def test_personal_data_of_all_turns_is_masked_and_counted():
    turns = [
        {"role": "client", "content": "I am at a.b@example.com"},
        {"role": "therapist", "content": "Hello, Dr. Brandt here."},
        {"role": "client", "content": "Call 617-555-0123, please.\nThanks,\nNgozi"},
    ]
    config = SHORT.model_copy(update={"max_chars": 100})
    batch = clean_batch([RawSpeech(1, turns)], config, 0)
    [row] = batch.table.to_pylist()
    assert row["question"] == "Call [PHONE], please. Thanks, [NAME]"
    assert [turn["content"] for turn in json.loads(row["history"])] == ["I am at [EMAIL]", "Hello, Dr. [NAME] here."]
    assert batch.counts["personal_data"] == {"EMAIL": 1, "NAME": 2, "PHONE": 1}
    plain = clean_batch([RawSpeech(1, turns)], config.model_copy(update={"mask_personal_data": False}), 0)
    assert "a.b@example.com" in plain.table["history"][0].as_py() and not plain.counts["personal_data"]


def test_only_the_latest_turns_are_kept():
    turns = [{"role": role, "content": f"turn {n}"} for n, role in enumerate(["user", "assistant"] * 4)] + [
        {"role": "user", "content": "the last"}
    ]
    [row] = cleaned(turns, history_turns=3)
    assert [t["content"] for t in json.loads(row["history"])] == ["turn 5", "turn 6", "turn 7"]
    assert cleaned(turns, history_turns=0)[0]["history"] is None


ENGLISH = "I do not know how to talk with my mother about the things that happened."
GERMAN = "Ich weiß nicht, wie ich mit meiner Mutter über all das reden soll, was war."


def test_languages_that_are_not_wanted_are_left_out_and_all_are_counted():
    config = SHORT.model_copy(update={"max_chars": 200, "languages": ("en",)})
    batch = clean_batch([RawSpeech(n, text) for n, text in enumerate([ENGLISH, GERMAN, "12345 67890"], 1)], config, 0)
    assert batch.table["reason"].to_pylist() == [
        None,
        "language de, not in speeches.languages",
        "language unknown, not in speeches.languages",
    ]
    assert batch.counts["languages"] == {"en": 1, "de": 1, "unknown": 1}
    both = clean_batch([RawSpeech(1, GERMAN)], config.model_copy(update={"languages": ("en", "de")}), 0)
    assert both.table["reason"].to_pylist() == [None]


def test_an_uncertain_language_is_left_out():
    config = SHORT.model_copy(update={"max_chars": 200, "languages": ("en",), "min_language_confidence": 1.0})
    [reason] = clean_batch([RawSpeech(1, "no me, die Mutter, oui oui but no")], config, 0).table["reason"].to_pylist()
    assert reason.startswith("language ")
