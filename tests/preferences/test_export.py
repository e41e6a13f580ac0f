"""The exported data set: loads by `datasets`, trains under TRL as it is, says what it is, and comes back in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import yaml

from psycho import storage
from psycho.config import PairsConfig, load_config
from psycho.errors import BadInput
from psycho.evaluation.metrics import clustered_rate
from psycho.job import Job
from psycho.preferences.audit import audit_pairs
from psycho.preferences.export import CONVERSATIONAL, TEXT, export_pairs
from psycho.preferences.published import read_published
from psycho.principles import STEMS
from psycho.run import Run, StageResult
from psycho.schema import PREFERENCE_PAIR
from psycho.stages import STAGES
from ray_jobs import export as recipe

NANO = Path(__file__).parents[2] / "configs" / "nano.yaml"
Row = dict[str, Any]


def pair(number: int, history: list[dict[str, str]] | None = None) -> Row:
    ratings = {f"{side}_{stem}_rating": r for side, r in (("chosen", 4), ("rejected", 2)) for stem in STEMS}
    return {
        "ID": f"s{number}",
        "prefID": 0,
        "question": f"I lie awake, case {number}.",
        "chosen": f"That sounds hard. What would help, case {number}?",
        "rejected": f"Sleep more, case {number}.",
        "chosen_model": "warm",
        "rejected_model": "brisk",
        **ratings,
        "speech_id": f"s{number}",
        "gap": 2.0,
        "history": json.dumps(history) if history else None,
    }


EARLIER = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Welcome."}]
PAIRS = {"train": [pair(n, EARLIER if n == 0 else None) for n in range(12)], "test": [pair(n) for n in range(12, 16)]}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A nano run whose pairs are done."""
    run = Run(load_config(NANO, run_dir=str(tmp_path / "run")), STAGES)
    run.open()

    def made(*folders: str) -> Callable[[str], StageResult]:
        def body(partial: str) -> StageResult:
            for folder in folders:
                storage.write_text(storage.join(partial, folder, "made"), "")
            return StageResult()

        return body

    def pairs(partial: str) -> StageResult:
        for name, rows in PAIRS.items():
            storage.write_table(pa.Table.from_pylist(rows, PREFERENCE_PAIR), storage.join(partial, "preferences", name))
        audit = audit_pairs(PAIRS, clustered_rate)
        storage.write_text(storage.join(partial, "preferences", "audit.json"), json.dumps(audit))
        return StageResult(16, 16, extra={"train": 12, "test": 4, "left_out": {"tie": 3}})

    for name, output in (("prepare", "speeches"), ("generate", "responses"), ("judge", "ratings")):
        run.execute(name, made(output))
    run.execute("pair", pairs)
    said: list[str] = []
    return cast(Job, SimpleNamespace(run=run, config=run.config, said=said, progress=SimpleNamespace(say=said.append)))


@pytest.fixture
def exported(job: Job, tmp_path: Path) -> Path:
    target = tmp_path / "set"
    recipe.export(job, str(target), "cc-by-nc-4.0", rows_per_shard=5)
    return target


def load(folder: Path, tmp_path: Path, *name: str) -> Any:
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(str(folder), *name, cache_dir=str(tmp_path / "cache"))


def test_it_loads_with_its_splits_and_shards(exported: Path, tmp_path: Path) -> None:
    found = load(exported, tmp_path)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 12, "test": 4}
    assert found["train"].column_names == [*PREFERENCE_PAIR.names, "prompt"] == TEXT.names
    assert [dict(row) for row in found["train"].remove_columns("prompt")] == PAIRS["train"]
    assert [p.name for p in sorted((exported / "data").glob("train-*"))] == [
        f"train-0000{n}-of-00003.parquet" for n in range(3)
    ]
    assert found["train"][0]["prompt"] == (
        "Client: Hello.\n\nTherapist: Welcome.\n\nClient: I lie awake, case 0.\n\nTherapist:\n"
    )


def test_the_same_pairs_as_messages(exported: Path, tmp_path: Path) -> None:
    rows = load(exported, tmp_path, "conversational")["train"]
    assert rows.column_names == CONVERSATIONAL.names
    assert rows[0]["prompt"] == [*EARLIER, {"role": "user", "content": "I lie awake, case 0."}]
    assert rows[1]["chosen"] == [{"role": "assistant", "content": PAIRS["train"][1]["chosen"]}]


@pytest.mark.parametrize("name", [(), ("conversational",)])
def test_trl_trains_on_it_as_it_is(
    name: tuple[str, ...], exported: Path, tmp_path: Path, tiny_llama: Callable[..., str], nano_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    data = load(exported, tmp_path, *name)
    common = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": [],
              "save_strategy": "no", "disable_tqdm": True, "max_length": 512}  # fmt: skip
    for kind, config, trainer in (
        (AutoModelForCausalLM, DPOConfig, DPOTrainer),
        (AutoModelForSequenceClassification, RewardConfig, RewardTrainer),
    ):
        reward = trainer is RewardTrainer
        model = kind.from_pretrained(tiny_llama(reward=reward))
        made = trainer(
            model=model,
            args=config(output_dir=str(tmp_path / "out"), **common),
            train_dataset=data["train"],
            eval_dataset=data["test"],
            processing_class=nano_tokenizer,
        )
        assert len(made.train_dataset) == 12 and len(made.eval_dataset) == 4  # none was dropped as too long
        result = made.train()
        assert result.training_loss > 0
        ids = made.train_dataset[0]
        before = ids["prompt_ids"] + ids["chosen_ids"] if "prompt_ids" in ids else ids["chosen_ids"]
        text = nano_tokenizer.decode(before)
        assert "Welcome." in text and "case 0" in text and "What would help" in text


