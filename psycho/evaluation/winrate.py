"""Win rate of a policy against a baseline: raw, and with length held equal.

The raw rate rewards length, since judges do, so a length-controlled rate stands beside it: what the rate
would be had both responses been equally long (Dubois et al. 2024, "Length-Controlled AlpacaEval", arXiv
2404.04475). All intervals are 95 %, clustered by client speech, in closed form (no seed), and never of zero
width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit

from psycho.evaluation.metrics import Vector, clustered_rate, finite_vector, speech_index, wilson_interval

INTERCEPT_RIDGE = 1e-3
LENGTH_RIDGE = 0.16  # a normal prior of standard deviation 2.5 on the length coefficient
MAX_NEWTON_STEPS = 100


class LogisticFit(NamedTuple):
    """A ridge logistic regression: coefficients (k,) and two covariance matrices of them (k, k)."""

    coefficients: Vector
    covariance: Vector
    clustered_covariance: Vector


def win_rate(outcomes: ArrayLike, speech_ids: Sequence[Any] | NDArray[Any]) -> dict[str, Any]:
    """Mean outcome of the policy with its interval, as {n, rate, low, high}.

    `outcomes` (n,) are 1 for a win, 0.5 for a tie and 0 for a loss, or the average of both presentation
    orders; `speech_ids` (n,) name each row's client speech. The interval is a Wilson interval at the
    cluster-robust effective sample size; `metrics.clustered_rate` says why. ValueError on empty or non-finite
    input.
    """
    return dict(clustered_rate(outcomes, speech_ids)._asdict())


def length_controlled_win_rate(
    outcomes: ArrayLike,
    chars_policy: ArrayLike,
    chars_baseline: ArrayLike,
    speech_ids: Sequence[Any] | NDArray[Any],
    length_ridge: float = LENGTH_RIDGE,
) -> dict[str, Any]:
    """Win rate had both responses been equally long, as {n, rate, low, high, length_coefficient}.

    The method of AlpacaEval 2: a logistic regression of the outcome (n,) on an intercept for the policy and
    tanh(d / sd(d)), d = chars_policy - chars_baseline in characters; the rate is its prediction at d = 0. Two
    parts of theirs need outputs of other models and are left out: the difficulty of each instruction (so our
    prediction is the same for every row, and averaging it is the intercept alone) and the gamed baselines
    that regularise the length term. A ridge stands for the latter and for their cross-validated L1: weak on
    the length coefficient (`length_ridge`, worth less than one evenly split row), so that the rate stays put
    where few losses or one-sided lengths hardly determine it, and negligible on the intercept (1e-3), so that
    a policy that always wins stays finite and equal lengths return the raw rate.

    The interval is the Wilson interval at the effective sample size that the prediction's variance implies,
    the larger of the cluster-robust and the model's. Where every response is longer by the same amount the
    data cannot tell length from quality: the rate stays near the raw one and the interval spans nearly
    [0, 1] to say so. ValueError on empty, unequal or non-finite input.
    """
    y = finite_vector(outcomes, "outcomes")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {y.min():g} to {y.max():g}")
    term = length_term(chars_policy, chars_baseline)
    if term.size != y.size:
        raise ValueError(f"{y.size} outcomes but {term.size} lengths")
    speech, n_speeches = speech_index(speech_ids, y.size)
    design = np.column_stack([np.ones(y.size), term])
    ridge = np.array([INTERCEPT_RIDGE, length_ridge])
    fit = fit_logistic(design, y, speech, ridge)
    rate = float(expit(fit.coefficients[0]))
    logit_variance = float(max(fit.covariance[0, 0], fit.clustered_covariance[0, 0]))
    effective_n = 1 / (rate * (1 - rate) * logit_variance)
    if y.min() == y.max() and y[0] in (0.0, 1.0):
        # Residuals that only the ridge keeps from zero tell no spread: count each speech once, and charge for
        # the length term what estimating it costs when every row weighs the same.
        inverse = np.linalg.inv(design.T @ design + np.diag(ridge))
        effective_n = n_speeches / (y.size * float(inverse[0, 0]))
    low, high = wilson_interval(rate, effective_n, n_speeches)
    return {
        "n": y.size,
        "rate": rate,
        "low": low,
        "high": high,
        "length_coefficient": float(fit.coefficients[1]),
    }


def length_term(chars_policy: ArrayLike, chars_baseline: ArrayLike) -> Vector:
    """tanh(d / sd(d)) with shape (n,), d the difference in characters.

    d is scaled but not centred, so that zero still means equally long. Where sd(d) is 0 the limit is the sign
    of d.
    """
    policy = finite_vector(chars_policy, "chars_policy")
    baseline = finite_vector(chars_baseline, "chars_baseline")
    if policy.size != baseline.size:
        raise ValueError(f"{policy.size} policy lengths but {baseline.size} baseline lengths")
    difference = policy - baseline
    deviation = float(difference.std(ddof=1)) if difference.size > 1 else 0.0
    return np.tanh(difference / deviation) if deviation > 0 else np.sign(difference)


def fit_logistic(design: Vector, outcomes: Vector, speech: NDArray[np.intp], ridge: Vector) -> LogisticFit:
    """Maximise the log-likelihood of `outcomes` (n,) in [0, 1] less sum(ridge b^2)/2, by halving Newton.

    `design` is (n, k), `ridge` (k,), `speech` (n,) counts the speeches from 0. The clustered covariance is
    the sandwich with the factor G/(G-1), as in statsmodels' GLM without its (n-1)/(n-k).
    """

    def objective(b: Vector) -> float:
        eta = design @ b
        return float(outcomes @ eta - np.logaddexp(0, eta).sum() - (ridge * b) @ b / 2)

    b = np.zeros(design.shape[1])
    for _ in range(MAX_NEWTON_STEPS):
        gradient, hessian = _derivatives(design, outcomes, b, ridge)
        step = np.linalg.solve(hessian, gradient)
        here, size = objective(b), 1.0
        while objective(b + size * step) < here and size > 1e-8:
            size /= 2
        b = b + size * step
        if np.abs(size * step).max() < 1e-10:
            break
    inverse: Vector = np.linalg.inv(_derivatives(design, outcomes, b, ridge)[1]).astype(np.float64)
    scores = np.zeros((int(speech.max()) + 1, design.shape[1]))
    np.add.at(scores, speech, design * (outcomes - expit(design @ b))[:, None])
    correction = len(scores) / max(len(scores) - 1, 1)
    return LogisticFit(b, inverse, correction * inverse @ (scores.T @ scores) @ inverse)


def _derivatives(design: Vector, outcomes: Vector, b: Vector, ridge: Vector) -> tuple[Vector, Vector]:
    """Gradient (k,) and negated Hessian (k, k) of the penalised log-likelihood."""
    p = expit(design @ b)
    gradient = design.T @ (outcomes - p) - ridge * b
    return gradient, (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)
