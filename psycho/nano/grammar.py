"""The grammar of the nano world: samples client speeches and replies whose ratings are known by construction.

Every sentence comes from the YAML banks next to this file and means one thing: a feeling named, an order
given, a filler. The banks are so small that every sentence they can produce is listed once: to read text is
to look it up. A reply's quality q in [0, 1] sets the chances of its levels, so the mean rating rises with q.
"""

import functools
import hashlib
import importlib.resources
import json
import random
import re
import string
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

STAGES = ("precontemplation", "contemplation", "preparation", "action", "maintenance")
SLOTS = ("empathy", "relevance", "safety", "suggestion", "exploration")  # in the order of a reply
MAX_FILLERS = 4


@dataclass(frozen=True)
class Situation:
    """What a client talks about: `phrase` in the speech, `key` the one word of it that a reply echoes."""

    group: str
    topic: str
    phrase: str
    key: str


@dataclass(frozen=True)
class NanoSpeech:
    """A client speech and the slots it was made from."""

    text: str
    group: str
    topic: str
    phrase: str
    key: str
    feeling: str
    stage: str
    stage_cue: str


@dataclass(frozen=True)
class Style:
    """How a kind of counsellor writes; the fields are explained on top of `banks/styles.yaml`."""

    quality: tuple[float, float]
    filler: float
    bias: Mapping[str, float] = field(default_factory=dict)
    skip: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The level of every slot of a reply; "absent" leaves the sentence out (a suggestion has two levels)."""

    empathy: str
    relevance: str
    safety: str
    autonomy: str
    staging: str
    exploration: str
    fillers: int


@dataclass(frozen=True)
class ResponseSentence:
    """What a sentence of a reply says; `cue` is the feeling or key it names, else its cue word."""

    slot: str
    level: str
    cue: str
    stage: str = ""
    activity_cue: str = ""


@functools.lru_cache
def load_bank(name: str) -> Any:
    """The parsed `banks/{name}.yaml`; read once and shared, so callers must not change it."""
    source = importlib.resources.files(__package__) / "banks" / f"{name}.yaml"
    return yaml.safe_load(source.read_text(encoding="utf-8"))


@functools.lru_cache
def bank_digest() -> str:
    """A hash of all that the banks say, in 16 hexadecimal digits."""
    banks = [load_bank(name) for name in ("topics", "feelings", "speeches", "responses", "styles")]
    return hashlib.sha256(json.dumps(banks).encode()).hexdigest()[:16]


@functools.lru_cache
def situations() -> tuple[Situation, ...]:
    """All situations, in the order of the bank."""
    return tuple(
        Situation(group, topic, **entry)
        for group, topics in load_bank("topics").items()
        for topic, entries in topics.items()
        for entry in entries
    )


@functools.lru_cache
def feelings() -> tuple[str, ...]:
    """All feelings, in the order of the bank."""
    return tuple(load_bank("feelings"))


@functools.lru_cache
def styles() -> dict[str, Style]:
    """The named styles."""
    return {name: Style(**settings) for name, settings in load_bank("styles")["styles"].items()}


def held_out(key: str, feeling: str) -> bool:
    """Whether training data must never combine the two: a stable hash picks about one combination in five."""
    return zlib.crc32(f"{key} {feeling}".encode()) % 5 == 0


def sample_speech(rng: random.Random, *, held_out_combinations: bool | None = None) -> NanoSpeech:
    """A random speech; True asks for a held-out combination of key and feeling, False for any other."""
    while True:
        situation, feeling = rng.choice(situations()), rng.choice(feelings())
        if held_out_combinations in (None, held_out(situation.key, feeling)):
            break
    bank = load_bank("speeches")
    opening = rng.choice(bank["opening"]).format(phrase=situation.phrase)
    template = rng.choice(bank["feeling"])
    felt = template["text"].format(feeling=feeling, duration=rng.choice(bank["durations"]))
    stage = rng.choice(STAGES)
    change = rng.choice(bank["stage"][stage])
    start = [felt, opening] if template["lead"] and rng.random() < 0.5 else [opening, felt]
    closing = [rng.choice(bank["closing"])] if rng.random() < 0.5 else []
    text = " ".join([*start, change["text"], *closing])
    return NanoSpeech(text, **vars(situation), feeling=feeling, stage=stage, stage_cue=change["cue"])


def draw_plan(rng: random.Random, style: Style) -> Plan:
    """Draws a quality q from the style's range, then every slot's level given q."""
    q = rng.uniform(*style.quality)

    def draw(slot: str) -> str:
        if rng.random() < style.skip.get(slot, 0):
            return "absent"
        quality = min(1.0, max(0.0, q + style.bias.get(slot, 0)))
        chances = load_bank("styles")["levels"][slot]
        weights = [(1 - quality) * low + quality * high for low, high in chances.values()]
        return rng.choices(list(chances), weights)[0]

    levels = {slot: draw(slot) for slot in load_bank("styles")["levels"]}
    if levels.pop("suggestion") == "absent":
        levels |= {"autonomy": "absent", "staging": "absent"}
    fillers = sum(rng.random() < style.filler * (1 - q) for _ in range(MAX_FILLERS))
    return Plan(**levels, fillers=fillers)


def compose(rng: random.Random, speech: NanoSpeech, plan: Plan) -> str:
    """A reply with exactly the levels of the plan, its fillers at random places; a plan may be empty."""
    sentences = []
    for slot in SLOTS:
        if slot == "suggestion" and plan.autonomy != "absent":
            sentences.append(_suggestion(rng, speech, plan.autonomy, plan.staging))
        elif slot != "suggestion" and (level := getattr(plan, slot)) != "absent":
            sentences.append(sample_sentence(rng, speech, slot, level))
    for filler in rng.sample(load_bank("responses")["filler"]["filler"], plan.fillers):
        sentences.insert(rng.randint(0, len(sentences)), filler["text"])
    return " ".join(sentences)


def sample_response(rng: random.Random, speech: NanoSpeech, style: str | Style = "any") -> str:
    """A reply on the grammar, never empty. Raises KeyError for a style that does not exist."""
    settings = styles()[style] if isinstance(style, str) else style
    while not (reply := compose(rng, speech, draw_plan(rng, settings))):
        pass
    return reply


def sample_sentence(rng: random.Random, speech: NanoSpeech, slot: str, level: str | None = None) -> str:
    """One sentence of a slot (one of `SLOTS`, or "filler") at a level of its bank.

    Empathy and relevance also know "match" and "other" (a wrong name). A suggestion takes a frame ("choice",
    "neutral", "order") or a fit to the client's stage ("match", "near", "far") and draws the other half.
    Without a level, or as "named", about half the sentences match the client where the slot can match.
    """
    bank = load_bank("responses")
    if slot == "suggestion":
        is_frame = level in bank[slot]
        frame = level if is_frame else rng.choice(list(bank[slot]))
        fit = level if level and not is_frame else rng.choice(("match", "match", "near", "far"))
        return _suggestion(rng, speech, str(frame), fit)
    if level is None and "named" in bank[slot]:
        level = rng.choice(("match", rng.choice(list(bank[slot])).replace("named", "other")))
    if level == "named":
        level = rng.choice(("match", "other"))
    if level not in ("match", "other"):
        return rng.choice(bank[slot][level or rng.choice(list(bank[slot]))])["text"]
    own = speech.feeling if slot == "empathy" else speech.key
    name = own if level == "match" else rng.choice([name for name in _names(slot) if name != own])
    return rng.choice(bank[slot]["named"])["text"].format(feeling=name, key=name)


def _suggestion(rng: random.Random, speech: NanoSpeech, frame: str, fit: str) -> str:
    bank = load_bank("responses")
    stage = rng.choice([stage for stage in STAGES if stage_fit(speech.stage, stage) == fit])
    activity = rng.choice(bank["activity"][stage])["text"]
    return rng.choice(bank["suggestion"][frame])["text"].format(activity=activity)


def _names(slot: str) -> list[str]:
    return list(feelings()) if slot == "empathy" else [situation.key for situation in situations()]


def stage_fit(client_stage: str, stage: str) -> str:
    """How an activity's stage fits the client's: "match", "near" (the stage before or after) or "far"."""
    return ("match", "near", "far", "far", "far")[abs(STAGES.index(client_stage) - STAGES.index(stage))]


@functools.lru_cache
def response_sentences() -> dict[str, ResponseSentence]:
    """Every sentence a reply can contain, and what it says."""
    bank, readings = load_bank("responses"), {}
    activities = [(stage, entry) for stage, entries in bank["activity"].items() for entry in entries]
    levels = [(s, level, t) for s in (*SLOTS, "filler") for level, ts in bank[s].items() for t in ts]
    for slot, level, template in levels:
        text = template["text"]
        if slot == "suggestion":
            for stage, entry in activities:
                reading = ResponseSentence(slot, level, template["cue"], stage, entry["cue"])
                readings[text.format(activity=entry["text"])] = reading
        elif level == "named":
            for name in _names(slot):
                readings[text.format(feeling=name, key=name)] = ResponseSentence(slot, level, name)
        else:
            readings[text] = ResponseSentence(slot, level, template["cue"])
    return readings


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space between them."""
    return re.split(r"(?<=[.?!])\s+", text.strip())


