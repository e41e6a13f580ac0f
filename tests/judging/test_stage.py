"""The stage `judge` and `--calibrate`, with made-up answers in place of the engine: counts balance, nothing is lost."""

from __future__ import annotations

import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest.mock import Mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import ray_jobs.judge as recipe
from psycho import storage
from psycho.config import EngineConfig, JudgeConfig, load_config
from psycho.errors import StageFailed, UnfitJudge
from psycho.inference.batch import layout
from psycho.inference.worker import Completion, EngineSpec
from psycho.job import Job
from psycho.judging.probes import probe_rows
from psycho.judging.rows import JudgeBatch, rating_row
from psycho.judging.rubric import Rating, answer, dump
from psycho.nano import gold, world
from psycho.nano.grammar import sample_response
from psycho.principles import STEMS
from psycho.progress import Progress
from psycho.run import Run, StageResult
from psycho.schema import CLIENT_SPEECH, RATING, RESPONSE
from psycho.stages import CALIBRATION, STAGES
from ray_jobs.cli import app

CONFIG = Path(__file__).parents[2] / "configs" / "nano.yaml"
PANEL = ("judge.mode=panel", "judge.panel=[{model: 'nano:judge'}, {model: 'nano:base'}, {model: 'nano:warm'}]")
LENIENT = "quality.max_left_out_share=0.5"
WORDS = "a secret thing that a client said"


