"""A worker killed, the driver killed, the disk full, a finished file deleted: every request is answered once after all.

The first three run a job whose answers cost nothing, in processes of their own, and count what was made twice. The
slow ones kill real vLLM workers under the real command.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
AGAIN = 0.05  # of the finished rows: most that may be made again
COUNT = 400


def drive(root: Path, kill: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).with_name("driver.py")), str(root), kill]
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command += [str(folder)] if folder else []
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)


def made(root: Path) -> Counter[str]:
    return Counter((root / "log").read_text().split())


def ids(folder: Path) -> list[str]:
    return sorted(i for path in folder.rglob("*.parquet") for i in pq.read_table(path)["request_id"].to_pylist())


def whole(folder: Path) -> bool:
    return ids(folder) == [f"r{number:03d}" for number in range(COUNT)]


@pytest.mark.parametrize("what", ["actor", "engine"])
def test_a_worker_or_its_engine_dies_and_the_same_run_ends_well(tmp_path: Path, what: str) -> None:
    done = drive(tmp_path, what)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "killed").exists() and whole(tmp_path / "answers")
    assert "1 time(s) a worker died and was started again" in done.stdout
    assert sum(made(tmp_path).values()) - COUNT <= AGAIN * 200


def outlived(log: Path) -> None:
    """Wait until the killed driver's workers are gone too: they answer for a moment longer."""
    size, still = -1, 0
    for _ in range(600):
        still = still + 1 if size == log.stat().st_size else 0
        size = log.stat().st_size
        if still == 20:
            return
        time.sleep(0.1)


def check_rerun(root: Path, answers: Path, before: int) -> None:
    """The same run once more ends well, and asks for little again of what was made before it."""
    again = drive(root, "nobody", answers)
    assert again.returncode == 0, again.stderr[-2000:]
    assert whole(answers)
    twice = sum(made(root).values()) - COUNT
    assert twice <= AGAIN * before
    assert f"resumed {before - twice}" in again.stdout


def test_the_driver_is_killed_and_a_rerun_goes_on(tmp_path: Path) -> None:
    killed = drive(tmp_path, "driver")
    assert killed.returncode == -signal.SIGKILL
    outlived(tmp_path / "log")
    check_rerun(tmp_path, tmp_path / "answers", sum(made(tmp_path).values()))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 600 KiB, room for half of the answers: then the 2 % that may be unwritten are under 5 %."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def test_the_disk_is_full_and_a_rerun_with_more_room_goes_on(tmp_path: Path, small_disk: Path) -> None:
    full = drive(tmp_path, "nobody", small_disk / "answers")
    assert full.returncode != 0 and "No space left on device" in full.stderr
    before = sum(made(tmp_path).values())
    assert 50 < before < COUNT
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    check_rerun(tmp_path, small_disk / "answers", before)


# The real command on real engines


@pytest.fixture
def command(tiny_llama: Callable[..., str], tmp_path: Path) -> list[str]:
    """`python -m ray_jobs.generate` on two tiny models that never come to an end by themselves."""
    models = [tiny_llama(0), tiny_llama(1)]
    nano = yaml.safe_load((ROOT / "configs" / "nano.yaml").read_text())
    nano |= {"policy": models[0], "run_dir": str(tmp_path / "run")}
    nano["speeches"] |= {"nano_train": 130, "evaluation": 70}
    nano["generation"] |= {
        "models_per_speech": 2,
        "pool": [{"name": f"m{number}", "model": model} for number, model in enumerate(models)],
        "sampling": {"temperature": 1.0, "max_tokens": 64},
    }
    nano["judge"]["model"] = nano["evaluation"]["baseline"] = models[0]
    nano["inference"]["engine"] |= {"max_model_len": 512, "max_num_seqs": 8}
    nano["inference"]["workers"] = 1
    nano["quality"] = {"max_left_out_share": 1.0}  # models that know nothing may say nothing
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(nano))
    prepare = [sys.executable, "-m", "ray_jobs.prepare", "--config", str(file)]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return [sys.executable, "-m", "ray_jobs.generate", "--config", str(file)]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start it, and wait until a third is on disk."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    for _ in range(1200):
        if process.poll() is not None or len(on_disk(log.parent / "run")) >= 130:
            break
        time.sleep(0.1)
    assert process.poll() is None, log.read_text()[-2000:]
    return process


def on_disk(run: Path) -> list[str]:
    found: list[str] = []
    for path in run.glob(".partial/*/answers/*/*.parquet"):
        found += pq.read_table(path, columns=["request_id"])["request_id"].to_pylist()
    return found


def check_result(run: Path) -> None:
    manifest = json.loads((run / "manifests" / "generate.json").read_text())
    bad = [json.loads(line)["request_id"] for line in (run / "quarantine" / "generate.jsonl").read_text().splitlines()]
    every = [*ids(run / "responses"), *bad]
    assert len(every) == len(set(every)) == 400 == manifest["rows_in"]


@pytest.mark.slow
def test_a_vllm_worker_is_killed_under_the_real_command(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process = start(command, log)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name().startswith("ray::")]
    max(workers, key=lambda p: p.memory_info().rss).kill()
    assert process.wait(300) == 0, log.read_text()[-2000:]
    assert "a worker died and was started again" in log.read_text()
    check_result(tmp_path / "run")


@pytest.mark.slow
def test_the_driver_is_killed_under_the_real_command(command: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    process = start(command, log)
    process.kill()
    process.wait(60)
    before = on_disk(tmp_path / "run")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    found = re.search(r"(\d+) of 400 answers are there from before", again.stderr)
    assert found and int(found[1]) >= len(before)  # its workers answer for a moment longer
    check_result(tmp_path / "run")
