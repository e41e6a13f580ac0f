"""Peak memory of a run: resident memory of this process and all below it, sampled every two seconds.

A page that several processes share (libraries, Ray's object store) counts once, as it does for the machine: Linux
splits it among them (PSS). On a cluster it is the driver's node.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Samples while the block runs; `gib` is the highest sum seen."""

    def __init__(self, every_s: float = 2.0) -> None:
        self.gib = 0.0
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        while True:
            self.gib = max(self.gib, resident_gib())
            if self._stop.wait(self._every_s):
                return


def resident_gib() -> float:
    """Resident memory of this process and its descendants, GiB, pages that several of them share counted once."""
    root = psutil.Process()
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except psutil.Error:  # it ended while we looked
            continue
    return total / 2**30
