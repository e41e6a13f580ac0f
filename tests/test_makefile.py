"""make install with a Python that only writes down what it is asked for: uv first, pip where it fails, then a stamp."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SET = "--no-deps --no-build-isolation --requirement requirements/cpu.txt"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A checkout with an environment that holds nothing."""
    for name in ("Makefile", "pyproject.toml", "requirements"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tmp_path / name)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "pip"):
        (binaries / name).write_text('#!/bin/sh\necho "$*" >> asked.txt\ncase "$*" in *$FAILING*) exit 1;; esac\n')
        (binaries / name).chmod(0o755)
    return tmp_path


def install(house: Path, failing: str, *variables: str) -> tuple[int, list[str], bool]:
    """The exit code, what Python was asked for, and whether the installation counts as done."""
    (house / "asked.txt").unlink(missing_ok=True)
    command = ["make", "install", f"PYTHON={sys.executable}", *variables]
    environment = {"PATH": "/usr/bin:/bin", "FAILING": failing}
    done = subprocess.run(command, cwd=house, env=environment, capture_output=True, text=True, timeout=120)
    asked = (house / "asked.txt").read_text().splitlines()
    return done.returncode, asked, bool(list((house / ".venv").glob(".installed-*")))


def by(installer: str, asked: list[str]) -> bool:
    return any(installer in line and line.endswith(SET) for line in asked)


def test_uv_installs_and_a_second_call_does_nothing(house):
    code, asked, done = install(house, "nothing that is asked")
    assert code == 0 and done and by("uv.py", asked) and not by("-m pip", asked)
    assert "--no-deps --no-build-isolation --editable ." in " ".join(asked)
    (house / "asked.txt").write_text("")
    subprocess.run(["make", "install"], cwd=house, check=True, capture_output=True, timeout=120)
    assert (house / "asked.txt").read_text() == ""


@pytest.mark.parametrize(
    "failing", ["uv.py install", "cpu.txt uv"], ids=["uv does not get through", "there is no uv to be had"]
)
def test_pip_takes_over_where_uv_fails(house, failing):
    code, asked, done = install(house, failing)
    assert code == 0 and done and by("-m pip", asked)


def test_pip_alone_where_it_is_asked_for(house):
    code, asked, done = install(house, "nothing that is asked", "INSTALLER=pip")
    assert code == 0 and done and by("-m pip", asked) and not any("uv" in line for line in asked)


def test_what_is_not_installed_is_not_called_installed(house):
    code, _, done = install(house, "install")
    assert code != 0 and not done


def test_the_lock_is_a_choice_and_another_lock_another_installation(house):
    assert install(house, "nothing that is asked")[2]
    stamp = list((house / ".venv").glob(".installed-*"))
    _, asked, _ = install(house, "nothing that is asked", "LOCK=requirements/gpu.txt")
    assert any(line.endswith("--requirement requirements/gpu.txt") for line in asked)
    assert list((house / ".venv").glob(".installed-*")) != stamp


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_documents_name_commands_and_files_that_are_there(document):
    text, makefile = (ROOT / document).read_text(encoding="utf-8"), (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", text))
    assert targets and targets <= set(re.findall(r"(?m)^([a-z-]+):", makefile))
    files = set(re.findall(r"\b(?:benchmarks|configs|deploy|docs|psycho|ray_jobs|requirements)/[\w./-]*\w", text))
    assert files and not [name for name in files if not (ROOT / name).exists()]
