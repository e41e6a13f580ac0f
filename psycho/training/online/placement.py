"""Where the engines and the training of online DPO lie, which workers there are, and the way that new weights go.

`separate`: beside each other; the weights go over NCCL where each side has whole GPUs. `colocate`: on the same GPUs in
turn; the engines sleep while the policy trains, and take its weights by CUDA IPC. Where neither is to be had (a CPU,
parts of a GPU, weights in 4 bit) the engines read the folder that the trainer wrote.
"""

from __future__ import annotations

from typing import Any

from psycho.config import Config, EngineConfig, InferenceConfig, JudgeConfig
from psycho.errors import BadInput
from psycho.inference.models import engine_signature


def transport_of(config: Config) -> str:
    """`disk`, `nccl` or `ipc`: what is asked for, or what fits the placement."""
    if config.online.transport != "auto":
        return config.online.transport
    if _quantized(config):
        return "disk"
    if config.online.placement == "colocate":
        return "ipc"
    return "nccl" if _whole_gpus(config) else "disk"


def _whole_gpus(config: Config) -> bool:
    """True where engines and training have GPUs of their own; NCCL has no two ranks on one."""
    shares = config.training.gpus_per_worker, config.inference.gpus_per_worker
    return config.training.device == "cuda" and min(shares) >= 1


def _quantized(config: Config) -> bool:
    """True where the trainer holds the weights in 4 bits: plain ones are made for the folder alone."""
    return config.training.lora is not None and config.training.lora.quantize is not None


def check_placement(config: Config) -> None:
    """Refuse what cannot be, before anything is started.

    Raises:
        BadInput: the sentence says which settings contradict each other and what to do.
    """
    online, training, way = config.online, config.training, transport_of(config)
    colocated = online.placement == "colocate"
    if colocated and training.device == "cpu":
        raise BadInput(
            "online.placement colocate lets engines and training take turns on a GPU, and training.device is cpu; set "
            "online.placement=separate"
        )
    if way != "disk" and (training.device == "cpu" or not config.inference.gpus_per_worker):
        raise BadInput(
            f"online.transport {way} sends weights from GPU to GPU, and the training or the engines have none "
            "(training.device, inference.gpus_per_worker); set online.transport=disk"
        )
    if way != "disk" and _quantized(config):
        raise BadInput(
            f"online.transport {way} sends whole weights, and training.lora.quantize keeps them in 4 bits; set "
            "online.transport=disk"
        )
    if colocated and way == "nccl":
        raise BadInput(
            "online.transport nccl needs a GPU for each side, and online.placement is colocate; set online.transport "
            "to ipc or disk"
        )
    if way == "nccl" and not _whole_gpus(config):
        raise BadInput(
            "online.transport nccl needs a GPU for each side, and training.gpus_per_worker "
            f"{config.training.gpus_per_worker:g} and inference.gpus_per_worker "
            f"{config.inference.gpus_per_worker:g} may be parts of the same one; set online.transport=disk"
        )
    if not colocated and way == "ipc":
        raise BadInput(
            "online.transport ipc needs engines and training on the same GPUs, and online.placement is separate; set "
            "online.transport to nccl or disk, or online.placement to colocate"
        )
    if colocated:
        _check_turns(config)


def _check_turns(config: Config) -> None:
    online, training, inference = config.online, config.training, config.inference
    if online.staleness:
        raise BadInput(
            "online.staleness 1 samples while the policy trains, and under online.placement colocate the engines sleep "
            "then; set online.staleness=0 or online.placement=separate"
        )
    if inference.engine.tensor_parallel_size > 1:
        raise BadInput(
            "under online.placement colocate an engine shares one GPU with one training worker, and "
            f"inference.engine.tensor_parallel_size is {inference.engine.tensor_parallel_size}; set it to 1 or "
            "online.placement=separate"
        )
    if inference.workers != training.workers:
        raise BadInput(
            f"under online.placement colocate every engine shares the GPU of a training worker, and inference.workers "
            f"{inference.workers} is not training.workers {training.workers}; make them the same"
        )
    scorers = _parts_of_gpus(config)
    if training.workers > 1 and inference.gpus_per_worker + 2 * training.gpus_per_worker <= 1 + 1e-6:
        raise BadInput(
            f"under online.placement colocate two training workers of training.gpus_per_worker "
            f"{training.gpus_per_worker:g} could be put on one GPU beside an engine of inference.gpus_per_worker "
            f"{inference.gpus_per_worker:g}; {_advice(config)}"
        )
    if inference.gpus_per_worker + training.gpus_per_worker + scorers > 1 + 1e-6:
        raise BadInput(
            "under online.placement colocate a GPU holds an engine, a training worker and what scores, and "
            f"inference.gpus_per_worker {inference.gpus_per_worker:g}, training.gpus_per_worker "
            f"{training.gpus_per_worker:g} and the workers that score ({scorers:g}) are over 1 together; "
            f"{_advice(config)}"
        )
    if inference.workers > 1 and inference.gpus_per_worker <= 0.5:
        raise BadInput(
            f"under online.placement colocate two engines of inference.gpus_per_worker {inference.gpus_per_worker:g} "
            f"could be put on one GPU; {_advice(config)}"
        )


