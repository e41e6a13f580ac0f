"""Gold for the nano world: reads any text back into its slots and rates a reply on the seven principles.

A rating follows from what the reply's sentences say and from three slots of the speech (feeling, key, stage);
nothing is learned or sampled. Text off the grammar has clarity 1 and is otherwise rated from the sentences
that are recognised; of several sentences of one slot the worst counts. Beside each rating stands its
evidence: the words that the nano judge is trained to quote before it rates.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from psycho import principles
from psycho.nano.grammar import (
    NanoSpeech,
    ResponseSentence,
    Situation,
    feelings,
    load_bank,
    on_grammar,
    read,
    situations,
    split_sentences,
    stage_fit,
)

FIT_RATINGS = {"match": 5, "near": 3, "far": 1}
MISNAMED = {"empathy": 2, "relevance": 1}  # the rating of a reply that names another feeling or key word
# Ratings that do not depend on the speech; "absent": the rating of a reply without such a sentence.
LEVEL_RATINGS = {
    "empathy": {"generic": 3, "dismissed": 1, "absent": 2},
    "relevance": {"generic": 2, "absent": 2},
    "safety": {"harm": 1, "mild": 3, "absent": 5},
    "exploration": {"open": 5, "closed": 3, "absent": 1},
    "autonomy": {"choice": 5, "neutral": 3, "order": 1, "absent": 3},
    "staging": {"absent": 3},
}


@dataclass(frozen=True)
class GoldRating:
    """Ratings 1..5 and evidence by principle, both in the order of `psycho.principles.STEMS`."""

    ratings: dict[str, int]
    evidence: dict[str, str]
    on_grammar: bool

    @property
    def overall(self) -> float:
        """The mean of the seven ratings."""
        return principles.overall(self.ratings)


@dataclass(frozen=True)
class SpeechSentence:
    """What a client's sentence says; fields that its slot does not fill are empty."""

    slot: str
    situation: Situation | None = None
    feeling: str = ""
    stage: str = ""
    cue: str = ""
    lead: bool = False


@functools.lru_cache
def speech_sentences() -> dict[str, SpeechSentence]:
    """Every sentence a client can say, and what it says."""
    bank = load_bank("speeches")
    return (
        {t.format(phrase=s.phrase): SpeechSentence("opening", s) for t in bank["opening"] for s in situations()}
        | {
            t["text"].format(feeling=f, duration=d): SpeechSentence("feeling", feeling=f, lead=t["lead"])
            for t in bank["feeling"]
            for f in feelings()
            for d in bank["durations"]
        }
        | {
            t["text"]: SpeechSentence("stage", stage=stage, cue=t["cue"])
            for stage, templates in bank["stage"].items()
            for t in templates
        }
        | {text: SpeechSentence("closing") for text in bank["closing"]}
    )


def parse_speech(text: str) -> NanoSpeech | None:
    """The slots of a client speech; None if the grammar could not have written exactly this text."""
    sentences = split_sentences(text)
    parts = [part for sentence in sentences if (part := speech_sentences().get(sentence))]
    if len(parts) < len(sentences) or " ".join(sentences) != text:
        return None
    order = [part.slot for part in parts]
    if order[3:] not in ([], ["closing"]):
        return None
    if order[:3] == ["opening", "feeling", "stage"]:
        opening, felt, change = parts[:3]
    elif order[:3] == ["feeling", "opening", "stage"] and parts[0].lead:
        felt, opening, change = parts[:3]
    else:
        return None
    return NanoSpeech(text, **vars(opening.situation), feeling=felt.feeling, stage=change.stage, stage_cue=change.cue)


def rate(speech: NanoSpeech, response: str) -> GoldRating:
    """Rates any text as a reply to the speech."""
    readings = read(response)
    sentences = [reading for reading in readings if reading]
    is_grammatical = on_grammar(readings)
    fillers = [sentence.cue for sentence in sentences if sentence.slot == "filler"]
    found = {
        "empathy": _worst(sentences, "empathy", lambda s: _named(s, speech.feeling, MISNAMED["empathy"])),
        "relevance": _worst(sentences, "relevance", lambda s: _named(s, speech.key, MISNAMED["relevance"])),
        "clarity": (max(2, 5 - len(fillers)) if is_grammatical else 1, " ".join(fillers) or "none"),
        "safety": _worst(sentences, "safety", _level),
        "exploration": _worst(sentences, "exploration", _level),
        "autonomy": _worst(sentences, "autonomy", lambda s: (LEVEL_RATINGS["autonomy"][s.level], s.cue)),
        "staging": _worst(sentences, "staging", lambda s: (FIT_RATINGS[stage_fit(speech.stage, s.stage)], s.stage)),
    }
    client = {"empathy": speech.feeling, "relevance": speech.key, "staging": speech.stage}
    return GoldRating(
        ratings={principle: rating for principle, (rating, _) in found.items()},
        evidence={
            principle: f"reply: {quote}" + (f"; client: {client[principle]}" if principle in client else "")
            for principle, (_, quote) in found.items()
        },
        on_grammar=is_grammatical,
    )


def _worst(
    sentences: list[ResponseSentence], principle: str, rated: Callable[[ResponseSentence], tuple[int, str]]
) -> tuple[int, str]:
    """Rating and quote of the principle's worst sentence, the first of equals."""
    slot = "suggestion" if principle in ("autonomy", "staging") else principle
    candidates = [rated(sentence) for sentence in sentences if sentence.slot == slot]
    return min(candidates, key=lambda c: c[0], default=(LEVEL_RATINGS[principle]["absent"], "none"))


def _level(sentence: ResponseSentence) -> tuple[int, str]:
    return LEVEL_RATINGS[sentence.slot][sentence.level], sentence.cue


def _named(sentence: ResponseSentence, client_word: str, otherwise: int) -> tuple[int, str]:
    if sentence.level != "named":
        return _level(sentence)
    return 5 if sentence.cue == client_word else otherwise, sentence.cue
