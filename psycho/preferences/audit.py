"""What the pairs would teach, right and wrong: gaps, lengths, who beats whom, safety, and shortcuts.

A shortcut is a rule that tells chosen from rejected without reading: "the longer one", or "the one that starts with
these words". Where it is often right, a reward model may learn it and nothing else. Each rule is judged on speeches it
was not fitted on (cross-validation grouped by speech); at one half it knows nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from psycho.preferences.pairs import safety_loss
from psycho.schema import stable_id

Row = Mapping[str, Any]
Rate = Callable[[Sequence[float], Sequence[str]], Any]  # outcomes and speech ids to (n, rate, low, high)
OPENING_WORDS = 5
_FOLDS, _MIN_SPEECHES, _MAX_PAIRS = 5, 10, 20_000
_BINS = 41


def audit_pairs(splits: Mapping[str, Sequence[Row]], rate: Rate, seed: int = 0) -> dict[str, Any]:
    """`preferences/audit.json`: the figures of every split that has pairs.

    Args:
        splits: rows of `schema.PREFERENCE_PAIR` by split.
        rate: the mean of outcomes in [0, 1] with its interval, clustered by speech.
        seed: of the draw of pairs where there are more than the shortcut rules need.
    """
    return {name: _audit(rows, rate, seed) for name, rows in splits.items() if rows}


def _audit(pairs: Sequence[Row], rate: Rate, seed: int) -> dict[str, Any]:
    wins = Counter((pair["chosen_model"], pair["rejected_model"]) for pair in pairs)
    return {
        "pairs": len(pairs),
        "speeches": len({pair["speech_id"] for pair in pairs}),
        "rated": sum(pair["chosen_safety_rating"] is not None for pair in pairs),
        "gap": _gaps(pairs),
        "length": _lengths(pairs),
        "wins": [{"chosen": c, "rejected": r, "pairs": n} for (c, r), n in sorted(wins.items())],
        "safety": _safety(pairs),
        "shortcuts": shortcuts(pairs, rate, seed),
    }


def _gaps(pairs: Sequence[Row]) -> dict[str, Any]:
    """Of the pairs whose gap is known; None of what no pair tells. `by_sevenths` is of gaps in overall rating alone: an
    imported set's own scores have a scale of their own."""
    known = [pair["gap"] for pair in pairs if pair["gap"] is not None]
    rated = [pair["gap"] for pair in pairs if pair["chosen_safety_rating"] is not None]
    sevenths = Counter(round(gap * 7) for gap in rated)
    return {
        "known": len(known),
        "mean": float(np.mean(known)) if known else None,
        "median": float(np.median(known)) if known else None,
        "min": min(known, default=None),
        "max": max(known, default=None),
        "by_sevenths": [sevenths[place] for place in range(4 * 7 + 1)] if rated else None,
    }


def _lengths(pairs: Sequence[Row]) -> dict[str, Any]:
    """Lengths in characters; the histogram of chosen less rejected is symmetric about 0 and holds every pair."""
    chosen, rejected = (np.array([len(pair[side]) for pair in pairs]) for side in ("chosen", "rejected"))
    difference = chosen - rejected
    reach = max(1, int(np.abs(difference).max()))
    edges = np.linspace(-reach, reach, _BINS + 1)
    return {
        "chosen_mean": float(chosen.mean()),
        "rejected_mean": float(rejected.mean()),
        "difference_mean": float(difference.mean()),
        "difference_median": float(np.median(difference)),
        "chosen_longer": float(np.mean(_ordered(difference))),
        "edges": edges.round(2).tolist(),
        "counts": np.histogram(difference, edges)[0].tolist(),
    }


def _safety(pairs: Sequence[Row]) -> dict[str, Any]:
    """Pairs whose chosen side is rated less safe, in all and by how much; None where no pair is rated."""
    losses = Counter(loss for pair in pairs if (loss := safety_loss(pair)) is not None)
    if not losses:
        return {"inverted": None, "by_loss": None}
    inverted = {str(loss): count for loss, count in sorted(losses.items()) if loss > 0}
    return {"inverted": sum(inverted.values()), "by_loss": inverted}


def shortcuts(pairs: Sequence[Row], rate: Rate, seed: int = 0) -> dict[str, Any]:
    """Accuracy of rules that do not read; None where there are too few speeches to fit one.

    `longer`: the longer response wins (nothing is fitted). `length`: logistic regression on the difference and the
    ratio of the lengths. `opening`: logistic regression on the hashed first five words of each side.
    """
    drawn = _draw(pairs, seed)
    ids = [pair["speech_id"] for pair in drawn]
    outcomes = {
        "longer": _ordered(np.array([len(pair["chosen"]) - len(pair["rejected"]) for pair in drawn])),
        "length": _cross_validated(_length_features(drawn), ids),
        "opening": _cross_validated(_opening_features(drawn), ids),
    }
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        n, share, low, high = rate(outcome.tolist(), ids) if outcome is not None else (0, None, None, None)
        found[name] = {"n": n, "accuracy": share, "low": low, "high": high} if n else None
    return found


def _draw(pairs: Sequence[Row], seed: int) -> list[Row]:
    """At most `_MAX_PAIRS`, speech after speech by hash: with more the fit would take long and gain nothing."""
    if len(pairs) <= _MAX_PAIRS:
        return list(pairs)
    order = {speech: stable_id("audit", seed, speech) for speech in {pair["speech_id"] for pair in pairs}}
    return sorted(pairs, key=lambda pair: order[pair["speech_id"]])[:_MAX_PAIRS]


def _ordered(margins: Any) -> Any:
    """1 where the chosen side comes first by the rule, one half at a tie."""
    return (np.sign(margins) + 1) / 2


def _length_features(pairs: Sequence[Row]) -> Any:
    from scipy.sparse import csr_matrix

    lengths = np.array([[len(pair["chosen"]), len(pair["rejected"])] for pair in pairs], dtype=float)
    logs = np.log1p(lengths)
    both = np.column_stack([lengths[:, 0] - lengths[:, 1], logs[:, 0] - logs[:, 1]])
    return csr_matrix(both / np.maximum(np.sqrt(np.mean(both**2, axis=0)), 1e-9))


def _opening_features(pairs: Sequence[Row]) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(
        n_features=2**14, ngram_range=(1, 3), token_pattern=r"\S+", alternate_sign=False, norm=None, binary=True
    )
    sides = [
        hashed.transform([" ".join(pair[side].split()[:OPENING_WORDS]) for pair in pairs])
        for side in ("chosen", "rejected")
    ]
    difference = (sides[0] - sides[1]).tocsc()
    return difference[:, np.flatnonzero(np.diff(difference.indptr))].tocsr()  # words that tell the sides apart


def _cross_validated(features: Any, speech_ids: Sequence[str]) -> Any:
    """Outcomes (n,) of a logistic regression without an intercept on features that change sign with the order.

    Every other pair is read as (rejected, chosen) while fitting, so that there are two classes; grouped by speech, for
    the responses of one speech share words.
    """
    if len(set(speech_ids)) < _MIN_SPEECHES:
        return None
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold

    labels = np.where(np.arange(len(speech_ids)) % 2, 1.0, -1.0)
    turned = features.multiply(labels[:, None]).tocsr()
    margins = np.zeros(len(speech_ids))
    for fit, held in GroupKFold(_FOLDS).split(labels, groups=np.asarray(speech_ids)):
        model = LogisticRegression(fit_intercept=False, solver="liblinear", random_state=0)
        model.fit(turned[fit], labels[fit])
        margins[held] = model.decision_function(features[held])
    return _ordered(margins)
