"""A training stage of the run: rows to Parquet, the loop on Ray Train, a model folder, counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.config import Config, LoopConfig, TrainingConfig
from psycho.errors import BadInput
from psycho.inference.models import fingerprint
from psycho.inference.requests import prompt
from psycho.job import Job
from psycho.principles import STEMS
from psycho.run import StageResult, content_key
from psycho.training.launch import TrainJob, read_history, train

Row = Mapping[str, Any]


def reward_rows(config: Config, pairs: pa.Table) -> list[dict[str, Any]]:
    """Rows of the reward model: as `preference_rows`, with the principles' ratings where it has heads for them.

    Raises:
        BadInput: the reward model is to learn ratings or margins, and no pair has any.
    """
    rows, reward = preference_rows(config, pairs), config.training.reward
    if rows and reward.margin_per_gap and all(row["gap"] is None for row in rows):
        raise BadInput(
            "training.reward.margin_per_gap asks for a margin by the pairs' gaps, and the imported pairs have neither "
            "ratings nor scores to tell any; set it to 0"
        )
    if not reward.principle_heads:
        return rows
    rated = pairs.num_rows - pairs[f"chosen_{STEMS[0]}_rating"].null_count
    if pairs.num_rows and not rated:
        raise BadInput(
            "training.reward.principle_heads learns ratings by principle, and the imported pairs have none; set it to 0"
        )
    for row, own in zip(rows, pairs.to_pylist(), strict=True):
        for side in ("chosen", "rejected"):
            ratings = [own.get(f"{side}_{stem}_rating") for stem in STEMS]
            row[f"{side}_ratings"] = [math.nan if value is None else float(value) for value in ratings]
    return rows


def preference_rows(config: Config, pairs: pa.Table) -> list[dict[str, Any]]:
    """Rows of preference training: the policy's prompt as messages, chosen, rejected."""
    return [
        {
            "id": f"{row['ID']}/{row['prefID']}",
            "messages": json.dumps(prompt(row, config.generation.system_prompt), ensure_ascii=False),
            "chosen": row["chosen"],
            "rejected": row["rejected"],
            "gap": row["gap"],
        }
        for row in pairs.select(["ID", "prefID", "question", "chosen", "rejected", "history", "gap"]).to_pylist()
    ]


def train_stage(
    job: Job,
    kind: str,
    name: str,
    start: str,
    rows: Sequence[Row],
    settings: LoopConfig,
    partial: str,
    if_empty: str = "no pair to train on; lower pairs.min_gap",
    dev: Sequence[Row] = (),
) -> StageResult:
    """Train `models/<name>` below `partial` and count what went in; `dev` rows choose the weights that are kept."""
    if not rows:
        raise BadInput(if_empty)
    job.need_ray()
    data, output = storage.join(partial, "data", name), storage.join(partial, "models", name)
    storage.remove(output)
    storage.write_table(pa.Table.from_pylist(list(rows)), data)
    references = job.run.path("references", content_key(fingerprint(start), *_arithmetic(job.config.training)))
    dev_data = storage.join(partial, "data", f"{name}-dev") if dev else None
    if dev_data:
        storage.write_table(pa.Table.from_pylist(list(dev)), dev_data)
    work = TrainJob(kind, start, data, output, settings, job.config.seed, references=references, dev=dev_data)
    with job.progress.stage(f"train_{name}", len(rows) * settings.epochs, "examples") as reporter:
        train([work], job.config.training, reporter, storage.join(partial, "ray"))
    storage.remove(data)
    if dev_data:
        storage.remove(dev_data)
    write_card(output, job.config, name, start)
    result = finish(output, rows)
    result.extra.update(say_notes(job, name, output))
    return result


def _arithmetic(training: TrainingConfig) -> list[str]:
    """What log-probabilities of one model depend on."""
    quantize = training.lora.quantize if training.lora else None
    return [training.precision, *([quantize] if quantize else [])]


def say_notes(job: Job, name: str, output: str) -> dict[str, list[str]]:
    """Tell what the training left for the user to hear, once; for the manifest, empty where there is nothing."""
    file = storage.join(output, "notes.json")
    notes = json.loads(storage.read_text(file) or "[]")
    storage.remove(file)
    for note in notes:
        job.progress.say(f"  train_{name}: {note}")
    return {"notes": notes} if notes else {}


def dev_rows(job: Job, rows_of: Callable[[Config, pa.Table], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The dev pairs to choose the best weights by; none where the last are kept.

    Raises:
        BadInput: `training.keep` is best and no dev pair was made.
    """
    if job.config.training.keep == "last":
        return []
    folder = job.run.path("preferences", "dev")
    found = rows_of(job.config, storage.read_table(folder)) if any(storage.parquet_files(folder)) else []
    if not found:
        raise BadInput(
            "training.keep is best and there is no dev pair to choose by; raise pairs.dev_share or set "
            "training.keep=last"
        )
    return found


def finish(output: str, rows: Sequence[Row]) -> StageResult:
    """Counts of a finished training: what was too long is quarantined by id."""
    too_long = json.loads(storage.read_text(storage.join(output, "too_long.json")) or "[]")
    storage.remove(storage.join(output, "too_long.json"))
    quarantine = [{"id": rows[index]["id"], "reason": "over training.max_length"} for index in too_long]
    history = read_history(output)
    last = history[-max(1, len(history) // 10) :]
    common = [key for key in (last[0] if last else {}) if all(key in row for row in last)]
    means = {key: sum(row[key] for row in last) / len(last) for key in common}
    return StageResult(
        rows_in=len(rows),
        rows_out=len(rows) - len(quarantine),
        tokens=int(sum(row["tokens"] for row in history)),
        quarantine=quarantine,
        extra={
            "steps": len(history),
            "final": {k: round(v, 5) for k, v in means.items() if k not in ("step", "lr")},
        },
    )


def write_card(folder: str, config: Config, name: str, start: str) -> None:
    """A model card beside the weights: what it is, what it came from, what it must not be used for."""
    card = f"""---
library_name: transformers
tags: [counselling, preference-learning]
---
# {config.name}: {name}

Trained by psycho (run `{config.name}`, seed {config.seed}) from `{Path(start).name}`.
{"A reward model: one logit, higher is preferred." if name == "reward" else "A counselling policy."}

Drafts for therapists to review. Not for use by clients alone, and no substitute for care in a crisis.
"""
    storage.write_text(storage.join(folder, "README.md"), card)
