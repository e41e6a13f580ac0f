"""From verdicts to outcomes: both orders or nothing, and no gain from a place."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.evaluation.comparison import Verdict, both_orders, first_place_rate, outcome, summarise
from psycho.judging.rubric import Rating
from psycho.principles import STEMS

RATINGS = st.lists(st.integers(1, 5), min_size=7, max_size=7)


def rating(values: list[int] | int) -> Rating:
    values = [values] * 7 if isinstance(values, int) else values
    return Rating(dict(zip(STEMS, values, strict=True)), dict.fromkeys(STEMS, ""))


def verdict(first: list[int] | int, second: list[int] | int) -> Verdict:
    return rating(first), rating(second)


@pytest.mark.parametrize(
    ("policy", "baseline", "expected"),
    [(3.0, 2.0, 1.0), (2.0, 3.0, 0.0), (3.0, 3.0, 0.5), (0.1 + 0.2, 0.3, 0.5), (22 / 7, 23 / 7, 0.0)],
)
def test_outcome(policy, baseline, expected):
    assert outcome(policy, baseline) == expected


@pytest.mark.parametrize(
    ("policy_first", "policy_second", "expected"),
    [
        (verdict(5, 1), verdict(1, 5), 1.0),
        (verdict(1, 5), verdict(5, 1), 0.0),
        (verdict(5, 1), verdict(5, 1), 0.5),  # the first place wins twice
        (verdict(3, 3), verdict(3, 3), 0.5),
        (verdict(5, 1), verdict(3, 3), 0.75),
        (verdict(3, 3), verdict(5, 1), 0.25),
        (None, verdict(1, 5), None),
        (verdict(5, 1), None, None),
        (None, None, None),
    ],
)
def test_both_orders(policy_first, policy_second, expected):
    assert both_orders(policy_first, policy_second) == expected


@settings(deadline=None)
@given(RATINGS, RATINGS)
def test_a_judge_who_always_prefers_the_first_place_gives_exactly_a_half(one, other):
    high, low = sorted((one, other), key=sum, reverse=True)
    assert both_orders(verdict(high, low), verdict(high, low)) == 0.5


@settings(deadline=None)
@given(RATINGS, RATINGS, RATINGS, RATINGS)
def test_the_policy_wins_what_the_baseline_loses(a, b, c, d):
    swapped = both_orders(verdict(d, c), verdict(b, a))
    assert both_orders(verdict(a, b), verdict(c, d)) == pytest.approx(swapped)
    assert both_orders(verdict(a, b), verdict(b, a)) == 1 - both_orders(verdict(b, a), verdict(a, b))


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([verdict(5, 1), verdict(5, 1)], 1.0),
        ([verdict(5, 1), verdict(1, 5)], 0.5),
        ([verdict(3, 3), None], 0.5),
        ([verdict(5, 1), None, None], 1.0),
        ([None], None),
        ([], None),
    ],
)
def test_first_place_rate(verdicts, expected):
    assert first_place_rate(verdicts) == expected


def test_the_summary_counts_each_speech_and_both_lengths():
    rows: list[dict[str, Any]] = [
        {"speech_id": f"s{n}", "outcome": (1.0, 1.0, 1.0, 0.0)[n % 4], "policy_chars": 100 + n, "baseline_chars": 120}
        for n in range(40)
    ]
    summary = summarise(rows)
    assert summary["rate"] == 0.75 and summary["low"] < 0.75 < summary["high"]
    assert (summary["mean_chars"], summary["baseline_mean_chars"]) == (119.5, 120)
    assert (
        0 <= summary["length_controlled_low"] <= summary["length_controlled"] <= summary["length_controlled_high"] <= 1
    )
