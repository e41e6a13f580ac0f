"""`ray job submit` against a real head with token authentication, as on a cluster."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head of our own; yields the environment in which `ray job submit` finds it."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    known = {k: v for k, v in environment.items() if not k.startswith("RAY_")}
    known |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port, dashboard = _free_port(), _free_port()
    ray = str(Path(sys.executable).parent / "ray")
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4", "--include-dashboard=true"]
    # Its default is taken where another Ray runs on the machine, and without the agent no job starts.
    ports.append(f"--dashboard-agent-listen-port={_free_port()}")
    # A short path: sockets below it may have at most 107 characters.
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host=127.0.0.1", *ports],
        env=known,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:  # ends when the head is up, or when it ended
        lines.append(line)
        if "--block" in line or "Next steps" in line:
            break
    assert process.poll() is None, "".join(lines)
    yield known | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    process.terminate()
    process.wait(timeout=60)


def test_a_submitted_job_joins_the_cluster_that_runs_it(
    finished: Path, head: dict[str, str], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    prepared = subprocess.run(
        command(run_dir, "prepare"), cwd=ROOT, env=os.environ | {"PSYCHO_CACHE": head["PSYCHO_CACHE"]}, check=False
    )
    assert prepared.returncode == 0
    submit = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--working-dir", ".", "--"]
    _, *rest = command(run_dir, "generate")
    for _ in range(60):
        done = subprocess.run(
            [*submit, "python", *rest], cwd=ROOT, env=head, capture_output=True, text=True, timeout=600, check=False
        )
        if "No available agent" not in done.stderr:  # the head answers before its node can take jobs
            break
        time.sleep(1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert pq.read_table(run_dir / "responses").num_rows > 0
    speech = pq.read_table(run_dir / "speeches")["question"][0].as_py()
    assert speech not in done.stdout


def test_without_the_token_the_cluster_says_no(finished: Path, head: dict[str, str]) -> None:
    known = {k: v for k, v in head.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "job", "list"],
        cwd=ROOT,
        env=known,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert refused.returncode != 0
