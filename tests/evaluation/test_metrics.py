"""The reward-model audit against scikit-learn, against slow and obvious versions, and its invariants."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import brier_score_loss, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from psycho.evaluation import metrics

MARGINS = st.lists(st.sampled_from([-50.0, -2.0, -0.5, 0.0, 0.5, 1.0, 4.0]), min_size=1, max_size=40)


def margins_of(seed: int, n: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.7, 1.5, n).round(1)


def both_orders(margins: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of every pair read in both orders."""
    labels = np.concatenate([np.ones(margins.size), np.zeros(margins.size)])
    return labels, expit(np.concatenate([margins, -margins]))


def test_auc_and_brier_are_scikit_learns_on_both_orders() -> None:
    margins = margins_of(0)
    labels, probabilities = both_orders(margins)
    assert metrics.auc(margins) == pytest.approx(roc_auc_score(labels, probabilities), abs=1e-12)
    assert metrics.brier(margins) == pytest.approx(brier_score_loss(labels, probabilities), abs=1e-12)


def test_auc_does_not_tie_margins_whose_sigmoid_rounds_to_one() -> None:
    assert metrics.auc([50.0, -60.0]) == pytest.approx(0.25)
    labels, probabilities = both_orders(np.array([50.0, -60.0]))
    assert roc_auc_score(labels, probabilities) > 0.25


@settings(deadline=None)
@given(MARGINS)
def test_auc_is_the_share_of_ordered_combinations(margins: list[float]) -> None:
    score = sum(1.0 if a > -b else 0.5 if a == -b else 0.0 for a in margins for b in margins)
    assert metrics.auc(margins) == pytest.approx(score / len(margins) ** 2)


@settings(deadline=None)
@given(MARGINS)
def test_swapping_chosen_and_rejected_mirrors_accuracy_and_auc(margins: list[float]) -> None:
    ids, swapped = [f"s{i // 2}" for i in range(len(margins))], [-m for m in margins]
    right, wrong = metrics.accuracy(margins, ids), metrics.accuracy(swapped, ids)
    assert wrong.rate == pytest.approx(1 - right.rate)
    assert (wrong.low, wrong.high) == pytest.approx((1 - right.high, 1 - right.low))
    assert metrics.auc(swapped) == pytest.approx(1 - metrics.auc(margins))


def test_a_tie_counts_half() -> None:
    assert metrics.accuracy([0.0, 0.0, 3.0, -1.0], list("abcd")).rate == 0.5
    assert metrics.accuracy([0.0, 1.0], list("ab")).rate == 0.75
    assert metrics.accuracy([3e-7, 4e-7, -2e-7, 1.0], list("abcd")).rate == 0.625, "rounding is no preference"
    assert metrics.accuracy([1e-4, -1e-4, 1e-4], list("abc")).rate == pytest.approx(2 / 3)
    assert metrics.reliability([0.0]) == [{"low": 0.5, "high": 0.6, "confidence": 0.5, "accuracy": 0.5, "n": 1}]


@pytest.mark.parametrize("n_bins", [2, 10, 20])
def test_ece_equals_the_both_order_definition_for_an_even_number_of_bins(n_bins: int) -> None:
    margins = np.random.default_rng(1).normal(0.4, 1.2, 500)
    labels, probabilities = both_orders(margins)
    index = np.minimum((probabilities * n_bins).astype(int), n_bins - 1)
    slow = sum(
        abs(labels[index == b].mean() - probabilities[index == b].mean()) * (index == b).mean()
        for b in range(n_bins)
        if (index == b).any()
    )
    assert metrics.ece(margins, n_bins) == pytest.approx(slow, abs=1e-12)


def test_ece_by_hand_for_fifteen_bins() -> None:
    logit = np.log(0.72 / 0.28)
    margins = [logit, logit, logit, -logit]
    assert metrics.ece(margins, 15) == pytest.approx(0.03)
    assert metrics.reliability(margins, 15)[0]["low"] == pytest.approx(10 / 15)


def test_a_calibrated_model_has_little_ece_and_a_confident_one_much() -> None:
    rng = np.random.default_rng(2)
    confidence = rng.normal(0, 1.5, 20_000)
    margins = np.where(rng.random(20_000) < expit(confidence), confidence, -confidence)
    assert metrics.ece(margins) < 0.015
    assert metrics.ece(margins * 5) > 0.1


