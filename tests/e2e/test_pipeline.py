"""The whole loop on the real engines, small: every stage runs, counts balance, and what is done is not done again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
Command = Callable[..., list[str]]
STAGES = ("prepare", "generate", "judge", "pair", "train_sft", "train_reward", "train_dpo", "train_online", "evaluate")

pytestmark = pytest.mark.timeout(1500)


def test_every_stage_is_done_and_counts_balance(finished: Path) -> None:
    for stage in STAGES:
        manifest = json.loads((finished / "manifests" / f"{stage}.json").read_text())
        left_out = (finished / "quarantine" / f"{stage}.jsonl").read_text().splitlines()
        assert manifest["rows_in"] == manifest["rows_out"] + manifest["quarantined"], stage
        assert manifest["quarantined"] == len(left_out), stage
    assert not list((finished / ".partial").glob("*"))


def test_rows_agree_from_stage_to_stage(finished: Path) -> None:
    speeches, responses, ratings = (
        pq.read_table(finished / name).to_pylist() for name in ("speeches", "responses", "ratings")
    )
    assert len(speeches) == 52
    assert {r["speech_id"] for r in responses} <= {s["speech_id"] for s in speeches}
    assert {r["request_id"] for r in ratings} <= {r["request_id"] for r in responses}
    asked = len(responses) + len((finished / "quarantine" / "generate.jsonl").read_text().splitlines())
    assert asked == 4 * len(speeches)
    train = set(pq.read_table(finished / "preferences" / "train")["speech_id"].to_pylist())
    test = set(pq.read_table(finished / "preferences" / "test")["speech_id"].to_pylist())
    assert train and test and not train & test


def test_models_are_plain_checkpoints(finished: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    for name in ("sft", "dpo", "online"):
        folder = finished / "models" / name
        assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == len(
            AutoTokenizer.from_pretrained(folder)
        )
        assert (folder / "model.safetensors").exists() and not list(folder.glob("*.bin"))
    assert AutoModelForSequenceClassification.from_pretrained(finished / "models" / "reward").config.num_labels == 1


def test_what_online_training_saw_is_kept(finished: Path) -> None:
    """Every sample of every round with its scores, and the pairs that were made of them."""
    rounds = json.loads((finished / "models" / "online" / "rounds.json").read_text())
    for number, report in enumerate(rounds):
        samples, pairs = (
            pq.read_table(finished / "online" / name / f"round-{number:03d}.parquet") for name in ("samples", "pairs")
        )
        assert (samples.num_rows, pairs.num_rows) == (report["samples"], report["pairs"])
        assert sum(score is not None for score in samples["score"].to_pylist()) == report["samples"] - report["failed"]
        assert report["judge_tokens"] > report["samples"]


def test_summary_has_the_agreed_names(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert {"run", "config", "versions", "seconds_total", "peak_rss_gib", "stages", "counts"} <= set(summary)
    assert set(summary["win_rate"]) >= {"base", "sft", "dpo", "online"}
    for policy in ("base", "sft", "dpo", "online"):
        row = summary["win_rate"][policy]
        assert row["low"] <= row["rate"] <= row["high"]
        assert set(row["gold"]) == {"rate", "low", "high", "mean_rating", "on_grammar"}
    assert "http" not in (finished / "report.html").read_text().split("<body")[1].split("src=")[0][:50]


def test_no_speech_in_what_is_not_an_artifact(finished: Path) -> None:
    speech = pq.read_table(finished / "speeches")["question"][0].as_py()
    sentence = speech.split(". ")[0]
    log = (finished.parent / "log.txt").read_text()
    texts = [log, (finished / "ledger.jsonl").read_text(), *(p.read_text() for p in finished.glob("manifests/*"))]
    texts += [p.read_text() for p in finished.glob("quarantine/*")]
    assert not any(sentence in text for text in texts)


def test_unchanged_run_skips_every_stage(finished: Path, environment: dict[str, str], command: Command) -> None:
    again = subprocess.run(
        command(finished), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert again.stderr.count("skipped") >= len(STAGES)
    summary = json.loads((finished / "summary.json").read_text())
    assert {stage["status"] for stage in summary["stages"].values()} == {"skipped"}


def test_a_changed_setting_runs_what_hangs_on_it(finished: Path, environment: dict[str, str], command: Command) -> None:
    manifests = finished / "manifests"
    before = {path.name: path.read_text() for path in manifests.glob("*.json")}
    subprocess.run(
        command(finished, "train_reward", "training.reward.epochs=3"),
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    after = {path.name: path.read_text() for path in manifests.glob("*.json")}
    assert {name for name in before if before[name] != after[name]} == {"train_reward.json"}
