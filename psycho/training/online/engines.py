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
from psycho.config import Config, InferenceConfig, JudgeConfig
from psycho.errors import BadInput
from psycho.inference.models import engine_signature
from psycho.inference.pool import WorkerPool


@dataclass
class Engines:
    """`judge` may be `rollout` itself; the models are folders or hub ids, empty where nothing scores by them."""

    rollout: WorkerPool
    reward: WorkerPool | None = None
    judge: WorkerPool | None = None
    reward_model: str = ""
    judge_model: str = ""

    def start(self, policy: str) -> None:
        """Let all engines start; returns at once."""
        self.rollout.start(policy)
        if self.reward:
            self.reward.start(self.reward_model, "pooling")
        if self.judge and self.judge is not self.rollout:
            self.judge.start(self.judge_model)

    def wait(self, policy: str) -> None:
        """Until all engines are up and hold what they need first."""
        self.rollout.use(policy)
        if self.reward:
            self.reward.use(self.reward_model, "pooling")
        if self.judge and self.judge is not self.rollout:
            self.judge.use(self.judge_model)


@contextmanager
def engines(
    config: Config, policy: str, reward_model: str = "", judge_model: str = "", verbose: bool = False
) -> Iterator[Engines]:
    """Workers for sampling by `policy` and for scoring by the models given; they end with the block.

    Raises:
        BadInput: the cluster cannot hold them and the training beside them.
    """
    shared = bool(judge_model) and takes_turns(config, policy, judge_model)
    rewards = reward_workers(config) if reward_model else None
    judges = judge_workers(config) if judge_model and not shared else None
    check_room(config, [config.inference, *filter(None, (rewards, judges))])
    with ExitStack() as stack:

        def pool(workers: InferenceConfig) -> WorkerPool:
            return stack.enter_context(WorkerPool(workers, config.seed, verbose=verbose))

        rollout = pool(config.inference)
        judge = rollout if shared else None
        yield Engines(
            rollout, pool(rewards) if rewards else None, pool(judges) if judges else judge, reward_model, judge_model
        )


def takes_turns(config: Config, policy: str, judge_model: str) -> bool:
    """True where the judge needs no workers of its own."""
    own = config.judge.engine is not None or config.judge.gpus_per_worker is not None or config.online.scorer_workers
    return not own and engine_signature(policy) == engine_signature(judge_model)


def reward_workers(config: Config) -> InferenceConfig:
    """The workers of the reward model."""
    online = config.online
    return _workers(config, online.scorer_gpus_per_worker, {"engine": online.scorer_engine or config.inference.engine})


def judge_workers(config: Config) -> InferenceConfig:
    """The workers of a judge that cannot share those of the policy."""
    judge: JudgeConfig = config.judge
    return _workers(config, judge.gpus_per_worker, {"engine": judge.engine or config.inference.engine})


def _workers(config: Config, gpus: float | None, update: dict[str, object]) -> InferenceConfig:
    inference = config.inference
    return inference.model_copy(
        update={
            "workers": config.online.scorer_workers or inference.workers,
            "gpus_per_worker": inference.gpus_per_worker if gpus is None else gpus,
            **update,
        }
    )


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
                "training.workers"
            )
