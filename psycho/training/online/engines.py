"""The vLLM workers of the online loop: those that sample and those that score, alive from its first round to its last.

A judge whose weights can take turns with the policy's in one engine (same architecture, same tokenizer, no engine or
GPUs of its own) is asked on the workers that sample: a change of weights takes a moment, a second engine memory and a
start. Every other scorer has workers of its own beside them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import ray

from psycho.cluster import AUTOSCALING
from psycho.config import Config, InferenceConfig
from psycho.errors import BadInput
from psycho.inference.pool import WorkerPool
from psycho.training.online.placement import engine_of, judge_workers, reward_workers


@dataclass
class Engines:
    """`judge` and `gold` may be `rollout`; the models are folders or hub ids, empty where nothing scores by them.

    `gold` is the judge that is not the scorer, which only watches.
    """

    rollout: WorkerPool
    reward: WorkerPool | None = None
    judge: WorkerPool | None = None
    reward_model: str = ""
    judge_model: str = ""
    gold: WorkerPool | None = None
    gold_model: str = ""
    colocated: bool = False

    def start(self, policy: str) -> None:
        """Let all engines start; returns at once, or where GPUs are shared when they are up (colocated: and asleep)."""
        for pool, model, runner in self._held(policy):
            if self.colocated or pool.shares_gpus:
                pool.use(model, runner)  # vLLM measures what memory is free, so nobody else may be about to take some
                if self.colocated:
                    pool.sleep(1)
            else:
                pool.start(model, runner)

    def sleep(self, level: int) -> None:
        """All engines give their GPU memory away, those that score with their weights kept."""
        for pool, *_ in self._held(""):
            pool.sleep(level if pool is self.rollout else 1)

    def wake(self) -> None:
        """All engines take it back."""
        for pool, *_ in self._held(""):
            pool.wake()

    def wait(self, policy: str) -> None:
        """Until all engines are up and hold what they need first."""
        for pool, model, runner in self._held(policy):
            pool.use(model, runner)

    def _held(self, policy: str) -> list[tuple[WorkerPool, str, str]]:
        """Every pool once, with the model that it holds first and vLLM's runner of it."""
        found = [(self.rollout, policy, "generate")]
        if self.reward:
            found.append((self.reward, self.reward_model, "pooling"))
        judges = [(self.judge, self.judge_model), (self.gold, self.gold_model)]
        return found + [(pool, model, "generate") for pool, model in judges if pool and pool is not self.rollout]


@contextmanager
def engines(
    config: Config,
    policy: str,
    reward_model: str = "",
    judge_model: str = "",
    verbose: bool = False,
    gold_model: str = "",
) -> Iterator[Engines]:
    """Workers for sampling by `policy` and for scoring by the models given; they end with the block.

    Raises:
        BadInput: the cluster cannot hold them and the training beside them.
    """
    rewards = reward_workers(config) if reward_model else None
    judges = judge_workers(config, config.judge, policy, judge_model)
    held_out = config.evaluation.judge
    watching = judge_workers(config, held_out, policy, gold_model) if held_out else None
    check_room(config, [config.inference, *filter(None, (rewards, judges, watching))])
    with ExitStack() as stack:

        def pool(workers: InferenceConfig | None) -> WorkerPool | None:
            return made(workers, policy=False) if workers else None

        def made(workers: InferenceConfig, policy: bool) -> WorkerPool:
            placed = workers.model_copy(update={"engine": engine_of(config, workers.engine, policy)})
            return stack.enter_context(WorkerPool(placed, config.seed, verbose=verbose))

        rollout = made(config.inference, policy=True)
        judge = (pool(judges) or rollout) if judge_model else None
        gold = (pool(watching) or rollout) if gold_model else None
        colocated = config.online.placement == "colocate"
        yield Engines(rollout, pool(rewards), judge, reward_model, judge_model, gold, gold_model, colocated)


def check_room(config: Config, pools: list[InferenceConfig]) -> None:
    """Refuse at once what would wait for ever: all of it lives at the same time.

    Raises:
        BadInput: the sentence says what is missing.
    """
    if os.environ.get(AUTOSCALING) == "1":
        return
    training, found = config.training, ray.cluster_resources()
    needs = {
        "CPU": sum(p.workers * p.cpus_per_worker for p in pools) + training.workers * training.cpus_per_worker,
        "GPU": sum(p.workers * p.gpus_per_worker for p in pools) + training.workers * training.gpus_per_worker,
    }
    for name, amount in needs.items():
        if amount > found.get(name, 0.0) + 1e-6:
            raise BadInput(
                f"online training holds workers that sample, score and train at once, {amount:g} {name} in all, and "
                f"the cluster has {found.get(name, 0.0):g}; lower inference.workers, online.scorer_workers or "
                "training.workers, or set cluster.autoscaling=true where nodes come when they are asked for"
            )
