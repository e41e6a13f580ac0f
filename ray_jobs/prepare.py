"""Client speeches: read, clean, drop exact duplicates, split by speech.

python -m ray_jobs.prepare --config configs/nano.yaml
python -m ray_jobs.prepare --set speeches.source=speeches.csv --set speeches.text_column=text
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.job import Job, main
from psycho.nano import build
from psycho.preferences.published import read_published
from psycho.run import StageResult
from psycho.schema import CLIENT_SPEECH
from psycho.speeches.clean import clean_speeches, split_speeches
from psycho.speeches.read import read_speeches
from psycho.stages import starts_from_pairs


def prepare(job: Job) -> None:
    """Write `speeches/`."""
    config = job.config.speeches

    def body(partial: str) -> StageResult:
        quarantine: list[dict[str, Any]] = []
        if starts_from_pairs(job.config):
            return _imported(job, partial)
        if config.source == "nano":
            speeches = build.speeches(job.config.nano, config.nano_train, config.evaluation, job.config.seed)
            rows = len(speeches)
        else:
            kept, quarantine, rows = clean_speeches(read_speeches(config), config)
            speeches = split_speeches(kept, config, job.config.seed)
        storage.write_table(pa.Table.from_pylist(speeches, schema=CLIENT_SPEECH), storage.join(partial, "speeches"))
        return StageResult(rows_in=rows, rows_out=len(speeches), quarantine=quarantine)

    job.stage("prepare", body)


def _imported(job: Job, partial: str) -> StageResult:
    """The client speeches of published pairs: they were cleaned and chosen by whoever made them."""
    speeches = list(read_published(job.config.pairs, job.config.seed).speeches.values())
    storage.write_table(pa.Table.from_pylist(speeches, schema=CLIENT_SPEECH), storage.join(partial, "speeches"))
    return StageResult(rows_in=len(speeches), rows_out=len(speeches))


if __name__ == "__main__":
    main("prepare", prepare, __doc__)
