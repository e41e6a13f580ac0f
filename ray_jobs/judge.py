"""Ratings: a judge LLM, or a panel of them, rates every response 1-5 on seven principles, evidence first.

python -m ray_jobs.judge --config configs/nano.yaml
python -m ray_jobs.judge --config configs/nano.yaml --set judge.mode=direct
python -m ray_jobs.judge --config configs/nano.yaml --calibrate ratings.csv

`--calibrate FILE` rates the responses of a file that holds human (or gold) ratings and says how far the configured
judge agrees with them: a table here, `evaluation/calibration.json` in the run, and a section of the report.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.config import JudgeConfig
from psycho.errors import UnfitJudge
from psycho.evaluation.calibration import calibration, calibration_table
from psycho.inference.batch import enough, run_batches
from psycho.inference.worker import EngineSpec
from psycho.job import Job, main
from psycho.judging.fitness import truth_gates, verdict
from psycho.judging.human import read_human_ratings
from psycho.judging.panel import join_panel, judge_report, sum_evidence
from psycho.judging.probes import HOW, is_probe, probe_gates, probe_rows
from psycho.judging.rows import JudgeBatch
from psycho.models import identity, resolve
from psycho.nano.truth import gold_ratings, judge_against_gold
from psycho.progress import Reporter
from psycho.quality import reasons, too_many_floored, too_many_left_out
from psycho.run import StageResult, content_key
from psycho.schema import RATING
from psycho.stages import CALIBRATION

Rows = list[dict[str, Any]]
_ENOUGH_HELD_OUT = 100  # ratings of evaluation speeches from which on these alone are held against the truth


def judge(job: Job) -> None:
    """Write `ratings/`, and find out whether the judge is fit to.

    Raises:
        UnfitJudge: it is not, and `judge.unfit` is stop.
    """

    def body(partial: str) -> StageResult:
        responses = responses_with_speech(job)
        asked, truth_is_known = responses, knows_truth(responses)
        if not truth_is_known:
            asked = pa.concat_tables([responses, _probe_table(job, responses.schema)])
        everything, not_rated, extra = rate_table(job, asked, partial)
        ratings = [row for row in everything if not is_probe(row)]
        left_out = [row for row in not_rated if not is_probe(row)]
        if truth_is_known:
            extra["fitness"] = fitness_by_truth(responses, ratings)
        else:
            extra["fitness"] = verdict(probe_gates([row for row in everything if is_probe(row)]), HOW)
        extra["floored"] = sum(bool(row["floored"]) for row in ratings)
        storage.write_table(pa.Table.from_pylist(ratings, schema=RATING), storage.join(partial, "ratings"))
        return StageResult(
            rows_in=responses.num_rows,
            rows_out=len(ratings),
            tokens=sum(report["output_tokens"] for report in extra["judges"]),
            quarantine=left_out,
            extra=extra,
            unusable=_unusable(job, responses.num_rows, left_out, extra),
        )

    job.stage("judge", body)
    require_fit(job, (job.run.manifest("judge") or {}).get("fitness") or {})


def require_fit(job: Job, fitness: Mapping[str, Any]) -> None:
    """Say that the judge is unfit, and stop where `judge.unfit` says so.

    Raises:
        UnfitJudge: the judge missed a gate, and `judge.unfit` is stop.
    """
    if fitness.get("fit") is not False:
        return
    said = f"the judge {job.config.judge.model} is unfit: {fitness['why']}"
    if job.config.judge.unfit == "stop":
        raise UnfitJudge(
            f"{said}; take another judge (judge.model), or set judge.unfit=warn to go on and see the machinery only"
        )
    job.progress.say(f"  [bold red]{said}[/bold red]; what follows shows the machinery only (judge.unfit is warn)")


def knows_truth(responses: pa.Table) -> bool:
    """True where every response answers a speech of the nano world."""
    asked = set(responses["question"].to_pylist())
    return bool(asked) and gold_ratings([(question, "") for question in asked]) is not None


def fitness_by_truth(responses: pa.Table, ratings: Rows) -> dict[str, Any]:
    """The judge's ratings held against the truth, on speeches that nothing was trained on where there are enough."""
    answered = {row["request_id"]: (row["question"], row["response"]) for row in responses.to_pylist()}
    held_out = [row for row in ratings if row["split"] == "evaluation"]
    rows = held_out if len(held_out) >= _ENOUGH_HELD_OUT else ratings
    known = gold_ratings([answered[row["request_id"]] for row in rows])
    if not rows or known is None:
        return verdict([], "no response was rated")
    where = "evaluation speeches" if rows is held_out else "speeches"
    how = f"{len(rows):,} of this run's own responses to {where}"
    return verdict(truth_gates(judge_against_gold(rows, known)), how)


def _probe_table(job: Job, schema: pa.Schema) -> pa.Table:
    """Planted pairs in the columns of the responses."""
    rows = [{name: row.get(name) for name in schema.names} for row in probe_rows(job.config.seed)]
    return pa.Table.from_pylist(rows, schema=schema)


