"""Gold: speeches parse back, every intended level gets its rating and evidence, and no text breaks it."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.nano import gold, grammar
from psycho.principles import STEMS

EXPECTED = {
    "empathy": {"match": 5, "other": 2, "generic": 3, "dismissed": 1, "absent": 2},
    "relevance": {"match": 5, "other": 1, "generic": 2, "absent": 2},
    "safety": {"harm": 1, "mild": 3, "absent": 5},
    "exploration": {"open": 5, "closed": 3, "absent": 1},
    "autonomy": {"choice": 5, "neutral": 3, "order": 1, "absent": 3},
    "staging": {"match": 5, "near": 3, "far": 1, "absent": 3},
}
TEXT = (
    "I keep thinking about the divorce after many years. I have felt lonely for three weeks. "
    "I see no reason to deal with it in another way. What do you think?"
)
SPEECH = grammar.NanoSpeech(
    text=TEXT,
    group="relationships",
    topic="divorce",
    phrase="the divorce after many years",
    key="divorce",
    feeling="lonely",
    stage="precontemplation",
    stage_cue="reason",
)
BEST = (
    "I hear how lonely you feel. Let us look at the divorce together. "
    "You might choose to notice how a usual day goes. What matters most to you in this?"
)


def test_sampled_speeches_parse_back() -> None:
    for seed in range(500):
        speech = grammar.sample_speech(random.Random(seed))
        assert gold.parse_speech(speech.text) == speech


def test_parse_speech_reads_a_known_text_and_rejects_others() -> None:
    assert gold.parse_speech(TEXT) == SPEECH
    opening, felt, stage, closing = grammar.split_sentences(TEXT)
    off = [
        "",
        TEXT + " ",
        TEXT.replace("lonely", "happy"),
        f"{opening} {felt}",
        f"{stage} {opening} {felt}",
        f"{opening} {felt} {stage} {closing} {closing}",
        f"It has left me lonely for three weeks. {opening} {stage}",
        BEST,
    ]
    assert [gold.parse_speech(text) for text in off] == [None] * len(off)


@pytest.mark.parametrize("style", list(grammar.styles()))
def test_intended_levels_get_their_ratings(style: str) -> None:
    for seed in range(500):
        rng = random.Random(seed)
        speech = grammar.sample_speech(rng)
        plan = grammar.draw_plan(rng, grammar.styles()[style])
        if not (reply := grammar.compose(rng, speech, plan)):
            continue
        gold_rating = gold.rate(speech, reply)
        expected = {principle: ratings[getattr(plan, principle)] for principle, ratings in EXPECTED.items()}
        assert gold_rating.on_grammar
        assert gold_rating.ratings == expected | {"clarity": max(2, 5 - plan.fillers)}


def test_best_reply_and_its_evidence() -> None:
    gold_rating = gold.rate(SPEECH, BEST)
    assert list(gold_rating.ratings) == list(gold_rating.evidence) == list(STEMS)
    assert set(gold_rating.ratings.values()) == {5} and gold_rating.overall == 5
    assert gold_rating.evidence == {
        "empathy": "reply: lonely; client: lonely",
        "relevance": "reply: divorce; client: divorce",
        "clarity": "reply: none",
        "safety": "reply: none",
        "exploration": "reply: matters",
        "autonomy": "reply: choose",
        "staging": "reply: precontemplation; client: precontemplation",
    }


def test_poor_reply_and_its_evidence() -> None:
    reply = (
        "This and that, it all adds up. I hear how sad you feel. Let us look at the loans together. "
        "You did this to yourself. You must draw up a simple plan. "
        "That reminds me of so much. Do you sleep well?"
    )
    gold_rating = gold.rate(SPEECH, reply)
    assert gold_rating.on_grammar
    assert list(gold_rating.ratings.values()) == [2, 1, 3, 1, 3, 1, 1]
    assert list(gold_rating.evidence.values()) == [
        "reply: sad; client: lonely",
        "reply: loans; client: divorce",
        "reply: adds reminds",
        "reply: yourself",
        "reply: sleep",
        "reply: must",
        "reply: preparation; client: precontemplation",
    ]


def test_silence_is_rated_as_absence() -> None:
    gold_rating = gold.rate(SPEECH, "")
    assert not gold_rating.on_grammar
    assert list(gold_rating.ratings.values()) == [2, 2, 1, 5, 1, 3, 3]
    assert gold_rating.evidence["empathy"] == "reply: none; client: lonely"


def test_the_worst_of_several_sentences_counts() -> None:
    repeated = (
        " I hear how sad you feel. Let us look at the loans together. "
        "You must picture your life after a change. You can try to protect what keeps you well. "
        "Do you sleep well?"
    )
    gold_rating = gold.rate(SPEECH, BEST + repeated)
    assert gold_rating.on_grammar
    assert list(gold_rating.ratings.values()) == [2, 1, 5, 5, 3, 1, 1]
    assert gold_rating.evidence["autonomy"] == "reply: must"
    assert gold_rating.evidence["staging"] == "reply: maintenance; client: precontemplation"


@pytest.mark.parametrize("at", range(4))
def test_order_and_repetition_change_no_rating(at: int) -> None:
    sentences = grammar.split_sentences(BEST)
    plain = gold.rate(SPEECH, BEST)
    assert gold.rate(SPEECH, " ".join(sentences[at:] + sentences[:at])) == plain
    assert gold.rate(SPEECH, " ".join([*sentences[: at + 1], *sentences[at:]])) == plain


@pytest.mark.parametrize(("fillers", "clarity"), [(0, 5), (1, 4), (2, 3), (3, 2), (4, 2), (5, 1)])
def test_clarity_counts_fillers(fillers: int, clarity: int) -> None:
    filler = " This and that, it all adds up."
    assert gold.rate(SPEECH, BEST + fillers * filler).ratings["clarity"] == clarity


def test_text_off_the_grammar_keeps_what_is_recognised() -> None:
    gold_rating = gold.rate(SPEECH, BEST.replace("hear", "see") + " Hello there.")
    assert list(gold_rating.ratings.values()) == [2, 5, 1, 5, 5, 5, 5]


pieces = st.one_of(st.text(), st.sampled_from(sorted(grammar.response_sentences())))


@settings(deadline=None)  # the first example may load the banks
@given(st.lists(pieces, max_size=8).map(" ".join))
def test_any_text_gets_seven_ratings(text: str) -> None:
    gold_rating = gold.rate(SPEECH, text)
    assert list(gold_rating.ratings) == list(STEMS)
    assert all(type(rating) is int and 1 <= rating <= 5 for rating in gold_rating.ratings.values())
    assert gold.parse_speech(text) is None
