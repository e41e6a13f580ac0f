"""What is watched over the rounds, when to stop, and which policy to keep."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import OnlineConfig
from psycho.inference.pool import WorkerPool
from psycho.training.groups import encode
from psycho.training.online.pairing import unsafe

Row = Mapping[str, Any]


def figures(samples: Sequence[Row], online: OnlineConfig) -> dict[str, Any]:
    """Figures of a round's samples; scores are those before the length penalty.

    `best_score` is the mean over speeches of the best sample's score, `spread` the mean over speeches of the standard
    deviation of the samples' scores.
    """
    known = [row["score"] for row in samples if row["score"] is not None]
    by_speech: dict[str, list[float]] = defaultdict(list)
    for row in samples:
        if row["score"] is not None:
            by_speech[row["speech_id"]].append(row["score"])
    speeches = max(1, len(by_speech))
    return {
        "samples": len(samples),
        "failed": len(samples) - len(known),
        "mean_score": sum(known) / max(1, len(known)),
        "best_score": sum(map(max, by_speech.values())) / speeches,
        "spread": sum(map(statistics.pstdev, by_speech.values())) / speeches,
        "mean_chars": sum(len(row["response"]) for row in samples) / max(1, len(samples)),
        "sampled_tokens": sum(row["output_tokens"] for row in samples),
        "judge_tokens": sum(row["judge_tokens"] for row in samples),
        "truncated": sum(row["truncated"] for row in samples),
        "floor_hits": len(unsafe(samples, online)),
    }


def mean_value(samples: Sequence[Row]) -> float | None:
    """The mean of the samples' values; None where there is none.

    An answer that is empty counts as the worst there was, or a policy would gain by falling silent; one that an engine
    refused to give, as where the speech is too long for it, is not the policy's fault and counts nothing.
    """
    known = [row["value"] for row in samples if row["value"] is not None]
    known += [min(known) for row in samples if known and not row["response"] and not row.get("error")]
    return sum(known) / len(known) if known else None


def said(index: int, facts: Row) -> str:
    """What was found after `index` rounds, for the progress line; empty where nothing was."""
    shown = (("dev", facts.get("dev_score")), ("held-out judge", facts.get("gold_score")))
    parts = [f"{name} {score:.2f}" for name, score in shown if score is not None]
    return f"after round {index}: {', '.join(parts)}" if parts else ""


def divergence(
    pool: WorkerPool, tokenizer: Any, policy: str, first: str, texts: Sequence[tuple[Any, str]]
) -> dict[str, float]:
    """The policy's distance from the first one, by its own samples (prompt messages, response).

    `kl`: mean log-ratio of a whole response, in nats, an estimate of the KL divergence (of the distribution that is
    sampled from, where temperature and top_p are 1). `entropy`: less the mean log-probability of a sampled token, in
    nats, an estimate of the entropy of the next token under the same condition.
    """
    rows = [encode(tokenizer, prompt, response) for prompt, response in texts]
    ids = [row.ids for row in rows]
    now = pool.read(policy, ids)
    then = now if policy == first else pool.read(first, ids)
    ratios, total, tokens = [], 0.0, 0
    for row, one, other in zip(rows, now, then, strict=True):
        if one is None or other is None:
            continue
        trained = [place for place, weight in enumerate(row.weights[1:]) if weight]
        ratios.append(sum(one[place] - other[place] for place in trained))
        total += sum(one[place] for place in trained)
        tokens += len(trained)
    if not tokens:
        return {}
    return {"kl": sum(ratios) / len(ratios), "entropy": -total / tokens}


def best(dev: Mapping[int, float | None], trained: int) -> int:
    """The number of rounds after which the dev score was highest (the earliest of equals); without one, all."""
    known = {index: score for index, score in dev.items() if index > 0 and score is not None}
    return min(known, key=lambda index: (-known[index], index)) if known else trained


def stops(dev: Mapping[int, float | None], trained: int, patience: int | None) -> bool:
    """True when `patience` rounds have passed since the best dev score; the first policy's counts too."""
    known = {index: score for index, score in dev.items() if score is not None}
    if patience is None or not known:
        return False
    highest = min(known, key=lambda index: (-known[index], index))
    return trained - highest >= patience
