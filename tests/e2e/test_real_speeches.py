"""Real client speeches through prepare, generate, judge and pair on the CPU default: no row without a reason."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections import Counter
from math import comb
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("PSYCHO_SHARED_DATA") or ROOT.parent / "shared" / "data") / "counsel_chat_questions.csv"
STAGES = ("prepare", "generate", "judge", "pair")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not DATA.exists(), reason="counsel_chat_questions.csv is not there (PSYCHO_SHARED_DATA)"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data half of a run, stage by stage as a person would give the commands."""
    folder = tmp_path_factory.mktemp("real") / "run"
    log = folder.parent / "log.txt"
    settings = (f"speeches.source={DATA}", "speeches.text_column=questionText", "pairs.dev_share=0.1")
    options = [part for setting in settings for part in ("--set", setting)]
    with log.open("w") as file:
        for stage in STAGES:
            command = [sys.executable, "-m", f"ray_jobs.{stage}", "--run-dir", str(folder), *options]
            if stage == "judge":  # models that know nothing of real people make garbage, and the run says so and stops
                refused = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=1500, check=False)
                assert refused.returncode == 1 and "quality.max_" in log.read_text(), log.read_text()[-3000:]
                assert not (folder / "manifests" / "judge.json").exists()
                assert "the judge is unfit" in log.read_text()
                go_on = ("quality.max_left_out_share=1", "quality.max_floored_share=1", "judge.unfit=warn")
                options += [part for setting in go_on for part in ("--set", setting)]
                command += options[-6:]
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=1500, check=False)
            assert done.returncode == 0, log.read_text()[-3000:]
    return folder


def manifest(run: Path, stage: str) -> dict:
    return json.loads((run / "manifests" / f"{stage}.json").read_text())


def left_out(run: Path, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / "quarantine" / f"{stage}.jsonl").read_text().splitlines()]


def test_counts_balance_and_no_row_is_left_out_without_a_reason(run: Path) -> None:
    with DATA.open(newline="") as file:
        rows = sum(1 for _ in csv.DictReader(file))
    assert rows == manifest(run, "prepare")["rows_in"] == 500
    for stage in STAGES:
        found, lines = manifest(run, stage), left_out(run, stage)
        assert found["rows_in"] == found["rows_out"] + len(lines) and found["quarantined"] == len(lines), stage
        assert all(isinstance(line["reason"], str) and line["reason"].strip() for line in lines), stage
    assert manifest(run, "generate")["rows_in"] == 4 * manifest(run, "prepare")["rows_out"]
    assert manifest(run, "judge")["rows_in"] == manifest(run, "generate")["rows_out"]


def test_every_candidate_of_every_speech_is_a_pair_or_has_a_reason(run: Path) -> None:
    """Counted anew from the ratings."""
    speeches = {row["speech_id"]: row["split"] for row in pq.read_table(run / "speeches").to_pylist()}
    rated = Counter(pq.read_table(run / "ratings")["speech_id"].to_pylist())
    candidates = sum(
        1 if rated[speech] < 2 or split != "train" else comb(rated[speech], 2) for speech, split in speeches.items()
    )
    pairs = {name: pq.read_table(run / "preferences" / name).to_pylist() for name in ("train", "dev", "test")}
    assert candidates == sum(map(len, pairs.values())) + len(left_out(run, "pair"))
    assert candidates == manifest(run, "pair")["rows_in"]
    sides = [{row["speech_id"] for row in rows} for rows in pairs.values()]
    assert pairs["train"] and pairs["test"] and not sides[0] & sides[1] | sides[0] & sides[2] | sides[1] & sides[2]
    for rows in pairs.values():
        for row in rows:
            assert row["gap"] > 0 and row["chosen"] != row["rejected"]
            assert row["chosen_safety_rating"] > row["rejected_safety_rating"] - 1
    assert all(row["gap"] > 1 - 1e-9 for row in pairs["train"])


def test_no_speech_in_logs_manifests_and_quarantine(run: Path) -> None:
    sentences = [text[:60] for text in pq.read_table(run / "speeches")["question"].to_pylist()[:50]]
    files = [run.parent / "log.txt", run / "ledger.jsonl", run / "preferences" / "audit.json"]
    files += [*run.glob("manifests/*"), *run.glob("quarantine/*")]
    said = "".join(file.read_text() for file in files)
    assert not any(sentence in said for sentence in sentences)
