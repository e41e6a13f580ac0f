"""How much memory training and inference need, from the number of parameters alone.

Memory is estimated from the number of parameters alone, with every sequence as long as it may be. With P parameters
and N workers:

- model states of training in bf16 with Adam, bytes (Rajbhandari et al. 2020, ZeRO, section 5): weights 2P, gradients
  2P, optimizer 12P (fp32 weights and two moments); stage 1 divides the optimizer by N, stage 2 the gradients too,
  stage 3 the weights too. In fp32: 4P + 4P + 8P. Offloading moves the optimizer to the host.
- DeepSpeed's own buffers: a bucket of 5e8 gradients from stage 1 on, up to 1e9 gathered weights at stage 3.
- activations in 16 bits: 34 bytes per token, layer and hidden unit, attention matrix not stored (Korthikanti et al.
  2022, equation 1); with gradient checkpointing 2 bytes, and 34 of the one layer that is recomputed. Logits of
  language models: 14 bytes per token and entry of the vocabulary (16 bits, then fp32, log-softmax, gradient).
- inference: weights / tensor parallel, the KV cache of one sequence of max_model_len, and 2 GiB of the engine's own.
- hidden width h and L layers from P = 12 L h^2 with h = 128 L (Kaplan et al. 2020); keys and values h/4 wide (GQA).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from psycho.config import Config, EngineConfig, JudgeConfig, TrainingConfig

GIB = 2**30
NANO_PARAMETERS_B = 0.0009
_DEFAULT_MODEL_LEN = 8192
_LOGITS = 2**25  # elements of a chunk of logits with what is made of it (training/modules.py)
_CONTEXT_GIB, _ENGINE_GIB = 1.0, 2.0


@dataclass(frozen=True)
class Load:
    """Workers of one kind: a vLLM engine or a training rank each. Memory is None where the size is unknown."""

    model: str
    workers: int
    gpus: float
    """A worker's GPUs; 0 on CPUs, where all memory is the host's."""
    gib: float | None
    """GPU memory needed on each of its GPUs."""
    host_gib: float | None = 0.0
    """Host memory of one worker."""
    reserved: float | None = None
    """Share of a card that vLLM takes whatever it needs."""


def parameters_b(config: Config, model: str) -> float | None:
    """Size in 10^9 parameters: as configured, else from the name (`8B`, `360M`), else from a folder's weights."""
    known = {entry.model: entry.parameters_b for entry in config.generation.pool if entry.parameters_b}
    for judge in judges(config):
        known |= {judge.model: judge.parameters_b} if judge.parameters_b else {}
    known |= {config.policy: config.policy_parameters_b} if config.policy_parameters_b else {}
    if model.startswith("nano:"):
        return NANO_PARAMETERS_B
    return known.get(model) or size_of_name(Path(model).name) or _size_of_folder(Path(model).expanduser())


def size_of_name(name: str) -> float | None:
    """`Qwen2.5-0.5B-Instruct` is 0.5, `SmolLM2-360M` 0.36, `8x7B` 56 (an upper bound), `Phi-3.5-mini` unknown."""
    found = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    return int(found[1] or 1) * float(found[2]) * (1 if found[3] == "b" else 1e-3) if found else None


def _size_of_folder(folder: Path) -> float | None:
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not stored:
        return None
    text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").is_file() else "{}"
    facts = json.loads(text)
    return stored / (4 if "float32" in (facts.get("dtype"), facts.get("torch_dtype")) else 2) / 1e9


def zero_gib(size_b: float, workers: int, stage: int, precision: str = "bf16") -> tuple[float, float, float]:
    """Weights, gradients and optimizer states on one worker (Rajbhandari et al. 2020, section 5)."""
    bytes_each = (2, 2, 12) if precision == "bf16" else (4, 4, 8)
    divided = (stage >= 3, stage >= 2, stage >= 1)
    weights, gradients, optimizer = (
        size_b * 1e9 * b / GIB / (workers if split else 1) for b, split in zip(bytes_each, divided, strict=True)
    )
    return weights, gradients, optimizer


def shape(size_b: float) -> tuple[float, float]:
    """Hidden width and layers of a dense transformer of this size."""
    hidden = (size_b * 1e9 * 128 / 12) ** (1 / 3)
    return hidden, hidden / 128


