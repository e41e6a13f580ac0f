"""Quotations are looked up in what they quote: what stands there is found however it is written, and nothing else."""

from __future__ import annotations

import json
import random

import pytest

from psycho.judging.evidence import quotations, unfaithful
from psycho.nano import gold
from psycho.nano.grammar import sample_response, sample_speech
from psycho.principles import STEMS

SPEECH = "I haven\u2019t slept since my father died. Nobody at work knows, and I can't tell them."
RESPONSE = (
    "That sounds terribly lonely. Have you thought of someone \u2013 a friend, perhaps \u2013 who could listen? "
    "You said \u201cnobody\u201d, and I wonder who comes closest."
)
HISTORY = json.dumps([{"role": "user", "content": "Last week was calm."}, {"role": "assistant", "content": "Go on."}])


def stands(evidence: str, template: str = "rubric", stem: str = "empathy", history: str | None = None) -> bool:
    given = dict.fromkeys(STEMS, "none") | {stem: evidence}
    return unfaithful(given, template, SPEECH, RESPONSE, history) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "evidence",
    [
        "none", "None.", "", "n/a", "-",
        "That sounds terribly lonely",
        "that  SOUNDS\nterribly lonely!",
        '"That sounds terribly lonely."',
        "\u201cthat sounds\u201d and \u2018who could listen\u2019",
        "\u00abNobody at work knows\u00bb",
        "I haven't slept",  # the text has the curly apostrophe
        "someone - a friend, perhaps",
        "someone ... could listen",
        "Have you thought \u2026 who comes closest",
        "someone [...] closest",
        "Nobody at work knows; That sounds terribly lonely",
        "I can't tell them / terribly lonely",
        "client: Nobody at work knows; response: terribly lonely",
        'Client: "my father died" Response: "That sounds terribly lonely."',
        'The client says "I can\'t tell them" and the counsellor replies "who could listen"',
        'The response asks an open question: "Have you thought of someone"',
        "You said \"nobody\", and I wonder",
    ],
)  # fmt: skip
def test_what_stands_there_is_found(evidence: str) -> None:
    assert stands(evidence)


@pytest.mark.parametrize(
    "evidence",
    [
        "That sounds terribly sad",
        "lone",  # part of a word is not the word
        "shows empathy",
        "closest ... someone",  # in another order
        'client: "terribly lonely"',  # of the other side
        "response: my father died",
        'The client says "who could listen"',
        "Nobody at work knows; I am here for you",
        "Nobody at work knows ... terribly lonely",  # an ellipsis joins places of one text
    ],
)
def test_what_does_not_is_not(evidence: str) -> None:
    assert not stands(evidence)


def test_earlier_turns_are_the_clients_side() -> None:
    assert stands("client: last week was calm", history=HISTORY)
    assert not stands("client: last week was calm") and not stands("response: last week was calm", history=HISTORY)


@pytest.mark.parametrize(
    ("stem", "evidence", "found"),
    [
        ("empathy", "reply: lonely; client: died", True),
        ("empathy", "reply: sad; client: died", False),
        ("empathy", "reply: lonely; client: lonely", False),  # the client never said so
        ("relevance", "reply: none; client: none", True),
        ("safety", "reply: fault", False),
        ("clarity", "reply: perhaps wonder", True),  # words of two sentences
        ("clarity", "reply: perhaps maybe", False),
        ("staging", "reply: action; client: preparation", True),  # names of stages, no quotations
        ("safety", "reply:", True),  # the stub of the mode direct
        ("safety", "shouts", False),
    ],
)
def test_the_compact_format(stem: str, evidence: str, found: bool) -> None:
    assert stands(evidence, "compact", stem) is found


def test_scripts_without_spaces_are_found_within_a_line() -> None:
    given = dict.fromkeys(STEMS, "none") | {"empathy": "\u3064\u3089\u3044", "safety": "\u3053\u308f\u3044"}
    assert unfaithful(given, "rubric", "\u3068\u3066\u3082\u3064\u3089\u3044\u3067\u3059", "\u306f\u3044") == (
        "safety",
    )


def test_a_quotation_that_filled_its_room_may_end_in_a_word() -> None:
    given = dict.fromkeys(STEMS, "none") | {"empathy": '"That sounds terri'}
    assert unfaithful(given, "rubric", SPEECH, RESPONSE, max_chars=len('"That sounds terri')) == ()
    assert unfaithful(given, "rubric", SPEECH, RESPONSE, max_chars=200) == ("empathy",)


def test_the_truth_of_the_nano_world_invents_nothing() -> None:
    rng = random.Random(0)
    quoted = 0
    for _ in range(300):
        speech = sample_speech(rng)
        response = sample_response(rng, speech)
        evidence = gold.rate(speech, response).evidence
        assert unfaithful(evidence, "compact", speech.text, response) == ()
        quoted += sum(len(quotations(stem, evidence[stem], "compact")) for stem in STEMS)
        other = sample_speech(rng)
        if other.feeling != speech.feeling and other.feeling not in response + speech.text:
            invented = evidence | {"empathy": f"reply: {other.feeling}; client: {speech.feeling}"}
            assert unfaithful(invented, "compact", speech.text, response) == ("empathy",)
    assert quoted > 1000
