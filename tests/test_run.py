"""The run folder: what changes a stage's key, and that nothing half-done ever looks done."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import psycho
from psycho import storage
from psycho.commit import commit
from psycho.config import load_config
from psycho.errors import BadInput, StageFailed
from psycho.run import FORMAT, QuarantineFile, Run, Stage, StageResult, versions
from psycho.stages import STAGES

NANO = Path(__file__).parents[1] / "configs" / "nano.yaml"
ALL = [stage.name for stage in STAGES]
FROM_ONLINE = {"train_online", "evaluate", "report"}
FROM_PAIRS = {"pair", "train_reward", "train_dpo", *FROM_ONLINE}
FROM_TRAINING = {"train_sft", "train_reward", "train_dpo", *FROM_ONLINE}
HANGS_ON: dict[str, set[str]] = {
    "seed=1": set(ALL),
    "speeches.evaluation=100": set(ALL),
    "speeches.min_chars=90": set(ALL),
    "speeches.near_threshold=0.9": set(ALL),
    "speeches.topic_model=base": set(ALL),
    "speeches.batch_timeout_s=7": set(),
    "generation.models_per_speech=3": set(ALL) - {"prepare"},
    "generation.sampling.temperature=0.5": set(ALL) - {"prepare"},
    "generation.system_prompt=Listen.": set(ALL) - {"prepare"},
    "inference.engine.max_model_len=1024": set(ALL) - {"prepare"},
    "judge.retries=3": set(ALL) - {"prepare", "generate"},
    "judge.fluency_floor=-5": set(ALL) - {"prepare", "generate"},
    "judge.model=nano:base": set(ALL) - {"prepare", "generate"},
    "pairs.min_gap=0.7": FROM_PAIRS,
    "pairs.max_pairs_per_speech=2": FROM_PAIRS,
    "policy=nano:warm": FROM_TRAINING,
    "training.max_length=512": FROM_TRAINING,
    "training.precision=bf16": FROM_TRAINING,
    "training.sft.lr=1e-3": {"train_sft", "train_dpo", *FROM_ONLINE},  # training.dpo.init is sft
    "training.dpo.init=base": {"train_dpo", *FROM_ONLINE},
    "training.reward.lr=1e-3": {"train_reward", "evaluate", "report"},  # online.scorer is the judge
    "training.dpo.beta=0.2": {"train_dpo", *FROM_ONLINE},
    "online.rounds=3": FROM_ONLINE,
    "online.beta=0.2": FROM_ONLINE,
    "online.reference=fixed": FROM_ONLINE,
    "online.scorer_workers=1": set(),
    "evaluation.baseline=nano:base": {"evaluate", "report"},
    "evaluation.speeches=50": {"evaluate", "report"},
    "judge.evidence_check=retry": set(ALL) - {"prepare", "generate"},
    "judge.unfit=warn": set(),
    "quality.max_left_out_share=0.7": set(),
    "quality.max_floored_share=0.7": set(),
    "name=other": {"report"},
    # how fast, where, for whom to see: nothing that a result depends on
    "run_dir=elsewhere": set(),
    "cluster.local_cpus=8": set(),
    "inference.workers=5": set(),
    "inference.batch_size=7": set(),
    "generation.budget=5": set(),
    "generation.marks.refused=retry": set(ALL) - {"prepare"},
    "inference.start_timeout_s=7": set(),
    "inference.env={A: '1'}": set(),
    "inference.engine.gpu_memory_utilization=0.5": set(),
    "inference.engine.max_num_seqs=7": set(),
    "training.start_timeout_s=7": set(),
    "training.workers=3": set(),
    "training.zero_stage=3": set(),
    "training.bin_tokens=9999": set(),
    "training.threads_per_worker=2": set(),
    "serving.port=9000": set(),
}


def keys(*overrides: str) -> dict[str, str]:
    run = Run(load_config(NANO, overrides), STAGES)
    return {name: run.key(name) for name in ALL}


@pytest.mark.parametrize(("override", "expected"), HANGS_ON.items(), ids=list(HANGS_ON))
def test_a_setting_changes_the_keys_of_what_hangs_on_it_and_no_other(override, expected):
    before, after = keys(), keys(override)
    assert {name for name in ALL if before[name] != after[name]} == expected


@pytest.mark.parametrize(
    "setting",
    [
        "judge.engine={gpu_memory_utilization: %s}",
        "judge.panel=[{model: nano:base, engine: {gpu_memory_utilization: %s}}]",
        "online.scorer_engine={gpu_memory_utilization: %s}",
        "evaluation.judge={model: nano:base, engine: {gpu_memory_utilization: %s}}",
        "generation.pool=[{name: one, model: nano:base, engine: {gpu_memory_utilization: %s}}]",
    ],
)
def test_the_memory_of_an_engine_changes_no_key_and_its_own_context_does(setting):
    """Lowering it is what one does after a job ran out of it, with hours of answers on disk."""
    common = ["generation.models_per_speech=1"]
    if "evaluation" in setting:
        common += ["online.gold_every=1", "pairs.dev_share=0.1"]
    low, high, other = (keys(*common, setting % value) for value in ("0.5", "0.9", "0.9, max_model_len: 99"))
    assert low == high != other


def test_the_reward_model_matters_online_only_where_it_scores():
    before, after = (keys("online.scorer=reward", f"training.reward.lr={lr}") for lr in ("1e-3", "2e-3"))
    assert {n for n in ALL if before[n] != after[n]} == {"train_reward", *FROM_ONLINE}


def test_sft_matters_to_dpo_only_where_it_starts_from_it():
    before, after = (keys("training.dpo.init=sft", f"training.sft.lr={lr}") for lr in ("1e-3", "2e-3"))
    assert {n for n in ALL if before[n] != after[n]} == {"train_sft", "train_dpo", *FROM_ONLINE}


def test_a_changed_source_file_changes_every_key(tmp_path):
    source = tmp_path / "speeches.csv"
    before = keys(f"speeches.source={source}")
    source.write_text("question\n")
    there = keys(f"speeches.source={source}")
    source.write_text("question\nmore\n")
    after = keys(f"speeches.source={source}")
    assert all(len({before[name], there[name], after[name]}) == 3 for name in ALL)


def test_keys_are_the_same_in_another_process_and_differ_between_stages():
    assert keys() == keys() and len(set(keys().values())) == len(ALL)


class Toy:
    """Two stages, the second on the first; each writes one file named after its setting."""

    def __init__(self, folder: Path, gap: float = 1.0) -> None:
        config = load_config(NANO, [f"pairs.min_gap={gap}"], str(folder))
        first = Stage("first", lambda c: (), lambda c: {"pairs": c.pairs}, ("one", "two.txt"))
        second = Stage("second", lambda c: ("first",), lambda c: {}, ("three",))
        self.run = Run(config, (first, second))
        self.run.open()
        self.calls: list[str] = []

    def body(self, text: str, **result: Any) -> Callable[[str], StageResult]:
        def write(partial: str) -> StageResult:
            self.calls.append(text)
            for output in ("one/part", "two.txt", "three/part"):
                storage.write_text(storage.join(partial, output), text)
            return StageResult(**({"rows_in": 3, "rows_out": 3} | result))

        return write

    def text(self, *parts: str) -> str | None:
        return storage.read_text(self.run.path(*parts))

    def ledger(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.text("ledger.jsonl") or "").splitlines()]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "run")


def files(folder: str | Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_a_finished_stage_is_published_whole_and_skipped_the_next_time(toy):
    manifest = toy.run.execute("first", toy.body("a", tokens=9, extra={"train": 2}))
    assert (manifest["status"], manifest["rows_in"], manifest["tokens"], manifest["train"]) == ("done", 3, 9, 2)
    again = toy.run.execute("first", toy.body("b"))
    assert again["status"] == "skipped" and again["key"] == manifest["key"]
    assert toy.calls == ["a"] and toy.text("one", "part") == toy.text("two.txt") == "a"
    assert files(toy.run.root) == {
        "config.yaml",
        "ledger.jsonl",
        "manifests/run.json",
        "manifests/first.json",
        "quarantine/first.jsonl",
        "one/part",
        "two.txt",
    }


def test_a_manifest_says_what_it_was_made_from(toy):
    toy.run.execute("first", toy.body("a"))
    toy.run.execute("second", toy.body("b"))
    manifest = json.loads(toy.text("manifests", "second.json"))
    assert manifest["inputs"] == {"first": toy.run.key("first")}
    assert manifest["versions"]["pyarrow"] and manifest["seconds"] >= 0


def test_a_lost_artifact_or_another_key_is_not_done(toy, tmp_path):
    toy.run.execute("first", toy.body("a"))
    toy.run.execute("second", toy.body("a"))
    changed = Toy(tmp_path / "run", gap=0.5)
    assert not changed.run.is_done("first") and not changed.run.is_done("second")
    Path(toy.run.path("two.txt")).unlink()
    assert not toy.run.is_done("first") and toy.run.is_done("second")


def test_a_changed_stage_replaces_its_results(toy, tmp_path):
    toy.run.execute("first", toy.body("old"))
    changed = Toy(tmp_path / "run", gap=0.5)
    assert changed.run.execute("first", changed.body("new"))["status"] == "done"
    assert toy.text("one", "part") == toy.text("two.txt") == "new"
    assert not any(".old" in name for name in files(toy.run.root))


def test_an_input_that_is_not_done_is_named(toy):
    with pytest.raises(BadInput, match="stage second needs stage first"):
        toy.run.execute("second", toy.body("b"))
    assert toy.calls == []


@pytest.mark.parametrize(("rows_in", "rows_out", "left_out"), [(3, 2, 0), (3, 3, 1), (2, 3, 0)])
def test_counts_that_do_not_balance_fail_and_publish_nothing(toy, rows_in, rows_out, left_out):
    body = toy.body("a", rows_in=rows_in, rows_out=rows_out, quarantine=[{"reason": "r"}] * left_out)
    with pytest.raises(StageFailed, match=f"{rows_in} in, {rows_out} out, {left_out} quarantined"):
        toy.run.execute("first", body)
    assert not toy.run.is_done("first")
    assert toy.text("manifests", "first.json") is None and toy.text("one", "part") is None
    assert [line["status"] for line in toy.ledger()] == ["StageFailed"]


def test_every_row_left_out_is_in_the_quarantine_file(toy):
    left_out = [{"row": 2, "reason": "no text in this row"}, {"row": 5, "reason": "exact duplicate"}]
    manifest = toy.run.execute("first", toy.body("a", rows_in=5, quarantine=left_out))
    assert manifest["quarantined"] == 2
    assert [json.loads(line) for line in toy.text("quarantine", "first.jsonl").splitlines()] == left_out


def test_a_quarantine_that_is_on_disk_already_is_moved_into_its_place(toy, tmp_path):
    (tmp_path / "left_out.jsonl").write_text('{"row": 1, "reason": "r"}\n{"row": 4, "reason": "r"}\n')
    left_out = QuarantineFile(str(tmp_path / "left_out.jsonl"), 2)
    with pytest.raises(StageFailed, match="4 in, 3 out, 2 quarantined"):
        toy.run.execute("first", toy.body("a", rows_in=4, quarantine=left_out))
    assert toy.run.execute("first", toy.body("a", rows_in=5, quarantine=left_out))["quarantined"] == 2
    assert (toy.text("quarantine", "first.jsonl") or "").count("\n") == 2 and not (tmp_path / "left_out.jsonl").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), BadInput("no")])
def test_an_interrupted_stage_leaves_old_results_and_what_it_has(toy, tmp_path, error):
    toy.run.execute("first", toy.body("old"))
    changed = Toy(tmp_path / "run", gap=0.5)

    def interrupted(partial: str) -> StageResult:
        storage.write_text(storage.join(partial, "answers", "0"), "half")
        raise error

    with pytest.raises(type(error)):
        changed.run.execute("first", interrupted)
    assert toy.run.is_done("first") and not changed.run.is_done("first")
    assert toy.text("one", "part") == toy.text("two.txt") == "old"
    assert storage.read_text(storage.join(changed.run.partial("first"), "answers", "0")) == "half"
    assert [line["status"] for line in toy.ledger()] == ["done", type(error).__name__]


def test_what_an_interrupted_stage_has_is_kept_for_its_settings_until_the_stage_is_done(toy, tmp_path):
    """Hours of work are not lost to a setting that was tried and taken back."""
    storage.write_text(storage.join(toy.run.partial("first"), "answers"), "half")
    changed = Toy(tmp_path / "run", gap=0.5)
    neighbour = toy.run.path(".partial", "first-thing-0123456789abcdef", "answers")  # of another stage
    storage.write_text(neighbour, "half")
    seen: list[bool] = []

    def looking(partial: str) -> StageResult:
        seen.append(storage.exists(storage.join(partial, "answers")))
        raise RuntimeError

    for run in (toy.run, changed.run, toy.run):
        with pytest.raises(RuntimeError):
            run.execute("first", looking)
    assert seen == [True, False, True]
    assert changed.run.unfinished_others("first") == [toy.run.partial("first")]
    changed.run.execute("first", changed.body("new"))
    assert not storage.exists(toy.run.partial("first")) and storage.exists(neighbour)


@pytest.mark.parametrize("crash_at", ["run/two.txt", "quarantine/first.jsonl", "manifests/first.json"])
def test_the_manifest_comes_last_whatever_the_moment_of_a_crash(toy, tmp_path, monkeypatch, crash_at):
    toy.run.execute("first", toy.body("old"))
    changed = Toy(tmp_path / "run", gap=0.5)

    def dying(real: Callable[..., None], target: int) -> Callable[..., None]:
        def act(*arguments: str) -> None:
            if arguments[target].endswith(crash_at):
                raise KeyboardInterrupt
            real(*arguments)

        return act

    with monkeypatch.context() as patch:
        patch.setattr(storage, "publish", dying(storage.publish, 1))
        patch.setattr(storage, "write_text", dying(storage.write_text, 0))
        with pytest.raises(KeyboardInterrupt):
            changed.run.execute("first", changed.body("new"))
    # old and new results may lie side by side now: neither configuration may take them for its own
    assert toy.text("manifests", "first.json") is None
    assert not toy.run.is_done("first") and not changed.run.is_done("first")
    assert changed.run.execute("first", changed.body("newer"))["status"] == "done"
    assert toy.text("one", "part") == toy.text("two.txt") == "newer"


def test_a_full_disk_leaves_no_half_written_file(toy, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def half(self: Path, text: str, encoding: str | None = None) -> int:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise full

    before = files(toy.run.root)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError) as caught:
            toy.run.execute("first", toy.body("a text"))
        assert caught.value is full
    assert files(toy.run.root) == before | {"ledger.jsonl"}
    assert [line["status"] for line in toy.ledger()] == ["OSError"]


def test_every_try_is_a_line_of_the_ledger(toy):
    with pytest.raises(StageFailed):
        toy.run.execute("first", toy.body("a", rows_out=1))
    toy.run.execute("first", toy.body("a", tokens=12))
    toy.run.execute("first", toy.body("a"))
    toy.run.execute("second", toy.body("b"))
    lines = toy.ledger()
    assert [(line["stage"], line["status"], line["tokens"]) for line in lines] == [
        ("first", "StageFailed", 0),
        ("first", "done", 12),
        ("second", "done", 0),
    ]
    assert set(lines[0]) == {"time", "stage", "key", "status", "seconds", "tokens", "cost"}


@pytest.mark.parametrize("found", [json.dumps({"format": FORMAT + 1}), "{}", "not JSON", "[]"])
def test_a_folder_of_another_format_is_refused_and_left_alone(tmp_path, found):
    stamp = tmp_path / "run" / "manifests" / "run.json"
    stamp.parent.mkdir(parents=True)
    stamp.write_text(found)
    with pytest.raises(BadInput, match=r"has format .* choose another --run-dir"):
        Toy(tmp_path / "run")
    assert files(tmp_path) == {"run/manifests/run.json"} and stamp.read_text() == found


def test_a_run_folder_that_is_a_file_or_lies_below_one(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(BadInput, match="choose another --run-dir"):
            Toy(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_opening_a_run_again_keeps_what_is_there(toy, tmp_path):
    toy.run.execute("first", toy.body("a"))
    assert Toy(tmp_path / "run").run.is_done("first")


def test_a_result_that_lost_a_file_is_not_done_and_says_which(toy):
    def body(partial: str) -> StageResult:
        storage.write_table(pa.table({"row": list(range(10))}), storage.join(partial, "one"), files=5)
        storage.write_text(storage.join(partial, "two.txt"), "")
        return StageResult(rows_in=10, rows_out=10)

    toy.run.execute("first", body)
    assert toy.run.why_not_done("first") is None
    manifest = toy.run.manifest("first")
    assert sorted(manifest["files"]["one"]) == [f"part-{number}.parquet" for number in range(5)]
    part = Path(toy.run.path("one", "part-3.parquet"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    assert toy.run.why_not_done("first") == "one/part-3.parquet of its finished result is changed"
    part.unlink()
    Path(toy.run.path("one", "part-4.parquet")).unlink()
    assert toy.run.why_not_done("first") == "one/part-3.parquet and 1 more of its finished result is gone"
    assert not toy.run.is_done("first")
    toy.run.execute("first", body)
    assert toy.run.is_done("first") and toy.ledger()[-1]["status"] == "done"


def test_the_ledger_books_what_a_try_cost_and_not_what_earlier_ones_did(toy):
    """A try knows the cost of all rows so far; what a stopped try booked is not booked again."""

    class Stopped(StageFailed):
        cost = 2.0

    def stopped(partial: str) -> StageResult:
        raise Stopped("no more money")

    with pytest.raises(Stopped):
        toy.run.execute("first", stopped)
    toy.run.execute("first", toy.body("a", cost=5.0))
    toy.run.execute("second", toy.body("b", cost=1.0))
    assert [line["cost"] for line in toy.ledger()] == [2.0, 3.0, 1.0]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_manifests_name_the_commit_that_psycho_ran_from(tmp_path):
    (tmp_path / "psycho").mkdir()
    (tmp_path / "psycho" / "a.py").write_text("1")
    assert commit(tmp_path / "none") == ""
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert commit(tmp_path) == head
    commit.cache_clear()
    assert commit(tmp_path / "psycho") == "", "an environment within another's checkout"
    (tmp_path / "psycho" / "a.py").write_text("2")
    assert commit(tmp_path) == f"{head}-changed"


def test_without_git_the_version_alone_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    commit.cache_clear()
    try:
        assert versions()["psycho"] == psycho.__version__ and "psycho_commit" not in versions()
    finally:
        commit.cache_clear()


def test_a_manifest_holds_them(toy, monkeypatch):
    monkeypatch.setattr("psycho.run.commit", lambda: "abc")
    assert toy.run.execute("first", toy.body("a"))["versions"]["psycho_commit"] == "abc"
