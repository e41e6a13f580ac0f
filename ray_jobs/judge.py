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
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.config import JudgeConfig
from psycho.evaluation.calibration import calibration, calibration_table
from psycho.inference.batch import enough, run_batches
from psycho.inference.worker import EngineSpec
from psycho.job import Job, main
from psycho.judging.human import read_human_ratings
from psycho.judging.panel import join_panel, judge_report, sum_evidence
from psycho.judging.rows import JudgeBatch
from psycho.models import identity, resolve
from psycho.progress import Reporter
from psycho.quality import reasons, too_many_floored, too_many_left_out
from psycho.run import StageResult, content_key
from psycho.schema import RATING
from psycho.stages import CALIBRATION
from ray_jobs.nano import ensure_nano

Rows = list[dict[str, Any]]


def judge(job: Job) -> None:
    """Write `ratings/`."""

    def body(partial: str) -> StageResult:
        ensure_nano(job)
        responses = responses_with_speech(job)
        ratings, left_out, extra = rate_table(job, responses, partial)
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


def _unusable(job: Job, asked: int, left_out: Rows, extra: dict[str, Any]) -> str | None:
    quality = job.config.quality
    few = too_many_left_out("judge", len(left_out), asked, "ratings", quality.max_left_out_share, reasons(left_out))
    return few or too_many_floored(extra["floored"], asked - len(left_out), quality.max_floored_share)


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
            reports.append(judge_report(member, rated, failed))
            failures.append([{"request_id": row["request_id"], "reason": row["error"]} for row in failed])
    if config.mode == "panel":
        ratings, left_out = join_panel(responses["request_id"].to_pylist(), judged, config)
    else:
        ratings, left_out = judged[0], failures[0]
    return ratings, left_out, _extra(config, ratings, left_out, reports)


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
    ensure_nano(job)
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
