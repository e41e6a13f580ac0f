"""Checkpoints of a training in progress: every rank writes its shard of the ZeRO states, and the last one written whole
is gone on from. A checkpoint belongs to one training (its settings, data and number of ranks, by key); another
training's is not touched, it is removed and training starts at the beginning.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

History = list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one training below a folder that all ranks share."""

    def __init__(self, folder: str, key: str, every_steps: int) -> None:
        self._folder, self._key, self._every = Path(folder), key, every_steps

    def resume(self, engine: Any) -> tuple[int, History]:
        """Load the last whole checkpoint; the steps done and their statistics ((0, []): there is none)."""
        tag = self._last()
        if tag is None:
            return 0, []
        loaded, state = engine.load_checkpoint(str(self._folder), tag=tag)
        if loaded is None:
            return 0, []
        _set_random_state(self._folder / tag / f"random-{dist.get_rank()}.pt")
        return int(state["steps"]), list(state["history"])

    def save(self, engine: Any, steps: int, total: int, history: History) -> None:
        """Write a checkpoint where one is due; the one before it goes once this one is whole. Collective."""
        if steps % self._every or steps >= total:
            return
        tag = f"step-{steps}"
        (self._folder / tag).mkdir(parents=True, exist_ok=True)
        torch.save(torch.get_rng_state(), self._folder / tag / f"random-{dist.get_rank()}.pt")
        state: Mapping[str, Any] = {"steps": steps, "history": history}
        engine.save_checkpoint(str(self._folder), tag=tag, client_state=dict(state), save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            (self._folder / "whole.json").write_text(json.dumps({"tag": tag, "key": self._key}), encoding="utf-8")
            for other in self._folder.glob("step-*"):
                if other.name != tag:
                    shutil.rmtree(other, ignore_errors=True)
        dist.barrier()

    def _last(self) -> str | None:
        """All ranks hear it from the first, or one might see a file that another does not."""
        found: list[str | None] = [None]
        if dist.get_rank() == 0:
            file = self._folder / "whole.json"
            entry = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if entry.get("key") == self._key:
                found = [entry["tag"]]
            else:
                shutil.rmtree(self._folder, ignore_errors=True)
        dist.broadcast_object_list(found, src=0)
        return found[0]


def _set_random_state(file: Path) -> None:
    if file.is_file():
        torch.set_rng_state(torch.load(file, weights_only=True))
