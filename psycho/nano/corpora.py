"""The training texts of the nano models, all drawn from the grammar, all by seed.

The judge learns from three kinds of text. Extractions are the shortest: a speech and the three words of it that a
rating may hang on; they bring on the circuit that copies a word, without which nothing else is learned. Drills: one
speech, several one-sentence replies, each rated on one principle with its evidence quoted; they teach to match a reply
against the speech. Full examples are what it will be asked: two replies in turn, each with all seven ratings.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from psycho.judging.rubric import answer, dump, second_turn, single_prompt
from psycho.nano import gold
from psycho.nano.grammar import NanoSpeech, corrupt, sample_response, sample_sentence, sample_speech

Row = dict[str, str]
_DRILL_REPLIES = 8
# What a one-sentence reply of each slot is rated on; matching principles are drilled most.
_DRILLS = (
    ("empathy", "empathy", 4),
    ("relevance", "relevance", 4),
    ("suggestion", "staging", 3),
    ("suggestion", "autonomy", 1),
    ("exploration", "exploration", 1),
    ("safety", "safety", 1),
    ("filler", "clarity", 2),
)
# Levels of a drill's sentence where the reply may name what the client named: a wrong name as often as the right one,
# for to tell them apart is what is hardest to learn.
_DRILL_LEVELS = {
    "empathy": ("match", "match", "match", "match", "other", "other", "other", "other", "generic", "dismissed"),
    "relevance": ("match", "match", "match", "match", "other", "other", "other", "other", "generic", "generic"),
}
_MISHEARD = 0.35  # chance that a judged reply answers another client's feeling, and another's key word


def _row(messages: list[dict[str, str]]) -> Row:
    return {"messages": json.dumps(messages)}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def policy_row(rng: random.Random, style: str) -> Row:
    """A speech and a reply of one style."""
    speech = sample_speech(rng, held_out_combinations=False)
    return _row([_turn("user", speech.text), _turn("assistant", sample_response(rng, speech, style))])


def extraction_row(rng: random.Random) -> Row:
    """A speech, and what of it a rating may hang on: feeling, key word, stage of change."""
    speech = sample_speech(rng, held_out_combinations=False)
    return _row([_turn("user", speech.text), _turn("assistant", f"{speech.feeling} {speech.key} {speech.stage}")])


def drill_row(rng: random.Random, held_out: bool = False) -> Row:
    """One speech, several one-sentence replies, each rated on one principle."""
    speech = sample_speech(rng, held_out_combinations=held_out)
    messages = []
    for number in range(_DRILL_REPLIES):
        slot, stem, _ = rng.choices(_DRILLS, weights=[weight for *_, weight in _DRILLS])[0]
        sentence = _fillers(rng, speech) if slot == "filler" else _drill_sentence(rng, speech, slot)
        rated = gold.rate(speech, sentence)
        lead = speech.text if number == 0 else ""  # later replies answer the same speech
        entry = {stem: {"evidence": rated.evidence[stem], "rating": rated.ratings[stem]}}
        messages += [_turn("user", f"{lead}\nReply: {sentence}"), _turn("assistant", dump(entry)[1:-1])]
    return _row(messages)


def _drill_sentence(rng: random.Random, speech: NanoSpeech, slot: str) -> str:
    level = rng.choice(_DRILL_LEVELS[slot]) if slot in _DRILL_LEVELS else None
    return sample_sentence(rng, speech, slot, level)


def _fillers(rng: random.Random, speech: NanoSpeech) -> str:
    """One to three fillers around a sentence of another slot."""
    sentences = [sample_sentence(rng, speech, "filler") for _ in range(rng.randint(0, 3))]
    sentences.insert(
        rng.randint(0, len(sentences)), sample_sentence(rng, speech, rng.choice(("empathy", "exploration")))
    )
    return " ".join(sentences)


def _misheard(rng: random.Random, speech: NanoSpeech) -> NanoSpeech:
    """The speech as a poor listener heard it. Without such replies "what the reply names" is always what the client
    named, and a judge learns to quote the client twice."""
    other = sample_speech(rng)
    feeling = other.feeling if rng.random() < _MISHEARD else speech.feeling
    key = other.key if rng.random() < _MISHEARD else speech.key
    return replace(speech, feeling=feeling, key=key)


def judged_reply(rng: random.Random, speech: NanoSpeech, corrupted_share: float) -> tuple[str, dict[str, Any]]:
    """A reply of any quality, sometimes corrupted, and the answer a perfect judge gives."""
    style = rng.choice(("any", "any", "base", "good", "rambling"))
    reply = sample_response(rng, _misheard(rng, speech), style)
    if rng.random() < corrupted_share:
        reply = corrupt(rng, reply)
    rated = gold.rate(speech, reply)
    return reply, answer(rated.ratings, rated.evidence)


def rated_row(rng: random.Random) -> Row:
    """Two replies to one speech, one after the other, each with its seven ratings.

    The first turn is how a judge is asked for one reply, both turns are how it compares two (`rubric.second_turn`).
    """
    speech = sample_speech(rng, held_out_combinations=False)
    first, first_rated = judged_reply(rng, speech, 0.0)
    second, second_rated = judged_reply(rng, speech, 0.0)
    messages = [*single_prompt(speech.text, first, "compact"), _turn("assistant", dump(first_rated))]
    messages += [second_turn(second), _turn("assistant", dump(second_rated))]
    return _row(messages)


def backbone_rows(seed: int, steps: int, batch: int) -> Iterator[Row]:
    """Of sixteen rows three extractions, eight drills and five of language, drawn anew each time."""
    rng = random.Random(seed)
    for _ in range(steps * batch):
        kind = rng.random() * 16
        if kind < 3:
            yield extraction_row(rng)
        elif kind < 11:
            yield drill_row(rng)
        else:
            yield policy_row(rng, "good" if kind < 14.5 else "any")


def judge_rows(seed: int, steps: int, batch: int) -> Iterator[Row]:
    """First drills only, then mostly full examples."""
    rng = random.Random(seed)
    drills_only = int(steps * 0.15) * batch
    for index in range(steps * batch):
        if index < drills_only or rng.random() < 0.15:
            yield drill_row(rng)
        else:
            yield rated_row(rng)


def style_rows(seed: int, style: str, steps: int, batch: int) -> Iterator[Row]:
    """Speeches and replies of one style."""
    rng = random.Random(seed)
    for _ in range(steps * batch):
        yield policy_row(rng, style)