@settings(deadline=None)
@given(MARGINS, st.sampled_from([1, 7, 10, 15]))
def test_reliability_keeps_every_pair_and_its_confidence(margins: list[float], n_bins: int) -> None:
    bins = metrics.reliability(margins, n_bins)
    assert sum(b["n"] for b in bins) == len(margins)
    assert sum(b["n"] * b["confidence"] for b in bins) == pytest.approx(expit(np.abs(margins)).sum())
    right = metrics.accuracy(margins, list(range(len(margins)))).rate
    assert sum(b["n"] * b["accuracy"] for b in bins) / len(margins) == pytest.approx(right)
    assert all(b["high"] <= 1 for b in bins)
    assert all(b["low"] - 1e-12 <= b["confidence"] <= b["high"] + 1e-12 for b in bins)


def test_accuracy_divides_once_and_is_not_a_mean_of_speech_means() -> None:
    assert metrics.accuracy([1.0, 1.0, 1.0, -1.0], ["a", "a", "a", "b"]).rate == 0.75


def test_one_row_per_speech_is_the_wilson_interval_of_statsmodels() -> None:
    outcomes = np.repeat([1.0, 0.0], [7000, 3000])
    low, high = proportion_confint(7000, 10_000, method="wilson")
    rate = metrics.clustered_rate(outcomes, np.arange(10_000))
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=1e-5)


def test_interval_narrows_with_more_speeches() -> None:
    widths = []
    for n in (48, 192, 768):
        rate = metrics.accuracy(np.tile([1.0, 1.0, -1.0, 2.0], n // 4), np.arange(n))
        widths.append(rate.high - rate.low)
    assert widths[0] > 1.8 * widths[1] > 3.2 * widths[2]


@pytest.mark.parametrize("wins", [0.7, 1.0])
def test_repeating_the_rows_of_a_speech_adds_no_certainty(wins: float) -> None:
    outcomes = (np.arange(60) < 60 * wins).astype(float)
    once = metrics.clustered_rate(outcomes, np.arange(60))
    repeated = metrics.clustered_rate(np.repeat(outcomes, 5), np.repeat(np.arange(60), 5))
    as_if_independent = metrics.clustered_rate(np.repeat(outcomes, 5), np.arange(300))
    assert repeated[1:] == pytest.approx(once[1:])
    assert as_if_independent.high - as_if_independent.low < 0.6 * (repeated.high - repeated.low)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=40))
def test_interval_holds_its_rate_and_has_width(rows: list[tuple[float, int]]) -> None:
    rate = metrics.clustered_rate([y for y, _ in rows], [f"s{g}" for _, g in rows])
    assert 0 <= rate.low <= rate.rate <= rate.high <= 1
    assert rate.high - rate.low > 0.05


def test_one_speech_says_nothing_about_the_spread() -> None:
    assert metrics.accuracy([1.0, 2.0, -1.0], ["a"] * 3)[2:] == (0.0, 1.0)


def test_audit_has_exactly_its_keys_and_ignores_the_order_of_pairs() -> None:
    margins, ids = margins_of(3), np.arange(300) // 3
    audit = metrics.audit_reward_margins(margins, ids, seed=1)
    assert list(audit) == [*("n", "accuracy", "auc", "ece", "brier", "accuracy_low", "accuracy_high", "reliability")]
    assert audit["n"] == 300
    assert audit["accuracy"] == pytest.approx(((margins > 0) + 0.5 * (margins == 0)).mean())
    assert audit["auc"] == metrics.auc(margins)
    assert audit["ece"] == metrics.ece(margins)
    assert audit["brier"] == metrics.brier(margins)
    assert audit["accuracy_low"] < audit["accuracy"] < audit["accuracy_high"]
    order = np.random.default_rng(0).permutation(300)
    shuffled = metrics.audit_reward_margins(margins[order], ids[order], seed=2)
    for key in ("accuracy", "auc", "ece", "brier", "accuracy_low", "accuracy_high"):
        assert shuffled[key] == pytest.approx(audit[key], abs=1e-12)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        metrics.auc([])
    with pytest.raises(ValueError, match="1 values that are not finite"):
        metrics.accuracy([1.0, float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match="2 rows but 1 speech ids"):
        metrics.accuracy([1.0, 2.0], ["a"])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metrics.clustered_rate([1.0, 2.0], ["a", "b"])
    with pytest.raises(ValueError, match="n_bins"):
        metrics.ece([1.0], 0)
