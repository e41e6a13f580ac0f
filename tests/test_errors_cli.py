"""A person's mistakes on the command line: one sentence on stderr, exit code 2, no traceback, nothing half-written.

Three go through a process of their own, to see what a shell sees; the others call what the process calls.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from psycho import cluster, storage
from psycho.job import Options, execute
from psycho.run import FORMAT
from ray_jobs.generate import generate
from ray_jobs.pipeline import pipeline
from ray_jobs.prepare import prepare

ROOT = Path(__file__).parents[1]
SECRET = "Since my brother Tobias died I cannot sleep, and nobody at work has asked me once how I am doing."
JOBS = {"prepare": prepare, "generate": generate, "pipeline": pipeline}


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of these may get as far as Ray or the nano models."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cluster, "_QUIET", {})
    monkeypatch.setenv(cluster.AUTOSCALING, "0")  # the session sets it; to be put back
    monkeypatch.setattr(cluster, "_silence_libraries", lambda: None)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def sentence(code: int, out: str, err: str) -> str:
    assert code == 2, err
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in out + err
    assert "Tobias" not in out + err and SECRET[:20] not in out + err
    return last


def call(
    job: str, run_dir: Path, capsys: pytest.CaptureFixture[str], *overrides: str, config: Path | None = None
) -> str:
    options = Options(overrides=overrides, run_dir=str(run_dir))
    code = execute(job, JOBS[job], options if config is None else Options(config, overrides, str(run_dir)))
    return sentence(code, *capsys.readouterr())


def results(run_dir: Path) -> list[str]:
    """What a later stage or a reader could take for a result."""
    allowed = {"config.yaml", "ledger.jsonl", "manifests/run.json", "quarantine/prepare.jsonl"}
    found = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    return sorted(found - allowed)


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        ("pipeline", ["--config", "{tmp}/none.yaml"], "none.yaml does not exist"),
        ("pipeline", ["--set", "pairs.min_gapp=1"], "unknown key pairs.min_gapp; did you mean pairs.min_gap?"),
        ("prepare", ["--set", "speeches.source={tmp}/a.csv"], "has no column question; its columns are text, topic"),
    ],
)
def test_what_a_shell_sees(tmp_path, run_dir, job, arguments, said):
    (tmp_path / "a.csv").write_text(f'text,topic\n"{SECRET}",grief\n')
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", f"ray_jobs.{job}", *arguments, "--run-dir", str(run_dir)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert said in sentence(done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == (2 if job == "prepare" else 1)  # prepare says that it began
    assert done.stdout == "" and results(run_dir) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("training.workers=two",), "training.workers: input should be a valid integer"),
        (("generation.models_per_speech=9",), "models_per_speech is 9 but the pool holds 5 models"),
        (("pairs.min_gap=-1",), "pairs.min_gap: input should be greater than or equal to 0 (given: -1)"),
        (("speeches.max_chars=50",), "max_chars 50 is below min_chars 100"),
        (("seed",), "--set seed is not key=value"),
        (("judge.model=''",), "judge.model is empty"),
        (("policy=nano:nobody",), "there is no model nano:nobody; the nano models are"),
    ],
)
def test_settings(run_dir, capsys, overrides, said):
    assert said in call("pipeline", run_dir, capsys, *overrides)
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "does not exist; give a CSV, JSONL, JSON or Parquet file"),
        ("empty.csv", b"", "is empty; give a file with a header and rows"),
        ("header.csv", b"question\n", "holds no rows; give a file with client speeches"),
        ("wide.csv", f"question\n{SECRET}\n".encode("utf-16-be"), "is not text in UTF-8"),
        ("packed.jsonl", b"\x1f\x8b\x08" + SECRET.encode(), "is not text in UTF-8"),
        ("headless.csv", f'"{SECRET}"\n"{SECRET} And more."\n'.encode(), "is the header missing?"),
        ("one.csv", f'question\n"{SECRET * 2}"\n'.encode(), "only 1 speeches"),
        ("torn.parquet", b"PAR1" + SECRET.encode(), "is not a Parquet file or is cut short"),
        ("sheet.xlsx", b"PK", "ends in '.xlsx'"),
    ],
)
def test_speech_files(tmp_path, run_dir, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert said in call("prepare", run_dir, capsys, f"speeches.source={tmp_path / name}")
    assert results(run_dir) == []
    [line] = (run_dir / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "BadInput"


def test_prepare_that_refuses_lists_the_rows_and_the_causes(tmp_path, run_dir, capsys):
    file = tmp_path / "same.csv"
    file.write_text("question\n" + f'"{SECRET} {SECRET}"\n' * 60)
    said = call("prepare", run_dir, capsys, f"speeches.source={file}")
    place = run_dir / "quarantine" / "prepare.jsonl"
    assert "of its 60 rows (59 exact duplicate)" in said and "min_chars" not in said
    assert f"; {place} lists the rows left out" in said
    assert [json.loads(line) for line in place.read_text().splitlines()] == [
        {"row": row, "reason": "exact duplicate"} for row in range(2, 61)
    ]


def test_prepare_that_refuses_leaves_what_was_done_as_it_is(tmp_path, run_dir, capsys):
    texts = [f'"{word} {SECRET} {SECRET}"\n' for word in ("Well,", "Honestly,", "Today:")]
    file = tmp_path / "people.csv"
    file.write_text("question\n" + "".join(texts) + texts[0])
    plain = (f"speeches.source={file}", "speeches.near_duplicates=ignore")
    assert execute("prepare", prepare, Options(overrides=plain, run_dir=str(run_dir))) == 0
    assert "left out 1 of 4 rows: 1 exact duplicate" in capsys.readouterr().err
    before = (run_dir / "quarantine" / "prepare.jsonl").read_text()
    said = call("prepare", run_dir, capsys, *plain, "speeches.max_chars=120")
    assert "raise speeches.max_chars" in said and "prepare-refused.jsonl lists" in said
    assert (run_dir / "quarantine" / "prepare.jsonl").read_text() == before and before
    assert len((run_dir / "quarantine" / "prepare-refused.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no .safetensors weights"),
        ("tokenizer.json", "has no tokenizer; save the tokenizer beside the weights"),
        ("chat_template.jinja", "has no chat template; add chat_template.jinja to it"),
    ],
)
def test_model_folders(tmp_path, run_dir, capsys, missing, said):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} - {missing}:
        (folder / name).write_text("{}")
    assert f"model folder {folder} {said}" in call("pipeline", run_dir, capsys, f"policy={folder}")
    assert not run_dir.exists()


def test_a_run_folder_of_another_version(run_dir, capsys):
    stamp = run_dir / "manifests" / "run.json"
    stamp.parent.mkdir(parents=True)
    stamp.write_text(json.dumps({"format": FORMAT + 1}))
    said = call("prepare", run_dir, capsys)
    assert f"has format {FORMAT + 1}, this psycho writes format {FORMAT}; choose another --run-dir" in said
    assert [path.name for path in run_dir.rglob("*") if path.is_file()] == ["run.json"]


def test_a_run_folder_that_is_a_file(run_dir, capsys):
    run_dir.write_text("mine")
    assert "choose another --run-dir" in call("prepare", run_dir, capsys)
    assert run_dir.read_text() == "mine"


def test_a_stage_before_its_input(run_dir, capsys):
    assert "stage generate needs stage prepare, which is not done" in call("generate", run_dir, capsys)
    assert results(run_dir) == []


def test_too_little_memory_is_said_and_what_was_done_stays_done(run_dir, capsys):
    settings = ("cluster.min_memory_gib=100000", "speeches.nano_train=4", "speeches.evaluation=2")
    assert execute("prepare", prepare, Options(overrides=settings, run_dir=str(run_dir))) == 0
    before = results(run_dir)
    assert (run_dir / "quarantine" / "prepare.jsonl").read_text() == ""
    assert "needs 100000 GiB of free memory" in call("generate", run_dir, capsys, *settings)
    assert results(run_dir) == before == ["manifests/prepare.json", "speeches/part-0.parquet"]


@pytest.mark.parametrize("source", ["nano", "people"])
def test_nano_models_for_the_speeches_of_people_are_said(tmp_path, run_dir, capsys, source):
    file = tmp_path / "people.csv"
    file.write_text("question\n" + "".join(f'"{word} {SECRET}"\n' for word in ("Well,", "Honestly,", "Today:")))
    plain = ("speeches.nano_train=4", "speeches.evaluation=2", "speeches.near_duplicates=ignore")
    named = () if source == "nano" else (f"speeches.source={file}",)
    assert execute("prepare", prepare, Options(overrides=plain + named, run_dir=str(run_dir))) == 0
    said = capsys.readouterr().err
    assert ("note: policy, judge.model" in said) == ("configs/small-1gpu.yaml" in said) == (source == "people")
    assert "Tobias" not in said


def test_a_full_disk(run_dir, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "part-0.parquet")

    monkeypatch.setattr(storage, "write_table", full)
    settings = ("speeches.nano_train=4", "speeches.evaluation=2")
    assert "the disk is full while writing part-0.parquet" in call("prepare", run_dir, capsys, *settings)
    assert results(run_dir) == []
