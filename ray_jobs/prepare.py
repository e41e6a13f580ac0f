"""Client speeches: read, clean, mask personal data, drop duplicates, name topics, split by speech.

python -m ray_jobs.prepare --config configs/nano.yaml
python -m ray_jobs.prepare --set speeches.source=speeches.csv --set speeches.text_column=text
python -m ray_jobs.prepare --set speeches.source=s3://bucket/sessions/ --set speeches.text_column=messages
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import Config, ModelConfig
from psycho.errors import BadInput, said_counts
from psycho.job import Job, main
from psycho.nano import world
from psycho.preferences.published import read_published
from psycho.rowfile import say_notes
from psycho.run import StageResult
from psycho.schema import CLIENT_SPEECH
from psycho.speeches.topics import coarse_counts
from psycho.stages import nano_among_people, starts_from_pairs

_WITHOUT_RAY = 16  # batches that are cleaned sooner than Ray starts


def prepare(job: Job) -> None:
    """Write `speeches/`."""

    def body(partial: str) -> StageResult:
        result = made(partial)
        if misplaced := nano_among_people(job.config):
            job.progress.say(f"  note: {misplaced}")
        return result

    def made(partial: str) -> StageResult:
        if starts_from_pairs(job.config):
            return _imported(job, partial)
        if job.config.speeches.source == "nano":
            return _nano(job, partial)
        labeller = topic_model(job.config)
        result = _read(job, partial)
        if labeller:
            result.extra["topics"], result.tokens = _label(job, partial, labeller, result.rows_out)
        return result

    job.stage("prepare", body)


def _imported(job: Job, partial: str) -> StageResult:
    """The client speeches of published pairs: they were cleaned and chosen by whoever made them."""
    found = read_published(job.config.pairs, job.config.seed)
    speeches = list(found.speeches.values())
    storage.write_table(pa.Table.from_pylist(speeches, schema=CLIENT_SPEECH), storage.join(partial, "speeches"))
    say_notes(found.notes, job.progress.say)
    return StageResult(rows_in=len(speeches), rows_out=len(speeches), extra=dict(found.notes))


def _nano(job: Job, partial: str) -> StageResult:
    """Speeches of the embedded world: clean by construction, their topics known."""
    config = job.config
    made = world.speeches(config.speeches.nano_train, config.speeches.evaluation, config.seed)
    rows = [row | {"cluster": row["speech_id"]} for row in made]
    storage.write_table(pa.Table.from_pylist(rows, schema=CLIENT_SPEECH), storage.join(partial, "speeches"))
    extra = {"topics": coarse_counts(row["topic"] for row in rows)}
    return StageResult(rows_in=len(rows), rows_out=len(rows), extra=extra)


def _read(job: Job, partial: str) -> StageResult:
    """Speeches of a source; a short one is cleaned here, a long one on all CPUs of the cluster."""
    from psycho.speeches.clean import Cleaned, clean_batch
    from psycho.speeches.parallel import clean_on_ray
    from psycho.speeches.prepare import Batches, prepare_speeches

    config, seed = job.config.speeches, job.config.seed

    def clean_all(batches: Batches) -> Iterator[Cleaned]:
        begin = list(islice(batches, _WITHOUT_RAY))
        if len(begin) < _WITHOUT_RAY:
            return (clean_batch(batch, config, seed) for batch in begin)
        job.need_ray()
        return clean_on_ray(chain(begin, batches), config, seed)

    def resumed(rows: int) -> None:
        job.progress.say(f"  prepare: {rows:,} rows were cleaned before")

    result = prepare_speeches(config, seed, partial, clean_all, resumed)
    if reasons := Counter(result.extra["left_out"]):
        job.progress.say(f"  left out {reasons.total():,} of {result.rows_in:,} rows: {said_counts(reasons)}")
    say_notes(result.extra, job.progress.say)
    return result


def topic_model(config: Config) -> ModelConfig | None:
    """The model that names topics, if any.

    Raises:
        BadInput: the pool has no model of that name.
    """
    wanted = config.speeches.topic_model
    if wanted is None:
        return None
    for model in config.generation.pool:
        if model.name == wanted:
            return model
    names = ", ".join(model.name for model in config.generation.pool) or "none"
    raise BadInput(f"speeches.topic_model {wanted} is no model of generation.pool; its models are {names}")


def _label(job: Job, partial: str, model: ModelConfig, total: int) -> tuple[dict[str, int], int]:
    """Fill in `topic`, shard by shard; count the coarse topics, and the tokens of the answers."""
    from psycho.inference.batch import enough, run_batches
    from psycho.inference.worker import EngineSpec
    from psycho.models import resolve
    from psycho.speeches.label import TopicBatch

    job.need_ray()
    inference, folder = job.config.inference, storage.join(partial, "speeches")
    engine = model.engine or inference.engine
    spec = EngineSpec(engine, job.config.seed, inference.env, job.verbose)
    topics: list[str] = []
    tokens = 0
    with job.progress.stage("topics", total, "speeches") as reporter:
        arguments: dict[str, Any] = {"spec": spec, "model": resolve(job.config, model.model), "reporter": reporter}
        for fs, path in list(storage.parquet_files(folder)):
            speeches, name = pq.read_table(path, filesystem=fs), PurePosixPath(path).name
            requests = speeches.select(["speech_id", "question"]).rename_columns(["request_id", "question"])
            answers = storage.join(partial, "answers", name)
            tables = run_batches(
                requests, answers, TopicBatch, arguments, inference, model.gpus_per_worker, at_once=enough(engine)
            )
            found = {row["request_id"]: row["topic"] for table in tables for row in table.to_pylist()}
            tokens += sum(sum(table["output_tokens"].to_pylist()) for table in tables)
            column = [found[speech_id] for speech_id in speeches["speech_id"].to_pylist()]
            place = speeches.column_names.index("topic")
            storage.write_rows(speeches.set_column(place, "topic", pa.array(column)), storage.join(folder, name))
            topics += column
    return coarse_counts(topics), tokens


if __name__ == "__main__":
    main("prepare", prepare, __doc__)
