"""Responses: each client speech goes to k models drawn at random from a pool of n, through vLLM on Ray Data.

python -m ray_jobs.generate --config configs/nano.yaml
"""

from __future__ import annotations

from collections import defaultdict

import pyarrow as pa

from psycho import storage
from psycho.config import Config, ModelConfig
from psycho.inference.batch import run_batches, split_errors
from psycho.inference.generate import GenerateBatch
from psycho.inference.models import engine_signature
from psycho.inference.requests import draw_models, request_row
from psycho.inference.worker import EngineSpec
from psycho.job import Job, main
from psycho.models import resolve
from psycho.run import StageResult
from psycho.schema import REQUEST, RESPONSE
from ray_jobs.nano import ensure_nano


def generate(job: Job) -> None:
    """Write `responses/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        ensure_nano(job)
        job.need_ray()
        speeches = storage.read_table(job.run.path("speeches")).to_pylist()
        requests = build_requests(config, speeches)
        tables = []
        with job.progress.stage("generate", requests.num_rows, "responses") as reporter:
            for number, models in enumerate(engine_groups(config)):
                names = [model.name for model in models]
                mine = [index for index, name in enumerate(requests["model"].to_pylist()) if name in names]
                inference = config.inference
                spec = EngineSpec(models[0].engine or inference.engine, config.seed, inference.env, job.verbose)
                tables += run_batches(
                    requests.take(mine).sort_by([("model", "ascending"), ("request_id", "ascending")]),
                    storage.join(partial, "answers", str(number)),
                    GenerateBatch,
                    {
                        "spec": spec,
                        "models": {model.name: resolve(config, model.model) for model in models},
                        "sampling": config.generation.sampling,
                        "reporter": reporter,
                    },
                    inference,
                    models[0].gpus_per_worker,
                    reporter.add,
                )
        responses, failed = split_errors(tables)
        storage.write_table(responses.select(RESPONSE.names), storage.join(partial, "responses"))
        return StageResult(
            rows_in=requests.num_rows,
            rows_out=responses.num_rows,
            tokens=sum(responses["output_tokens"].to_pylist()),
            quarantine=failed,
        )

    job.stage("generate", body)


def build_requests(config: Config, speeches: list[dict[str, str]]) -> pa.Table:
    """k requests a speech, ids and seeds included."""
    generation = config.generation
    names = [model.name for model in generation.pool]
    rows = [
        request_row(speech, model, 0, config.seed, generation.system_prompt)
        for speech in speeches
        for model in draw_models(speech["speech_id"], names, generation.models_per_speech, config.seed)
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST)


def engine_groups(config: Config) -> list[list[ModelConfig]]:
    """Models of the pool that can take turns in one engine, together."""
    groups: dict[tuple[str, str], list[ModelConfig]] = defaultdict(list)
    for model in config.generation.pool:
        groups[engine_signature(resolve(config, model.model)), repr((model.engine, model.gpus_per_worker))].append(
            model
        )
    return list(groups.values())


if __name__ == "__main__":
    main("generate", generate, __doc__)
