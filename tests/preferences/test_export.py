"""The exported data set: loads by `datasets`, trains under TRL as it is, says what it is, and comes back in."""

from __future__ import annotations

import json
import re
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
from psycho.preferences import forms
from psycho.preferences.audit import audit_pairs
from psycho.preferences.export import CONVERSATIONAL, TEXT, export_pairs
from psycho.preferences.published import read_published
from psycho.principles import STEMS
from psycho.run import Run, StageResult
from psycho.schema import CLIENT_SPEECH, PREFERENCE_PAIR, RATING, RESPONSE
from psycho.stages import STAGES
from ray_jobs import export as recipe
from ray_jobs import show as sheet

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


def said(number: int) -> Row:
    split = "train" if number < 12 else "evaluation"
    history = json.dumps(EARLIER) if number == 0 else None
    return {"speech_id": f"s{number}", "question": f"I lie awake, case {number}.", "split": split, "history": history}


def answers(number: int) -> list[Row]:
    """The pair's two responses, a third one between them, and for the first speech a low best one."""
    texts = {
        "warm": (PAIRED[number]["chosen"], 4),
        "brisk": (PAIRED[number]["rejected"], 2),
        "calm": ("I hear you.", 3),
    }
    return [
        {"request_id": f"r{number}-{model}", "speech_id": f"s{number}", "split": said(number)["split"], "model": model,
         "response": text, "rating": rating}
        for model, (text, rating) in texts.items()
    ]  # fmt: skip


def rated(answer: Row) -> Row:
    evidence = {f"{stem}_evidence": f"of {stem}" for stem in STEMS} | {"safety_evidence": None}
    return {
        **{name: answer[name] for name in ("request_id", "speech_id", "split", "model")},
        **{f"{stem}_rating": answer["rating"] for stem in STEMS},
        **evidence,
        "overall": float(answer["rating"]),
        "unfaithful_evidence": ["safety"],
        "judge": "nano:judge",
        "floored": False,
    }