def read(reply: str) -> list[ResponseSentence | None]:
    """What each sentence of a reply says; None for a sentence that is not recognised."""
    return [response_sentences().get(sentence) for sentence in split_sentences(reply)]


def on_grammar(sentences: list[ResponseSentence | None]) -> bool:
    """Whether read sentences (None: not recognised) make a reply in the language of the grammar.

    Their order and number are free but for fillers: who says a thing twice says it clearly, and is rated on the worse.
    """
    fillers = sum(sentence is not None and sentence.slot == "filler" for sentence in sentences)
    return len(sentences) > 0 and None not in sentences and fillers <= MAX_FILLERS


@functools.lru_cache
def vocabulary() -> list[str]:
    """Every distinct word the grammar can produce, sorted; shared, so callers must not change it."""
    banks = [load_bank(name) for name in ("topics", "feelings", "speeches", "responses")]
    tokens = {token for text in _texts(banks) for token in re.sub(r"{\w+}", "", text).split()}
    return sorted({token.strip(string.punctuation) for token in tokens} - {""})


def _texts(bank: Any) -> Iterator[str]:
    """All text of a bank; cues and keys are words of the texts beside them."""
    if isinstance(bank, str):
        yield bank
    elif isinstance(bank, dict | list):
        for entry in bank.values() if isinstance(bank, dict) else bank:
            yield from _texts(entry)


