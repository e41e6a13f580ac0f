"""Preference pairs from ratings (paper, section 3.3), as pure functions.

Train pairs are all pairs of a speech's responses whose overall ratings differ by at least the gap; a test pair is a
speech's best response against its worst. Equal ratings never make a pair. Every candidate is accounted for: kept, or
left out with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from psycho.config import PairsConfig
from psycho.principles import STEMS
from psycho.schema import stable_id

Row = Mapping[str, Any]
_EPSILON = 1e-9  # overall ratings are means of seven integers


def train_pairs(responses: Sequence[Row], config: PairsConfig) -> tuple[list[tuple[Row, Row]], list[dict[str, Any]]]:
    """(chosen, rejected) of one speech, widest gap first, and the candidates left out with their reasons."""
    kept, dropped = [], []
    for one, other in combinations(responses, 2):
        chosen, rejected = (one, other) if one["overall"] >= other["overall"] else (other, one)
        reason = _reason(chosen, rejected, config.min_gap, "pairs.min_gap")
        if reason:
            dropped.append(_dropped(chosen, rejected, reason))
        else:
            kept.append((chosen, rejected))
    kept.sort(
        key=lambda pair: (
            pair[1]["overall"] - pair[0]["overall"],
            pair[0]["request_id"],
            pair[1]["request_id"],
        )
    )
    limit = config.max_pairs_per_speech
    if limit is not None:
        dropped += [_dropped(c, r, "over pairs.max_pairs_per_speech") for c, r in kept[limit:]]
        kept = kept[:limit]
    return kept, dropped


def test_pair(responses: Sequence[Row], config: PairsConfig) -> tuple[tuple[Row, Row] | None, list[dict[str, Any]]]:
    """The best against the worst response of one speech; None, with a reason, where they tie."""
    if len(responses) < 2:
        return None, []
    order = sorted(responses, key=lambda row: (-row["overall"], row["request_id"]))
    best, worst = order[0], order[-1]
    reason = _reason(best, worst, config.min_test_gap, "pairs.min_test_gap")
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


def _reason(chosen: Row, rejected: Row, min_gap: float, setting: str) -> str | None:
    gap = chosen["overall"] - rejected["overall"]
    if gap <= _EPSILON:
        return "tie"
    if chosen["response"] == rejected["response"]:
        return "same text"
    return f"gap under {setting}" if gap < min_gap - _EPSILON else None


def _dropped(chosen: Row, rejected: Row, reason: str) -> dict[str, Any]:
    return {"pair": stable_id(chosen["request_id"], rejected["request_id"]), "reason": reason}
