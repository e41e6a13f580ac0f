"""Does `prepare` stay flat in memory and linear in time?

    python -m benchmarks.prepare_scale [--quick] [--rows 10000,100000,1000000] [--folder runs/prepare_scale]

Synthetic speeches go through reading, cleaning, the language filter, masking, near-duplicates and the split, as the
job does it with Ray. Of the rows, one in 20 is an earlier one with two words changed, one in 50 is an earlier one as it
was, and one in 10 holds personal data; what was planted stands beside what was found. Times begin when Ray is up and
its workers have cleaned something. The last line holds the largest size, the highest memory of any one process (the
driver or a worker), and the time per row there against that of the smallest, by the clock and by CPU time of all
processes, which other work on the machine does not touch as much. `--quick` stops at 10,000 rows.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from psycho.cluster import ray_session
from psycho.config import ClusterConfig, SpeechesConfig
from psycho.run import StageResult
from psycho.speeches.parallel import clean_on_ray
from psycho.speeches.prepare import prepare_speeches

_TEXT = """
afraid again alone always angry answer anxious apart argue arrive ashamed asleep awake away awful bad bed before behind
better blame body bother break breathe busy call calm care change child city close cold college come confused cook cope
cousin cry daily dark day dinner distance doctor door doubt dream drink drive early eat empty end evening ever exam
exhausted explain face fail fall family father fear feel fight find finish food forget forgive friend garden gone good
grow guilty habit happen hard hate head hear heart heavy help hide holiday home honest hope hospital hour house hurt
husband idea ill job journey keep kitchen know late laugh learn leave less letter lie life listen little lonely long
look lose loud love lunch manager marriage meet message mind miss mistake moment money month morning mother move music
name neighbour nervous never news night noise nothing office often old open pain parent party pay phone plan play
pressure promise proud quiet reason remember rent rest room run sad safe say school secret see shame share shout sick
silence sister sit sleep slow small smile sorry speak spend stay stop street stress strong struggle study summer talk
teacher team tears tell think tired together tomorrow train travel trouble trust try understand upset visit voice wait
wake walk want watch week weekend wife window winter wish woman work worry worse write wrong year young
"""
_WORDS = _TEXT.split()
_FRAMES = (
    "I do not know how to {} the {} with my {} any more.",
    "Since the {} I cannot {} at {} and everything is {}.",
    "My {} says that I should {} about the {}, but I only {}.",
    "When the {} comes I think of {} and the {} of my {}.",
    "It has been a {} since we could {} without a {} about {}.",
    "Is it {} that I want to {} the {} and never {} again?",
    "Every {} I {} for the {} until it is {}.",
)
_PERSONAL = (
    "You can write to {}.{}@example.org.",
    "Call me at (617) 555-0{}{}.",
    "I live at {}{} Maple Street, Boston, MA 02115.",
    "My name is Tobias and {} is not {}.",
)


def speeches(rows: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """(kind, text) of synthetic speeches; kind is fresh, exact or near."""
    draw = random.Random(seed)
    recent: deque[str] = deque(maxlen=2000)
    for number in range(rows):
        roll = draw.random()
        if recent and roll < 0.02:
            yield "exact", draw.choice(recent)
        elif recent and roll < 0.07:
            words = draw.choice(recent).split()
            for _ in range(2):
                words[draw.randrange(len(words))] = draw.choice(_WORDS)
            yield "near", " ".join(words)
        else:
            text = " ".join(_sentence(draw, draw.choice(_FRAMES)) for _ in range(draw.randint(5, 8)))
            if number % 10 == 0:
                text += " " + draw.choice(_PERSONAL).format(draw.randint(10, 99), draw.randint(10, 99))
            recent.append(text)
            yield "fresh", text


def _sentence(draw: random.Random, frame: str) -> str:
    return frame.format(*draw.choices(_WORDS, k=frame.count("{}")))


def write(path: Path, rows: int) -> dict[str, int]:
    """Write the speeches as JSONL; how many there are of each kind."""
    planted = {"fresh": 0, "exact": 0, "near": 0}
    with path.open("w", encoding="utf-8") as file:
        for kind, text in speeches(rows):
            planted[kind] += 1
            file.write(json.dumps({"question": text}) + "\n")
    return planted


class Watch:
    """Highest resident memory of the driver and of any one process below it, sampled twice a second, and CPU time."""

    def __init__(self) -> None:
        self.driver_gib, self.worker_gib = 0.0, 0.0
        self._cpu: dict[int, tuple[float, float]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=5)

    @property
    def cpu_seconds(self) -> float:
        """Of the driver and all below it, since each was first seen."""
        return sum(last - first for first, last in self._cpu.values())

    def _run(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(0.5):
            self.driver_gib = max(self.driver_gib, self._look(driver))
            for process in driver.children(recursive=True):
                try:
                    self.worker_gib = max(self.worker_gib, self._look(process))
                except psutil.Error:  # it ended while we looked
                    continue

    def _look(self, process: psutil.Process) -> float:
        times = process.cpu_times()
        now = times.user + times.system
        self._cpu[process.pid] = (self._cpu.get(process.pid, (now, now))[0], now)
        return float(process.memory_info().rss / 2**30)


@dataclass(frozen=True)
class Measured:
    """One size."""

    rows: int
    seconds: float
    cpu_seconds: float
    driver_gib: float
    worker_gib: float
    planted: dict[str, int]
    result: StageResult


def measure(rows: int, folder: Path) -> Measured:
    """Prepare so many rows; Ray is up."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    planted = write(folder / "speeches.jsonl", rows)
    config = SpeechesConfig(source=str(folder / "speeches.jsonl"))
    started = time.perf_counter()
    with Watch() as watch:
        result = prepare_speeches(config, 0, str(folder), lambda batches: clean_on_ray(batches, config, 0))
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return Measured(rows, seconds, watch.cpu_seconds, watch.driver_gib, watch.worker_gib, planted, result)