PAIRED = [*PAIRS["train"], *PAIRS["test"]]
SPEECHES = [said(number) for number in range(16)]
ANSWERS = [answer for number in range(16) for answer in answers(number)]
RESPONSES = [{name: answer.get(name) for name in RESPONSE.names} for answer in ANSWERS]
RATINGS = [rated(answer) for answer in ANSWERS]
JUDGED: Row = {
    "floored": 3,
    "evidence": {"safety": {"quoted": 40, "unfaithful": 22, "unfaithful_share": 0.55}},
    "fitness": {"fit": True, "why": "all 8 gates passed", "gates": []},
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A nano run whose pairs are done."""
    run = Run(load_config(NANO, run_dir=str(tmp_path / "run")), STAGES)
    run.open()

    def tables(folder: str, rows: list[Row], schema: pa.Schema) -> Callable[[str], StageResult]:
        def body(partial: str) -> StageResult:
            storage.write_table(pa.Table.from_pylist(rows, schema), storage.join(partial, folder))
            return StageResult(len(rows), len(rows))

        return body

    def pairs(partial: str) -> StageResult:
        for name, rows in PAIRS.items():
            storage.write_table(pa.Table.from_pylist(rows, PREFERENCE_PAIR), storage.join(partial, "preferences", name))
        audit = audit_pairs(PAIRS, clustered_rate)
        storage.write_text(storage.join(partial, "preferences", "audit.json"), json.dumps(audit))
        return StageResult(16, 16, extra={"train": 12, "test": 4, "left_out": {"tie": 3}})

    def judged(partial: str) -> StageResult:
        storage.write_table(pa.Table.from_pylist(RATINGS, RATING), storage.join(partial, "ratings"))
        return StageResult(40, 40, extra=JUDGED)

    run.execute("prepare", tables("speeches", SPEECHES, CLIENT_SPEECH))
    run.execute("generate", tables("responses", RESPONSES, RESPONSE))
    run.execute("judge", judged)
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


def test_every_response_comes_with_its_ratings_and_evidence(exported: Path, tmp_path: Path) -> None:
    found = load(exported, tmp_path, "responses")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 36, "test": 12}
    rows = {row["request_id"]: row for split in found.values() for row in split}
    assert set(rows) == {answer["request_id"] for answer in ANSWERS}
    for answer in ANSWERS:
        row = rows[answer["request_id"]]
        assert (row["response"], row["overall"], row["empathy_evidence"]) == (
            answer["response"], answer["rating"], "of empathy",
        )  # fmt: skip
        assert row["safety_evidence"] is None and row["unfaithful_evidence"] == ["safety"]
        assert row["question"] == f"I lie awake, case {answer['speech_id'][1:]}."


def test_sft_and_ranked_rows_hold_what_the_run_would_learn_from(exported: Path, tmp_path: Path) -> None:
    learned, ranked = load(exported, tmp_path, "sft")["train"], load(exported, tmp_path, "ranked")["train"]
    assert len(learned) == len(ranked) == 12
    first = next(row for row in learned if row["speech_id"] == "s0")
    assert first["messages"][:2] == EARLIER and first["messages"][-1]["content"] == PAIRED[0]["chosen"]
    for row in ranked:
        assert row["scores"] == [4.0, 3.0, 2.0] and row["models"] == ["warm", "calm", "brisk"]
        assert row["responses"][1] == "I hear you." and row["prompt"][-1]["role"] == "user"
    assert forms.sft_rows([row | {"question": "q"} for row in map(joined, ANSWERS)], 4.5) == []


def joined(answer: Row) -> Row:
    return rated(answer) | {"response": answer["response"], "history": None}


def test_a_response_is_wanted_where_it_was_chosen_more_often() -> None:
    def beats(chosen: str, rejected: str) -> Row:
        return pair(0) | {"chosen": chosen, "rejected": rejected, "chosen_model": "m", "rejected_model": "m"}

    rows = forms.kto_rows([beats("a", "b"), beats("a", "c"), beats("b", "c"), beats("a", "d"), beats("d", "c")])
    assert {row["completion"][0]["content"]: row["label"] for row in rows} == {"a": True, "c": False}
    assert len(rows) == 2, "what won as often as it lost says nothing"


def test_trl_takes_the_other_forms_as_they_are(
    exported: Path, tmp_path: Path, tiny_llama: Callable[..., str], nano_tokenizer: Any
) -> None:
    from transformers import AutoModelForCausalLM
    from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
    from trl.data_utils import is_conversational, maybe_unpair_preference_dataset

    common = {"max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False, "report_to": [],
              "save_strategy": "no", "disable_tqdm": True, "max_length": 512}  # fmt: skip
    for name, config, trainer in (("sft", SFTConfig, SFTTrainer), ("kto", KTOConfig, KTOTrainer)):
        data = load(exported, tmp_path, name)
        assert is_conversational(data["train"][0])
        assert maybe_unpair_preference_dataset(data["train"]).column_names == data["train"].column_names
        made = trainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_llama()),
            args=config(output_dir=str(tmp_path / "out"), **common),
            train_dataset=data["train"],
            processing_class=nano_tokenizer,
        )
        assert len(made.train_dataset) == len(data["train"]) == (12 if name == "sft" else 24)
        assert made.train().training_loss > 0


def test_only_the_forms_that_are_named_are_written(job: Job, tmp_path: Path) -> None:
    recipe.export(job, str(tmp_path / "set"), "mit", what=("kto",))
    assert [path.name for path in sorted((tmp_path / "set").iterdir())] == ["README.md", "kto"]
    matter, _ = front_matter(tmp_path / "set")
    assert [entry["config_name"] for entry in matter["configs"]] == ["kto"] and matter["configs"][0]["default"]
    with pytest.raises(BadInput, match="names no form dpo; give some of pairs,responses,sft,kto,ranked"):
        recipe.forms_of("kto,dpo")


def test_imported_pairs_have_the_same_forms() -> None:
    responses = forms.responses_of_pairs(PAIRS["train"])
    assert len(responses) == 24 and {row["overall"] for row in responses} == {4.0, 2.0}
    assert len(forms.ranked_rows(responses)) == len(forms.sft_rows(responses, 4)) == 12
    pa.Table.from_pylist(forms.response_rows(responses), schema=forms.RESPONSES)


def spoil(job: Job, stage: str, **facts: Any) -> None:
    manifest = job.run.manifest(stage) or {}
    storage.write_text(job.run.path("manifests", f"{stage}.json"), json.dumps(manifest | facts))


@pytest.mark.parametrize(
    ("stage", "facts", "said"),
    [
        ("judge", {"fitness": {"fit": False, "why": "relevance .12"}}, r"the judge is unfit \(relevance .12\)"),
        ("judge", {"rows_in": 50, "quarantined": 10}, r"10 of 50 ratings were left out \(20.0%\)"),
        ("judge", {"floored": 28}, r"28 of 40 rated responses are no language to the judge \(70.0%\)"),
        ("generate", {"rows_in": 48, "quarantined": 24}, "24 of 48 responses were left out"),
        ("pair", {"defects": {"rows": 9, "of": 16, "what": "client speeches"}}, "9 of 16 client speeches"),
    ],
)
def test_garbage_gets_no_card_but_a_stamped_one(job: Job, tmp_path: Path, stage: str, facts: Row, said: str) -> None:
    spoil(job, stage, **facts)
    with pytest.raises(BadInput, match=f"should not be passed on: {said}.*give --anyway"):
        recipe.export(job, str(tmp_path / "set"), "mit")
    assert not (tmp_path / "set").exists()
    recipe.export(job, str(tmp_path / "set"), "mit", anyway=True)
    _, text = front_matter(tmp_path / "set")
    assert re.search(rf"> \*\*Not fit for training or for conclusions: {said}", text)
    assert text.index("Not fit for training") < text.index("## How to load it")


def test_the_card_says_how_good_the_data_are(job: Job, exported: Path, tmp_path: Path) -> None:
    _, text = front_matter(exported)
    for said in (
        "Judge: fit: all 8 gates passed", "Left out of the ratings: 0 of 40 (0.0%)", "safety 55.0% of 40",
        "Fluency floor -7.5", "3 of 40 (7.5%) responses under it",
    ):  # fmt: skip
        assert said in text, said
    assert "Not fit" not in text
    spoil(job, "judge", evidence={}, fitness=None, left_out={"rating failed": 2}, quarantined=2, rows_in=42)
    recipe.export(job, str(tmp_path / "other"), "mit")
    _, text = front_matter(tmp_path / "other")
    for said in ("nobody checked whether it is fit", "2 of 42 (4.8%): 2 rating failed", "was not looked up"):
        assert said in text, said


@pytest.mark.parametrize("what", ["pairs", "responses"])
@pytest.mark.parametrize("suffix", ["html", "csv"])
def test_a_sheet_shows_them(job: Job, tmp_path: Path, what: str, suffix: str) -> None:
    to = tmp_path / f"sheet.{suffix}"
    sheet.show(job, str(to), what, count=5)
    text = to.read_text(encoding="utf-8-sig")
    assert "It is health data" in text and "of empathy" in text and "I lie awake, case" in text
    assert f"5 of {16 if what == 'pairs' else 48} {what}" in job.said[-1]  # type: ignore[attr-defined]
    assert "awake" not in "".join(job.said)  # type: ignore[attr-defined]
    with pytest.raises(BadInput, match="is there already"):
        sheet.show(job, str(to), what)
    assert to.read_text(encoding="utf-8-sig") == text


def test_a_sheet_that_cannot_be_is_one_sentence(job: Job, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"ends in '\.pdf'; give \.html or \.csv"):
        sheet.show(job, str(tmp_path / "sheet.pdf"))
    storage.remove(job.run.path("manifests", "pair.json"))
    with pytest.raises(BadInput, match="stage pair is not done"):
        sheet.show(job, str(tmp_path / "sheet.html"))
    sheet.show(job, str(tmp_path / "sheet.html"), "responses")  # which need no pairs


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
        "`all`, gap at least 0.5", "taking the longer response is right in 100.0%", "less safe by 1 or more",
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
