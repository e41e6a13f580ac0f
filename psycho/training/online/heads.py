"""The reward model and its heads of the principles as one classifier, so that vLLM scores both in one pass.

vLLM pools the last token through one linear layer, `score`. A head beside it is another row of that layer: the model's
folder again with a `score` of eight rows and a bias, everything else linked, and the plain one-label model as it was.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from psycho import storage
from psycho.errors import BadInput
from psycho.inference.models import local_model
from psycho.principles import STEMS
from psycho.training.loop import HEADS

LABELS = ("reward", *STEMS)
_SCORE = "score.weight"
_CENTRE = 3.0  # a head says the rating less this (`psycho.training.loop.save_heads`)


def with_heads(reward: str, folder: str) -> str:
    """Write into `folder` a classifier of `LABELS`: the reward's logit and the ratings (1-5) of the principles.

    Raises:
        BadInput: the reward model has no heads, or is not built in the way that they can stand beside its own.
    """
    source = Path(local_model(reward))
    heads_file = source / HEADS / "heads.safetensors"
    if not heads_file.is_file():
        raise BadInput(
            f"online.head_weights and safety_floor need the heads of the principles, and the model {reward} has none; "
            "train it with training.reward.principle_heads above 0"
        )
    holder = next((file for file in sorted(source.glob("*.safetensors")) if _SCORE in _names(file)), None)
    if holder is None:
        raise BadInput(
            f"the heads of the principles: no weights file of {reward} holds {_SCORE}; such a reward model can only be "
            "used without online.head_weights and safety_floor"
        )
    weights = _tensors(holder)
    heads = _tensors(heads_file)
    own = weights[_SCORE]
    weights[_SCORE] = torch.cat([own, heads["principles.weight"].to(own.dtype)])
    bias = heads["principles.bias"].float() + _CENTRE
    weights["score.bias"] = torch.cat([torch.zeros(1), bias]).to(own.dtype)
    storage.remove(folder)
    with storage.writing_folder(folder) as target:
        for file in source.iterdir():
            if file.is_file() and file.name not in ("config.json", holder.name, f"{holder.name}.index.json"):
                (target / file.name).symlink_to(file.resolve())
        save_file(weights, target / holder.name, metadata={"format": "pt"})
        _write_config(source, target)
        _write_index(target, holder.name)
    return folder


def _names(file: Path) -> set[str]:
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys())


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118, it is no mapping


def _write_config(source: Path, target: Path) -> None:
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {str(place): label for place, label in enumerate(LABELS)}
    config["label2id"] = {label: place for place, label in enumerate(LABELS)}
    config.pop("num_labels", None)  # follows from the labels; two sayings could differ
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_index(target: Path, holder: str) -> None:
    """Name the bias in the index of a model of several files: what it does not name is not read."""
    index = target / "model.safetensors.index.json"
    if index.exists():
        found = json.loads(index.read_text(encoding="utf-8"))
        found["weight_map"]["score.bias"] = holder
        os.unlink(index)
        index.write_text(json.dumps(found, indent=2), encoding="utf-8")
