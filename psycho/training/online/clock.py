"""Where the time of a round goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

OVERHEAD = ("sync", "checkpoint", "waiting", "start")
"""What an ideal loop would not spend: all but sampling, scoring, training and watching."""


class Clock:
    """Seconds by phase since it was made; each phase is noted where it ends, and phases do not overlap."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = self._phases.get(phase, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        return {phase: round(value, 3) for phase, value in self._phases.items()}

    def whole(self) -> dict[str, float]:
        """The same with `wall`, and `waiting`: what was in no phase, or waited for in one of that name."""
        wall = time.perf_counter() - self._began
        rest = wall - sum(self._phases.values())
        waiting = self._phases.get("waiting", 0.0) + rest
        return self.seconds() | {"waiting": round(waiting, 3), "wall": round(wall, 3)}
