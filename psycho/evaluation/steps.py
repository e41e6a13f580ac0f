"""Did each step of the training gain, and which policy is best? Compared on the same speeches, speech by speech.

Every policy answers the same held-out speeches, so two policies are compared by the difference on each speech: what
makes a speech easy or hard for both drops out, and the interval of the difference says whether one gained on the
other, which the two intervals of their rates do not. Everything here is a pure function of one row per policy and
speech.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import t as student_t

from psycho.evaluation.metrics import finite_vector, speech_index

Row = Mapping[str, Any]
Found = dict[str, Any]

STEP_FIGURES = {"win_rate": "outcome", "gold_win_rate": "gold_outcome", "gold_mean_rating": "gold_rating"}
NAMES = {"base": "the model before training", "sft": "SFT", "dpo": "DPO", "online": "online DPO"}
_PRIOR = 1.0  # of the two made-up differences: a whole win, or a whole point of rating


def paired_difference(
    before: ArrayLike, after: ArrayLike, speech_ids: Sequence[Any] | NDArray[Any], bound: float = math.inf
) -> Found:
    """Mean of `after - before` with its 95 % interval clustered by speech, as {n, difference, low, high}.

    The interval is that of Bonett and Price (2012) for paired proportions, with the cluster-robust variance and
    Student's t: two made-up speeches, one that `after` wins by 1 and one that it loses by 1, are added before mean
    and variance of the interval are taken. So a handful of speeches, or policies that never differ, give no interval
    of zero width. The difference itself is the plain mean. With one speech nothing is known about the spread.

    Args:
        before: (n,) outcomes or ratings of one policy.
        after: (n,) those of the other, of the same speeches in the same order.
        speech_ids: (n,) each row's client speech.
        bound: the largest difference that can be, 1 for outcomes; the interval ends there.

    Raises:
        ValueError: empty, unequal or non-finite input.
    """
    one, other = finite_vector(before, "before"), finite_vector(after, "after")
    if one.size != other.size:
        raise ValueError(f"unequal lengths: before {one.size}, after {other.size}")
    speech, n_speeches = speech_index(speech_ids, one.size)
    differences = other - one
    mean = float(differences.mean())
    if n_speeches < 2:
        return {"n": one.size, "difference": mean, "low": -bound, "high": bound}
    padded = np.concatenate([differences, [_PRIOR, -_PRIOR]])
    clusters = np.concatenate([speech, [n_speeches, n_speeches + 1]])
    centre = float(padded.mean())
    sums = np.bincount(clusters, weights=padded - centre)
    count = n_speeches + 2
    deviation = math.sqrt(count / (count - 1) * float(sums @ sums)) / padded.size
    half = float(student_t.ppf(0.975, n_speeches - 1)) * deviation
    low, high = max(-bound, min(mean, centre - half)), min(bound, max(mean, centre + half))
    return {"n": one.size, "difference": mean, "low": low, "high": high}


def compare(rows: Sequence[Row], before: str, after: str, figure: str = "outcome") -> Found | None:
    """The paired difference of two policies over the speeches for which both have the figure; None without any.

    Args:
        rows: `policy`, `speech_id` and the figure, a number or None, at most one row per policy and speech.
        figure: the column to compare; a difference of outcomes is at most 1.
    """
    known = {name: _figures(rows, name, figure) for name in (before, after)}
    shared = sorted(known[before].keys() & known[after].keys())
    if not shared:
        return None
    one, other = ([known[name][speech] for speech in shared] for name in (before, after))
    return paired_difference(one, other, shared, 1.0 if figure.endswith("outcome") else 4.0)


def steps(rows: Sequence[Row], order: Sequence[str]) -> list[Found]:
    """The paired difference of each policy to the one before it.

    Args:
        rows: one per policy and speech: `policy`, `speech_id`, `outcome` against the baseline (1 win, .5 tie, 0 loss,
            None where it was not judged); where the truth is known, `gold_outcome` and `gold_rating` too.
        order: names of the policies in the order of their training; those without a row are passed over.

    Returns:
        {from, to, win_rate, gold_win_rate, gold_mean_rating} a step, each figure as {n, difference, low, high}; a
        figure that no speech has for both is left out.
    """
    there = [name for name in order if any(row["policy"] == name for row in rows)]
    found = []
    for before, after in itertools.pairwise(there):
        figures = {name: compare(rows, before, after, column) for name, column in STEP_FIGURES.items()}
        found.append({"from": before, "to": after} | {name: value for name, value in figures.items() if value})
    return found


def best_policy(rows: Sequence[Row], order: Sequence[str], figure: str = "outcome") -> Found | None:
    """The policy with the highest win rate, and whether these speeches set it apart from the others.

    It is called the best only where the paired interval of its lead over every other policy is above 0. None where no
    policy was judged.

    Returns:
        policy (None: the first cannot be told apart from another), highest (the name with the highest rate), rate,
        not_told_apart (names of the others), runner_up and its `difference`, `low`, `high`, `n` (highest less
        runner-up; left out where there is no other policy or no shared speech).
    """
    rates = {name: list(_figures(rows, name, figure).values()) for name in order}
    ranked = sorted((name for name in order if rates[name]), key=lambda name: -float(np.mean(rates[name])))
    if not ranked:
        return None
    first, *others = ranked
    leads = {other: compare(rows, other, first, figure) for other in others}
    close = [other for other in others if (lead := leads[other]) is None or lead["low"] <= 0]
    return {
        "policy": None if close else first,
        "highest": first,
        "rate": float(np.mean(rates[first])),
        "not_told_apart": close,
        "runner_up": others[0] if others else None,
        **((leads[others[0]] if others else None) or {}),
    }


def _figures(rows: Sequence[Row], policy: str, figure: str) -> dict[str, float]:
    """The policy's figure by speech, where it is known."""
    return {row["speech_id"]: row[figure] for row in rows if row["policy"] == policy and row.get(figure) is not None}


