"""Agreement of a judge with gold labels: a loop as reference, ties, gaps that rounding blurs, constants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from psycho.evaluation.agreement import correlation, pair_agreement

RATING = st.integers(1, 5)
PAIRS = st.lists(st.tuples(RATING, RATING, RATING, RATING), min_size=1, max_size=30)


def columns(rows: list[tuple[int, ...]]) -> list[list[int]]:
    return [list(column) for column in zip(*rows, strict=True)]


@settings(deadline=None)
@given(PAIRS, st.sampled_from([0, 1, 2]))
def test_pair_agreement_is_the_obvious_loop(rows: list[tuple[int, int, int, int]], min_gap: int) -> None:
    counted = [r for r in rows if r[0] != r[1] and abs(r[0] - r[1]) >= min_gap]
    score = sum(0.5 if c == d else float((a > b) == (c > d)) for a, b, c, d in counted)
    found = pair_agreement(*columns(rows), min_gap=min_gap)
    assert found["n"] == len(counted)
    assert found["judge_ties"] == sum(c == d for _, _, c, d in counted)
    assert found["agreement"] == (pytest.approx(score / len(counted)) if counted else None)


@settings(deadline=None)
@given(PAIRS)
def test_a_reversed_judge_agrees_on_the_rest(rows: list[tuple[int, int, int, int]]) -> None:
    gold_a, gold_b, judge_a, judge_b = columns(rows)
    found = pair_agreement(gold_a, gold_b, judge_a, judge_b, 1)
    assume(found["n"] > 0)
    reversed_judge = pair_agreement(gold_a, gold_b, judge_b, judge_a, 1)
    assert reversed_judge["agreement"] == pytest.approx(1 - found["agreement"])
    assert pair_agreement(gold_b, gold_a, judge_b, judge_a, 1) == found
    assert pair_agreement(gold_a, gold_b, gold_a, gold_b, 1)["agreement"] == 1


def test_a_gap_that_rounding_blurs_still_counts() -> None:
    assert 4.3 - 4.0 < 0.3
    assert pair_agreement([4.3], [4.0], [5], [1], min_gap=0.3) == {"n": 1, "agreement": 1.0, "judge_ties": 0}
    assert pair_agreement([4.29], [4.0], [5], [1], min_gap=0.3)["n"] == 0


def test_means_that_differ_by_rounding_are_ties() -> None:
    assert pair_agreement([0.1 + 0.2], [0.3], [5], [1], min_gap=0) == {
        "n": 0,
        "agreement": None,
        "judge_ties": 0,
    }
    assert pair_agreement([5], [1], [0.1 + 0.2], [0.3], min_gap=1)["agreement"] == 0.5


def test_correlation_is_numpys() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    y = 1e6 + x + rng.normal(size=50)
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert correlation(x, 5 * x + 1) <= 1


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([3, 3, 3], [1, 2, 3]),
        ([1, 2, 3], [0.1, 0.1, 0.1]),
        ([1], [2]),
        ([0, 0], [1, 2]),
        ([0.3, 0.1 + 0.2], [1, 2]),
    ],
)
def test_correlation_with_a_constant_is_none(x: list[float], y: list[float]) -> None:
    assert correlation(x, y) is None


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="judge_b holds 1 values that are not finite"):
        pair_agreement([1], [2], [3], [float("nan")], 1)
    with pytest.raises(ValueError, match="unequal lengths: x 2, y 1"):
        correlation([1, 2], [1])
    with pytest.raises(ValueError, match="at least one"):
        correlation([], [])