def table(found: list[Measured]) -> Table:
    """A row a size."""
    out = Table(
        "rows", "seconds", "µs a row", "CPU µs a row", "driver GiB", "worker GiB", "exact / planted", "near / planted",
        "masked",
    )  # fmt: skip
    for one in found:
        duplicates = one.result.extra["duplicates"]
        out.add_row(
            f"{one.rows:,}",
            f"{one.seconds:.1f}",
            f"{one.seconds / one.rows * 1e6:.0f}",
            f"{one.cpu_seconds / one.rows * 1e6:.0f}",
            f"{one.driver_gib:.2f}",
            f"{one.worker_gib:.2f}",
            f"{duplicates['exact']:,} / {one.planted['exact']:,}",
            f"{duplicates['near']:,} / {one.planted['near']:,}",
            f"{sum(one.result.extra['personal_data'].values()):,}",
        )
    return out


def main() -> None:
    """Run the sizes and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,100000,1000000")
    parser.add_argument("--folder", type=Path, default=Path("runs/prepare_scale"))
    parser.add_argument("--quick", action="store_true", help="10,000 rows only")
    arguments = parser.parse_args()
    console = Console(width=140)
    sizes = [10_000] if arguments.quick else sorted(int(rows) for rows in arguments.rows.split(","))
    with ray_session(ClusterConfig(object_store_gib=0.25), verbose=False):
        measure(3_000, arguments.folder)  # workers load what they need
        found = []
        for rows in sizes:
            found.append(measure(rows, arguments.folder))
            console.print(f"{rows:,} rows in {found[-1].seconds:.0f} s")
    console.print(table(found))
    first, last = found[0], found[-1]
    figures = {
        "rows": last.rows,
        "peak_rss_gib": round(max(max(one.driver_gib, one.worker_gib) for one in found), 3),
        "time_per_row_vs_smallest": round(last.seconds / last.rows / (first.seconds / first.rows), 3),
        "cpu_per_row_vs_smallest": round(last.cpu_seconds / last.rows / (first.cpu_seconds / first.rows), 3),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
