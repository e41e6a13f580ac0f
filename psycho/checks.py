"""Settings that each are possible and together are not; without a look at them a run would find out after hours.

What is refused here is certain. What only looks wrong is a warning of the plan.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from psycho.config import Config, EngineConfig, JudgeConfig
from psycho.errors import BadInput

_SEES_EVERY_GPU = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


class Placed(NamedTuple):
    """An engine, and what its worker holds of GPUs by the setting that says so."""

    engine: EngineConfig
    gpus: float
    setting: str

    @property
    def split(self) -> int:
        """Processes of the engine, one a GPU."""
        return self.engine.tensor_parallel_size

    @property
    def lacks_gpus(self) -> bool:
        """True where GPUs are fewer than processes; a worker without any may be one on a CPU."""
        return self.split > max(1, self.gpus)


def check_together(config: Config) -> None:
    """Refuse settings that contradict each other.

    Raises:
        BadInput: the sentence names them and says what to do.
    """
    _check_device(config)
    for placed in engines(config):
        if cannot_split(config, placed):
            raise BadInput(
                f"tensor_parallel_size {placed.split} splits an engine over as many GPUs, and {placed.setting} is "
                f"{placed.gpus:g}; set it to {placed.split} or tensor_parallel_size to 1"
            )


def engines(config: Config) -> Iterator[Placed]:
    """Every engine that the configuration asks for."""
    inference, online = config.inference, config.online
    yield Placed(inference.engine, inference.gpus_per_worker, "inference.gpus_per_worker")
    named: list[tuple[str, EngineConfig | None, float | None]] = []
    if not config.pairs.source:
        pool = [model for model in config.generation.pool if not model.remote]
        named += [(f"generation.pool ({m.name}).gpus_per_worker", m.engine, m.gpus_per_worker) for m in pool]
    named += [(f"{name}.gpus_per_worker", judge.engine, judge.gpus_per_worker) for name, judge in _judges(config)]
    if online.rewarded:
        named.append(("online.scorer_gpus_per_worker", online.scorer_engine, online.scorer_gpus_per_worker))
    for setting, engine, gpus in named:
        if engine or gpus is not None:  # else it is as that of inference
            yield Placed(engine or inference.engine, inference.gpus_per_worker if gpus is None else gpus, setting)


def cannot_split(config: Config, placed: Placed) -> bool:
    """True where it certainly cannot: vLLM starts its processes beside itself, on the GPUs that Ray lets it see."""
    beside = placed.engine.extra.get("distributed_executor_backend") in (None, "mp")
    return (
        placed.lacks_gpus and placed.gpus > 0 and beside and _SEES_EVERY_GPU not in {*config.inference.env, *os.environ}
    )


def _judges(config: Config) -> Iterator[tuple[str, JudgeConfig]]:
    """Those that have work to do."""
    judge = config.judge
    if config.online.judged or not config.evaluation.judge or (judge.mode != "panel" and not config.pairs.source):
        yield "judge", judge
    if judge.mode == "panel" and not config.pairs.source:
        yield from ((f"judge.panel.{n}", member) for n, member in enumerate(judge.members()))
    if config.evaluation.judge:
        yield "evaluation.judge", config.evaluation.judge


def _check_device(config: Config) -> None:
    training = config.training
    if training.device == "cuda" and not training.gpus_per_worker:
        raise BadInput(
            "training.device is cuda and training.gpus_per_worker 0, so that no worker would see a GPU; set "
            "training.gpus_per_worker=1 or training.device=cpu"
        )
    if training.device == "cpu" and training.gpus_per_worker:
        raise BadInput(
            f"training.device is cpu and training.gpus_per_worker {training.gpus_per_worker:g}, of which nothing would "
            "be used; set training.gpus_per_worker=0 or training.device=cuda"
        )


def short_answers(config: Config) -> Iterator[str]:
    """Where answers end before the tokens that they are allowed: no prompt leaves as many."""
    for setting, most, where, length in _answers(config):
        if length is not None and most >= length:
            yield (
                f"{setting} is {most} and {where}.max_model_len {length}, which is for prompt and answer together: "
                "answers are cut off earlier; lower the first or raise the second"
            )


def _answers(config: Config) -> Iterator[tuple[str, int, str, int | None]]:
    """Most tokens of an answer and of the engine that gives it, each by its setting."""
    evaluation = config.evaluation
    for model in () if config.pairs.source else config.generation.pool:
        own = f"generation.pool ({model.name})"
        setting = f"{own}.sampling" if model.sampling else "generation.sampling"
        most = (model.sampling or config.generation.sampling).max_tokens
        if not model.remote:
            yield f"{setting}.max_tokens", most, *_length(config, model.engine, own)
    yield "online.sampling.max_tokens", config.online.sampling.max_tokens, *_length(config, None, "")
    judge, name = (evaluation.judge, "evaluation.judge") if evaluation.judge else (config.judge, "judge")
    # One pool of workers answers and compares.
    yield "evaluation.sampling.max_tokens", evaluation.sampling.max_tokens, *_length(config, judge.engine, name)


def _length(config: Config, own: EngineConfig | None, name: str) -> tuple[str, int | None]:
    where = f"{name}.engine" if own else "inference.engine"
    return where, (own or config.inference.engine).max_model_len
