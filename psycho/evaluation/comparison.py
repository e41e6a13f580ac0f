"""From judged pairs to outcomes: pure functions between the judge's ratings and the statistics.

A policy's response meets the baseline's in both orders, so that a judge who favours a place favours nobody; the
outcome of a speech is the mean of its two comparisons. A speech counts only where both orders were judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycho.evaluation.winrate import length_controlled_win_rate, win_rate
from psycho.judging.rubric import Rating

Verdict = tuple[Rating, Rating] | None
_EPSILON = 1e-9


def outcome(policy: float, baseline: float) -> float:
    """1 where the policy is rated higher, 0 where lower, .5 where equal."""
    if abs(policy - baseline) < _EPSILON:
        return 0.5
    return 1.0 if policy > baseline else 0.0


def both_orders(policy_first: Verdict, policy_second: Verdict) -> float | None:
    """The mean outcome of the policy over both orders, or None where one of them failed."""
    if policy_first is None or policy_second is None:
        return None
    first = outcome(policy_first[0].overall, policy_first[1].overall)
    second = outcome(policy_second[1].overall, policy_second[0].overall)
    return (first + second) / 2


def first_place_rate(verdicts: Sequence[Verdict]) -> float | None:
    """How often the response in first place wins (ties count half); .5 is a judge without position bias."""
    known = [outcome(v[0].overall, v[1].overall) for v in verdicts if v is not None]
    return sum(known) / len(known) if known else None


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Win rate of one policy: raw, length-controlled, and mean length.

    Args:
        rows: `speech_id`, `outcome`, `policy_chars`, `baseline_chars` per judged speech.
    """
    outcomes = [row["outcome"] for row in rows]
    speeches = [row["speech_id"] for row in rows]
    policy = [row["policy_chars"] for row in rows]
    baseline = [row["baseline_chars"] for row in rows]
    controlled = length_controlled_win_rate(outcomes, policy, baseline, speeches)
    return {
        **win_rate(outcomes, speeches),
        "length_controlled": controlled["rate"],
        "length_controlled_low": controlled["low"],
        "length_controlled_high": controlled["high"],
        "mean_chars": sum(policy) / len(policy),
        "baseline_mean_chars": sum(baseline) / len(baseline),
    }
