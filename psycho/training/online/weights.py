"""The weights in training as the engines know them, one layer after the other.

Under ZeRO-3 no rank holds a whole tensor: the ranks gather one layer, hand it on and let go of it, so that a layer is
the most that is ever whole on a device. Adapters are merged on the way. The names are those of the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from psycho.errors import BadInput
from psycho.inference.models import local_model
from psycho.training.lora import merged

_HEAD = "lm_head.weight"


class WeightStream:
    """Named plain weights of a trainer's policy; every rank must go through them, in step."""

    def __init__(self, trainer: Any) -> None:
        self._parameters: dict[str, Any] = dict(trainer.engine.module.named_parameters())
        self._sharded = trainer.training.zero_stage == 3
        lora = trainer.training.lora
        self._scaling = lora.alpha / lora.r if lora else None
        self._tied = bool(getattr(trainer.engine.module.model.config, "tie_word_embeddings", False))
        self.groups = layers(list(self._parameters))

    def shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(name, dtype, shape) of each weight in the order that they come in; nothing is gathered for it."""
        found = []
        for group in self.groups:
            parameters = {name: self._parameters[name] for name in group}
            empty = {
                name: torch.empty(getattr(value, "ds_shape", value.shape), dtype=value.dtype, device="meta")
                for name, value in parameters.items()
            }
            found += [(name, value.dtype, tuple(value.shape)) for name, value in self._plain(empty).items()]
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole weight). A weight is the receiver's, and no view of what the trainer goes on changing."""
        for group in self.groups:
            _settle()  # nobody reads any more what the last group was cloned into
            own = [self._parameters[name] for name in group]
            with torch.no_grad(), self._whole(own):
                state = {name: value.detach() for name, value in zip(group, own, strict=True)}
                plain = {name: value.clone() for name, value in self._plain(state).items()}
            _settle()
            yield from plain.items()

    def _whole(self, parameters: list[Any]) -> AbstractContextManager[Any]:
        if not self._sharded:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(parameters)

    def _plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        plain = {name.removeprefix("model."): value for name, value in state.items()}
        if self._scaling is not None:
            plain = merged(plain, self._scaling)
        if self._tied:
            plain.pop(_HEAD, None)
        return plain


def _settle() -> None:
    """Who sends takes turns between streams of the GPU, so that no one stream orders the clones and their readers."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layers(names: list[str]) -> list[list[str]]:
    """The parameters that are gathered together, in their order: those of a layer, else those of a module.

    A layer is what comes before the first number in a name (`model.layers.3`), so no architecture need be known.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
        if number is None:  # an adapter goes with the weight that it is merged into
            key = name.split(".base_layer.")[0].split(".lora_")[0]
        else:
            key = ".".join(parts[: number + 1])
        found.setdefault(key, []).append(name)
    return list(found.values())


def check_names(stream: WeightStream, policy: str) -> None:
    """The names and shapes are those of the checkpoint in the folder `policy`, from which the engines started.

    Raises:
        BadInput: transformers holds this architecture's weights in another form than it saves them in.
    """
    expected: dict[str, tuple[int, ...]] = {}
    for file in Path(local_model(policy)).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            expected |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    own = {name: shape for name, _, shape in stream.shapes()}
    if _HEAD not in own:  # tied: a checkpoint may hold it or not
        expected.pop(_HEAD, None)
    strange = sorted(name for name in own.keys() | expected.keys() if own.get(name) != expected.get(name))
    if strange:
        raise BadInput(
            f"the weights in training are not those of the checkpoint (the first that differs: {strange[0]}), so they "
            "cannot go to the engines from GPU to GPU; set online.transport=disk"
        )
