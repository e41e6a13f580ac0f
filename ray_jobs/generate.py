"""Responses: each client speech goes to k models drawn at random from a pool of n, here through vLLM or remote.

python -m ray_jobs.generate --config configs/nano.yaml
"""

from __future__ import annotations

from collections import defaultdict

import pyarrow as pa
import pyarrow.compute as pc

from psycho import storage
from psycho.config import Config, ModelConfig
from psycho.inference.batch import collect, enough, run_batches, split_errors, unanswered
from psycho.inference.generate import ANSWER, GenerateBatch, Served, tally
from psycho.inference.models import engine_signature
from psycho.inference.remote import ask_remote, lost_cost
from psycho.inference.requests import draw_models, request_row
from psycho.inference.worker import EngineSpec
from psycho.job import Job, main
from psycho.models import resolve
from psycho.progress import Reporter
from psycho.quality import reasons, too_many_left_out
from psycho.run import StageResult
from psycho.schema import REQUEST, RESPONSE

_FILES = 32  # of the result: the loss of one costs a thirty-second


def generate(job: Job) -> None:
    """Write `responses/`."""

    def body(partial: str) -> StageResult:
        job.need_ray()
        requests = build_requests(job.config, storage.read_table(job.run.path("speeches")).to_pylist())
        folder = storage.join(partial, "answers")
        paid_before = keep_published(job, requests, folder)
        with job.progress.stage("generate", requests.num_rows, "responses") as reporter:
            found = requests.num_rows - unanswered(requests, folder).num_rows
            if found:
                reporter.add(found)
                job.progress.say(f"  generate: {found:,} of {requests.num_rows:,} answers are there from before")
            local(job, requests, folder, reporter)
            remote(job, requests, folder, reporter)
        tables = collect(requests, folder)
        answers = tally(pa.concat_tables(tables, promote_options="permissive")) if tables else {}
        responses, failed = split_errors(tables)
        limit = job.config.quality.max_left_out_share
        storage.write_table(responses.select(RESPONSE.names), storage.join(partial, "responses"), _FILES)
        return StageResult(
            rows_in=requests.num_rows,
            rows_out=responses.num_rows,
            tokens=sum(model["tokens"] for model in answers.get("by_model", {}).values()),
            cost=cost_so_far(folder) - paid_before,
            quarantine=failed,
            extra=answers,
            unusable=too_many_left_out("generate", len(failed), requests.num_rows, "responses", limit, reasons(failed)),
        )

    job.stage("generate", body)


def local(job: Job, requests: pa.Table, folder: str, reporter: Reporter) -> None:
    """The answers of models that run on this cluster, one engine after the other."""
    config, inference = job.config, job.config.inference
    for models in engine_groups(config):
        names = pa.array([model.name for model in models])
        engine = models[0].engine or inference.engine
        run_batches(
            requests.filter(pc.is_in(requests["model"], names)).sort_by("model"),
            folder,
            GenerateBatch,
            {
                "spec": EngineSpec(engine, config.seed, inference.env, job.verbose),
                "models": {model.name: _served(config, model) for model in models},
                "policy": config.generation.marks,
                "reporter": reporter,
            },
            inference,
            models[0].gpus_per_worker,
            at_once=enough(engine),
            say=job.progress.say,
        )


def _served(config: Config, model: ModelConfig) -> Served:
    sampling = model.sampling or config.generation.sampling
    return Served(resolve(config, model.model), sampling, model.price, model.template_variables)


def remote(job: Job, requests: pa.Table, folder: str, reporter: Reporter) -> None:
    """The answers of models behind an endpoint."""
    pool = job.config.generation.pool
    names = pa.array([model.name for model in pool if model.remote], pa.string())
    wanted = unanswered(requests.filter(pc.is_in(requests["model"], names)), folder)
    if wanted.num_rows:
        ask_remote(job.config.generation, wanted, folder, cost_so_far(folder, names.to_pylist()), reporter)


def cost_so_far(folder: str, models: list[str] | None = None) -> float:
    """What the answers on disk have cost, all or those of these models, and tries that left none."""
    tables = storage.read_finished(folder, ["model", "cost"])
    rows = [row for table in tables for row in table.to_pylist() if models is None or row["model"] in models]
    return lost_cost(folder) + sum(row["cost"] or 0.0 for row in rows)


def keep_published(job: Job, requests: pa.Table, folder: str) -> float:
    """Where a finished result lost some of its files, keep the rest: its rows are answers too.

    Returns:
        What those rows cost, which was booked when they were made.
    """
    kept = storage.join(folder, "kept", "part-0.parquet")
    manifest = job.run.manifest("generate")
    if not storage.exists(kept) and manifest is not None and manifest["key"] == job.run.key("generate"):
        rows = [table.cast(RESPONSE) for table in storage.read_finished(job.run.path("responses"))]
        if rows:
            table = pa.concat_tables(rows)
            table = table.append_column("spent_tokens", table["output_tokens"])  # of earlier tries nothing is kept
            table = table.append_column("error", pa.nulls(table.num_rows, pa.string())).cast(ANSWER)
            wanted = unanswered(requests, folder)["request_id"].combine_chunks()
            storage.write_rows(table.filter(pc.is_in(table["request_id"], wanted)), kept)
    tables = storage.read_finished(storage.join(folder, "kept"), ["cost"])
    return sum(cost or 0.0 for table in tables for cost in table["cost"].to_pylist())


def build_requests(config: Config, speeches: list[dict[str, str]]) -> pa.Table:
    """k requests a speech, ids and seeds included."""
    generation = config.generation
    common = generation.system_prompt
    prompts = {model.name: common if model.system_prompt is None else model.system_prompt for model in generation.pool}
    weights = {model.name: model.weight for model in generation.pool}
    rows = [
        request_row(speech, model, 0, config.seed, prompts[model])
        for speech in speeches
        for model in draw_models(speech["speech_id"], weights, generation.models_per_speech, config.seed)
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST)


def engine_groups(config: Config) -> list[list[ModelConfig]]:
    """Local models of the pool that can take turns in one engine, together."""
    groups: dict[tuple[str, str], list[ModelConfig]] = defaultdict(list)
    for model in config.generation.pool:
        if not model.remote:
            place = repr((model.engine, model.gpus_per_worker))
            groups[engine_signature(resolve(config, model.model)), place].append(model)
    return list(groups.values())


if __name__ == "__main__":
    main("generate", generate, __doc__)
