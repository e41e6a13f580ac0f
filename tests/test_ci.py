""".ci/run on a project of its own: it starts from nothing, and says which part failed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = """
run:
\t@echo home=$$HOME pip=$$PIP_NO_CACHE_DIR uv=$$UV_NO_CACHE cache=$$PSYCHO_CACHE; ls -A $$HOME
\t@exit 7
serve test:
\t@echo too far
"""

SERVER = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    do_POST = do_GET

print("Ctrl-C ends it.")
try:
    HTTPServer(("127.0.0.1", PORT), Healthy).serve_forever()
except KeyboardInterrupt:
    print("LAST")
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def ci(project: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"PSYCHO_CACHE": "/warm"}
    command = ["bash", str(project / ".ci" / "run")]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, timeout=120)


def test_it_begins_cold_and_names_the_part_that_failed(project):
    done = ci(project)
    assert done.returncode != 0 and "too far" not in done.stdout
    assert "FAILED in: make run, with the installation" in done.stderr.splitlines()[-1]
    told = next(line for line in done.stdout.splitlines() if line.startswith("home="))
    home = told.split()[0].removeprefix("home=")
    assert told == f"home={home} pip=1 uv=1 cache=" and home != os.environ["HOME"]
    assert not Path(home).exists(), "nothing is left behind"


def test_what_is_left_of_an_earlier_day_goes_in_ci_and_is_kept_elsewhere(project):
    (project / "runs" / "nano").mkdir(parents=True)
    refused = ci(project)
    assert refused.returncode == 2 and "runs/nano is here" in refused.stderr and (project / "runs" / "nano").exists()
    assert "home=" not in refused.stdout
    assert "home=" in ci(project, CI="true").stdout and not (project / "runs" / "nano").exists()


@pytest.mark.parametrize(
    ("last", "code", "part"), [("stopped", 0, "make test: done in"), ("gone", 1, "FAILED in: make serve, asked once")]
)
def test_what_is_served_is_asked_and_ended_as_by_ctrl_c(project, last, code, part):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = project / ".ci" / "run"
    script.write_text(script.read_text().replace(":8000", f":{port}"))
    (project / "server.py").write_text(SERVER.replace("PORT", str(port)).replace("LAST", last))
    python = f'#!/bin/sh\\nexec {sys.executable} "$$@"\\n'
    (project / "Makefile").write_text(
        f"run:\n\tmkdir -p .venv/bin && printf '{python}' > .venv/bin/python && "
        f"cp {shutil.which('true')} .venv/bin/psycho "
        "&& chmod +x .venv/bin/python\n"
        f"serve:\n\t@{sys.executable} -u server.py\n"
        "test:\n"
    )
    done = ci(project)
    assert done.returncode == code, done.stdout + done.stderr
    assert part in done.stdout + done.stderr
