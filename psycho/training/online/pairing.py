"""Pairs of a round, as pure functions of texts and scores.

What pairs are made by is the score less the length penalty. Scores are compared within a speech only; a sample without
a score stays out, a tie never pairs, and a response that is under the safety floor or was cut off at its most tokens is
never chosen (it may be rejected): to choose it would be to teach what it says, and to end in the middle.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from psycho.config import OnlineConfig, PairsConfig
from psycho.preferences.pairs import train_pairs
from psycho.schema import stable_id

Pair = tuple[int, int]  # places of chosen and rejected


def value(score: float | None, text: str, online: OnlineConfig) -> float | None:
    """The score that pairs are made by: less the penalty for each 100 characters over the free ones."""
    if score is None or not online.length_penalty:
        return score
    return score - online.length_penalty * max(0, len(text) - online.length_free_chars) / 100


def unsafe(samples: Sequence[Mapping[str, Any]], online: OnlineConfig) -> set[int]:
    """Places of the samples under the safety floor."""
    floor = online.safety_floor
    if floor is None:
        return set()
    return {n for n, row in enumerate(samples) if row["safety"] is not None and row["safety"] < floor}


def barred(samples: Sequence[Mapping[str, Any]], online: OnlineConfig) -> set[int]:
    """Places of the samples that are never chosen."""
    return unsafe(samples, online) | {place for place, row in enumerate(samples) if row["truncated"]}


def speech_pairs(
    texts: Sequence[str],
    values: Sequence[float | None],
    barred: Collection[int],
    online: OnlineConfig,
    seed: int,
) -> list[Pair]:
    """(chosen, rejected) places of one speech's samples by the strategy asked for; those `barred` are never chosen.

    Args:
        seed: of this speech in this round, where the strategy draws.
    """
    limit = online.max_pairs_per_speech or _unlimited(online.strategy, len(texts))
    if online.strategy == "best_worst":
        return best_against_worst(texts, values, online.min_gap, limit, barred)
    order = _order(values)
    first = next((turn for turn, place in enumerate(order) if place not in barred), len(order))
    rows = [
        {"request_id": f"{place:06d}", "response": texts[place], "overall": values[place], "safety_rating": 0}
        for place in order[first:]
    ]
    # Widest first is what `all` gives too, and then the floor comes before the limit.
    strategy = "all" if online.strategy == "top_margin" else online.strategy
    # A copy, because the bounds of the setting are those of ratings and a reward may be anything.
    settings = PairsConfig().model_copy(
        update={"strategy": strategy, "min_gap": online.min_gap, "max_safety_loss": None, "max_pairs_per_speech": None}
    )
    found, _ = train_pairs(rows, settings, seed)
    places = [(int(chosen["request_id"]), int(rejected["request_id"])) for chosen, rejected in found]
    return [pair for pair in places if pair[0] not in barred][:limit]


def most_pairs(online: OnlineConfig) -> int:
    """The pairs that a speech can give."""
    k = online.samples_per_speech
    limit = online.max_pairs_per_speech
    return min(limit or k * k, _unlimited("all" if limit and online.strategy == "top_margin" else online.strategy, k))


def _unlimited(strategy: str, samples: int) -> int:
    """The pairs that a strategy makes of so many samples where nothing limits it; the widest alone is one."""
    return {"best_worst": samples // 2, "all": samples * (samples - 1) // 2}.get(strategy, 1)


def best_against_worst(
    texts: Sequence[str],
    values: Sequence[float | None],
    min_gap: float,
    limit: int,
    barred: Collection[int] = (),
) -> list[Pair]:
    """(best, worst) places of one speech's samples, then second best against second worst, up to `limit`.

    A pair needs a gap above zero, of at least `min_gap`, and two different texts; samples without a score stay out,
    and those `barred` are no best.
    """
    order = _order(values)
    free = [place for place in order if place not in barred]
    pairs = []
    for best, worst in list(zip(free, reversed(order), strict=False))[: min(limit, len(order) // 2)]:
        gap = (values[best] or 0.0) - (values[worst] or 0.0)
        if gap > 0 and gap >= min_gap and texts[best] != texts[worst]:
            pairs.append((best, worst))
    return pairs


def _order(values: Sequence[float | None]) -> list[int]:
    """Places of the samples that have a value, best first; the earlier sample wins a tie."""
    return sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: (-(values[i] or 0.0), i))


def round_speeches(speeches: Sequence[Mapping[str, str]], online: OnlineConfig, seed: int, number: int) -> list[Any]:
    """The speeches of one round, drawn without replacement by seed and round."""
    order = sorted(speeches, key=lambda speech: stable_id("round", seed, number, speech["speech_id"]))
    return list(order[: online.speeches_per_round])
