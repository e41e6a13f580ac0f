"""The same figures against the truth, which only the nano world has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycho.evaluation.agreement import correlation, kappa, pair_agreement
from psycho.evaluation.comparison import outcome
from psycho.evaluation.winrate import win_rate
from psycho.nano import gold
from psycho.principles import STEMS

Row = Mapping[str, Any]


def gold_ratings(items: Sequence[tuple[str, str]]) -> list[gold.GoldRating] | None:
    """Gold of (speech, response) items; None when a speech is not of the nano grammar, for then there is no truth."""
    rated = []
    for question, response in items:
        speech = gold.parse_speech(question)
        if speech is None:
            return None
        rated.append(gold.rate(speech, response))
    return rated


def judge_against_gold(rows: Sequence[Row], truth: Sequence[gold.GoldRating], min_gap: float = 1.0) -> dict[str, Any]:
    """Correlation of the judge with gold per principle and overall, and agreement on pairs of one speech.

    Args:
        rows: rating rows (`schema.RATING`), one per gold rating.
        min_gap: pairs count from this gold gap on.
    """
    correlations = {
        stem: correlation([row[f"{stem}_rating"] for row in rows], [g.ratings[stem] for g in truth]) for stem in STEMS
    }
    judged, known = [row["overall"] for row in rows], [g.overall for g in truth]
    correlations["overall"] = correlation(judged, known)
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row["speech_id"], []).append(index)
    pairs = [(a, b) for members in groups.values() for i, a in enumerate(members) for b in members[i + 1 :]]
    agreement: Mapping[str, Any] = {"agreement": None, "n": 0}
    if pairs:
        agreement = pair_agreement(
            [known[a] for a, _ in pairs],
            [known[b] for _, b in pairs],
            [judged[a] for a, _ in pairs],
            [judged[b] for _, b in pairs],
            min_gap,
        )
    return {
        "n": len(rows),
        "kappa_gold": {
            stem: kappa([row[f"{stem}_rating"] for row in rows], [g.ratings[stem] for g in truth]) for stem in STEMS
        },
        "pair_agreement_gold": agreement["agreement"],
        "pairs": agreement["n"],
        "correlation_gold": correlations,
    }


def gold_win_rate(
    policy: Sequence[gold.GoldRating], baseline: Sequence[gold.GoldRating], speeches: Sequence[str]
) -> dict[str, Any]:
    """Gold win rate of a policy with its interval, its mean rating, and the share of its text on the grammar."""
    outcomes = [outcome(p.overall, b.overall) for p, b in zip(policy, baseline, strict=True)]
    return {
        **win_rate(outcomes, speeches),
        "mean_rating": sum(p.overall for p in policy) / len(policy),
        "on_grammar": sum(p.on_grammar for p in policy) / len(policy),
    }
