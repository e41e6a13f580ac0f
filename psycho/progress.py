"""Progress that a person can follow: stage, rows, tokens/s, time left.

Workers anywhere in the cluster tell one small actor how many rows and tokens they finished; the driver reads it once
a second and draws a bar on a terminal, or prints a line now and then where the output is a log.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Column

from psycho.eta import Eta, said

_LINE_EVERY_S = 20.0
_LOOK_EVERY_S = 1.0


class _Counter:
    """Rows and tokens done, by stage."""

    def __init__(self) -> None:
        self._done: dict[str, list[float]] = {}
        self._note: dict[str, str] = {}

    def add(self, stage: str, rows: int, tokens: int, note: str = "") -> None:
        entry = self._done.setdefault(stage, [0, 0])
        entry[0] += rows
        entry[1] += tokens
        if note:
            self._note[stage] = note

    def read(self, stage: str) -> tuple[int, int, str]:
        rows, tokens = self._done.get(stage, (0, 0))
        return int(rows), int(tokens), self._note.get(stage, "")


class Reporter:
    """What a worker holds: tells the counter and goes on, whatever becomes of the message."""

    def __init__(self, counter: Any, stage: str) -> None:
        self._counter, self._stage = counter, stage

    def add(self, rows: int, tokens: int = 0, note: str = "") -> None:
        self._counter.add.remote(self._stage, rows, tokens, note)


class Progress:
    """The driver's side: one bar a stage."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._counter: Any = None

    def say(self, text: str) -> None:
        """One line for the person who waits."""
        self.console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int, unit: str = "rows") -> Iterator[Reporter]:
        """Show the progress of one stage while the block runs."""
        if self._counter is None:
            import ray  # here, so that a dry run needs no Ray

            self._counter = ray.remote(num_cpus=0)(_Counter).remote()
        stop = threading.Event()
        watch = self._draw if self.console.is_terminal else self._log
        thread = threading.Thread(target=watch, args=(name, total, unit, stop), daemon=True)
        thread.start()
        try:
            yield Reporter(self._counter, name)
        finally:
            stop.set()
            thread.join(timeout=5)

    def _read(self, name: str) -> tuple[int, int, str]:
        import ray

        if not ray.is_initialized():  # it went down meanwhile: asking would start another
            return 0, 0, ""
        try:
            return ray.get(self._counter.read.remote(name), timeout=5)
        except Exception:  # the display must never end the work it shows
            return 0, 0, ""

    def _draw(self, name: str, total: int, unit: str, stop: threading.Event) -> None:
        with bar(self.console, unit) as shown:
            task = shown.add_task(name, total=max(total, 1), detail="")
            for rows, detail in self._watched(name, total, stop):
                shown.update(task, completed=rows, detail=detail)

    def _log(self, name: str, total: int, unit: str, stop: threading.Event) -> None:
        printed = time.monotonic()
        for rows, detail in self._watched(name, total, stop):
            if time.monotonic() - printed >= _LINE_EVERY_S:
                printed = time.monotonic()
                self.say(f"  {name}: {rows:,}/{total:,} {unit}{detail}")

    def _watched(self, name: str, total: int, stop: threading.Event) -> Iterator[tuple[int, str]]:
        """Rows done and the rest of the line, once a second until `stop`."""
        started, eta = time.monotonic(), Eta(total)
        while not stop.wait(_LOOK_EVERY_S):
            rows, tokens, note = self._read(name)
            seconds = time.monotonic() - started
            eta.see(seconds, rows, tokens)
            yield rows, detail(eta, seconds, note)


def bar(console: Console, unit: str) -> Bar:
    """A bar that keeps to one line of the terminal: the bar is short where that is narrow, and a note gives way."""
    return Bar(
        SpinnerColumn(),
        TextColumn("{task.description:<12}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=24 if console.width >= 110 else 8),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn(unit + "{task.fields[detail]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        console=console,
        transient=True,
        expand=True,
    )


def detail(eta: Eta, seconds: float, note: str) -> str:
    """What stands behind the counts of a stage: the time left, once it is known, tokens a second, the worker's note."""
    left, tokens = eta.left(seconds), eta.tokens_per_s()
    parts = [said(left)] if left is not None else []
    parts += [f"{tokens:,.0f} tok/s"] if tokens else []
    parts += [note] if note else []
    return "".join(f" · {part}" for part in parts)
