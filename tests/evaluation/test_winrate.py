"""Win rates: coverage of the intervals, parity of the regression with statsmodels, and what length may do."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from psycho.evaluation.winrate import fit_logistic, length_controlled_win_rate, length_term, win_rate

DATA_SETS = 300
NO_RIDGE = np.zeros(2)


def clustered_outcomes(seed: int, rate: float, speeches: int, rows: int, correlation: float) -> np.ndarray:
    """Wins of every simulated data set, (DATA_SETS, speeches * rows), beta-binomial within a speech."""
    rng = np.random.default_rng(seed)
    size = 1 / correlation - 1
    chance = rng.beta(rate * size, (1 - rate) * size, (DATA_SETS, speeches, 1))
    return (rng.random((DATA_SETS, speeches, rows)) < chance).reshape(DATA_SETS, -1).astype(float)


def regression_data(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Design (n, 2), outcomes (n,) with ties, and speeches (n,) of four rows."""
    rng = np.random.default_rng(seed)
    term = np.tanh(rng.normal(0.4, 1, n))
    outcomes = rng.binomial(2, expit(0.5 + 0.8 * term)) / 2
    return np.column_stack([np.ones(n), term]), outcomes, np.arange(n) // 4


@pytest.mark.parametrize(
    ("rate", "speeches", "rows", "correlation"),
    [(0.5, 40, 4, 0.3), (0.7, 60, 3, 0.4), (0.9, 100, 2, 0.2), (0.95, 150, 1, 0.01)],
)
def test_win_rate_interval_covers(rate: float, speeches: int, rows: int, correlation: float) -> None:
    ids = np.repeat(np.arange(speeches), rows)
    found = [win_rate(y, ids) for y in clustered_outcomes(0, rate, speeches, rows, correlation)]
    assert np.mean([f["low"] <= rate <= f["high"] for f in found]) >= 0.92
    # An interval that covers by being everything would pass the line above.
    independent = 2 * 1.96 * np.sqrt(rate * (1 - rate) / (speeches * rows))
    assert np.mean([f["high"] - f["low"] for f in found]) < 1.8 * independent


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_win_rate_keeps_its_width_at_the_ends(rate: float) -> None:
    found = win_rate([rate] * 100, np.arange(100))
    assert found["n"] == 100
    assert found["rate"] == rate
    assert 0.02 < found["high"] - found["low"] < 0.05


def test_win_rate_divides_once_and_counts_ties_half() -> None:
    found = win_rate([1.0, 1.0, 0.5, 0.0], ["a", "a", "a", "b"])
    assert list(found) == ["n", "rate", "low", "high"]
    assert found["rate"] == pytest.approx(2.5 / 4)


def test_logistic_fit_is_statsmodels() -> None:
    design, outcomes, speech = regression_data(0)
    ours = fit_logistic(design, outcomes, speech, NO_RIDGE)
    model = sm.GLM(outcomes, design, family=sm.families.Binomial())
    theirs = model.fit(tol=1e-12)
    np.testing.assert_allclose(ours.coefficients, theirs.params, atol=1e-8)
    np.testing.assert_allclose(ours.covariance, theirs.cov_params(), rtol=1e-6)
    robust = model.fit(tol=1e-12, cov_type="cluster", cov_kwds={"groups": speech, "use_correction": False})
    np.testing.assert_allclose(ours.clustered_covariance, 100 / 99 * robust.cov_params(), rtol=1e-6)