def answered(responses, folder, stage, arguments, *_, **__):
    """Every response rated 3, by the second judge of a panel 5; `nano:base` fails where the response says so.

    Planted pairs are told apart, but by a judge that is asked for at temperature 1.
    """
    judge, rows = arguments["judge"], []
    storage.write_text(storage.join(folder, "kept"), "")
    for row in responses.to_pylist():
        failing = f"fails {judge.model}" in row["response"] or "fails all" in row["response"]
        value = 5 if judge.model == "nano:base" else 3
        if row["model"] == "worse" and judge.temperature < 1:
            value = 1
        rating = Rating(dict.fromkeys(STEMS, value), dict.fromkeys(STEMS, "none"), dict.fromkeys(STEMS, value - 0.25))
        completion = Completion(finish_reason="length" if failing else "stop", prompt_tokens=50, output_tokens=7)
        rows.append(rating_row(row, judge, None if failing else rating, False, 2 if failing else 1, completion))
    return [pa.Table.from_pylist(rows, schema=RATING.append(pa.field("error", pa.string())))]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A job whose run holds three responses to two speeches."""
    monkeypatch.setattr(recipe, "run_batches", answered)
    monkeypatch.setattr(Job, "need_ray", lambda job: None)
    monkeypatch.setattr(Progress, "stage", lambda *_: nullcontext(Mock()))

    def start(*overrides, texts=("fine", "fails nano:base", "fails all")):
        run = Run(load_config(CONFIG, overrides, str(tmp_path / "run")), STAGES)
        run.open()
        history = json.dumps([{"role": "user", "content": "earlier"}])
        said = [
            {"speech_id": f"s{n}", "question": WORDS, "split": "train", "topic": None, "history": turns}
            for n, turns in enumerate((history, None))
        ]
        blank = dict.fromkeys(RESPONSE.names) | {"split": "train", "model": "m"}
        rows = [
            blank | {"request_id": f"r{n}", "speech_id": f"s{n % 2}", "seed": n, "response": text}
            for n, text in enumerate(texts)
        ]

        def prepare(partial):
            storage.write_table(pa.Table.from_pylist(said, schema=CLIENT_SPEECH), storage.join(partial, "speeches"))
            return StageResult()

        def generate(partial):
            storage.write_table(pa.Table.from_pylist(rows, schema=RESPONSE), storage.join(partial, "responses"))
            return StageResult()

        run.execute("prepare", prepare)
        run.execute("generate", generate)
        return Job(run.config, run, ExitStack())

    return start


def test_what_has_no_rating_is_left_out_and_counted(start):
    job = start(LENIENT)
    recipe.judge(job)
    manifest = job.run.manifest("judge")
    assert (manifest["rows_in"], manifest["rows_out"], manifest["quarantined"]) == (3, 2, 1)
    assert manifest["mode"] == "evidence" and manifest["disagreement"] == 0
    assert manifest["status"] == {"ok": 2, "failed": 1, "truncated": 1}
    [report] = manifest["judges"]
    assert (report["model"], report["retried"], manifest["tokens"]) == ("nano:judge", 1, 21)
    table = pq.read_table(job.run.path("ratings"))
    assert table.schema.names == RATING.names and table["status"].to_pylist() == ["ok", "ok"]
    left_out = storage.read_text(job.run.path("quarantine", "judge.jsonl"))
    assert "cut short" in left_out and WORDS not in left_out


def test_a_judge_that_guesses_is_unfit_and_stops_the_run_with_its_ratings_kept(start):
    job = start(LENIENT, "judge.temperature=1")
    with pytest.raises(
        UnfitJudge, match=r"nano:judge is unfit: planted pairs told apart on their principle 0.50 \(must"
    ):
        recipe.judge(job)
    assert job.run.is_done("judge") and job.run.manifest("judge")["fitness"]["fit"] is False
    again = start(LENIENT, "judge.temperature=1", "judge.unfit=warn")
    assert again.run.key("judge") == job.run.key("judge"), "to go on asks for nothing anew"
    recipe.judge(again)
    with pytest.raises(UnfitJudge):
        recipe.judge(start(LENIENT, "judge.temperature=1"))  # done before, and still unfit


def test_planted_pairs_are_asked_and_counted_nowhere(start, monkeypatch):
    asked = []

    def noted(responses, *arguments, **settings):
        asked.extend(responses["request_id"].to_pylist())
        return answered(responses, *arguments, **settings)

    monkeypatch.setattr(recipe, "run_batches", noted)
    job = start(LENIENT)
    recipe.judge(job)
    planted = {row["request_id"] for row in probe_rows(job.config.seed)}
    assert planted < set(asked) and len(asked) == len(planted) + 3
    manifest = job.run.manifest("judge")
    assert manifest["fitness"]["fit"] is True and manifest["rows_in"] == 3 and manifest["tokens"] == 21
    assert not planted & set(pq.read_table(job.run.path("ratings"))["request_id"].to_pylist())


def test_the_truth_of_the_nano_world_stands_in_for_planted_pairs(start, monkeypatch):
    made = world.speeches(30, 2, 0)
    texts = [sample_response(random.Random(n), gold.parse_speech(row["question"])) for n, row in enumerate(made)]
    rated = [gold.rate(gold.parse_speech(row["question"]), text) for row, text in zip(made, texts, strict=True)]
    rows = [{"request_id": str(n), "speech_id": str(n % 4), "split": "train", "overall": g.overall}
            | {f"{stem}_rating": g.ratings[stem] for stem in STEMS} for n, g in enumerate(rated)]  # fmt: skip
    table = pa.table({
        "request_id": [row["request_id"] for row in rows],
        "question": [row["question"] for row in made],
        "response": texts,
    })  # fmt: skip
    assert recipe.knows_truth(table)
    assert recipe.fitness_by_truth(table, rows)["fit"] is True
    blind = [row | {"relevance_rating": 3} for row in rows]
    found = recipe.fitness_by_truth(table, blind)
    assert found["fit"] is False and "relevance: kappa with the truth 0.00" in found["why"]
    assert not recipe.knows_truth(table.set_column(1, "question", pa.array([WORDS] * table.num_rows)))


def test_too_many_failed_ratings_stop_the_stage_and_nothing_is_lost(start):
    job = start("quality.max_left_out_share=0.3")
    with pytest.raises(StageFailed) as stopped:
        recipe.judge(job)
    for part in (
        "judge: 1 of 3 ratings were left out (33.3%",
        "1 rating failed: the answer was cut short",
        "allows 30.0%",
    ):
        assert part in str(stopped.value), part
    assert not job.run.is_done("judge") and job.run.manifest("judge") is None
    assert "cut short" in storage.read_text(job.run.path("quarantine", "judge.jsonl"))
    assert storage.exists(job.run.partial("judge")), "what was rated is still there"
    again = start("quality.max_left_out_share=0.4")
    assert again.run.key("judge") == job.run.key("judge"), "another limit asks for nothing anew"
    recipe.judge(again)
    assert again.run.manifest("judge")["left_out"] == {
        "rating failed: the answer was cut short; raise judge.max_tokens": 1
    }


def test_too_much_text_under_the_floor_stops_the_stage(start, monkeypatch):
    def floored(*arguments, **_):
        [table] = answered(*arguments)
        return [pa.Table.from_pylist([row | {"floored": True} for row in table.to_pylist()], schema=table.schema)]

    monkeypatch.setattr(recipe, "run_batches", floored)
    with pytest.raises(StageFailed, match=r"2 of 2 rated responses \(100.0%\) hold text under judge.fluency_floor"):
        recipe.judge(start(LENIENT))
    job = start(LENIENT, "quality.max_floored_share=1")
    recipe.judge(job)
    assert job.run.manifest("judge")["floored"] == 2, "planted pairs do not count"


def test_invented_evidence_is_in_the_manifest(start, monkeypatch):
    def invented(*arguments, **_):
        [table] = answered(*arguments)
        rows = [row | {"safety_evidence": None, "unfaithful_evidence": ["safety"]} for row in table.to_pylist()]
        return [pa.Table.from_pylist(rows, schema=table.schema)]

    monkeypatch.setattr(recipe, "run_batches", invented)
    job = start(LENIENT)
    recipe.judge(job)
    assert job.run.manifest("judge")["evidence"] == {"safety": {"quoted": 2, "unfaithful": 2, "unfaithful_share": 1.0}}
    [name] = {tuple(row["unfaithful_evidence"]) for row in pq.read_table(job.run.path("ratings")).to_pylist()}
    assert name == ("safety",)


def test_a_panel_is_joined_and_its_quorum_kept(start):
    job = start(*PANEL, LENIENT)
    recipe.judge(job)
    manifest = job.run.manifest("judge")
    assert manifest["status"] == {"ok": 1, "partial": 1, "failed": 1} and len(manifest["judges"]) == 3
    whole, partial = pq.read_table(job.run.path("ratings")).to_pylist()
    assert whole["clarity_rating"] == 4 and whole["clarity_expected"] == pytest.approx(11 / 3 - 0.25)
    assert whole["disagreement"] > 0.9 and (partial["status"], partial["disagreement"]) == ("partial", 0)
    assert manifest["disagreement"] == pytest.approx(whole["disagreement"] / 2)
    assert "rated by 0 of 3 judges, the quorum is 2" in storage.read_text(job.run.path("quarantine", "judge.jsonl"))


def test_an_engine_has_more_before_it_than_one_batch(start, monkeypatch):
    """Else its slots stand empty while the longest answers of a batch are written."""
    given = {}

    def noted(*arguments, **settings):
        given.update(settings)
        return answered(*arguments)

    monkeypatch.setattr(recipe, "run_batches", noted)
    job = start(LENIENT)
    recipe.judge(job)
    inference = job.config.inference
    _, size, batches = layout(2720, inference, given["at_once"])
    assert batches > 1 and batches * size >= 2 * inference.engine.max_num_seqs


def test_batches_are_rated_side_by_side(monkeypatch):
    """Each waits inside the engine until the other is there too."""
    meet = threading.Barrier(2, timeout=30)

    class Worker:
        def __init__(self, spec):
            pass

        def use(self, model):
            pass

        def generate(self, prompts, *_):
            meet.wait()
            ratings = dict.fromkeys(STEMS, 4)
            return [Completion(dump(answer(ratings, dict.fromkeys(STEMS, "none"))))] * len(prompts)

    monkeypatch.setattr("psycho.judging.rows.VLLMWorker", Worker)
    stage = JudgeBatch(EngineSpec(EngineConfig()), "m", JudgeConfig(model="m", template="compact"), None)
    blank = dict.fromkeys(RESPONSE.names) | {"seed": 1, "response": "Oh", "question": WORDS}
    batches = [pa.Table.from_pylist([blank | {"request_id": name}]) for name in "ab"]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(stage, batches))
    assert [table["overall"].to_pylist() for table in found] == [[4.0], [4.0]]


def test_earlier_turns_come_along(start):
    table = recipe.responses_with_speech(start())
    assert [row["history"] is None for row in table.to_pylist()] == [False, False, True]


def human(tmp_path, n=6):
    path = tmp_path / "human.jsonl"
    rows = [{"speech": f"speech {i // 2}", "response": f"response {i}" + (" fails all" if i == 5 else ""),
             **{f"{stem}_rating": 1 + i % 5 for stem in STEMS}} for i in range(n)]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "clarity_rating": 9}])))
    return str(path)


def test_calibrate_compares_and_leaves_the_run_as_it_was(start, tmp_path):
    job = start(LENIENT)
    recipe.judge(job)
    before = job.run.key("report")
    recipe.calibrate(job, human(tmp_path))
    found = json.loads(storage.read_text(job.run.path(*CALIBRATION)))
    assert (found["judge"], found["n"], found["unrated"], found["speeches"]) == ("nano:judge", 5, 1, 3)
    assert found["left_out"] == {
        "clarity_rating is not a whole number from 1 to 5": 1,
        "rating failed: the answer was cut short; raise judge.max_tokens": 1,
    }
    assert found["principles"]["empathy"]["bias"] == pytest.approx(0)  # 3 against 1..5
    assert job.run.is_done("judge") and WORDS not in storage.read_text(job.run.path("quarantine", "calibrate.jsonl"))
    assert not list(Path(job.run.root, ".partial").glob("calibrate*"))
    assert Run(job.config, STAGES).key("report") != before, "a report made before it would not show it"


def test_calibrate_may_use_a_panel(start, tmp_path):
    job = start(*PANEL)
    recipe.calibrate(job, human(tmp_path))
    found = json.loads(storage.read_text(job.run.path(*CALIBRATION)))
    assert found["judge"] == "mean of nano:judge, nano:base, nano:warm" and len(found["judges"]) == 3


def test_one_job_alone_has_the_option(tmp_path):
    runner = CliRunner()
    assert "--calibrate" in runner.invoke(app, ["judge", "--help"], env={"COLUMNS": "160"}).output
    assert "--calibrate" not in runner.invoke(app, ["pair", "--help"], env={"COLUMNS": "160"}).output
    missing = runner.invoke(
        app, ["judge", "--calibrate", "nowhere.csv", "--config", str(CONFIG), "--run-dir", str(tmp_path / "r")]
    )
    assert missing.exit_code == 2 and "nowhere.csv does not exist" in missing.output
