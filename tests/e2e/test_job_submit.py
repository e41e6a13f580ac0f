"""`ray job submit` against a real head with token authentication, as on a cluster."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(known: dict[str, str], folder: Path) -> Iterator[dict[str, str]]:
    """A head in this environment, on ports of its own; yields the environment in which `ray job submit` finds it."""
    port, dashboard = _free_port(), _free_port()
    ray = str(Path(sys.executable).parent / "ray")
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=4", "--include-dashboard=true"]
    # Its default is taken where another Ray runs on the machine, and without the agent no job starts.
    ports.append(f"--dashboard-agent-listen-port={_free_port()}")
    # A short path: sockets below it may have at most 107 characters.
    process = subprocess.Popen(
        [ray, "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host=127.0.0.1", *ports],
        env=known,
        cwd=folder,
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
    try:
        yield known | {"RAY_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        process.terminate()
        process.wait(timeout=60)


def submitted(command: str, known: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What a shell in the project's folder makes of a command that submits a job."""
    for _ in range(60):
        done = subprocess.run(
            command, shell=True, cwd=ROOT, env=known, capture_output=True, text=True, timeout=600, check=False
        )
        if "No available agent" not in done.stderr:  # the head answers before its node can take jobs
            break
        time.sleep(1)
    return done


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A head with token authentication."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    known = {k: v for k, v in environment.items() if not k.startswith("RAY_")}
    with started(known | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}, tmp_path) as found:
        yield found


@pytest.fixture
def newcomer(environment: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of somebody who has just made a local run, in a home of their own."""
    known = {k: v for k, v in environment.items() if not k.startswith(("RAY_", "HF_"))} | {"HOME": str(tmp_path)}
    run = "from psycho.cluster import ray_session as s; from psycho.config import ClusterConfig as C\n"
    run += "with s(C(local_cpus=1, object_store_gib=0.1), False): pass"
    subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=known, check=True, timeout=600)
    return known


def test_readmes_line_after_a_local_run(newcomer: dict[str, str], tmp_path: Path) -> None:
    """A local run leaves no token, which a head would then demand and the line not give."""
    assert not (tmp_path / ".ray" / "auth_token").exists()
    [line] = re.findall(r"^(ray job submit .*?) +#", (ROOT / "README.md").read_text(), re.MULTILINE)
    with started(newcomer, tmp_path) as known:
        done = submitted(f"{line} --dry-run", known)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "plan of nano: pipeline" in done.stdout
        # The way that README gives a token to the workers of a cluster.
        given = f"--runtime-env-json {shlex.quote(json.dumps({'env_vars': {'HF_TOKEN': 'hf_given'}}))}"
        (tmp_path / "seen.py").write_text(_SEEN)
        done = submitted(f"ray job submit --working-dir . {given} -- python {tmp_path / 'seen.py'}", known)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        assert "a worker sees hf_given" in done.stdout


_SEEN = """
import os
import ray
from psycho.cluster import ray_session
from psycho.config import ClusterConfig, build_config
from psycho.secrets import filled

config = filled(build_config({"inference": {"env": {"HF_TOKEN": None}}}, "test"))
assert config.inference.env["HF_TOKEN"] == "hf_given"
with ray_session(ClusterConfig(), False):
    print("a worker sees", ray.get(ray.remote(lambda: os.environ["HF_TOKEN"]).remote()))
"""


def test_a_submitted_job_joins_the_cluster_that_runs_it(
    finished: Path, head: dict[str, str], command: Callable[..., list[str]], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    prepared = subprocess.run(
        command(run_dir, "prepare"), cwd=ROOT, env=os.environ | {"PSYCHO_CACHE": head["PSYCHO_CACHE"]}, check=False
    )
    assert prepared.returncode == 0
    _, *rest = command(run_dir, "generate")
    done = submitted(f"ray job submit --working-dir . -- python {shlex.join(rest)}", head)
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
