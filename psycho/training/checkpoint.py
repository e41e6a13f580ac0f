"""Checkpoints of a training in progress: every rank writes whole parameters, with their optimizer states, of its share
of the model, and the last checkpoint that all ranks have written is gone on from, by as many ranks as there are then
and at any ZeRO stage. A checkpoint belongs to one training (its settings and data, by key): where another training's
lies in the folder it is removed, and training starts at the beginning. Beside them, where dev pairs are there to choose
by, the best weights so far as a finished model folder.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psycho import storage
from psycho.inference.models import local_model
from psycho.training import states

History = list[dict[str, float]]
_BEST = "best.json"


class Checkpoints:
    """The checkpoints of one training: `step-<n>/shard-<rank>-of-<ranks>.pt` below a folder that all ranks share, or on
    an object store, where what was copied whole is there and nothing else."""

    def __init__(self, folder: str, key: str, every_steps: int, timeout_s: float) -> None:
        self._folder, self._key, self._every, self._timeout_s = folder, key, every_steps, timeout_s
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")

    def resume(self, engine: Any, prime: Callable[[], None]) -> tuple[int, History]:
        """Load the last whole checkpoint; the steps done and their statistics ((0, []): there is none). Collective.

        Args:
            prime: makes the optimizer's state, which is not there before its first step.
        """
        folder = self._last()
        if folder is None:
            return 0, []
        prime()
        parameters: dict[str, dict[str, Any]] = {}
        random_state: dict[str, Tensor] | None = None
        about: dict[str, Any] = {}
        folder = local_model(folder)  # of an object store a node fetches them once
        for name in _shards(folder):
            shard = torch.load(Path(folder, name), map_location="cpu", weights_only=True, mmap=True)
            parameters |= shard["parameters"]
            if shard["rank"] == dist.get_rank():
                random_state = shard["random"]
            about = shard
        states.restore(engine, parameters)
        if random_state:
            _set_random_state(random_state)
        return int(about["steps"]), list(about["history"])

    def save(self, engine: Any, steps: int, total: int, history: History) -> None:
        """Take a checkpoint where one is due; a thread writes it while training goes on. Collective."""
        if steps % self._every or steps >= total:
            return
        self.wait()
        rank, world = dist.get_rank(), dist.get_world_size()
        shard = {
            "parameters": states.gather(engine),
            "steps": steps,
            "history": list(history),
            "rank": rank,
            "random": _random_state(),
        }
        if rank == 0:
            self._remove_old()
        file = storage.join(self._folder, f"step-{steps}", f"shard-{rank}-of-{world}.pt")
        self._writing = self._writer.submit(_write, shard, file)

    def wait(self) -> None:
        """Until what is being written is written; its error is raised here."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result(self._timeout_s)

    def close(self) -> None:
        """Wait, and let the thread end."""
        try:
            self.wait()
        finally:
            self._writer.shutdown(wait=False)

    def _steps(self) -> list[str]:
        """Folders of checkpoints, the newest first."""
        steps = [int(name.removeprefix("step-")) for name in storage.names(self._folder) if name.startswith("step-")]
        return [storage.join(self._folder, f"step-{step}") for step in sorted(steps, reverse=True)]

    def _remove_old(self) -> None:
        """Those before the newest whole one."""
        folders = self._steps()
        newest = next((place for place, folder in enumerate(folders) if _whole(folder)), len(folders))
        for folder in folders[newest + 1 :]:
            _remove(folder)

    def _last(self) -> str | None:
        """All ranks hear it from the first, or one might see a file that another does not."""
        found: list[str | None] = [None]
        if dist.get_rank() == 0:
            file = storage.join(self._folder, "key")
            if storage.read_text(file) != self._key:
                storage.remove(self._folder)  # or fail: a step that stayed would be gone on from under this key
                storage.write_text(file, self._key)
            for folder in self._steps():
                if found[0] is None and _whole(folder):
                    found = [folder]
                elif found[0] is None:  # cut short, and of another number of ranks perhaps
                    _remove(folder)
        dist.broadcast_object_list(found, src=0)
        return found[0]


def _shards(folder: str) -> list[str]:
    return [name for name in storage.names(folder) if name.startswith("shard-") and name.endswith(".pt")]


def _whole(folder: str) -> bool:
    """Every rank that took part has written its shard."""
    files = _shards(folder)
    return bool(files) and len(files) == int(files[0].removesuffix(".pt").rpartition("-")[2])


def _remove(folder: str) -> None:
    with suppress(OSError):  # a worker that outlives its killed driver for a moment may still write there
        storage.remove(folder)


def _write(shard: Mapping[str, Any], file: str) -> None:
    with storage.writing(file) as local:
        torch.save(dict(shard), local)


class Best:
    """The best weights so far by the loss on the dev pairs: a model folder below the checkpoints, which `best.json`,
    written after it, names."""

    def __init__(self, folder: str, every_steps: int | None) -> None:
        self._folder, self._every = folder, every_steps

    def due(self, steps: int, total: int) -> bool:
        """When a checkpoint is due, and at the end."""
        return steps == total or (self._every is not None and steps % self._every == 0)

    def offer(self, loss: float, steps: int, save: Callable[[str], None]) -> None:
        """Keep the present weights where none were better; collective, for all ranks hold the same loss."""
        better: list[str | None] = [None]
        if dist.get_rank() == 0:
            known = storage.read_text(self._file)
            if known is None or json.loads(known)["loss"] > loss:
                # Another name each time: a step that is done again after a crash must not write into what is named.
                better = [storage.join(self._folder, f"best-{steps}-{uuid.uuid4().hex[:8]}")]
        dist.broadcast_object_list(better, src=0)
        folder = better[0]
        if folder is None:
            return
        save(folder)
        if dist.get_rank() == 0:
            before = best_folder(self._folder)
            storage.write_text(self._file, json.dumps({"loss": loss, "steps": steps, "folder": folder}))
            if before and before != folder:
                _remove(before)
        dist.barrier()

    @property
    def _file(self) -> str:
        return storage.join(self._folder, _BEST)


def best_folder(checkpoints: str) -> str:
    """Where the best weights of a training lie; empty before it has met dev pairs."""
    known = storage.read_text(storage.join(checkpoints, _BEST))
    return str(json.loads(known)["folder"]) if known else ""


def _random_state() -> dict[str, Tensor]:
    """Of the CPU's generator and the GPU's, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
