"""Preference pairs: train = every pair with overall gap >= pairs.min_gap (or a strategy), test = best against worst.

    python -m ray_jobs.pair --config configs/nano.yaml --set pairs.min_gap=1.0
    python -m ray_jobs.pair --set pairs.strategy=best_random --set pairs.balance_length=true
    python -m ray_jobs.pipeline --set pairs.source=pairs.parquet     # published pairs: the run starts at training

`preferences/` then holds train, test (and dev, where pairs.dev_share asks for it), the same train pairs as groups of K
responses, and `audit.json`, what the pairs would teach.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.errors import said_counts
from psycho.evaluation.metrics import clustered_rate
from psycho.job import Job, main
from psycho.preferences.audit import audit_pairs
from psycho.preferences.build import Preferences, build_pairs, groups, import_pairs
from psycho.preferences.published import DUPLICATE, read_published
from psycho.quality import reasons, too_many_left_out
from psycho.run import StageResult
from psycho.schema import PREFERENCE_GROUP, PREFERENCE_PAIR
from psycho.stages import starts_from_pairs
from ray_jobs.judge import responses_with_speech

Rows = list[dict[str, Any]]


def pair(job: Job) -> None:
    """Write `preferences/`."""

    def body(partial: str) -> StageResult:
        found = imported_pairs(job) if starts_from_pairs(job.config) else own_pairs(job)
        folder = storage.join(partial, "preferences")
        for name, rows in found.splits.items():
            storage.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_PAIR), storage.join(folder, name))
        grouped = pa.Table.from_pylist(groups(found.splits["train"]), schema=PREFERENCE_GROUP)
        storage.write_table(grouped, storage.join(folder, "groups"))
        limit = job.config.quality.max_left_out_share
        audit = audit_pairs(found.splits, clustered_rate, job.config.seed)
        say_pairs(job, found, audit)
        storage.write_text(storage.join(folder, "audit.json"), json.dumps(audit, indent=2))
        return StageResult(
            rows_in=found.kept + len(found.left_out),
            rows_out=found.kept,
            quarantine=found.left_out,
            extra=found.counts,
            unusable=too_many_left_out(
                "pair", len(found.defective), found.entries, found.what, limit, reasons(found.defective)
            ),
        )

    job.stage("pair", body)


def say_pairs(job: Job, found: Preferences, audit: Mapping[str, Any]) -> None:
    """Tell why candidates were left out, and what imported pairs do not tell."""
    if found.left_out:
        job.progress.say(f"  left out {len(found.left_out):,}: {said_counts(found.counts['left_out'])}")
    if unrated := sum(split["pairs"] - split["rated"] for split in audit.values()):
        job.progress.say(
            f"  note: {unrated:,} pairs have no ratings by principle; for them safety is no constraint, and the gap is "
            "that of the set's own scores or unknown"
        )


def own_pairs(job: Job) -> Preferences:
    """Pairs of the run's own rated responses."""
    said, rated = rated_speeches(job)
    return build_pairs(said, rated, job.config.pairs, job.config.seed)


def imported_pairs(job: Job) -> Preferences:
    """Pairs of `pairs.source` within the run's constraints; bad rows are left out with their reason."""
    published = read_published(job.config.pairs, job.config.seed)
    said = {row["speech_id"]: row for row in storage.read_table(job.run.path("speeches")).to_pylist()}
    found = import_pairs(published.pairs, said, job.config.pairs, job.config.seed)
    found.left_out += published.quarantine
    found.defective = [row for row in published.quarantine if row["reason"] != DUPLICATE]
    found.entries, found.what = len(published.pairs) + len(published.quarantine), "imported rows"
    return found


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