def step_sentence(step: Row) -> str:
    """What a step came to, in plain words: gained, lost, or neither; where judge and truth part, both verdicts."""
    before, after = (str(NAMES.get(step[side], step[side])) for side in ("from", "to"))
    after = after[0].upper() + after[1:]
    judged, known = step.get("win_rate"), step.get("gold_win_rate")
    if judged is None:
        text = f"{after} cannot be compared with {before}: the judge compared no speech for both"
    elif known is None:
        text = f"{after} {_verdict(judged)} {before}: {signed(judged)}"
    elif _verdict(judged) == _verdict(known):
        text = f"{after} {_verdict(judged)} {before}: {signed(judged)} by the judge, {signed(known)} by the truth"
    else:
        text = f"{after} {_verdict(judged)} {before} by the judge, {signed(judged)}, but {_verdict(known)} it by the "
        text += f"truth, {signed(known)}"
    if "gold_mean_rating" in step:
        text += f"; true rating {signed(step['gold_mean_rating'])}"
    return f"{text}."


def best_sentence(best: Row, by: str = "the judge") -> str:
    """Which policy is best, or which ones cannot be told apart, with the evidence."""
    first = NAMES.get(best["highest"], best["highest"])
    rate = f"win rate {best['rate']:.0%}".replace("%", " %")
    if not best["runner_up"]:
        return f"Only {first} was compared, by {by}: {rate}."
    evidence = f"{signed(best)} over {NAMES.get(best['runner_up'], best['runner_up'])}" if "low" in best else ""
    evidence = f", {evidence}, n = {best['n']:,}" if evidence else ""
    if best["policy"]:
        return f"Best by {by}: {first} ({rate}{evidence})."
    names = [first, *(NAMES.get(name, name) for name in best["not_told_apart"])]
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    return f"No single best by {by}: {listed} cannot be told apart ({first}: {rate}{evidence})."


def _verdict(figure: Row) -> str:
    if figure["low"] > 0:
        return "gained on"
    return "lost against" if figure["high"] < 0 else "did not gain on"


def signed(figure: Row) -> str:
    """A difference with its interval, as +.01 [-.02, .04]; a third decimal where two would hide a bound's sign."""
    digits = 3 if any(0 < abs(figure[name]) < 0.005 for name in ("low", "high")) else 2
    value, low, high = (_short(figure[name], digits) for name in ("difference", "low", "high"))
    return f"{'' if value.startswith('-') else '+'}{value} [{low}, {high}]"


def _short(value: float, digits: int) -> str:
    """A few decimals without the zero in front of the point; never -.00."""
    text = f"{value:.{digits}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    return re.sub(r"^(-?)0\.", r"\1.", text)
