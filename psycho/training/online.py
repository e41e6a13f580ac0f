"""Online DPO: rounds of sample, score, best against worst, train; the new weights go into the running engines.

One Ray Train group and one pool of vLLM workers live through all rounds. Rank 0 asks the pool for a rollout while the
other ranks wait at a barrier; the weights travel as a Hugging Face folder that the engines reload in place. The
reference of a round is the policy the round starts from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.config import Config, JudgeConfig, OnlineConfig, TrainingConfig
from psycho.errors import StageFailed
from psycho.inference.pool import WorkerPool
from psycho.inference.requests import prompt
from psycho.progress import Reporter
from psycho.schema import stable_id, stable_seed

Row = dict[str, Any]


@dataclass
class Rollout:
    """Samples and scores a round's speeches; runs inside rank 0 and drives the pool's actors."""

    pool: WorkerPool
    config: Config
    judge: JudgeConfig
    scorer: str
    """Model folder of the reward model or the judge."""
    reporter: Reporter | None = None

    def __call__(self, policy: str, number: int, speeches: Sequence[Mapping[str, str]]) -> tuple[list[Row], Row]:
        """Pairs (`messages`, `chosen`, `rejected`) of one round, and what to report of it."""
        online, seed = self.config.online, self.config.seed
        k = online.samples_per_speech
        asked = [(speech, sample) for speech in speeches for sample in range(k)]
        prompts = [prompt(s, self.config.generation.system_prompt) for s, _ in asked]
        seeds = [stable_seed("online", seed, number, s["speech_id"], n) for s, n in asked]
        answers = self.pool.sample(policy, prompts, seeds, online.sampling, self.reporter)
        texts = [answer.text.strip() for answer in answers]
        scores = self._score(prompts, asked, texts, seeds)
        pairs: list[Row] = []
        for index, speech in enumerate(speeches):
            rows = slice(index * k, (index + 1) * k)
            for best, worst in best_against_worst(
                texts[rows], scores[rows], online.min_gap, online.max_pairs_per_speech
            ):
                pairs.append(
                    {
                        "id": stable_id("online", number, speech["speech_id"], len(pairs)),
                        "messages": json.dumps(prompts[index * k], ensure_ascii=False),
                        "chosen": texts[index * k + best],
                        "rejected": texts[index * k + worst],
                    }
                )
        known = [score for score in scores if score is not None]
        report = {
            "round": number,
            "samples": len(texts),
            "pairs": len(pairs),
            "failed": len(texts) - len(known),
            "mean_score": sum(known) / max(1, len(known)),
            "mean_chars": sum(map(len, texts)) / max(1, len(texts)),
            "sampled_tokens": sum(answer.output_tokens for answer in answers),
        }
        return pairs, report

    def _score(
        self,
        prompts: Sequence[list[dict[str, str]]],
        asked: Sequence[tuple[Mapping[str, str], int]],
        texts: Sequence[str],
        seeds: Sequence[int],
    ) -> list[float | None]:
        places = [index for index, text in enumerate(texts) if text]
        scores: list[float | None] = [None] * len(texts)
        found: Sequence[float | None]
        if self.config.online.scorer == "reward":
            whole = [[*prompts[i], {"role": "assistant", "content": texts[i]}] for i in places]
            found = self.pool.reward(self.scorer, whole, self.reporter)
        else:
            items = [(asked[i][0]["question"], texts[i], asked[i][0].get("history")) for i in places]
            rated = self.pool.rate(self.scorer, self.judge, items, [seeds[i] for i in places], self.reporter)
            found = [rating.overall if rating else None for rating in rated]
        for index, score in zip(places, found, strict=True):
            scores[index] = score
        return scores


def best_against_worst(
    texts: Sequence[str], scores: Sequence[float | None], min_gap: float, limit: int
) -> list[tuple[int, int]]:
    """(best, worst) positions of one speech's samples, then second best against second worst, up to `limit`.

    A pair needs a gap above zero, of at least `min_gap`, and two different texts; samples without a score stay out.
    """
    order = sorted((i for i, s in enumerate(scores) if s is not None), key=lambda i: (-(scores[i] or 0.0), i))
    pairs = []
    for rank in range(min(limit, len(order) // 2)):
        best, worst = order[rank], order[-1 - rank]
        gap = (scores[best] or 0.0) - (scores[worst] or 0.0)
        if gap > 0 and gap >= min_gap and texts[best] != texts[worst]:
            pairs.append((best, worst))
    return pairs


def round_speeches(speeches: Sequence[Mapping[str, str]], online: OnlineConfig, seed: int, number: int) -> list[Any]:
    """The speeches of one round, drawn without replacement by seed and round."""
    order = sorted(speeches, key=lambda speech: stable_id("round", seed, number, speech["speech_id"]))
    return list(order[: online.speeches_per_round])


def online_worker(config: dict[str, Any]) -> None:
    """One rank of the online loop (`train_loop_config`: training, online, seed, policy, work, speeches, rollout)."""
    import torch.distributed as dist

    from psycho.training.launch import read_rows
    from psycho.training.loop import Trainer, setup_worker, write_history

    training: TrainingConfig = config["training"]
    online: OnlineConfig = config["online"]
    rollout: Rollout = config["rollout"]
    work = Path(config["work"])
    setup_worker(training)
    trainer = Trainer("dpo", config["policy"], online, training, config["seed"])
    history: list[dict[str, float]] = []
    reports: list[Row] = []
    policy = config["policy"]
    for number in range(online.rounds):
        outcome: list[Any] = [None]
        if trainer.rank == 0:
            try:
                chosen = round_speeches(config["speeches"], online, config["seed"], number)
                pairs, report = rollout(policy, number, chosen)
                reports.append(report)
                storage.write_table(pa.Table.from_pylist(pairs), str(work / f"round-{number}"))
                outcome = [None if pairs else f"round {number} made no pair; lower online.min_gap"]
            except Exception as error:  # every rank must hear of it, or the others would wait for ever
                outcome = [f"round {number}: {type(error).__name__}: {error}"]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[0]:
            raise StageFailed(outcome[0])
        groups, _ = trainer.groups(read_rows(str(work / f"round-{number}")))

        def on_step(rows: int, tokens: int, statistics: dict[str, float], round_: int = number) -> None:
            if rollout.reporter and trainer.rank == 0:
                rollout.reporter.add(rows, tokens, f"round {round_ + 1} loss {statistics['loss']:.3f}")

        history += [row | {"round": number} for row in trainer.fit(groups, config["seed"] + number, on_step)]
        policy = str(work / f"policy-{number}")
        trainer.save(policy)
    if trainer.rank == 0:
        shutil.copytree(policy, config["output"])
        write_history(config["output"], history)
        Path(config["output"], "rounds.json").write_text(json.dumps(reports), encoding="utf-8")
    trainer.close()
