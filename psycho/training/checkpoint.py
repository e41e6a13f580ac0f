"""Checkpoints of a training in progress: every rank writes whole parameters, with their optimizer states, of its share
of the model, and the last checkpoint that all ranks have written is gone on from, by as many ranks as there are then
and at any ZeRO stage. A checkpoint belongs to one training (its settings and data, by key): where another training's
lies in the folder it is removed, and training starts at the beginning. Beside them, where dev pairs are there to choose
by, the best weights so far as a finished model folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psycho.training import states

History = list[dict[str, float]]


class Checkpoints:
    """The checkpoints of one training below a folder that all ranks share: `step-<n>/shard-<rank>-of-<ranks>.pt`."""

    def __init__(self, folder: str, key: str, every_steps: int, timeout_s: float) -> None:
        self._folder, self._key, self._every, self._timeout_s = Path(folder), key, every_steps, timeout_s
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
        for file in sorted(folder.glob("shard-*.pt")):
            shard = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
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
        file = self._folder / f"step-{steps}" / f"shard-{rank}-of-{world}.pt"
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

    def _steps(self) -> list[Path]:
        """Folders of checkpoints, the newest first."""
        return sorted(self._folder.glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))

    def _remove_old(self) -> None:
        """Those before the newest whole one."""
        folders = self._steps()
        newest = next((place for place, folder in enumerate(folders) if _whole(folder)), len(folders))
        for folder in folders[newest + 1 :]:
            shutil.rmtree(folder, ignore_errors=True)

    def _last(self) -> Path | None:
        """All ranks hear it from the first, or one might see a file that another does not."""
        found: list[str | None] = [None]
        if dist.get_rank() == 0:
            file = self._folder / "key"
            if not file.is_file() or file.read_text(encoding="utf-8") != self._key:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder.mkdir(parents=True)
                file.write_text(self._key, encoding="utf-8")
            for folder in self._steps():
                if found[0] is None and _whole(folder):
                    found = [str(folder)]
                elif found[0] is None:  # cut short, and of another number of ranks perhaps
                    shutil.rmtree(folder, ignore_errors=True)
        dist.broadcast_object_list(found, src=0)
        return None if found[0] is None else Path(found[0])


def _whole(folder: Path) -> bool:
    """Every rank that took part has written its shard."""
    files = list(folder.glob("shard-*.pt"))
    return bool(files) and len(files) == int(files[0].stem.rpartition("-")[2])


def _write(shard: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".unfinished")
    torch.save(dict(shard), aside)
    aside.rename(file)


class Best:
    """The best weights so far by the loss on the dev pairs, as a model folder `best` below the checkpoints."""

    def __init__(self, folder: str, every_steps: int | None) -> None:
        self._folder, self._every = Path(folder), every_steps

    def due(self, steps: int, total: int) -> bool:
        """When a checkpoint is due, and at the end."""
        return steps == total or (self._every is not None and steps % self._every == 0)

    def offer(self, loss: float, steps: int, save: Callable[[str], None]) -> None:
        """Keep the present weights where none were better; collective, for all ranks hold the same loss."""
        file, best = self._folder / "best.json", best_folder(str(self._folder))
        if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["loss"] <= loss:
            return
        dist.barrier()  # all have looked
        aside = self._folder / "best.unfinished"
        save(str(aside))
        if dist.get_rank() == 0:
            shutil.rmtree(best, ignore_errors=True)
            aside.rename(best)
            file.write_text(json.dumps({"loss": loss, "steps": steps}), encoding="utf-8")
        dist.barrier()


def best_folder(checkpoints: str) -> Path:
    """Where the best weights of a training lie, once it has met dev pairs."""
    return Path(checkpoints, "best")


def _random_state() -> dict[str, Tensor]:
    """Of the CPU's generator and the GPU's, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
