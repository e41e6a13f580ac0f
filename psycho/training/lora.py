"""LoRA on a loaded model, and back to plain weights: what is saved is merged, so that vLLM, TRL and transformers load
it without knowing. The base model is the reference of preference training, so no copy of it is needed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from psycho.config import LoRAConfig

_PREFIX = "base_model.model."


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
