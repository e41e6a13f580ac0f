"""How far a judge agrees with human (or gold) ratings: what has to be looked at before it is trusted.

Per principle: quadratic-weighted kappa and the confusion of whole ratings, Spearman's rank correlation, the mean bias;
overall also the agreement on pairs of one speech by how far apart the two truly are. Beside Spearman and the pairs
stands the same figure of the expected ratings, which tell responses apart that have the same rating: that helps where
people's own ratings are fine and hurts where they tie. Where several people rated a response, their mean stands for
them (rounded for kappa).
Intervals are percentiles of a bootstrap that draws whole speeches, for responses to one speech are not independent.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from scipy.stats import spearmanr
from statsmodels.stats.inter_rater import cohens_kappa

from psycho.evaluation.agreement import GAP_TOLERANCE, pair_agreement
from psycho.evaluation.metrics import Vector, speech_index
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, overall

Row = Mapping[str, Any]
GAPS = (0.0, 0.5, 1.0, 1.5, 2.0)  # lower ends of the bins of |difference in overall rating|
BOOTSTRAPS = 500
_SCALE = range(MIN_RATING, MAX_RATING + 1)


def calibration(human: Sequence[Row], judged: Sequence[Row], seed: int = 0) -> dict[str, Any]:
    """Every figure of the comparison.

    Args:
        human: rows with `request_id`, `speech_id`, `rater`, the seven `{stem}_rating`; several a response are raters.
        judged: rating rows (`schema.RATING`); responses without one are left out and counted.

    Returns:
        n, speeches, raters, unrated, principles (a row each, with `overall`), pairs (a row a gap), raters_kappa.
    """
    by_response: dict[str, list[Row]] = defaultdict(list)
    for row in human:
        by_response[row["request_id"]].append(row)
    rated = {row["request_id"]: row for row in judged}
    both = [(by_response[i], rated[i]) for i in sorted(by_response) if i in rated]
    result: dict[str, Any] = {
        "n": len(both),
        "unrated": len(by_response) - len(both),
        "raters": len({row["rater"] for row in human}),
        "speeches": len({people[0]["speech_id"] for people, _ in both}),
        "principles": {},
        "pairs": [],
    }
    if not both:
        return result
    speeches, count = speech_index([people[0]["speech_id"] for people, _ in both], len(both))
    draws = _draws(speeches, count, seed)
    truth = {stem: np.array([np.mean([p[f"{stem}_rating"] for p in people]) for people, _ in both]) for stem in STEMS}
    for stem in STEMS:
        given = np.array([row[f"{stem}_rating"] for _, row in both], dtype=float)
        finer = _expected([row for _, row in both], f"{stem}_expected", given)
        result["principles"][stem] = _principle(truth[stem], given, finer, draws)
    known = np.array([overall({stem: truth[stem][i] for stem in STEMS}) for i in range(len(both))])
    given = np.array([row["overall"] for _, row in both], dtype=float)
    finer = _expected([row for _, row in both], "expected_overall", given)
    result["principles"]["overall"] = _continuous(known, given, finer, draws)
    result["pairs"] = _pairs_by_gap(known, given, finer, speeches, draws)
    result["raters_kappa"] = _between_raters(list(by_response.values()))
    return result


def _expected(rows: Sequence[Row], column: str, otherwise: Vector) -> Vector:
    values = [row.get(column) for row in rows]
    return otherwise if None in values else np.array(values, dtype=float)


def _draws(speeches: NDArray[np.intp], count: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows of each bootstrap sample: whole speeches, drawn with replacement."""
    members = [np.flatnonzero(speeches == speech) for speech in range(count)]
    random = np.random.default_rng(seed)
    return [np.concatenate([members[i] for i in random.integers(0, count, count)]) for _ in range(BOOTSTRAPS)]


def _principle(truth: Vector, given: Vector, finer: Vector, draws: Sequence[NDArray[np.intp]]) -> dict[str, Any]:
    whole = np.floor(truth + 0.5)
    row = _continuous(truth, given, finer, draws)
    row |= _with_interval("kappa", lambda rows: weighted_kappa(confusion(whole[rows], given[rows])), draws, truth.size)
    row["confusion"] = confusion(whole, given).tolist()
    return row


def _continuous(truth: Vector, given: Vector, finer: Vector, draws: Sequence[NDArray[np.intp]]) -> dict[str, Any]:
    found = _with_interval("spearman", lambda rows: rank_correlation(truth[rows], given[rows]), draws, truth.size)
    found["spearman_expected"] = rank_correlation(truth, finer)
    return found | _with_interval("bias", lambda rows: float((given[rows] - truth[rows]).mean()), draws, truth.size)


