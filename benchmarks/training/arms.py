"""An arm is a process of its own that waits for its turns; the first turn warms it up, counts its operations and shows
how far its memory grows."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.training.data import SIZES, with_words


class Flops(TorchDispatchMode):
    """Floating-point operations of all matrix products, and of attention, that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif "_scaled_dot_product_flash_attention_for_cpu" in str(packet):  # which torch's own counter does not know
            backward = str(packet).endswith("_backward")
            query, key, *_ = args[1:] if backward else args
            self.total += (10 if backward else 4) * _looks(query, key)
        return out


def _looks(query: Tensor, key: Tensor) -> int:
    """Multiplications of one product of all queries [B, H, T, D] with all keys; nothing is taken off for causality."""
    batch, heads, length, width = query.shape
    return batch * heads * length * key.shape[2] * width


def worker(variant: str, folder: str, size: str) -> None:
    """Make the arm, then one turn per line on the standard input."""
    from benchmarks.training.ours import ours
    from benchmarks.training.peer import trl

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    made = with_words(SIZES[size], folder) if size == "real" else SIZES[size]
    turn = (trl if variant.startswith("trl") else ours)(variant, folder, made)
    before = psutil.Process().memory_info().rss / 2**30
    with Flops() as flops:
        pairs = turn()["pairs"]
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    about = {"grown_gib": grown, "gflop_per_pair": flops.total / pairs / 1e9}
    print(json.dumps({"ready": True}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn() | about), file=out, flush=True)


class Arm:
    """A worker process and what its turns said."""

    def __init__(self, name: str, folder: Path, size: str, log: Path) -> None:
        self.name, self.turns = name, list[dict[str, float]]()
        command = [sys.executable, "-m", "benchmarks.training", "--worker", name, "--model", str(folder)]
        self._log = log.open("a")
        self._process = subprocess.Popen(
            [*command, "--size", size], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1",
                              "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, float]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended: see {self._log.name}")
        return dict(json.loads(line))

    def turn(self) -> None:
        """One timed turn."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.turns.append(self._read())

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)

    @property
    def pairs_per_s(self) -> float:
        """Median of the turns."""
        return statistics.median(turn["pairs"] / turn["seconds"] for turn in self.turns)

    def __getitem__(self, name: str) -> float:
        """What every turn says alike: `grown_gib`, `gflop_per_pair`, the first `loss`."""
        return self.turns[0][name]


def compare(
    names: tuple[str, ...], folder: Path, size: str, turns: int, log: Path, say: Callable[[str], None]
) -> list[Arm]:
    """Run the arms turn by turn, side by side."""
    arms = []
    for name in names:
        say(f"starting {name}")
        arms.append(Arm(name, folder, size, log))
    for number in range(turns):
        say(f"turn {number + 1} of {turns}: {', '.join(names)}")
        for arm in arms:
            arm.turn()
    for arm in arms:
        arm.close()
        say(f"{arm.name}: {arm.pairs_per_s:.2f} pairs/s, grown by {arm['grown_gib']:.2f} GiB")
    return arms