def _unusable(job: Job, asked: int, left_out: Rows, extra: dict[str, Any]) -> str | None:
    quality = job.config.quality
    few = too_many_left_out("judge", len(left_out), asked, "ratings", quality.max_left_out_share, reasons(left_out))
    said = few or too_many_floored(extra["floored"], asked - len(left_out), quality.max_floored_share)
    if said and extra["fitness"]["fit"] is False:
        said += f"; and the judge is unfit: {extra['fitness']['why']}"
    return said


def rate_table(job: Job, responses: pa.Table, folder: str) -> tuple[Rows, Rows, dict[str, Any]]:
    """Rate responses with the configured judge or panel, answers kept below `folder`.

    Args:
        responses: rows of `schema.RESPONSE` with `question` and `history`, those of one speech together.

    Returns:
        Rating rows (`schema.RATING`), quarantine rows, and what the manifest says of the judges.
    """
    job.need_ray()
    config = job.config.judge
    members = config.members()
    judged: list[Rows] = []
    reports, failures = [], []
    with job.progress.stage("judge", responses.num_rows * len(members), "ratings") as reporter:
        for number, member in enumerate(members):
            answers = _ask_one(job, member, responses, storage.join(folder, f"answers-{number}"), reporter)
            rated = [row for row in answers if row["error"] is None]
            failed = [row for row in answers if row["error"] is not None]
            judged.append(rated)
            real, lost = ([row for row in rows if not is_probe(row)] for rows in (rated, failed))
            reports.append(judge_report(member, real, lost))
            failures.append([{"request_id": row["request_id"], "reason": row["error"]} for row in failed])
    if config.mode == "panel":
        ratings, left_out = join_panel(responses["request_id"].to_pylist(), judged, config)
    else:
        ratings, left_out = judged[0], failures[0]
    real, lost = ([row for row in rows if not is_probe(row)] for rows in (ratings, left_out))
    return ratings, left_out, _extra(config, real, lost, reports)


def _ask_one(job: Job, judge: JudgeConfig, responses: pa.Table, folder: str, reporter: Reporter) -> Rows:
    """One judge's answers to all responses, sorted by request."""
    inference = job.config.inference
    engine = judge.engine or inference.engine
    tables = run_batches(
        responses,
        folder,
        JudgeBatch,
        {
            "spec": EngineSpec(engine, job.config.seed, inference.env, job.verbose),
            "model": resolve(job.config, judge.model),
            "judge": judge,
            "reporter": reporter,
        },
        inference,
        judge.gpus_per_worker,
        on_resume=reporter.add,
        at_once=enough(engine),
        say=job.progress.say,
    )
    return pa.concat_tables(tables, promote_options="permissive").sort_by("request_id").to_pylist()


def _extra(config: JudgeConfig, ratings: Rows, left_out: Rows, reports: Rows) -> dict[str, Any]:
    counts = Counter(row["status"] for row in ratings)
    kinds = reports[0]["status"] if len(reports) == 1 else {}
    return {
        "mode": config.mode,
        "status": {"ok": 0, **kinds, **counts, "failed": len(left_out)},
        "judges": reports,
        "disagreement": sum(row["disagreement"] for row in ratings) / max(1, len(ratings)),
        "evidence": sum_evidence(reports),
    }


def responses_with_speech(job: Job) -> pa.Table:
    """Responses with the `question` they answer and its `history`, those of one speech together (prefix caching)."""
    speeches = {s["speech_id"]: s for s in storage.read_table(job.run.path("speeches")).to_pylist()}
    table = storage.read_table(job.run.path("responses"))
    asked = [speeches[speech_id] for speech_id in table["speech_id"].to_pylist()]
    for column in ("question", "history"):
        table = table.append_column(column, pa.array([speech.get(column) for speech in asked], pa.string()))
    return table.sort_by([("speech_id", "ascending"), ("request_id", "ascending")])


def calibrate(job: Job, file: str) -> None:
    """Compare the configured judge with the ratings in a file; write `evaluation/calibration.json` and print a table.

    Raises:
        BadInput: the file cannot be read or lacks a column.
    """
    human = read_human_ratings(file, job.config.seed)
    members = job.config.judge.members()
    key = content_key(human.digest, job.config.judge.model_dump(), [identity(job.config, m.model) for m in members])
    folder = job.run.path(".partial", f"calibrate-{key}")
    rated, left_out, extra = rate_table(job, human.responses, folder)
    names = [member.model for member in members]
    result = {
        "judge": names[0] if len(names) == 1 else f"{job.config.judge.aggregate} of {', '.join(names)}",
        **extra,
        "left_out": dict(Counter(row["reason"] for row in (*human.quarantine, *left_out))),
        **calibration(human.rows, rated, job.config.seed),
    }
    storage.write_text(job.run.path(*CALIBRATION), json.dumps(result, indent=2))
    lines = "".join(json.dumps(row) + "\n" for row in (*human.quarantine, *left_out))
    storage.write_text(job.run.path("quarantine", "calibrate.jsonl"), lines)
    storage.remove(folder)
    job.progress.console.print(calibration_table(result))
    job.progress.say(f"calibration: {job.run.path('evaluation', 'calibration.json')}")


if __name__ == "__main__":
    main("judge", judge, __doc__, calibrate)
