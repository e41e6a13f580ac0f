"""The whole loop with its run folder on an object store: real jobs, a moto server for the store."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psycho import storage

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_run_on_an_object_store_leaves_nothing_on_disk_but_copies_of_models(
    bucket: Any, command: Callable[..., list[str]], environment: dict[str, str], tmp_path: Path
) -> None:
    run, cache = f"{bucket.uri}/small", tmp_path / "cache"
    server = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    own = environment | server | {"PSYCHO_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    (tmp_path / "here").mkdir()
    config = command(run)
    config[config.index("configs/nano.yaml")] = str(ROOT / "configs" / "nano.yaml")
    for turn in range(2):
        done = subprocess.run(
            config, cwd=tmp_path / "here", env=own, capture_output=True, text=True, timeout=1200, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert ("skipped" in done.stderr) == bool(turn)
    stages = json.loads(storage.read_text(f"{run}/summary.json") or "")["stages"]
    assert {stage["status"] for stage in stages.values()} == {"skipped"}
    for name in ("sft", "reward", "dpo", "online"):
        files = {name for name, _, _ in storage.listing(f"{run}/models/{name}")}
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files
    assert len(storage.names(f"{run}/online/samples")) == 2
    assert not storage.listing(f"{run}/.partial")
    assert not list((tmp_path / "here").iterdir())
    copies = {path.name.rpartition("-")[0] for path in (cache / "models").iterdir() if path.is_dir()}
    assert copies <= {"sft", "dpo", "online", "reward"}  # the policies of past rounds are gone
