"""A part of online DPO is killed at a random moment: no sample is lost or trained twice, and the totals are the same.

A vLLM worker that dies is started again within the run; the training too, and all that a lost node held, where
`training.max_failures` lets it. After the driver died, or the training without that, the same command goes on from the
last half of a round that is on disk.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
ROUNDS, SAMPLES = 4, 48
HALVES = [f"{kind}-{number + (kind == 'trained')}" for number in range(ROUNDS) for kind in ("sampled", "trained")]
Command = Callable[[Path, str], list[str]]
WITHIN = ["rollout", "reward", "training within the run", "node"]


@pytest.fixture(scope="module")
def command(tiny_llama: Callable[..., str]) -> Command:
    driver = str(Path(__file__).with_name("online_driver.py"))
    return lambda root, what: [sys.executable, driver, str(root), tiny_llama(0), tiny_llama(1, reward=True), what]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TRAIN_V2_ENABLED": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=env)


def end(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; nothing of it is left running where it takes too long."""
    try:
        return process.wait(400)
    except subprocess.TimeoutExpired:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        raise


def finish(command: list[str], log: Path) -> None:
    assert end(start(command, log)) == 0, log.read_text()[-3000:]


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    root = tmp_path_factory.mktemp("whole")
    finish(command(root, "nothing"), root / "log.txt")
    return root


def samples(root: Path, number: int) -> list[dict[str, Any]]:
    return list(pq.read_table(root / "rounds" / f"sampled-{number}" / "samples.parquet").to_pylist())


def totals(root: Path) -> list[tuple[int, int, int, int]]:
    """Samples, failures, pairs and trained tokens of each round."""
    reports = json.loads((root / "online" / "rounds.json").read_text())
    history = [json.loads(line) for line in (root / "online" / "training.jsonl").read_text().splitlines()]
    tokens = [sum(int(row["tokens"]) for row in history if row["round"] == number) for number in range(ROUNDS)]
    return [(r["samples"], r["failed"], r["pairs"], tokens[r["round"]]) for r in reports]


def check(root: Path, whole: Path) -> None:
    """Every sample of every round once, each round trained once, and the same totals as without a death."""
    for number in range(ROUNDS):
        found = [(row["speech_id"], row["sample"]) for row in samples(root, number)]
        assert len(found) == len(set(found)) == SAMPLES
    assert [row["response"] for row in samples(root, 0)] == [row["response"] for row in samples(whole, 0)]
    assert [(one[0], one[1]) for one in totals(root)] == [(SAMPLES, 0)] * ROUNDS
    assert totals(root)[0] == totals(whole)[0]
    history = (root / "online" / "training.jsonl").read_text().splitlines()
    steps = [(row["round"], row["step"]) for row in map(json.loads, history)]
    assert len(steps) == len(set(steps)) and {number for number, _ in steps} == set(range(ROUNDS))
    assert not list((root / "rounds").glob(".unfinished-*"))


def kill(process: subprocess.Popen[bytes], root: Path, what: str) -> None:
    """Of a node its raylet, with which all that runs there ends: that of the training's last rank."""
    if what == "driver":
        process.kill()
        return
    if what.startswith("training"):
        psutil.Process(int((root / "rank").read_text())).kill()
        return
    pids = json.loads((root / "pids.json").read_text())
    if what == "node":
        held_by = {process.pid for process in psutil.Process(int((root / "rank").read_text())).parents()}
        (pids[what],) = [pid for name, pid in pids.items() if name.startswith("node") and pid in held_by]
    psutil.Process(pids[what]).kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("what", [*WITHIN, "training", "driver"])
def test_a_part_is_killed_at_a_random_moment(
    command: Command, whole: Path, tmp_path: Path, what: str, seed: int
) -> None:
    chance = random.Random(f"{what} {seed}")
    half, delay, log = chance.choice(HALVES[:-2]), chance.random(), tmp_path / "log.txt"
    process = start(command(tmp_path, what), log)
    for _ in range(3000):
        if process.poll() is not None or (tmp_path / "rounds" / half).exists():
            break
        time.sleep(0.05)
    time.sleep(delay)  # somewhere in the half after it
    assert process.poll() is None, log.read_text()[-3000:]
    kill(process, tmp_path, what)
    code = end(process)
    if what in WITHIN:
        assert code == 0, log.read_text()[-3000:]
    else:
        assert code != 0
        finish(command(tmp_path, what), log)
    check(tmp_path, whole)