def test_length_controlled_rate_is_statsmodels_prediction_at_equal_length() -> None:
    rng = np.random.default_rng(1)
    policy, baseline = rng.normal(900, 200, 500).round(), rng.normal(700, 150, 500).round()
    difference = policy - baseline
    term = np.tanh(difference / difference.std(ddof=1))
    outcomes = (rng.random(500) < expit(-0.3 + term)).astype(float)
    fit = sm.GLM(outcomes, sm.add_constant(term), family=sm.families.Binomial()).fit()
    found = length_controlled_win_rate(outcomes, policy, baseline, np.arange(500), length_ridge=0.0)
    assert found["rate"] == pytest.approx(fit.predict([[1.0, 0.0]])[0], abs=1e-4)
    assert found["length_coefficient"] == pytest.approx(fit.params[1], abs=1e-4)
    with_ridge = length_controlled_win_rate(outcomes, policy, baseline, np.arange(500))
    assert with_ridge["rate"] == pytest.approx(found["rate"], abs=0.01)


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=10, max_size=60))
def test_equal_lengths_return_the_raw_rate_and_its_interval(outcomes: list[float]) -> None:
    ids, chars = [i // 2 for i in range(len(outcomes))], [500] * len(outcomes)
    raw, controlled = win_rate(outcomes, ids), length_controlled_win_rate(outcomes, chars, chars, ids)
    for key in ("rate", "low", "high"):
        assert controlled[key] == pytest.approx(raw[key], abs=2e-3)


@pytest.mark.parametrize("steepness", [2.0, np.inf])
def test_winning_only_by_length_drops_towards_half(steepness: float) -> None:
    rng = np.random.default_rng(3)
    difference = rng.normal(150, 150, 1000).round()
    chance = (difference > 0) if np.isinf(steepness) else expit(steepness * np.tanh(difference / 150))
    outcomes = (rng.random(1000) < chance).astype(float)
    raw = win_rate(outcomes, np.arange(1000))["rate"]
    found = length_controlled_win_rate(outcomes, 600 + difference, np.full(1000, 600), np.arange(1000))
    assert raw > 0.7
    assert abs(found["rate"] - 0.5) < 0.4 * (raw - 0.5)
    assert found["low"] < 0.5 < found["high"]


def test_winning_at_any_length_stays() -> None:
    rng = np.random.default_rng(4)
    difference = rng.normal(150, 150, 1000).round()
    outcomes = (rng.random(1000) < 0.8).astype(float)
    found = length_controlled_win_rate(outcomes, 600 + difference, np.full(1000, 600), np.arange(1000))
    assert found["rate"] == pytest.approx(0.8, abs=0.05)


def test_swapping_the_two_models_mirrors_the_rate() -> None:
    rng = np.random.default_rng(5)
    policy, baseline, outcomes = (
        rng.integers(200, 900, 90),
        rng.integers(200, 700, 90),
        rng.random(90).round(),
    )
    ids = np.arange(90) // 3
    one = length_controlled_win_rate(outcomes, policy, baseline, ids)
    other = length_controlled_win_rate(1 - outcomes, baseline, policy, ids)
    assert other["rate"] == pytest.approx(1 - one["rate"])
    assert (other["low"], other["high"]) == pytest.approx((1 - one["high"], 1 - one["low"]))


@pytest.mark.parametrize("outcome", [0.0, 1.0])
def test_separation_stays_finite_and_keeps_a_width(outcome: float) -> None:
    difference = np.random.default_rng(6).normal(100, 100, 200).round()
    outcomes = np.full(200, outcome)
    found = length_controlled_win_rate(outcomes, 500 + difference, np.full(200, 500), np.arange(200))
    assert np.isfinite(list(found.values())).all()
    assert found["rate"] == pytest.approx(outcome, abs=0.001)
    assert abs(found["length_coefficient"]) < 10
    assert 0.01 < found["high"] - found["low"] < 0.2


@pytest.mark.parametrize("share", [0.8, 1.0])
def test_a_constant_length_advantage_is_reported_as_undetermined(share: float) -> None:
    outcomes = (np.arange(300) < 300 * share).astype(float)
    found = length_controlled_win_rate(outcomes, np.full(300, 900), np.full(300, 600), np.arange(300))
    assert found["rate"] == pytest.approx(share, abs=0.06)
    assert found["low"] < 0.3
    assert found["high"] > 0.98


@pytest.mark.parametrize(("rate", "slope"), [(0.7, 1.5), (0.97, 0.0)])
def test_length_controlled_interval_covers(rate: float, slope: float) -> None:
    rng = np.random.default_rng(7)
    difference = rng.normal(150, 100, (100, 100)).round()
    chance = expit(np.log(rate / (1 - rate)) + slope * np.array([length_term(d, 0 * d) for d in difference]))
    outcomes = (rng.random((100, 100)) < chance).astype(float)
    found = [
        length_controlled_win_rate(y, 500 + d, np.full(100, 500), np.arange(100))
        for y, d in zip(outcomes, difference, strict=True)
    ]
    assert np.mean([f["low"] <= rate <= f["high"] for f in found]) >= 0.92


def test_repeating_the_rows_of_a_speech_widens_what_independence_would_give() -> None:
    rng = np.random.default_rng(8)
    policy, outcomes = rng.integers(400, 900, 80), rng.random(80).round()

    def width(repeats: int, ids: np.ndarray) -> float:
        y, chars = np.repeat(outcomes, repeats), np.repeat(policy, repeats)
        found = length_controlled_win_rate(y, chars, np.full(y.size, 600), ids)
        return found["high"] - found["low"]

    clustered = width(6, np.repeat(np.arange(80), 6))
    assert clustered == pytest.approx(width(1, np.arange(80)), rel=0.1)
    assert width(6, np.arange(480)) < 0.6 * clustered


def test_length_term_is_scaled_but_not_centred() -> None:
    term = length_term([100, 200, 300], [100, 100, 100])
    np.testing.assert_allclose(term, np.tanh([0.0, 1.0, 2.0]))
    np.testing.assert_array_equal(length_term([5, 5], [3, 3]), [1.0, 1.0])
    np.testing.assert_array_equal(length_term([5, 5], [5, 5]), [0.0, 0.0])


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        win_rate([1.5], ["a"])
    with pytest.raises(ValueError, match="not finite"):
        win_rate([1.0, float("nan")], ["a", "b"])
    with pytest.raises(ValueError, match="2 outcomes but 3 lengths"):
        length_controlled_win_rate([1.0, 0.0], [1, 2, 3], [1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="policy lengths"):
        length_controlled_win_rate([1.0, 0.0], [1, 2], [1], ["a", "b"])
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        length_controlled_win_rate([1.0, -1.0], [1, 2], [1, 2], ["a", "b"])
