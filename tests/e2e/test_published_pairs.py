"""A run on pairs that are there already: exported by one run, named by another, trained, evaluated and reported."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., list[str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def test_an_exported_data_set_is_used_by_naming_it(
    finished: Path, environment: dict[str, str], command: Command, tmp_path: Path
) -> None:
    exported = tmp_path / "set"
    subprocess.run(
        [*command(finished, "export"), "--to", str(exported), "--licence", "mit"],
        cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    folder = tmp_path / "run"
    done = subprocess.run(
        command(folder, "pipeline", f"pairs.source={exported}", "generation.pool=[]"),
        cwd=ROOT, env=environment, check=False, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    stages = {path.stem for path in (folder / "manifests").glob("*.json")} - {"run"}
    assert stages == {
        *("prepare", "pair", "train_sft", "train_reward", "train_dpo", "train_online", "evaluate", "report")
    }
    for name in ("train", "test"):
        theirs, ours = (pq.read_table(run / "preferences" / name) for run in (finished, folder))
        key = [("ID", "ascending"), ("prefID", "ascending")]
        assert ours.sort_by(key).equals(theirs.sort_by(key))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["win_rate"]["online"]["n"] and summary["reward_model"]["n"]
    assert "Preference pairs" in (folder / "report.html").read_text()