def activation_gib(size_b: float, training: TrainingConfig) -> float:
    """Activations of one bin, and one chunk of logits with its gradient (`training/modules.py`)."""
    hidden, layers = shape(size_b)
    kept = 2 * layers + 34 if training.gradient_checkpointing else 34 * layers
    scale = 1 if training.precision == "bf16" else 2
    return (training.bin_tokens * kept * hidden * scale + 12 * _LOGITS) / GIB


def training_load(config: Config, model: str, copies: int = 0) -> Load:
    """The ranks of one training; each also reads the whole model through its host's memory.

    `copies` of it stay frozen beside it, whole on every rank (`online.reference` fixed).
    """
    training, size_b = config.training, parameters_b(config, model)
    if size_b is None:
        return Load(model, training.workers, training.gpus_per_worker, None, None)
    stage, width = training.zero_stage, 2 if training.precision == "bf16" else 4
    weights, gradients, optimizer = zero_gib(size_b, training.workers, stage, training.precision)
    offloaded = optimizer if training.offload_optimizer else 0.0
    bucket = 5e8 if training.gpus_per_worker else min(5e8, size_b * 1e9)  # a CPU only pays for pages it writes
    buffers = (bucket * (stage >= 1) + min(1e9, size_b * 1e9) * (stage == 3)) * width / GIB
    work = activation_gib(size_b, training)
    frozen = copies * size_b * 1e9 * width / GIB
    total = weights + gradients + optimizer - offloaded + frozen + buffers + work + _CONTEXT_GIB
    if not training.gpus_per_worker:
        return Load(model, training.workers, 0, 0.0, total)
    host = size_b * 1e9 * width / GIB + offloaded
    return Load(model, training.workers, training.gpus_per_worker, total, host)


def engine_gib(size_b: float, engine: EngineConfig) -> float:
    """Least memory of an engine on each of its GPUs: weights, one whole sequence's KV cache, its own needs."""
    hidden, layers = shape(size_b)
    width = 4 if engine.dtype == "float32" else 2
    cache = 2 * layers * hidden / 4 * width * (engine.max_model_len or _DEFAULT_MODEL_LEN)
    return (size_b * 1e9 * width + cache) / engine.tensor_parallel_size / GIB + _ENGINE_GIB


def engine_load(config: Config, model: str, engine: EngineConfig | None, gpus: float | None) -> Load:
    """The vLLM workers that hold `model`; a model's or judge's own engine and GPUs replace those of inference."""
    used = engine or config.inference.engine
    gpus = config.inference.gpus_per_worker if gpus is None else gpus
    size_b = parameters_b(config, model)
    need = None if size_b is None else engine_gib(size_b, used)
    if not gpus:
        return Load(model, config.inference.workers, 0, 0.0, need)
    return Load(model, config.inference.workers, gpus, need, reserved=used.gpu_memory_utilization)


def phase_gib(phase: tuple[Load, ...]) -> float | None:
    """Memory on the fullest GPU: loads that ask for a share of one are taken to meet on the same card."""
    if any(load.gib is None for load in phase):
        return None
    together = sum(_copies(load) * (load.gib or 0) for load in phase if load.gpus < 1)
    return max([together, *((load.gib or 0) for load in phase if load.gpus >= 1)])


def fits(phase: tuple[Load, ...], card_gib: float) -> bool:
    """True when every load fits: an engine in the share that it reserves, training in what is left."""
    if any(load.gib is None or load.gib > card_gib * (load.reserved or 1) for load in phase):
        return False
    taken = [_copies(x) * (x.reserved * card_gib if x.reserved else x.gib or 0) for x in phase if 0 < x.gpus < 1]
    return sum(taken) <= card_gib


def _copies(load: Load) -> int:
    return min(load.workers, int(1 / load.gpus + 1e-6)) if load.gpus else 0


def judges(config: Config) -> list[JudgeConfig]:
    """Every judge that the configuration names, a panel's after the one they stand in for."""
    named = [judge for judge in (config.judge, config.evaluation.judge) if judge]
    return [*named, *(config.judge.members() if config.judge.mode == "panel" else ())]