def test_it_starts_a_run(exported: Path) -> None:
    found = read_published(PairsConfig(source=str(exported)), 0)
    assert not found.quarantine
    by_split = {"train": PAIRS["train"], "evaluation": PAIRS["test"]}
    for split, rows in by_split.items():
        assert [{k: v for k, v in p.items() if k != "split"} for p in found.pairs if p["split"] == split] == rows


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, matter, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(matter), text


def test_the_card_says_what_it_is(exported: Path, job: Job) -> None:
    matter, text = front_matter(exported)
    assert matter["license"] == "cc-by-nc-4.0" and matter["language"] == ["en"]
    assert "| train | 12 | 12 | 2.00 |" in text and "| test | 4 | 4 | 2.00 |" in text
    for said in (
        "nano:judge", "brisk, warm", "3 tie", "no person said them", "never faces clients alone",
        "`all`, gap at least 1", "taking the longer response is right in 100.0%", "less safe by 1 or more",
    ):  # fmt: skip
        assert said in text, said
    assert str(Path(job.run.root).parent) not in text and "awake" not in text


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"personal_data": {"name": 7, "phone": 2}}, "7 name, 2 phone"),
        ({"personal_data": {}}, "none found"),
        ({}, "Not looked for"),
    ],
)
def test_the_card_says_who_looked_for_personal_data(job: Job, tmp_path: Path, found: Row, said: str) -> None:
    facts = recipe.card_facts(job, "mit", "Counsel Chat") | {
        "nano": False,
        "languages": None,
        "personal_data": found.get("personal_data"),
    }
    export_pairs(job.run.path("preferences"), str(tmp_path / "set"), facts)
    matter, text = front_matter(tmp_path / "set")
    assert said in text and "Client speeches: Counsel Chat." in text
    assert "language" not in matter  # nobody looked, so none is claimed


def test_an_earlier_data_set_is_not_overwritten(exported: Path, job: Job) -> None:
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    with pytest.raises(BadInput, match="holds a data set already"):
        recipe.export(job, str(exported), "mit")
    assert {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()} == before


class Hub:
    """What the hub was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, name: str, **settings: Any) -> str:
        self.asked.append((f"create {name}", settings))
        return f"hub/{name}"

    def upload_folder(self, **settings: Any) -> None:
        self.asked.append(("upload", settings))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    import huggingface_hub

    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_nothing_is_pushed_without_the_flag(hub: Hub, job: Job, tmp_path: Path) -> None:
    recipe.export(job, str(tmp_path / "a"), "mit")
    assert hub.asked == []
    with pytest.raises(BadInput, match="--push needs --licence"):
        recipe.export(job, str(tmp_path / "b"), repository="owner/name")
    assert hub.asked == [] and not (tmp_path / "b").exists()


@pytest.mark.parametrize("public", [False, True])
def test_a_push_is_private_unless_it_is_said_to_be_public(hub: Hub, job: Job, tmp_path: Path, public: bool) -> None:
    recipe.export(job, str(tmp_path / "a"), "mit", repository="owner/name", public=public)
    (created, settings), (_, upload) = hub.asked
    assert created == "create owner/name" and settings["private"] is not public and settings["repo_type"] == "dataset"
    assert upload["folder_path"] == str(tmp_path / "a") and upload["repo_type"] == "dataset"


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ray_jobs.cli import app

    options = ["export", "--to", str(tmp_path / "set"), "--config", str(NANO), "--run-dir", str(tmp_path / "none")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 2 and not (tmp_path / "set").exists()
    assert "stage pair is not done" in done.output


def test_a_dry_run_says_what_would_be_written_and_touches_nothing(job: Job, tmp_path: Path, hub: Hub) -> None:
    from typer.testing import CliRunner

    from ray_jobs.cli import app

    target, common = tmp_path / "set", ["--config", str(NANO), "--run-dir", job.run.root, "--dry-run"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = ["--rows-per-shard", "5", "--licence", "mit", "--push", "owner/name"]
    done = CliRunner().invoke(app, ["export", "--to", str(target), *common, *options])
    assert done.exit_code == 0, done.output
    for said in (
        f"12 train, 4 test pairs of {job.run.root} -> {target}", "3 train, 1 test Parquet files each", "licence mit",
        "owner/name on the hub (private)", "Nothing was written or sent.",
    ):  # fmt: skip
        assert said in done.output, said
    assert "awake" not in done.output and hub.asked == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    refused = CliRunner().invoke(app, ["export", "--to", str(target), *common, "--push", "owner/name"])
    assert refused.exit_code == 2 and "--push needs --licence" in refused.output
    recipe.export(job, str(target), "mit")
    assert CliRunner().invoke(app, ["export", "--to", str(target), *common]).exit_code == 2


def test_a_dry_run_of_a_run_that_is_not_there_makes_no_folder(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from ray_jobs.cli import app

    options = ["--config", str(NANO), "--run-dir", str(tmp_path / "none"), "--dry-run"]
    done = CliRunner().invoke(app, ["export", "--to", str(tmp_path / "set"), *options])
    assert done.exit_code == 2 and "stage pair is not done" in done.output and not list(tmp_path.iterdir())


def test_pairs_that_are_not_done_are_one_sentence(job: Job, tmp_path: Path) -> None:
    storage.remove(job.run.path("manifests", "pair.json"))
    with pytest.raises(BadInput, match="stage pair is not done"):
        recipe.export(job, str(tmp_path / "a"), "mit")
