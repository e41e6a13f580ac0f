"""The stage on disk: from ratings, and from published pairs, where sampling and judging fall away. Without Ray."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from psycho import storage
from psycho.config import load_config
from psycho.errors import BadInput, StageFailed
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.job import Job
from psycho.plan import build_plan
from psycho.principles import STEMS
from psycho.run import Run, StageResult
from psycho.schema import CLIENT_SPEECH, PREFERENCE_GROUP, PREFERENCE_PAIR, RATING, RESPONSE
from psycho.stages import STAGES, check_config, same_judge
from psycho.training.stage import reward_rows
from ray_jobs import export, pipeline
from ray_jobs.pair import pair
from ray_jobs.prepare import prepare
from ray_jobs.train_online import sides
from ray_jobs.train_sft import best_responses, chosen_of_pairs

NANO = Path(__file__).parents[2] / "configs" / "nano.yaml"
Rows = list[dict[str, Any]]


def job(folder: Path, *settings: str) -> Job:
    config = load_config(NANO, settings, str(folder))
    run = Run(config, STAGES)
    run.open()
    return Job(config, run, ExitStack())


def read(made: Job, *parts: str) -> Rows:
    return storage.read_table(made.run.path(*parts)).to_pylist()


def balances(made: Job, stage: str) -> dict[str, Any]:
    manifest = made.run.manifest(stage) or {}
    lines = (storage.read_text(made.run.path("quarantine", f"{stage}.jsonl")) or "").splitlines()
    assert manifest["rows_in"] == manifest["rows_out"] + manifest["quarantined"]
    assert manifest["quarantined"] == len(lines) and all(json.loads(line)["reason"] for line in lines)
    return manifest


def rated_run(made: Job, speeches: int = 40) -> None:
    """Speeches, responses and ratings as the stages before would have left them."""
    said = [
        {"speech_id": f"s{n:02}", "question": f"Question {n}", "split": "train" if n < 30 else "evaluation"}
        for n in range(speeches)
    ]
    answers = [
        {"request_id": f"{s['speech_id']}-{place}", "speech_id": s["speech_id"], "split": s["split"],
         "model": f"m{place}", "response": f"Answer {place} to {s['question']}"}
        for s in said for place in range(4)
    ]  # fmt: skip
    ratings = []
    for answer in answers:
        level = 4 - int(answer["model"][1:])
        unsafe = level == 4 and answer["split"] == "train"
        row = {k: v for k, v in answer.items() if k != "response"} | {f"{stem}_rating": level for stem in STEMS}
        ratings.append(row | {"overall": float(level), "safety_rating": 2 if unsafe else 4})
    tables = {"speeches": (said, CLIENT_SPEECH), "responses": (answers, RESPONSE), "ratings": (ratings, RATING)}
    for stage, (name, (rows, schema)) in zip(("prepare", "generate", "judge"), tables.items(), strict=True):

        def body(partial: str, rows: Rows = rows, schema: pa.Schema = schema, name: str = name) -> StageResult:
            blank = dict.fromkeys(schema.names)
            table = pa.Table.from_pylist([blank | row for row in rows], schema=schema)
            storage.write_table(table, storage.join(partial, name))
            return StageResult(len(rows), len(rows))

        made.run.execute(stage, body)


def test_pairs_groups_and_audit_of_a_run_of_its_own(tmp_path: Path) -> None:
    made = job(tmp_path / "run", "pairs.dev_share=0.3")
    rated_run(made)
    pair(made)
    manifest = balances(made, "pair")
    splits = {name: read(made, "preferences", name) for name in ("train", "dev", "test")}
    assert {name: len(rows) for name, rows in splits.items()} == {name: manifest[name] for name in splits}
    assert manifest["rows_in"] == 30 * 6 + 10 and manifest["train"] + manifest["dev"] == 30 * 3
    # the best response of each train speech is less safe by two: its three pairs go
    assert manifest["left_out"] == {"less safe by 2": 30 * 3} and manifest["less_safe"] == 90


def test_too_few_rated_responses_stop_the_stage(tmp_path: Path) -> None:
    made = job(tmp_path / "run")
    rated_run(made)
    rows = read(made, "ratings")
    lost = {f"s{n:02}" for n in range(5)} | {"s33"}
    kept = [row for row in rows if row["speech_id"] not in lost]
    for file in Path(made.run.path("ratings")).glob("*.parquet"):
        file.unlink()
    storage.write_table(pa.Table.from_pylist(kept, schema=RATING), made.run.path("ratings"))
    manifest = made.run.manifest("judge") or {}
    files = {"ratings": storage.parquet_sizes(made.run.path("ratings"))}
    storage.write_text(made.run.path("manifests", "judge.json"), json.dumps(manifest | {"files": files}))
    with pytest.raises(StageFailed, match=r"pair: 6 of 40 client speeches were left out \(15\.0%.*6 fewer than two"):
        pair(made)
    assert made.run.manifest("pair") is None
    assert "fewer than two" in (storage.read_text(made.run.path("quarantine", "pair.jsonl")) or "")
    again = job(tmp_path / "run", "quality.max_left_out_share=0.2")
    pair(again)
    assert balances(again, "pair")["defects"] == {"rows": 6, "of": 40, "what": "client speeches"}


def test_imported_rows_with_a_defect_stop_the_stage_and_duplicates_do_not(tmp_path: Path) -> None:
    source = Path(published(tmp_path / "pairs.jsonl"))
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text("\n".join(map(json.dumps, [*rows, *rows])))
    settings = ("pairs.test_share=0.2", "generation.pool=[]")
    made = job(tmp_path / "one", f"pairs.source={doubled}", *settings)
    prepare(made)
    pair(made)
    assert balances(made, "pair")["defects"] == {"rows": 4, "of": 240, "what": "imported rows"}
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "\n".join(json.dumps(row | {"rejected": ""} if n % 4 == 0 else row) for n, row in enumerate(rows))
    )
    made = job(tmp_path / "other", f"pairs.source={broken}", *settings)
    prepare(made)
    with pytest.raises(StageFailed, match=r"pair: .* of 120 imported rows were left out"):
        pair(made)


def test_no_test_pair_is_one_sentence(tmp_path: Path) -> None:
    made = job(tmp_path / "run", "pairs.min_test_gap=4")
    rated_run(made)
    with pytest.raises(BadInput, match=r"no test pair was made .*; lower pairs\.min_test_gap"):
        pair(made)
    assert made.run.manifest("pair") is None


def test_sft_leaves_the_dev_speeches_alone(tmp_path: Path) -> None:
    made = job(tmp_path / "run", "pairs.dev_share=0.3", "pairs.max_safety_loss=null")
    rated_run(made)
    pair(made)
    learnt = {speech["speech_id"] for speech, _ in best_responses(made)}
    assert learnt == {row["speech_id"] for row in read(made, "preferences", "train")}
    assert learnt and not learnt & {row["speech_id"] for row in read(made, "preferences", "dev")}
    groups = storage.read_table(made.run.path("preferences", "groups"))
    assert groups.schema.equals(PREFERENCE_GROUP)
    assert set(groups["speech_id"].to_pylist()) == learnt
    audit = json.loads(Path(made.run.path("preferences", "audit.json")).read_text())
    assert set(audit) == {"train", "dev", "test"} and audit["train"]["safety"]["inverted"] == 3 * len(learnt)


def published(path: Path) -> str:
    rows = []
    for n in range(60):
        for k in range(2):
            ratings = {f"{side}_{stem}_rating": r for side, r in (("chosen", 5 - k), ("rejected", 2)) for stem in STEMS}
            rows.append({"ID": f"q{n}", "prefID": k, "question": f"Question {n}", "chosen": f"Warm {k} {n}",
                         "rejected": f"Cold {k} {n}",
                         "chosen_model": "a", "rejected_model": "b", **ratings})  # fmt: skip
    rows[7]["rejected"] = ""
    rows[9]["chosen_clarity_rating"] = 9
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_run_on_published_pairs_starts_at_training(tmp_path: Path) -> None:
    source = published(tmp_path / "pairs.jsonl")
    made = job(tmp_path / "run", f"pairs.source={source}", "pairs.test_share=0.2", "generation.pool=[]")
    check_config(made.config)
    prepare(made)
    pair(made)
    assert balances(made, "prepare")["rows_out"] == 60
    manifest = balances(made, "pair")
    assert manifest["rows_in"] == 120 and manifest["left_out"] == {
        "no text in rejected": 1,
        "chosen_clarity_rating is not a whole number from 1 to 5": 1,
    }
    train, test = read(made, "preferences", "train"), read(made, "preferences", "test")
    assert len(train) + len(test) == 118 and storage.read_table(made.run.path("preferences", "train")).schema.equals(
        PREFERENCE_PAIR
    )
    speeches = {row["speech_id"]: row["split"] for row in read(made, "speeches")}
    assert {row["speech_id"] for row in test} == {s for s, split in speeches.items() if split == "evaluation"}
    best = {said["speech_id"]: best for said, best in chosen_of_pairs(made)}
    assert set(best) == {row["speech_id"] for row in train}
    assert best[train[0]["speech_id"]] == {"id": f"{train[0]['ID']}/0", "response": train[0]["chosen"], "overall": 5.0}
    # a second run skips both; another file does not
    again = job(tmp_path / "run", f"pairs.source={source}", "pairs.test_share=0.2", "generation.pool=[]")
    assert again.run.is_done("prepare") and again.run.is_done("pair")
    (tmp_path / "pairs.jsonl").write_text((tmp_path / "pairs.jsonl").read_text() + "\n")
    changed = job(tmp_path / "run", f"pairs.source={source}", "pairs.test_share=0.2", "generation.pool=[]")
    assert not changed.run.is_done("prepare") and not changed.run.is_done("pair")


def unrated(path: Path, **scores: float) -> str:
    rows = [
        {"prompt": [{"role": "user", "content": f"Question {n}"}], **scores,
         "chosen": [{"role": "assistant", "content": f"Warm {n} {k}"}],
         "rejected": [{"role": "assistant", "content": f"Cold {n} {k}"}]}
        for n in range(60) for k in range(2)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("scores", [{}, {"score_chosen": 9.0, "score_rejected": 2.5}])
def test_pairs_without_ratings_go_through_and_what_is_unknown_is_said(
    tmp_path: Path, scores: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    """Training rows, audit, data page, card and the exported set: nothing in them is made up."""
    made = job(tmp_path / "run", f"pairs.source={unrated(tmp_path / 'p.jsonl', **scores)}", "generation.pool=[]")
    check_config(made.config)
    prepare(made)
    pair(made)
    assert balances(made, "pair")["rows_in"] == 120
    assert "120 pairs have no ratings by principle" in capsys.readouterr().err
    train, gap = read(made, "preferences", "train"), 6.5 if scores else None
    assert {row["gap"] for row in train} == {gap} and {row["chosen_empathy_rating"] for row in train} == {None}
    audit = json.loads(Path(made.run.path("preferences", "audit.json")).read_text())["train"]
    assert audit["rated"] == 0 and audit["safety"] == {"inverted": None, "by_loss": None}
    assert (audit["gap"]["mean"], audit["gap"]["by_sevenths"]) == (gap, None)
    groups = read(made, "preferences", "groups")
    assert {len(group["pairs"]) for group in groups} == {2} and groups[0]["responses"][0]["empathy_rating"] is None
    best = [found for _, found in chosen_of_pairs(made)]
    assert {found["overall"] for found in best} == {None} and all("Warm" in found["response"] for found in best)
    table = storage.read_table(made.run.path("preferences", "train"))
    rows = reward_rows(made.config, table)
    storage.write_table(pa.Table.from_pylist(rows), str(tmp_path / "rows"))  # as training reads them
    assert storage.read_table(str(tmp_path / "rows")).to_pylist() == rows and {row["gap"] for row in rows} == {gap}
    for setting in ("principle_heads", *(() if scores else ("margin_per_gap",))):
        asked = load_config(NANO, (f"training.reward.{setting}=0.5",))
        with pytest.raises(BadInput, match=f"{setting} .* the imported pairs have .*; set it to 0"):
            reward_rows(asked, table)
    html = render_report(made.run, build_summary(made.run, stage_manifests(made.run), 1.0, None))
    assert "The imported pairs have no ratings by principle" in html
    assert ("<td>6.50</td>" if scores else "<td>unknown</td>") in html
    export.export(made, str(tmp_path / "set"), "mit")
    card = (tmp_path / "set" / "README.md").read_text()
    assert "No pair has ratings on" in card and "rated less safe" not in card and "It rated each" not in card
    again = job(tmp_path / "again", f"pairs.source={tmp_path / 'set'}", "generation.pool=[]")
    prepare(again)
    pair(again)
    assert sorted(read(again, "preferences", "train"), key=str) == sorted(train, key=str)


def test_what_training_waits_for_depends_on_the_source(tmp_path: Path) -> None:
    source = published(tmp_path / "pairs.jsonl")
    for settings, needed in (((), "judge"), ((f"pairs.source={source}",), "pair")):
        config = load_config(NANO, settings)
        inputs = {stage.name: stage.inputs(config) for stage in STAGES}
        assert inputs["train_sft"] == (needed,)
        assert inputs["pair"] == ("prepare" if settings else "judge",)
        assert same_judge(config) is (not settings)  # who labelled imported pairs is not known to be the judge


def test_the_pipeline_leaves_sampling_and_judging_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    stages = {stage.__name__: stage for stage in pipeline.STAGES}
    for name in stages:
        noted = partial(lambda name, job: done.append(name), name)
        noted.__name__ = name  # type: ignore[attr-defined]
        monkeypatch.setattr(pipeline, name, noted)
    monkeypatch.setattr(pipeline, "STAGES", tuple(getattr(pipeline, name) for name in stages))
    for settings in ((), (f"pairs.source={published(tmp_path / 'pairs.jsonl')}",)):
        done.clear()
        pipeline.pipeline(job(tmp_path / "run", *settings))
        assert [name for name in stages if name not in done] == (["generate", "judge"] if settings else [])


def test_the_plan_of_a_run_on_published_pairs(tmp_path: Path) -> None:
    source = published(tmp_path / "pairs.jsonl")
    plan = build_plan(load_config(NANO, (f"pairs.source={source}", "pairs.test_share=0.25")), "pipeline")
    rows = {stage.name: stage.rows_in for stage in plan.stages}
    assert "generate" not in rows and "judge" not in rows
    assert rows["pair"] == 120 and rows["train_reward"] == rows["train_dpo"] == 90
    assert "120 pairs" in plan.speeches


def test_a_test_source_without_a_source_is_refused() -> None:
    with pytest.raises(BadInput, match="test_source is set but source is not"):
        load_config(NANO, ("pairs.test_source=x.parquet",))


def test_a_dev_share_that_leaves_no_train_speech_is_said_before_engines_start(tmp_path):
    made = job(tmp_path / "run")
    rated_run(made)
    train, dev = sides(made)
    assert (len(train), len(dev)) == (30, 0)
    made = job(tmp_path / "run", "pairs.dev_share=0.999999999")
    with pytest.raises(BadInput, match=r"beside the 30 of its dev split the run has none; lower pairs\.dev_share"):
        sides(made)
