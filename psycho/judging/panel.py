"""A panel: the ratings of several judges joined into one row a response, their disagreement kept.

Ratings and expected ratings are aggregated apart, by weight; the written rating is the aggregate rounded to a whole
one. A response that fewer judges than the quorum could rate is left out with that reason, never filled up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from psycho.config import JudgeConfig
from psycho.judging.evidence import quotations
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, overall

Row = Mapping[str, Any]
_SAME = ("request_id", "speech_id", "split", "model")
_SUMS = ("attempts", "prompt_tokens", "output_tokens")


def join_panel(
    requests: Sequence[str], judged: Sequence[Sequence[Row]], judge: JudgeConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One row of `schema.RATING` a response, and a quarantine row where too few judges rated it.

    Args:
        requests: the ids of all responses.
        judged: per judge of the panel, in its order, the rows that it rated.
    """
    weights = [member.weight for member in judge.panel]
    found: dict[str, list[tuple[Row, float]]] = {request_id: [] for request_id in requests}
    for rows, weight in zip(judged, weights, strict=True):
        for row in rows:
            found[row["request_id"]].append((row, weight))
    quorum = judge.quorum or len(judge.panel) // 2 + 1
    kept = [_joined(votes, judge) for _, votes in sorted(found.items()) if len(votes) >= quorum]
    few = [
        {
            "request_id": request_id,
            "reason": f"rated by {len(votes)} of {len(judge.panel)} judges, the quorum is {quorum}",
        }
        for request_id, votes in sorted(found.items())
        if len(votes) < quorum
    ]
    return kept, few


def _joined(votes: Sequence[tuple[Row, float]], judge: JudgeConfig) -> dict[str, Any]:
    rows, weights = [row for row, _ in votes], [weight for _, weight in votes]
    means = {stem: aggregate([row[f"{stem}_rating"] for row in rows], weights, judge.aggregate) for stem in STEMS}
    ratings = {stem: round_rating(value) for stem, value in means.items()}
    expected = {stem: _expected(rows, weights, stem, judge.aggregate) for stem in STEMS}
    known = {stem: value for stem, value in expected.items() if value is not None}
    nearest = {stem: _nearest(rows, stem, means[stem]) for stem in STEMS}
    spread = [_spread([row[f"{stem}_rating"] for row in rows], weights) for stem in STEMS]
    return {
        **{name: rows[0][name] for name in _SAME},
        **{f"{stem}_rating": ratings[stem] for stem in STEMS},
        **{f"{stem}_evidence": nearest[stem][f"{stem}_evidence"] for stem in STEMS},
        "overall": overall(ratings),
        "floored": any(row["floored"] for row in rows),
        **{name: sum(row[name] for row in rows) for name in _SUMS},
        **{f"{stem}_expected": expected[stem] for stem in STEMS},
        "expected_overall": overall(known) if len(known) == len(STEMS) else None,
        "status": "ok" if len(rows) == len(judge.panel) else "partial",
        "judge": f"{judge.aggregate} of {', '.join(row['judge'] for row in rows)}",
        "prompt_version": ", ".join(dict.fromkeys(row["prompt_version"] for row in rows)),
        "disagreement": float(np.mean(spread)),
        "unfaithful_evidence": [stem for stem in STEMS if stem in nearest[stem]["unfaithful_evidence"]],
    }


def aggregate(values: Sequence[float], weights: Sequence[float], how: Literal["mean", "median"]) -> float:
    """The weighted mean, or the weighted median (the middle of two where the weights split evenly)."""
    if how == "mean":
        return float(np.average(values, weights=weights))
    order = np.argsort(values, kind="stable")
    ordered, reached = np.asarray(values, dtype=float)[order], np.cumsum(np.asarray(weights, dtype=float)[order])
    half = reached[-1] / 2
    low = ordered[np.searchsorted(reached, half - 1e-9)]
    high = ordered[np.searchsorted(reached, half + 1e-9)]
    return float((low + high) / 2)


def round_rating(value: float) -> int:
    """The nearest rating; a half goes up."""
    return min(MAX_RATING, max(MIN_RATING, math.floor(value + 0.5)))


def _expected(rows: Sequence[Row], weights: Sequence[float], stem: str, how: Literal["mean", "median"]) -> float | None:
    values = [row[f"{stem}_expected"] for row in rows]
    return None if None in values else aggregate(values, weights, how)


def _spread(values: Sequence[float], weights: Sequence[float]) -> float:
    mean = np.average(values, weights=weights)
    return math.sqrt(float(np.average((np.asarray(values, dtype=float) - mean) ** 2, weights=weights)))


def _nearest(rows: Sequence[Row], stem: str, value: float) -> Row:
    """The first judge whose rating is nearest to the panel's, of those one that invented nothing: its evidence speaks
    for it."""
    return min(rows, key=lambda row: (abs(row[f"{stem}_rating"] - value), stem in row["unfaithful_evidence"]))


def judge_report(judge: JudgeConfig, rows: Sequence[Row], failed: Sequence[Row]) -> dict[str, Any]:
    """What one judge did, for the manifest: rows by status, retried, floored, tokens."""
    return {
        "model": judge.model,
        "mode": judge.mode,
        "status": {"ok": len(rows), "failed": len(failed), **Counter(row["status"] for row in failed)},
        "retried": sum(row["attempts"] > 1 for row in (*rows, *failed)),
        "floored": sum(bool(row["floored"]) for row in rows),
        "output_tokens": sum(row["output_tokens"] for row in (*rows, *failed)),
        "evidence": evidence_report(judge, rows),
    }


def evidence_report(judge: JudgeConfig, rows: Sequence[Row]) -> dict[str, dict[str, int]]:
    """By principle: the ratings whose evidence quotes something, and those of them whose quotation stands nowhere in
    what it quotes. Empty where nobody looked."""
    if judge.evidence_check == "off":
        return {}
    found = {}
    for stem in STEMS:
        wrong = sum(stem in row["unfaithful_evidence"] for row in rows)
        right = sum(bool(quotations(stem, row[f"{stem}_evidence"] or "", judge.template)) for row in rows)
        if wrong + right:
            found[stem] = {"quoted": wrong + right, "unfaithful": wrong}
    return found


def sum_evidence(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The same of all judges, with the unfaithful share of what was quoted."""
    found: dict[str, dict[str, float]] = {}
    for stem in STEMS:
        counts = [report["evidence"][stem] for report in reports if stem in report["evidence"]]
        if counts:
            quoted, wrong = (sum(count[key] for count in counts) for key in ("quoted", "unfaithful"))
            found[stem] = {"quoted": quoted, "unfaithful": wrong, "unfaithful_share": wrong / quoted}
    return found
