"""A batch job with a stage that costs nothing, in a process that a test may kill.

`python driver.py ROOT KILL [FOLDER]`: answers 400 requests into ROOT/answers (or FOLDER) and notes every answer made
in ROOT/log. KILL: `actor` or `driver` is killed, or the `engine` found dead, once, at the 200th answer; or `nobody`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import ray

from psycho.config import InferenceConfig
from psycho.inference.batch import run_batches
from psycho.inference.loop import EngineFailed

COUNT, KILL_AT = 400, 200


class EngineDeadError(Exception):
    """Named like vLLM's."""


class Trickle:
    """Answers one by one, as an engine does."""

    SCHEMA = pa.schema([(name, pa.string()) for name in ("request_id", "text", "error")])

    def __init__(self, root: str, kill: str, driver: int) -> None:
        self._log, self._killed = Path(root, "log"), Path(root, "killed")
        self._kill, self._driver, self._pause = kill, driver, threading.Event()

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, str | None]]:
        for name in batch["request_id"].to_pylist():
            self._pause.wait(0.01)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{name}\n")
            if self._kill != "nobody" and self._log.read_text().count("\n") >= KILL_AT and not self._killed.exists():
                self._killed.touch()
                if self._kill == "engine":
                    raise EngineFailed("the engine failed") from EngineDeadError()
                os.kill(self._driver if self._kill == "driver" else os.getpid(), signal.SIGKILL)
            yield {"request_id": name, "text": os.urandom(512).hex(), "error": None}


def main() -> None:
    """Run it, and say on stdout what a person would be told."""
    root, kill = sys.argv[1:3]
    folder = sys.argv[3] if len(sys.argv) > 3 else f"{root}/answers"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    config = InferenceConfig(workers=1, cpus_per_worker=0.5, gpus_per_worker=0, batch_size=32)
    requests = pa.table({"request_id": [f"r{number:03d}" for number in range(COUNT)]})
    arguments = {"root": root, "kill": kill, "driver": os.getpid()}
    run_batches(
        requests, folder, Trickle, arguments, config,
        on_resume=lambda count: print(f"resumed {count}", flush=True), at_once=64, say=print,
    )  # fmt: skip


if __name__ == "__main__":
    main()
