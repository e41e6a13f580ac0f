"""A hub id with its revision: `owner/name@revision` is one folder for every library, and its commit is recorded."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from psycho.config import load_config
from psycho.errors import BadInput
from psycho.inference import worker
from psycho.inference.models import check_model, engine_signature, fingerprint, hub_commit, hub_parts, local_model
from psycho.job import Job
from psycho.models import hub_commits, resolve
from psycho.run import Run, Stage, StageResult

OLD, NEW = "a" * 40, "b" * 40
CONFIG = Path(__file__).parents[2] / "configs" / "nano.yaml"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as huggingface_hub writes it, with two commits of owner/name; the hub itself is out of reach."""
    folder = tmp_path / "hub" / "models--owner--name"
    for commit, size in ((OLD, 64), (NEW, 128)):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": size}))
        (snapshot / "model.safetensors").write_text("weights")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(NEW)
    (folder / "refs" / "v1").write_text(OLD)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("owner/name", ("owner/name", None)),
        ("name", ("name", None)),
        ("owner/name@v1.0", ("owner/name", "v1.0")),
        ("owner/name@refs/pr/7", ("owner/name", "refs/pr/7")),
        ("./a@b", None),
        ("/a/b@c", None),
        ("s3://bucket/a@b", None),
        ("nano:judge", None),
    ],
)
def test_a_revision_stands_behind_an_at(model: str, parts: tuple[str, str | None] | None) -> None:
    assert hub_parts(model) == parts


def test_a_folder_with_an_at_in_its_name_stays_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "sft@2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_parts("models/sft@2") is None and local_model("models/sft@2") == "models/sft@2"


@pytest.mark.parametrize(("revision", "commit"), [("v1", OLD), ("main", NEW), (OLD, OLD)])
def test_what_is_loaded_is_the_snapshot_of_the_revision(cache: Path, revision: str, commit: str) -> None:
    """A folder, so that weights, configuration and tokenizer are of one commit, whoever loads them."""
    assert Path(local_model(f"owner/name@{revision}")) == cache / "snapshots" / commit
    assert hub_commit(f"owner/name@{revision}") == commit
    assert local_model("owner/name") == "owner/name"  # left to the library, as before


def test_the_engine_gets_the_snapshot(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stop_ids", "reasoning_is_control"):
        monkeypatch.setattr(worker, name, lambda tokenizer: None)
    started: list[str] = []

    def start(folder: str, runner: str) -> Any:
        started.append(folder)
        return SimpleNamespace(get_tokenizer=lambda: None)

    held: Any = SimpleNamespace(model="", _llm=None, _signature="", _stop=lambda: None, _start=start)
    worker.VLLMWorker._hold(held, "owner/name@v1")
    assert started == [str(cache / "snapshots" / OLD)] and held.model == "owner/name@v1"


def test_the_commit_of_a_hub_id_without_a_revision_is_that_of_main(cache: Path) -> None:
    assert hub_commit("owner/name") == NEW
    assert hub_commit("owner/other") is None and hub_commit("/a/folder") is None and hub_commit("nano:judge") is None
    assert hub_commit(f"owner/other@{OLD}") == OLD  # needs no cache to be known


def test_a_revision_that_is_not_there_is_one_sentence(cache: Path) -> None:
    with pytest.raises(BadInput, match="revision v9 of owner/name is not in the hub's cache"):
        local_model("owner/name@v9")
    with pytest.raises(BadInput, match="names an empty revision; write owner/name@revision"):
        check_model("owner/name@")
    check_model("owner/name@v1")


def test_another_revision_is_another_model(cache: Path) -> None:
    assert len({fingerprint(model) for model in ("owner/name", "owner/name@v1", "owner/name@v2")}) == 3
    assert engine_signature("owner/name@v1") != engine_signature("owner/name")


def test_a_manifest_records_the_commits_that_were_used(cache: Path, tmp_path: Path) -> None:
    config = load_config(
        CONFIG, ["policy=owner/name@v1", "evaluation.baseline=owner/name"], run_dir=str(tmp_path / "run")
    )
    assert resolve(config, config.policy) == "owner/name@v1"
    run = Run(config, [Stage("prepare", lambda c: (), lambda c: {}, ())])
    run.open()
    with ExitStack() as resources:
        Job(config, run, resources).stage("prepare", lambda partial: StageResult(extra={"more": 1}))
    manifest = run.manifest("prepare") or {}
    assert manifest["commits"] == {"owner/name@v1": OLD, "owner/name": NEW} == hub_commits(config)
    assert manifest["more"] == 1
