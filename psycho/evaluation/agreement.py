"""Does a judge order responses as the gold labels do? Agreement over pairs, and the correlation of ratings.

Used to validate a judge against experts or a stronger judge before it is trusted to label or to evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import cohen_kappa_score

from psycho.evaluation.metrics import Vector, finite_vector

GAP_TOLERANCE = 1e-9
CONSTANT_TOLERANCE = 1e-12


def pair_agreement(
    gold_a: ArrayLike, gold_b: ArrayLike, judge_a: ArrayLike, judge_b: ArrayLike, min_gap: float
) -> dict[str, Any]:
    """Share of pairs that the judge orders as gold does, as {n, agreement, judge_ties}.

    All four are (n,) ratings of responses a and b. Only pairs with |gold_a - gold_b| >= `min_gap` count (to
    1e-9, as mean ratings are not exact); a gold tie orders nothing and never counts, even at `min_gap` 0. A
    tie of the judge counts half. `n` is the number of pairs that count; where it is 0, agreement is None.
    ValueError on empty, unequal or non-finite input: a failed rating is left out before, it is not a
    disagreement.
    """
    ga, gb, ja, jb = _same_length(gold_a=gold_a, gold_b=gold_b, judge_a=judge_a, judge_b=judge_b)
    gold = ga - gb
    counted = np.abs(gold) >= max(min_gap - GAP_TOLERANCE, GAP_TOLERANCE)
    judge = np.where(np.abs(ja - jb) < GAP_TOLERANCE, 0.0, ja - jb)[counted]
    n = int(counted.sum())
    score = float(((np.sign(judge) * np.sign(gold[counted]) + 1) / 2).sum())
    return {"n": n, "agreement": score / n if n else None, "judge_ties": int((judge == 0).sum())}


def kappa(x: Sequence[int], y: Sequence[int]) -> float:
    """Cohen's kappa of two (n,) whole ratings, unweighted: agreement beyond chance, 0 for who always says the same.

    Where nearly all ratings are equal a correlation hangs on a few rows; kappa does not. 1 where both are one and the
    same constant.
    """
    if list(x) == list(y):
        return 1.0
    return float(cohen_kappa_score(x, y))


def correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Pearson's r of two (n,) vectors; None, never NaN, where one of them is constant (also n = 1)."""
    a, b = _same_length(x=x, y=y)
    da, db = a - a.mean(), b - b.mean()
    if _constant(a, da) or _constant(b, db):
        return None
    r = float((da / np.linalg.norm(da)) @ (db / np.linalg.norm(db)))
    return min(1.0, max(-1.0, r))


def _constant(values: Vector, deviations: Vector) -> bool:
    """Whether the deviations are rounding only."""
    return bool(np.abs(deviations).max() <= CONSTANT_TOLERANCE * np.abs(values).max())


def _same_length(**vectors: ArrayLike) -> list[Vector]:
    checked = [finite_vector(v, name) for name, v in vectors.items()]
    if len({v.size for v in checked}) > 1:
        sizes = ", ".join(f"{k} {v.size}" for k, v in zip(vectors, checked, strict=True))
        raise ValueError(f"unequal lengths: {sizes}")
    return checked
