"""A judge that the policy is not trained to please, asked about its answers to dev speeches every few rounds.

A scorer that is optimised against goes on rising after the answers have stopped getting better (Gao et al. 2023,
arXiv 2210.10760); a second opinion shows where. It only watches: what is kept and when to stop is the dev score's.
In the nano world the truth may stand for that judge, since there it is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import NO_HELD_OUT, Config
from psycho.errors import BadInput
from psycho.models import resolve
from psycho.nano.truth import gold_ratings
from psycho.progress import Reporter
from psycho.schema import stable_seed
from psycho.training.online.engines import Engines

Row = Mapping[str, Any]
KEYS = ("gold_score", "gold_rated", "gold_failed", "gold_tokens")


def held_out_model(config: Config, dev: Sequence[Mapping[str, str]]) -> str:
    """The model that is asked; empty where nobody is, or the truth.

    Raises:
        BadInput: there is neither such a judge nor a truth.
    """
    if config.online.gold_every is None:
        return ""
    if not dev:
        raise BadInput("online.gold_every rates answers to dev speeches, and the run has none; raise pairs.dev_share")
    if config.evaluation.judge:
        return resolve(config, config.evaluation.judge.model)
    if gold_ratings([(speech["question"], "") for speech in dev]) is None:
        raise BadInput(NO_HELD_OUT)
    return ""


def due(config: Config, index: int) -> bool:
    """True where the held-out judge is asked after `index` rounds: before the first, to compare with, and last."""
    every = config.online.gold_every
    return every is not None and (index % every == 0 or index == config.online.rounds)


def opinion(
    engines: Engines,
    config: Config,
    speeches: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Mean overall rating of an answer to each dev speech (`rows` of `rollout.SAMPLE`, in the speeches' order).

    Returns:
        `gold_score` (1-5; None where nothing was rated), `gold_rated`, `gold_failed` (empty answers, and those the
        judge could not rate) and `gold_tokens`, which the judge read and wrote.
    """
    asked = [(speech, row) for speech, row in zip(speeches, rows, strict=True) if row["response"]]
    items = [(speech["question"], row["response"], speech.get("history")) for speech, row in asked]
    tokens = 0
    if engines.gold and config.evaluation.judge:
        seeds = [stable_seed("gold", config.seed, speech["speech_id"]) for speech, _ in asked]
        found = engines.gold.rate_counted(engines.gold_model, config.evaluation.judge, items, seeds, reporter)
        known = [rating.overall for rating, _ in found if rating is not None]
        tokens = sum(spent for _, spent in found)
    else:
        known = [rating.overall for rating in gold_ratings([item[:2] for item in items]) or []]
    score = sum(known) / len(known) if known else None
    return dict(zip(KEYS, (score, len(known), len(rows) - len(known), tokens), strict=True))