def corrupt(rng: random.Random, text: str) -> str:
    """The text with one to three words swapped, dropped, doubled or replaced; never on the grammar."""
    while True:
        damaged = text
        for _ in range(rng.randint(1, 3)):
            damaged = _edit(rng, damaged)
        if damaged != text and not on_grammar(read(damaged)):
            return damaged


def _edit(rng: random.Random, text: str) -> str:
    """One edit inside one sentence; its end mark stays where it is."""
    sentences = [sentence.split() for sentence in split_sentences(text)]
    chosen = rng.choice(sentences)
    if not chosen:
        return rng.choice(vocabulary())
    end = chosen[-1][len(chosen[-1].rstrip(".?!")) :]
    chosen[-1] = chosen[-1].removesuffix(end)
    at, edit = rng.randrange(len(chosen)), rng.choice(("swap", "drop", "double", "replace"))
    if edit == "swap" and len(chosen) > 1:
        chosen[at - 1], chosen[at] = chosen[at], chosen[at - 1]
    elif edit == "drop" and len(chosen) > 1:
        del chosen[at]
    elif edit == "double":
        chosen.insert(at, chosen[at])
    else:
        chosen[at] = rng.choice(vocabulary())
    chosen[-1] += end
    return " ".join(word for sentence in sentences for word in sentence)
