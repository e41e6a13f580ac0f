"""Preference pairs from ratings (paper, section 3.3), as pure functions.

Train pairs are pairs of a speech's responses whose overall ratings differ by at least the gap, all of them or those a
strategy takes; a test pair is a speech's best response against its worst. Equal ratings never make a pair, and safety
is a constraint rather than a seventh of a mean: no pair prefers a response that is less safe by `max_safety_loss` (in
the published data 1.9 % of the train rows do). Every candidate is accounted for: kept, or left out with its reason.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from psycho.config import PairsConfig
from psycho.principles import STEMS
from psycho.schema import stable_id, stable_seed

Row = Mapping[str, Any]
Pair = tuple[Row, Row]  # (chosen, rejected)
Dropped = list[dict[str, Any]]
_EPSILON = 1e-9  # overall ratings are means of seven integers


def train_pairs(responses: Sequence[Row], config: PairsConfig, seed: int = 0) -> tuple[list[Pair], Dropped]:
    """(chosen, rejected) of one speech, widest gap first, and the candidates left out with their reasons."""
    eligible, dropped = [], []
    for one, other in combinations(responses, 2):
        chosen, rejected = (one, other) if one["overall"] >= other["overall"] else (other, one)
        reason = _reason(chosen, rejected, config, config.min_gap, "pairs.min_gap")
        if reason:
            dropped.append(_dropped(chosen, rejected, reason))
        else:
            eligible.append((chosen, rejected))
    eligible.sort(key=lambda pair: (pair[1]["overall"] - pair[0]["overall"], *map(_id, pair)))
    taken = _taken(_ranking(responses), eligible, config, seed)
    dropped += [_dropped(*p, f"not taken by pairs.strategy {config.strategy}") for p in eligible if p not in taken]
    limit = config.max_pairs_per_speech or len(taken)
    dropped += [_dropped(*pair, "over pairs.max_pairs_per_speech") for pair in taken[limit:]]
    return taken[:limit], dropped


def _taken(ranking: Sequence[Row], eligible: list[Pair], config: PairsConfig, seed: int) -> list[Pair]:
    """Those of the eligible pairs (widest first) that the strategy is about."""
    if config.strategy == "all" or not eligible:
        return eligible
    if config.strategy == "top_margin":
        return eligible[: config.max_pairs_per_speech or 1]
    best, worst = ranking[0], ranking[-1]
    if config.strategy == "best_worst":
        return [pair for pair in eligible if _id(pair[0]) == _id(best) and _id(pair[1]) == _id(worst)]
    of_best = [pair for pair in eligible if _id(pair[0]) == _id(best)]
    return [random.Random(stable_seed("best_random", seed, _id(best))).choice(of_best)] if of_best else []


def test_pair(responses: Sequence[Row], config: PairsConfig) -> tuple[Pair | None, Dropped]:
    """The best against the worst response of one speech; None, with a reason, where they tie."""
    if len(responses) < 2:
        return None, []
    order = _ranking(responses)
    best, worst = order[0], order[-1]
    reason = _reason(best, worst, config, config.min_test_gap, "pairs.min_test_gap")
    return (None, [_dropped(best, worst, reason)]) if reason else ((best, worst), [])


test_pair.__test__ = False  # type: ignore[attr-defined]  # the name is the paper's, not pytest's


def pair_row(speech: Row, number: int, chosen: Row, rejected: Row) -> dict[str, Any]:
    """A row of the published schema (`schema.PREFERENCE_PAIR`)."""
    row: dict[str, Any] = {
        "ID": speech["speech_id"],
        "prefID": number,
        "question": speech["question"],
        "chosen": chosen["response"],
        "rejected": rejected["response"],
        "chosen_model": chosen["model"],
        "rejected_model": rejected["model"],
        "speech_id": speech["speech_id"],
        "gap": chosen["overall"] - rejected["overall"],
        "history": speech.get("history"),
    }
    for side, source in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"{side}_{stem}_rating": source[f"{stem}_rating"] for stem in STEMS}
    return row


def gap_reason(
    gap: float | None, safety_loss: float | None, config: PairsConfig, min_gap: float, setting: str
) -> str | None:
    """Why two different texts make no pair; None where they do. What is unknown (None) keeps no pair out.

    Args:
        gap: overall rating of the chosen response less that of the rejected one.
        safety_loss: safety rating of the rejected response less that of the chosen one.
        min_gap: the gap asked for, and the `setting` that asks for it.
    """
    if gap is not None and abs(gap) <= _EPSILON:
        return "tie"
    if gap is not None and gap < min_gap - _EPSILON:
        return f"gap under {setting}"
    limit = config.max_safety_loss
    if limit is None or safety_loss is None or safety_loss < limit:
        return None
    return f"less safe by {safety_loss:g}"


def safety_loss(pair: Row) -> int | None:
    """How much less safe the chosen response is rated than the rejected one; None where that is unknown."""
    chosen, rejected = (pair[f"{side}_safety_rating"] for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else rejected - chosen


def _reason(chosen: Row, rejected: Row, config: PairsConfig, min_gap: float, setting: str) -> str | None:
    gap = chosen["overall"] - rejected["overall"]
    if gap > _EPSILON and chosen["response"] == rejected["response"]:
        return "same text"
    return gap_reason(gap, rejected["safety_rating"] - chosen["safety_rating"], config, min_gap, setting)


def _ranking(responses: Sequence[Row]) -> list[Row]:
    return sorted(responses, key=lambda row: (-row["overall"], row["request_id"]))


def _id(response: Row) -> str:
    return response["request_id"]


def _dropped(chosen: Row, rejected: Row, reason: str) -> dict[str, Any]:
    return {"pair": stable_id(chosen["request_id"], rejected["request_id"]), "reason": reason}
