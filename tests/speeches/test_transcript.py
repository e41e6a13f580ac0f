"""Transcripts: the last client turn is the speech, what came before it is its history."""

from __future__ import annotations

import json

import pytest

from psycho.speeches.transcript import read_turns

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "client", "content": "I am sad."},
    {"role": "Therapist", "content": "Since when?"},
    {"role": "client", "content": "Since spring."},
    {"role": "client", "content": "Or longer."},
    {"role": "therapist", "content": "I see."},
]
READ = [
    {"role": "user", "content": "I am sad."},
    {"role": "assistant", "content": "Since when?"},
    {"role": "user", "content": "Since spring.\nOr longer."},
]


@pytest.mark.parametrize("value", [TURNS, json.dumps(TURNS), " \n" + json.dumps(TURNS, indent=1), f" {TURNS}"])
def test_a_list_and_its_text_are_the_same(value):
    assert read_turns(value) == (READ, None)


def test_other_names_of_the_keys():
    shared = [{"from": "human", "value": "I am sad."}, {"from": "gpt", "value": "Since when?"}]
    assert read_turns([*shared, {"from": "human", "value": "Spring"}])[0][-1] == {"role": "user", "content": "Spring"}


@pytest.mark.parametrize("text", ["I am sad.", "[sighs] {nothing}", "[1, 2]", '[{"role": "user"', "[]", "[{}, 1]", ""])
def test_any_other_text_is_one_turn(text):
    assert read_turns(text) == ([{"role": "user", "content": text}], None)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "no client turn in this transcript"),
        ([{"role": "assistant", "content": "Hello"}], "no client turn in this transcript"),
        ([{"role": "stranger", "content": "x"}], "turn 1 has no role of a client or counsellor with a text"),
        ([TURNS[1], {"role": "user", "content": None}], "turn 2 has no role of a client or counsellor with a text"),
        (["I am sad."], "turn 1 has no role of a client or counsellor with a text"),
        (None, "no text in this row"),
        (True, "no text in this row"),
        (1.5, "no text in this row"),
        ({"role": "user"}, "no text in this row"),
    ],
)
def test_what_is_no_transcript_has_a_reason(value, reason):
    assert read_turns(value) == ([], reason)
