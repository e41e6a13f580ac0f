"""Which model answers which speech: one request row per (speech, model, sample), each with an id and a seed.

The draw depends on the run's seed and the speech's id alone, so the same run twice asks for the same rows on any
number of shards, and a longer list of speeches leaves the earlier draws as they were. Speeches whose ids end in a
number (`row-17`) are dealt in rounds, as cards are: over a round of n consecutive numbers every model comes up as
often as its weight says. Ids without order (hashes of the text) are rounds of their own: independent draws.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from psycho.schema import stable_id, stable_seed


def draw_models(speech_id: str, pool: Mapping[str, float] | Sequence[str], k: int, seed: int) -> list[str]:
    """k different models for one speech, each as likely as `shares` says (paper, section 3.2: all alike).

    Systematic sampling (Madow 1949): the models lie on a line of length k in random order, each as long as its share,
    and every k-th point at distance one from a random start falls on one that is drawn. The order and the start are
    the round's; the start moves on by 1/n from one number of the round to the next, so that the round is even.

    Args:
        pool: models with their weights, or names that weigh the same.
    """
    weights = dict(pool) if isinstance(pool, Mapping) else dict.fromkeys(pool, 1.0)
    names = sorted(weights)
    series, number = _place(speech_id)
    dealing = random.Random(stable_seed("round", seed, series, number // len(names)))
    dealing.shuffle(names)
    start = (dealing.random() + number % len(names) / len(names)) % 1.0
    lengths = shares(weights, k)
    ends = list(accumulate(lengths[name] for name in names))
    drawn: list[str] = []
    end = 0
    for point in range(k):
        while end < len(names) - 1 and ends[end] <= start + point:
            end += 1
        drawn.append(names[end])
        end += 1
    random.Random(stable_seed("models", seed, speech_id)).shuffle(drawn)
    return drawn


def shares(weights: Mapping[str, float], k: int) -> dict[str, float]:
    """The chance of each model to be among the k: in proportion to its weight, and at most 1."""
    certain: set[str] = set()
    while True:
        free = k - len(certain)
        left = sum(weight for name, weight in weights.items() if name not in certain)
        found = {name: 1.0 if name in certain else weight * free / left for name, weight in weights.items()}
        over = {name for name, share in found.items() if share > 1 + 1e-12}
        if not over:
            return found
        certain |= over


def _place(speech_id: str) -> tuple[str, int]:
    """The series that an id belongs to and its number in it."""
    found = re.fullmatch(r"(.*?)(\d{1,18})", speech_id, re.DOTALL | re.ASCII)
    return (found[1], int(found[2])) if found else (speech_id, 0)


def request_row(
    speech: Mapping[str, Any], model: str, sample: int, seed: int, system_prompt: str | None
) -> dict[str, Any]:
    """One request of `schema.REQUEST`."""
    return {
        "request_id": stable_id("request", seed, speech["speech_id"], model, sample),
        "speech_id": speech["speech_id"],
        "split": speech["split"],
        "model": model,
        "sample": sample,
        "seed": stable_seed("sample", seed, speech["speech_id"], model, sample),
        "messages": json.dumps(prompt(speech, system_prompt), ensure_ascii=False),
    }


def prompt(speech: Mapping[str, Any], system_prompt: str | None) -> list[dict[str, str]]:
    """The messages a policy answers: `question`, after the earlier turns (`history`, JSON) where there are any."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    history = json.loads(speech.get("history") or "[]")
    return [*system, *history, {"role": "user", "content": speech["question"]}]
