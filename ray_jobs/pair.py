"""Preference pairs: train = every pair with overall gap >= pairs.min_gap, test = best against worst.

python -m ray_jobs.pair --config configs/nano.yaml --set pairs.min_gap=1.0
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.errors import BadInput
from psycho.job import Job, main
from psycho.preferences.pairs import pair_row, test_pair, train_pairs
from psycho.run import StageResult
from psycho.schema import PREFERENCE_PAIR
from ray_jobs.judge import responses_with_speech

Rows = list[dict[str, Any]]


def pair(job: Job) -> None:
    """Write `preferences/train/` and `preferences/test/`."""

    def body(partial: str) -> StageResult:
        train: Rows = []
        test: Rows = []
        left_out: Rows = []
        said, speeches = rated_speeches(job)
        for speech_id, rows in sorted(speeches.items()):
            if rows[0]["split"] == "train":
                pairs, dropped = train_pairs(rows, job.config.pairs)
                target = train
            else:
                best, dropped = test_pair(rows, job.config.pairs)
                pairs, target = ([best] if best else []), test
            target += [pair_row(said[speech_id], n, c, r) for n, (c, r) in enumerate(pairs)]
            left_out += dropped
        for name, rows in (("train", train), ("test", test)):
            if not rows:
                setting = "pairs.min_gap" if name == "train" else "pairs.min_test_gap"
                raise BadInput(f"no {name} pair was made of {len(speeches)} rated speeches; lower {setting}")
            storage.write_table(
                pa.Table.from_pylist(rows, schema=PREFERENCE_PAIR), storage.join(partial, "preferences", name)
            )
        return StageResult(
            rows_in=len(train) + len(test) + len(left_out),
            rows_out=len(train) + len(test),
            quarantine=left_out,
            extra={
                "train": len(train),
                "test": len(test),
                "left_out": Counter(row["reason"] for row in left_out),
            },
        )

    job.stage("pair", body)


def rated_speeches(job: Job) -> tuple[dict[str, dict[str, Any]], dict[str, Rows]]:
    """Client speeches by id, and each one's rated responses."""
    responses = {row["request_id"]: row for row in responses_with_speech(job).to_pylist()}
    said = {row["speech_id"]: row for row in storage.read_table(job.run.path("speeches")).to_pylist()}
    speeches: dict[str, Rows] = defaultdict(list)
    for rating in storage.read_table(job.run.path("ratings")).to_pylist():
        row = responses[rating["request_id"]]
        speeches[row["speech_id"]].append(rating | {"response": row["response"]})
    return said, speeches


if __name__ == "__main__":
    main("pair", pair, __doc__)