def _parts_of_gpus(config: Config) -> float:
    """Of all workers that score and hold less than a GPU each: all of them could be put on one."""
    own, inference = config.online.scorer_workers, config.inference
    shares = _shares(config, own, inference.gpus_per_worker).values()
    return sum(share for share in shares if share < 1) * (own or inference.workers)


def _shares(config: Config, scorer_workers: int | None, sampling: float) -> dict[str, float]:
    """What a worker of each kind that scores holds of a GPU, by its setting; where that is unset `sampling`."""
    online = config.online
    shares = {"online.scorer_gpus_per_worker": online.scorer_gpus_per_worker} if online.rewarded else {}
    judges = {"judge": config.judge if online.judged else None}
    judges |= {"evaluation.judge": config.evaluation.judge if online.gold_every else None}
    for name, judge in judges.items():  # one without anything of its own may take turns with the policy in its engines
        if judge and (judge.engine is not None or judge.gpus_per_worker is not None or scorer_workers):
            shares[f"{name}.gpus_per_worker"] = judge.gpus_per_worker
    return {name: sampling if share is None else share for name, share in shares.items()}


def _advice(config: Config) -> str:
    """Settings that go together, of which some may be as they are.

    What scores gets what the two leave of one GPU, or keeps GPUs of its own. A judge is asked in other stages too, with
    as many workers as generate: there several with a small share would meet on one GPU, so it gets a whole one.
    """
    sampling = 0.6
    settings = {"inference.gpus_per_worker": sampling, "training.gpus_per_worker": 0.3}
    several = config.inference.workers > 1
    scorer_workers = config.online.scorer_workers
    if any(share < 1 for share in _shares(config, scorer_workers, sampling).values()) and (several or scorer_workers):
        settings["online.scorer_workers"] = scorer_workers = 1
    shares = _shares(config, scorer_workers, sampling)
    parts = [name for name, share in shares.items() if share < 1 and not (several and "judge" in name)]
    for name in shares:
        if name in parts:
            settings[name] = int(10 / len(parts)) / 100
        elif shares[name] < 1:
            settings[name] = 1
    return f"set {', '.join(f'{name}={value:g}' for name, value in settings.items())}, say"


def engine_of(config: Config, engine: EngineConfig, policy: bool) -> EngineConfig:
    """An engine's settings with what its placement needs; `policy`: it takes weights from the trainer."""
    extra: dict[str, Any] = {}
    if config.online.placement == "colocate":
        extra["enable_sleep_mode"] = True
    if policy and transport_of(config) != "disk":
        extra["weight_transfer_config"] = {"backend": transport_of(config)}
    return engine.model_copy(update={"extra": extra | engine.extra}) if extra else engine


def takes_turns(config: Config, policy: str, judge_model: str, judge: JudgeConfig | None = None) -> bool:
    """True where the judge (none: that of the labels) needs no workers of its own."""
    judge = judge or config.judge
    own = judge.engine is not None or judge.gpus_per_worker is not None or config.online.scorer_workers
    return not own and engine_signature(policy) == engine_signature(judge_model)


def reward_workers(config: Config) -> InferenceConfig:
    """The workers of the reward model."""
    online = config.online
    return _workers(config, online.scorer_gpus_per_worker, {"engine": online.scorer_engine or config.inference.engine})


def judge_workers(config: Config, judge: JudgeConfig, policy: str, model: str) -> InferenceConfig | None:
    """The workers of a judge; none where there is no model of it, or where it shares those of the policy."""
    if not model or takes_turns(config, policy, model, judge):
        return None
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
