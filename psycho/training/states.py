"""A parameter with its optimizer state, whole and in fp32, out of a DeepSpeed engine and back, whatever the ZeRO stage:
what makes a checkpoint that another number of ranks can go on from.

Ranks hold a parameter in pieces that depend on their number. Each parameter is put together in turn, by all ranks, and
kept by one of them, so that no rank ever holds more than its share and one whole parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam
State = dict[str, Any]


def gather(engine: Any) -> dict[str, State]:
    """This rank's share of the trained parameters, by name: `value`, the moments and `step`. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    step = next((float(state["step"]) for state in adam(engine).state.values() if "step" in state), 0.0)
    kept: dict[str, State] = {}
    masters = _masters(engine)
    for number, (name, parameter) in enumerate(_trained(engine)):
        whole = masters[id(parameter)] if masters else _get(parameter)
        if number % world == rank:
            kept[name] = {key: value.to("cpu", copy=True) for key, value in whole.items()} | {"step": step}
    return kept


def restore(engine: Any, states: Mapping[str, State]) -> None:
    """Give every parameter what `gather` took; the optimizer must have made its states, by a step. Collective.

    Raises:
        ValueError: a parameter is missing.
    """
    step = 0.0
    masters = _masters(engine)
    for name, parameter in _trained(engine):
        if name not in states:
            raise ValueError(f"the checkpoint does not hold {name}")
        state = states[name]
        step = state["step"]
        whole = {key: value.to(parameter.device) for key, value in state.items() if key != "step"}
        with torch.no_grad():
            for key, value in masters[id(parameter)].items() if masters else ():
                value.copy_(whole[key])
        _set(engine, parameter, whole)
    for state in adam(engine).state.values():
        if "step" in state:
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else int(step)


def _trained(engine: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def adam(engine: Any) -> Any:
    """The optimizer below DeepSpeed's."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _masters(engine: Any) -> dict[int, dict[str, Tensor]]:
    """At stage 0, where nothing is in pieces: by the id of a parameter its fp32 value and moments, where they lie.

    In fp32 the parameter is its own; in bf16 DeepSpeed keeps a copy of each (torch's Adam), or of all of them one after
    the other in one tensor (its fused Adam).
    """
    if engine.zero_optimization_stage() > 0:
        return {}
    wrapper, state = engine.optimizer, adam(engine).state
    found: dict[int, dict[str, Tensor]] = {}
    if isinstance(wrapper, torch.optim.Optimizer):
        own = [parameter for _, parameter in _trained(engine)]
        copies = zip([own], [own], strict=True)
    elif hasattr(wrapper, "fp32_groups_flat"):
        for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_groups_flat, strict=True):
            whole = {"value": flat.detach()} | {key: state[flat][key] for key in MOMENTS}
            cut = {key: value.split([p.numel() for p in group]) for key, value in whole.items()}
            for place, parameter in enumerate(group):
                found[id(parameter)] = {key: parts[place].view_as(parameter) for key, parts in cut.items()}
        return found
    else:
        copies = zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
    for group, masters in copies:
        for parameter, master in zip(group, masters, strict=True):
            found[id(parameter)] = {"value": master.detach()} | {key: state[master][key] for key in MOMENTS}
    return found


def _get(parameter: Any) -> dict[str, Tensor]:
    moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
    return {"value": safe_get_full_fp32_param(parameter)} | moments


def _set(engine: Any, parameter: Any, whole: Mapping[str, Tensor]) -> None:
    stage = engine.zero_optimization_stage()
    if stage == 3:
        own = {key: _partition(parameter, value) for key, value in whole.items()}
        safe_set_local_fp32_param(parameter, own["value"])
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, own[key], key)
        parameter.ds_tensor.data.copy_(own["value"])
        if parameter.numel() == whole["value"].numel():  # small ones stay whole on every rank
            parameter.data.copy_(whole["value"].view_as(parameter))
        return
    with torch.no_grad():
        parameter.copy_(whole["value"])
    if stage == 0:
        return
    safe_set_full_fp32_param(parameter, whole["value"])
    for key in MOMENTS:
        safe_set_full_optimizer_state(parameter, whole[key], key)


def _partition(parameter: Any, value: Tensor) -> Tensor:
    """This rank's piece of a whole value, filled up with zeros where the ranks do not divide it."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), device=value.device)
    padded[: value.numel()] = value.flatten()
    return padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]
