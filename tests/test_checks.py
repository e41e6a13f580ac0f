"""Settings that are possible alone and not together: refused before anything starts, and gone by the advice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from psycho.checks import short_answers
from psycho.config import Config, load_config
from psycho.errors import BadInput
from psycho.stages import check_config

CONFIGS = Path(__file__).parents[1] / "configs"
WIDE = "{tensor_parallel_size: 2, extra: {distributed_executor_backend: %s}}"
ONE = "generation.models_per_speech=1"
POOL = "generation.pool=[{name: a, model: o/a, %s}]"


def _config(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_what_is_shipped_goes_together(path: Path) -> None:
    check_config(load_config(path))


@pytest.mark.parametrize(
    ("name", "overrides", "said", "remedy"),
    [
        ("nano", ["training.device=cuda"], "cuda and training.gpus_per_worker 0, so", "training.device=cpu"),
        (
            "nano",
            ["training.gpus_per_worker=1"],
            "cpu and training.gpus_per_worker 1, of",
            "training.gpus_per_worker=0",
        ),
        (
            "paper-8b",
            ["judge.gpus_per_worker=2"],
            "tensor_parallel_size 4 splits an engine over as many GPUs, and judge.gpus_per_worker is 2; set it to 4",
            "judge.gpus_per_worker=4",
        ),
        (
            "paper-8b",
            ["inference.engine.tensor_parallel_size=2"],
            "inference.gpus_per_worker is 1; set it to 2",
            "inference.gpus_per_worker=2",
        ),
        (
            "paper-8b",
            ["online.scorer_engine={tensor_parallel_size: 2}"],
            "online.scorer_gpus_per_worker is 1; set it to 2",
            "online.scorer_gpus_per_worker=2",
        ),
        (
            "paper-8b",
            [ONE, POOL % "engine: {tensor_parallel_size: 2}"],
            "generation.pool (a).gpus_per_worker is 1; set it to 2",
            POOL % "engine: {tensor_parallel_size: 2}, gpus_per_worker: 2",
        ),
    ],
)
def test_what_contradicts_is_refused_until_it_does_not(name: str, overrides: list[str], said: str, remedy: str) -> None:
    with pytest.raises(BadInput) as refused:
        check_config(_config(name, *overrides))
    assert said in str(refused.value)
    check_config(_config(name, *overrides, remedy))


@pytest.mark.parametrize(
    ("name", "overrides", "said", "remedy"),
    [
        (
            "nano",
            ["inference.engine.max_model_len=96"],
            "generation.sampling.max_tokens is 96 and inference.engine.max_model_len 96, which is for prompt",
            "inference.engine.max_model_len=512",
        ),
        (
            "nano",
            ["online.sampling.max_tokens=4096"],
            "online.sampling.max_tokens is 4096 and inference.engine.max_model_len 2048",
            "online.sampling.max_tokens=512",
        ),
        (
            "paper-8b",
            [ONE, POOL % "engine: {max_model_len: 500}"],
            "generation.sampling.max_tokens is 1024 and generation.pool (a).engine.max_model_len 500",
            "generation.sampling.max_tokens=100",
        ),
        (
            "paper-8b",
            ["evaluation.judge.engine.max_model_len=1000"],
            "evaluation.sampling.max_tokens is 1024 and evaluation.judge.engine.max_model_len 1000",
            "evaluation.sampling.max_tokens=512",
        ),
    ],
)
def test_answers_that_end_early_are_warned_of(name: str, overrides: list[str], said: str, remedy: str) -> None:
    """And no more, for they may be short anyway."""
    check_config(_config(name, *overrides))
    assert any(said in line for line in short_answers(_config(name, *overrides)))
    assert not any(said in line for line in short_answers(_config(name, *overrides, remedy)))


@pytest.mark.parametrize(
    "overrides",
    [
        [f"inference.engine={WIDE % 'ray'}"],  # whose workers have GPUs of their own
        [f"inference.engine={WIDE % 'mp'}", "inference.gpus_per_worker=0"],  # on a CPU, or told otherwise what to see
        [f"inference.engine={WIDE % 'mp'}", "inference.env={RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES: '1'}"],
        ["inference.engine.max_model_len=null"],
        ["pairs.source=a.csv", "judge.gpus_per_worker=1"],  # it has nothing to do
    ],
)
def test_what_may_work_is_left_alone(overrides: list[str]) -> None:
    check_config(_config("paper-8b", *overrides))


def test_the_panel_is_asked_for_its_own_gpus() -> None:
    panel = [{"model": "a", "engine": {"tensor_parallel_size": 2}}, {"model": "b"}]
    judge: dict[str, Any] = {"model": "j", "mode": "panel", "panel": panel}
    config = _config("paper-8b").model_copy(update={"judge": Config.model_validate({"judge": judge}).judge})
    with pytest.raises(BadInput, match=r"judge\.panel\.0\.gpus_per_worker is 1; set it to 2"):
        check_config(config)
