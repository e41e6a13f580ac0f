"""One small run of the whole loop, shared by the end-to-end tests.

The nano models are those that ship; everything else is cut to what runs every part.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = (
    "speeches.nano_train=40",
    "speeches.evaluation=12",
    "evaluation.speeches=12",
    "pairs.min_gap=0.1",
    "training.sft.min_overall=1",
    "quality.max_left_out_share=1",
    "quality.max_floored_share=1",
    "online.rounds=2",
    "online.speeches_per_round=8",
    "online.samples_per_speech=4",
    "online.min_gap=0",
)
Command = Callable[..., list[str]]


def _command(run_dir: Path, job: str = "pipeline", *extra: str) -> list[str]:
    chosen = [part for setting in (*SMALL, *extra) for part in ("--set", setting)]
    where = ["--config", "configs/nano.yaml", "--run-dir", str(run_dir)]
    return [sys.executable, "-m", f"ray_jobs.{job}", *where, *chosen]


@pytest.fixture(scope="session")
def command() -> Command:
    """The command a person would type: `command(run_dir, job, *settings)`."""
    return _command


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A cache of its own, and the programs of this environment on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PSYCHO_CACHE": str(tmp_path_factory.mktemp("cache")), "PATH": path, "COLUMNS": "200"}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """A run that was interrupted once and then finished by the same command."""
    run_dir = tmp_path_factory.mktemp("runs") / "small"
    log = run_dir.parent / "log.txt"
    manifest = run_dir / "manifests" / "generate.json"
    relative = Path(os.path.relpath(run_dir, ROOT))  # as the default run folder is
    with log.open("w") as file:
        process = subprocess.Popen(
            _command(relative),
            cwd=ROOT,
            env=environment,
            stderr=file,
            stdout=file,
            # A shell's background job ignores SIGINT, and what it starts inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while process.poll() is None and not manifest.exists():
            time.sleep(0.2)  # until there is something to lose
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, log.read_text()[-3000:]
    before = manifest.read_text()
    with log.open("a") as file:
        again = subprocess.run(
            _command(relative), cwd=ROOT, env=environment, stderr=file, stdout=file, timeout=1200, check=False
        )
    assert again.returncode == 0, log.read_text()[-3000:]
    assert manifest.read_text() == before, "a finished stage ran again"
    return run_dir
