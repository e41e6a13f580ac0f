"""Ratings: a judge LLM rates every response 1-5 on seven principles, under a JSON grammar, evidence first.

python -m ray_jobs.judge --config configs/nano.yaml
"""

from __future__ import annotations

import pyarrow as pa

from psycho import storage
from psycho.inference.batch import run_batches, split_errors
from psycho.inference.worker import EngineSpec
from psycho.job import Job, main
from psycho.judging.judge import JudgeBatch
from psycho.models import resolve
from psycho.run import StageResult
from psycho.schema import RATING
from ray_jobs.nano import ensure_nano


def judge(job: Job) -> None:
    """Write `ratings/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        ensure_nano(job)
        job.need_ray()
        responses = responses_with_speech(job)
        inference = config.inference
        spec = EngineSpec(config.judge.engine or inference.engine, config.seed, inference.env, job.verbose)
        with job.progress.stage("judge", responses.num_rows, "ratings") as reporter:
            tables = run_batches(
                responses,
                storage.join(partial, "answers"),
                JudgeBatch,
                {
                    "spec": spec,
                    "model": resolve(config, config.judge.model),
                    "judge": config.judge,
                    "reporter": reporter,
                },
                inference,
                config.judge.gpus_per_worker,
                reporter.add,
            )
        ratings, failed = split_errors(tables)
        storage.write_table(ratings.select(RATING.names), storage.join(partial, "ratings"))
        return StageResult(
            rows_in=responses.num_rows,
            rows_out=ratings.num_rows,
            tokens=sum(ratings["output_tokens"].to_pylist()),
            quarantine=failed,
        )

    job.stage("judge", body)


def responses_with_speech(job: Job) -> pa.Table:
    """Responses with the `question` they answer, those of one speech together (prefix caching)."""
    questions = {s["speech_id"]: s["question"] for s in storage.read_table(job.run.path("speeches")).to_pylist()}
    table = storage.read_table(job.run.path("responses"))
    speeches = [questions[speech_id] for speech_id in table["speech_id"].to_pylist()]
    table = table.append_column("question", pa.array(speeches, pa.string()))
    return table.sort_by([("speech_id", "ascending"), ("request_id", "ascending")])


if __name__ == "__main__":
    main("judge", judge, __doc__)
