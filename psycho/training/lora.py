"""LoRA on a loaded model, and back to plain weights: what is saved is merged, so that vLLM, TRL and transformers load
it without knowing. The base model is the reference of preference training, so no copy of it is needed.

The frozen weights may be in 4 bit (QLoRA; Dettmers et al. 2023). Then what is saved is what was trained: the adapters
merged into the weights as 4 bit show them, not into those from before.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from psycho.config import LoRAConfig
from psycho.errors import BadInput

_PREFIX = "base_model.model."
_WHOLE = ("lm_head", "score")  # heads are trained, or asked for every word, and stay as they are


def add_lora(model: Any, settings: LoRAConfig, task: str) -> Any:
    """The model with trainable low-rank adapters beside its linear layers (Hu et al. 2021); the rest is frozen.

    Args:
        task: `CAUSAL_LM`, or `SEQ_CLS`, whose score head is trained as a whole.
    """
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules) or "all-linear",
            task_type=task,
        ),
    )


def load_options(settings: LoRAConfig | None, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` needs for weights in 4 bit; nothing without.

    Raises:
        BadInput: there is no GPU, or bitsandbytes is not installed.
    """
    if settings is None or settings.quantize is None:
        return {}
    asked = f"training.lora.quantize {settings.quantize}"
    if device.type != "cuda":
        raise BadInput(f"{asked} needs a CUDA device, and this worker trains on {device.type}; set it to null")
    if find_spec("bitsandbytes") is None:
        raise BadInput(f"{asked} needs the package bitsandbytes, which is not installed; install it or set it to null")
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=settings.quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(_WHOLE),  # of 4 bit, too, in spite of its name
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def dequantized(module: nn.Module) -> dict[str, Tensor]:
    """The state of a module whose frozen weights are in 4 bit, with those weights as numbers again."""
    from bitsandbytes.functional import dequantize_4bit

    state: dict[str, Tensor] = {}
    for name, value in (*module.named_parameters(remove_duplicate=False), *_persistent(module)):
        quantized = getattr(value, "quant_state", None)
        state[name] = value if quantized is None else dequantize_4bit(value.data, quantized).cpu()
    return state


def unquantized(model: Any) -> Any:
    """A model of the same shape without weights, to save those of `dequantized` by: it does not say that they are in
    4 bit, and knows no other way to write them."""
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        return type(model)(config)


def _persistent(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the state, which those that 4 bit keeps beside its weights do not."""
    known = {name for name, _ in module.named_buffers()}
    return [(name, value) for name, value in module.state_dict().items() if name in known]


def merged(state: dict[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Plain weights of a peft model's state: W + scaling * B A, under the names the base model has."""
    plain: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        stem = name.removeprefix(_PREFIX)
        if ".base_layer." in name:
            layer, _, kind = name.rpartition(".base_layer.")
            if kind == "weight":
                a, b = (state[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
                value = (value.float() + scaling * (b @ a)).to(value.dtype)
            stem = f"{layer.removeprefix(_PREFIX)}.{kind}"
        plain[stem.replace(".modules_to_save.default", "")] = value
    return plain
