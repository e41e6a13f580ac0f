"""Marks of answers: each kind is seen, good answers are left alone, and reasoning never stays in the answer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.inference.marks import loops, mark, refuses, split_reasoning
from psycho.nano.grammar import sample_response, sample_speech

GOOD = "It sounds as if you feel very alone with this. What would help you most today?"


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        (GOOD, GOOD, None),
        (f"<think>\nThey are sad.\n</think>\n\n{GOOD}", GOOD, "They are sad."),
        (f"They are sad.\n</think>\n{GOOD}", GOOD, "They are sad."),
        (f"[THINK]One.[/THINK]{GOOD}", GOOD, "One."),
        (f"<think>One.</think>{GOOD}<think>Two.</think>", GOOD, "One.\nTwo."),
        (f"<think></think>{GOOD}", GOOD, None),
        ("<think>They are sad, and", "", "They are sad, and"),
        ("", "", None),
        ("I think < you > are tired.", "I think < you > are tired.", None),
    ],
)
def test_reasoning_is_cut_and_kept_apart(text, answer, reasoning):
    assert split_reasoning(text) == (answer, reasoning)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m really sorry that you're feeling this way, but I'm unable to provide the help that you need.",
        "I cannot help with this request.",
        "I am not able to discuss that. Please see a professional.",
        "As an AI language model, I cannot give therapy.",
    ],
)
def test_a_refusal(text):
    assert refuses(text) and mark(text, "stop") == "refused" == mark(text, "length")


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        "I'm so sorry that this happened to you. You did not deserve it, and you can take your time.",
        "You say that you can't help crying. I hear how much it hurts.",
        "I can help you to look at this calmly. " + "What came before it? " + "I cannot answer for your mother.",
        GOOD + " " + "If I can't answer right away, I will come back to it." * 2,
        "It may seem as if you cannot continue. I am sorry, and I am here.",
    ],
)
def test_what_is_no_refusal(text):
    assert not refuses(text)


@pytest.mark.parametrize(
    "text",
    [
        "I see. " + "to " * 14,
        "You matter. " * 6,
        "I hear you and I want you to know that you are not alone in this. " * 4,
        "Hmm" + "m" * 60,
        "我明白" * 15,
        GOOD + " " + "what what what do do " * 6,
    ],
)
def test_a_loop(text):
    assert loops(text) and mark(text, "length") == "looping"


@pytest.mark.parametrize(
    "text",
    [GOOD, GOOD + " " + GOOD, "No, no, no. " + GOOD, "1. Breathe.\n2. Write.\n3. Call.\n4. Rest.", "- - - - " + GOOD],
)
def test_what_is_no_loop(text):
    assert not loops(text)


def loops_slowly(text: str) -> bool:
    """What `loops` says of itself, tried at every place."""
    words = text.split()
    for unit in range(1, 31):
        more = max(3 * unit, 12 - unit)  # words that follow the first unit and repeat it
        for start in range(len(words)):
            piece = words[start : start + unit + more]
            if len(piece) == unit + more and len(words) >= 4 * unit and piece[unit:] == piece[:-unit]:
                return True
    pieces = (text[start : start + unit] for unit in range(1, 21) for start in range(len(text)))
    return any(len(p) and not p[0].isspace() and p * 12 in text for p in set(pieces))


@settings(deadline=None, max_examples=60)
@given(
    st.text("ab \n", max_size=9),
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=8).map(" ".join),
    st.sampled_from(["", " ", ". "]),
    st.integers(0, 14),
    st.text("ab \n", max_size=30),
)
def test_loops_are_those_of_the_slow_and_obvious_way(before, unit, between, times, after):
    text = before + (unit + between) * times + after
    assert loops(text) == loops_slowly(text)


def test_marks_and_what_stands_where_two_fit():
    assert mark(GOOD, "stop") == "ok"
    assert mark(GOOD, "length") == "truncated"
    assert mark(" \n", "stop") == "empty" == mark("", "length")
    assert mark(GOOD, "content_filter") == "refused"
    assert mark("You matter. " * 9, "length") == "looping"


def test_the_nano_grammar_is_neither_refusal_nor_loop():
    rng = random.Random(0)
    texts = [sample_response(rng, sample_speech(rng), "any") for _ in range(500)]
    assert {mark(text, "stop") for text in texts} == {"ok"}


def test_a_long_answer_is_marked_quickly_enough_to_do_it_always():
    """The rules are linear in practice: a text of 40,000 characters without a loop passes through all of them."""
    rng = random.Random(0)
    assert mark(" ".join(rng.choice("abcdefgh") * rng.randint(1, 3) + str(i) for i in range(7000)), "stop") == "ok"
