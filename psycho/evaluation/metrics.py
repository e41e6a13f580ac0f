"""How well a reward model orders preference pairs: accuracy, AUC, ECE and Brier of its margins.

A pair has no natural positive class, because the chosen response is by definition the preferred one. So each
pair is read in both orders: (chosen, rejected) with p = sigmoid(margin) and label 1, and (rejected, chosen)
with p = sigmoid(-margin) and label 0. That is our definition of the AUC, ECE and Brier columns that the paper
reports without defining. Here too is the interval for a rate that all of `psycho.evaluation` uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit
from scipy.stats import rankdata
from scipy.stats import t as student_t

Vector = NDArray[np.float64]
MARGIN_TOLERANCE = 1e-5  # logits; what batches of another size leave of two scores of one text, and nobody's preference


class Rate(NamedTuple):
    """A rate in [0, 1] over `n` rows with its 95 % interval."""

    n: int
    rate: float
    low: float
    high: float


def finite_vector(values: ArrayLike, name: str) -> Vector:
    """`values` as a float64 array of shape (n,), n >= 1; ValueError if it is empty, not flat or not finite.

    A missing rating must have been left out before: NaN compares as False and would count as a lost row.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise ValueError(f"{name} must be one row of at least one number, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise ValueError(f"{name} holds {int((~np.isfinite(vector)).sum())} values that are not finite")
    return vector


def speech_index(speech_ids: Sequence[Any] | NDArray[Any], n: int) -> tuple[NDArray[np.intp], int]:
    """Number the speeches 0..G-1: returns (index of each row's speech with shape (n,), G)."""
    if len(speech_ids) != n:
        raise ValueError(f"{n} rows but {len(speech_ids)} speech ids")
    unique, index = np.unique(np.asarray(speech_ids), return_inverse=True)
    return index.reshape(-1), int(unique.size)


def wilson_interval(rate: float, effective_n: float, n_speeches: int) -> tuple[float, float]:
    """95 % Wilson score interval of `rate` seen in `effective_n` independent rows, with Student's t for z.

    t has `n_speeches` - 1 degrees of freedom, as the variance was estimated from that many speeches; with one
    speech nothing is known about the spread and the interval is [0, 1].
    """
    if n_speeches < 2:
        return 0.0, 1.0
    t2 = float(student_t.ppf(0.975, n_speeches - 1)) ** 2
    centre = (rate * effective_n + t2 / 2) / (effective_n + t2)
    half = math.sqrt(t2 * (rate * (1 - rate) * effective_n + t2 / 4)) / (effective_n + t2)
    return max(0.0, min(rate, centre - half)), min(1.0, max(rate, centre + half))


def clustered_rate(outcomes: ArrayLike, speech_ids: Sequence[Any] | NDArray[Any]) -> Rate:
    """The mean of `outcomes` (n,), each in [0, 1], with a 95 % Wilson interval clustered by speech.

    The cluster-robust variance V of the mean (u_g = sum of residuals of speech g, V = G/(G-1) sum u_g^2 /
    n^2) says how many independent rows the sample is worth, p(1-p)/V, and the Wilson interval is taken at
    that number. We prefer it to a percentile bootstrap, which has zero width when every row is a win, and to
    a normal interval, which also leaves [0, 1]. As in Korn and Graubard (1998) the sample is never worth more
    than its n rows, so many ties make the interval conservative. At a rate of 0 or 1 the correlation inside a
    speech cannot be seen and we assume the worst: one independent row per speech.
    """
    y = finite_vector(outcomes, "outcomes")
    if y.min() < 0 or y.max() > 1:
        raise ValueError(f"outcomes must lie in [0, 1], got {y.min():g} to {y.max():g}")
    speech, n_speeches = speech_index(speech_ids, y.size)
    rate = float(y.sum() / y.size)
    residual_sums = np.bincount(speech, weights=y - rate)
    variance = n_speeches / max(n_speeches - 1, 1) * float(residual_sums @ residual_sums) / y.size**2
    spread = rate * (1 - rate)
    unanimous = y.min() == y.max() and y[0] in (0.0, 1.0)
    effective_n = float(n_speeches) if unanimous else spread / max(variance, spread / y.size)
    return Rate(y.size, rate, *wilson_interval(rate, effective_n, n_speeches))


def accuracy(margins: ArrayLike, speech_ids: Sequence[Any] | NDArray[Any]) -> Rate:
    """Share of pairs with r_chosen > r_rejected, a tie counting half, with its interval clustered by speech.

    `margins` (n,) are r_chosen - r_rejected in logits.
    """
    return clustered_rate(_correct(finite_vector(margins, "margins")), speech_ids)


def auc(margins: ArrayLike) -> float:
    """Area under the ROC curve with every pair in both orders: P(m_i > -m_j) + P(m_i = -m_j) / 2.

    Over all i, j. It ranks the margins (n,) themselves: the sigmoid would only add ties, where it rounds to 0
    or 1.
    """
    m = finite_vector(margins, "margins")
    ranks = rankdata(np.concatenate([m, -m]))[: m.size]
    return float((ranks.sum() - m.size * (m.size + 1) / 2) / m.size**2)


def brier(margins: ArrayLike) -> float:
    """Mean squared error of p = sigmoid(margin) against its label; the same in either order of a pair."""
    return float(np.mean(expit(-finite_vector(margins, "margins")) ** 2))


def reliability(margins: ArrayLike, n_bins: int = 10) -> list[dict[str, float]]:
    """The occupied bins of a reliability plot, by rising confidence, as {low, high, confidence, accuracy, n}.

    A pair's confidence is the probability of the preference the model predicts, sigmoid(|margin|) in [0.5,
    1], and it is right, wrong or, at a tie, half right. `n_bins` bins of equal width [low, high) cut [0, 1];
    the last one also holds 1.
    """
    m = finite_vector(margins, "margins")
    if n_bins < 1:
        raise ValueError(f"n_bins must be at least 1, got {n_bins}")
    confidence = expit(np.abs(m))
    index = np.minimum((confidence * n_bins).astype(np.intp), n_bins - 1)
    counts = np.bincount(index, minlength=n_bins)
    confident = np.bincount(index, weights=confidence, minlength=n_bins)
    right = np.bincount(index, weights=_correct(m), minlength=n_bins)
    return [
        {
            "low": b / n_bins,
            "high": (b + 1) / n_bins,
            "confidence": float(confident[b] / counts[b]),
            "accuracy": float(right[b] / counts[b]),
            "n": int(counts[b]),
        }
        for b in np.flatnonzero(counts).tolist()
    ]


def ece(margins: ArrayLike, n_bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017): |accuracy - confidence| of a bin, weighted by its pairs.

    Over the bins of `reliability`. For an even `n_bins` this equals the error with every pair in both orders
    and bins of the probability itself; an odd number would there hide errors around 0.5 in one symmetric bin.
    """
    bins = reliability(margins, n_bins)
    return sum(b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / sum(b["n"] for b in bins)


def audit_reward_margins(
    margins: ArrayLike, speech_ids: Sequence[Any] | NDArray[Any], seed: int = 0, n_bins: int = 10
) -> dict[str, Any]:
    """Every figure of the reward-model audit over pairs: one row of the paper's table, with its uncertainty.

    `margins` (n,) are r_chosen - r_rejected in logits, `speech_ids` (n,) name each pair's client speech.
    Returns n, accuracy, auc, ece, brier, accuracy_low, accuracy_high and reliability. The interval has a
    closed form, so `seed` changes nothing: it is taken so that every audit is called alike. ValueError on
    empty or non-finite input.
    """
    right = accuracy(margins, speech_ids)
    return {
        "n": right.n,
        "accuracy": right.rate,
        "auc": auc(margins),
        "ece": ece(margins, n_bins),
        "brier": brier(margins),
        "accuracy_low": right.low,
        "accuracy_high": right.high,
        "reliability": reliability(margins, n_bins),
    }


def _correct(margins: Vector) -> Vector:
    """1 for a pair in the right order, 0 in the wrong one; one half at a tie, which is nothing but rounding."""
    return (np.sign(np.where(np.abs(margins) <= MARGIN_TOLERANCE, 0.0, margins)) + 1) / 2