def _with_interval(
    name: str, figure: Callable[[NDArray[np.intp]], float | None], draws: Sequence[NDArray[np.intp]], n: int
) -> dict[str, float | None]:
    """The figure over all rows and its 95 % interval; None where it is undefined (no spread)."""
    value = figure(np.arange(n))
    sampled = [found for rows in draws if (found := figure(rows)) is not None] if value is not None else []
    low, high = np.percentile(sampled, [2.5, 97.5]).tolist() if sampled else (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def confusion(truth: Vector, given: Vector) -> NDArray[np.int64]:
    """Counts (5, 5) of whole ratings: rows the truth, columns the judge, both from 1."""
    size = len(_SCALE)
    cells = (truth.astype(int) - MIN_RATING) * size + given.astype(int) - MIN_RATING
    return np.bincount(cells, minlength=size * size).reshape(size, size)


def weighted_kappa(table: NDArray[np.int64]) -> float | None:
    """Quadratic-weighted kappa (Cohen 1968) of a confusion table; None where chance leaves nothing to agree on."""
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(cohens_kappa(table, wt="quadratic", return_results=False))
    return value if math.isfinite(value) else None


def rank_correlation(x: Vector, y: Vector) -> float | None:
    """Spearman's rank correlation; None where one side is constant."""
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spearmanr(x, y).statistic)


def _pairs_by_gap(
    truth: Vector, given: Vector, finer: Vector, speeches: NDArray[np.intp], draws: Sequence[NDArray[np.intp]]
) -> list[dict[str, Any]]:
    """Agreement on the order of two responses to one speech, by the true difference between them.

    A drawn speech brings its pairs along, so the bootstrap weighs pairs by how often their speech was drawn.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, speech in enumerate(speeches.tolist()):
        members[speech].append(index)
    pairs = np.array([pair for rows in members.values() for pair in combinations(rows, 2)], dtype=int).reshape(-1, 2)
    gaps = np.abs(truth[pairs[:, 0]] - truth[pairs[:, 1]])
    drawn = np.array([np.bincount(rows, minlength=truth.size) for rows in draws])
    found = []
    for low, high in zip(GAPS, (*GAPS[1:], math.inf), strict=True):
        chosen = pairs[(gaps > GAP_TOLERANCE) & (gaps >= low - GAP_TOLERANCE) & (gaps < high - GAP_TOLERANCE)]
        if not len(chosen):
            continue
        a, b = chosen.T
        whole = pair_agreement(truth[a], truth[b], given[a], given[b], low)
        right = (np.sign(truth[a] - truth[b]) * np.sign(_rounded(given[a] - given[b])) + 1) / 2
        weight = drawn[:, a].astype(float)  # both responses of a pair are of one speech, drawn equally often
        totals = weight.sum(axis=1)
        sampled = (weight @ right)[totals > 0] / totals[totals > 0]
        interval = np.percentile(sampled, [2.5, 97.5]).tolist()
        found.append(
            {
                "gap": low,
                "below": None if math.isinf(high) else high,
                "n": whole["n"],
                "agreement": whole["agreement"],
                "low": interval[0],
                "high": interval[1],
                "judge_ties": whole["judge_ties"],
                "agreement_expected": pair_agreement(truth[a], truth[b], finer[a], finer[b], low)["agreement"],
            }
        )
    return found


def _rounded(differences: Vector) -> Vector:
    return np.where(np.abs(differences) < GAP_TOLERANCE, 0.0, differences)


def _between_raters(responses: Sequence[Sequence[Row]]) -> dict[str, float | None] | None:
    """Kappa between people over all pairs of raters of one response: what a judge can be expected to reach."""
    pairs = [pair for people in responses for pair in combinations(people, 2)]
    if not pairs:
        return None
    found = {}
    for stem in STEMS:
        one, other = (np.array([pair[side][f"{stem}_rating"] for pair in pairs], dtype=float) for side in (0, 1))
        table = confusion(one, other)
        found[stem] = weighted_kappa(table + table.T)  # no rater comes first
    return found


def calibration_table(result: Mapping[str, Any]) -> Table:
    """What `--calibrate` prints."""
    title = f"{result['judge']} against {result['n']:,} rated responses to {result['speeches']:,} speeches"
    heads = ("principle", "weighted κ [95 %]", "Spearman [95 %]", "bias [95 %]")
    table = Table(*heads, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, row in result["principles"].items():
        table.add_row(name, *(_cell(row, figure) for figure in ("kappa", "spearman", "bias")))
    said = [
        f"  {_gap(row)} apart: {row['agreement']:.2f} [{row['low']:.2f}, {row['high']:.2f}], n = {row['n']:,}"
        for row in result["pairs"]
    ]
    left_out = sum(result.get("left_out", {}).values())
    table.caption = "\n".join(
        [
            "weighted κ: agreement beyond chance, 1 is perfect, 0 is chance",
            "Spearman: correlation of ranks; bias: mean rating of the judge less that of the raters",
            "share of two responses to one speech in the raters' order (.5 is chance), by how far apart they are:",
            *said,
            f"{left_out} left out",
        ]
    )
    table.caption_justify = "left"
    return table


def _gap(row: Row) -> str:
    return f"≥ {row['gap']:g}" if row["below"] is None else f"{row['gap']:g} to {row['below']:g}"


def _cell(row: Row, figure: str) -> str:
    if figure not in row:
        return ""
    if row[figure] is None:
        return "no spread"
    return f"{row[figure]:.2f} [{row[f'{figure}_low']:.2f}, {row[f'{figure}_high']:.2f}]"
