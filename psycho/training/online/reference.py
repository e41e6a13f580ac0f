"""The reference of all rounds where it is fixed: a frozen copy of the first policy beside the one in training.

It only fills the folder of stored reference log-probabilities, so that the loop finds them there and does not ask the
policy in training. The copy costs its weights in memory on every rank, unsharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from psycho.inference.models import local_model
from psycho.training.groups import Group
from psycho.training.modules import use_packing
from psycho.training.references import with_references


class FixedReference:
    """The first policy, frozen, on the trainer's device."""

    def __init__(self, trainer: Any, policy: str, folder: str) -> None:
        self._trainer, self.folder = trainer, folder
        dtype = torch.bfloat16 if trainer.training.precision == "bf16" else torch.float32
        loaded = trainer.objective.load(local_model(policy), dtype)
        if trainer.training.packing:
            use_packing(loaded)
        self._module = trainer.objective.wrap(loaded).to(trainer.device).eval()

    def store(self, groups: Sequence[Group]) -> None:
        """Store what the reference says of these groups; collective."""
        trainer = self._trainer
        with_references(
            groups,
            lambda batch: trainer.objective.logprobs(self._module(batch), batch),
            trainer.collate,
            trainer.training.bin_tokens,
            self.folder,
        )
