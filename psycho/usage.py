"""Peak memory of a run: resident memory of this process and all below it, sampled once a second.

Shared pages count once per process, so the figure errs on the high side. On a cluster it is the driver's node.
"""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Samples while the block runs; `gib` is the highest sum seen."""

    def __init__(self, every_s: float = 1.0) -> None:
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
    """Resident memory of this process and its descendants, GiB."""
    root = psutil.Process()
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.Error:  # it ended while we looked
            continue
    return total / 2**30
