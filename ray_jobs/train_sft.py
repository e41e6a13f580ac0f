"""Supervised fine-tuning of the base policy on each train speech's best response.

python -m ray_jobs.train_sft --config configs/nano.yaml
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from psycho import storage
from psycho.inference.requests import prompt
from psycho.job import Job, main
from psycho.models import resolve
from psycho.preferences.build import split_of
from psycho.principles import STEMS, overall
from psycho.run import StageResult
from psycho.stages import starts_from_pairs
from psycho.training.stage import train_stage
from ray_jobs.pair import rated_speeches


def train_sft(job: Job) -> None:
    """Write `models/sft/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        rows, unrated = [], 0
        for said, best in chosen_of_pairs(job) if starts_from_pairs(config) else best_responses(job):
            unrated += best["overall"] is None
            if best["overall"] is None or best["overall"] >= config.training.sft.min_overall:
                messages = prompt(said, config.generation.system_prompt)
                messages.append({"role": "assistant", "content": best["response"]})
                rows.append({"id": best["id"], "messages": json.dumps(messages, ensure_ascii=False)})
        if unrated:
            job.progress.say(
                f"  note: {unrated:,} chosen responses have no ratings; training.sft.min_overall was not asked of them"
            )
        return train_stage(
            job, "sft", "sft", resolve(config, config.policy), rows, config.training.sft, partial,
            "no response is rated high enough to learn from; lower training.sft.min_overall",
        )  # fmt: skip

    job.stage("train_sft", body)


def best_responses(job: Job) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each train speech with its best rated response."""
    said, speeches = rated_speeches(job)
    for speech_id, rated in sorted(speeches.items()):
        best = max(rated, key=lambda row: (row["overall"], row["request_id"]))
        if split_of(said[speech_id], job.config.pairs, job.config.seed) == "train":
            yield said[speech_id], best | {"id": best["request_id"]}


def chosen_of_pairs(job: Job) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The same where the run has pairs and no responses of its own: the best chosen response of each train speech."""
    best: dict[str, dict[str, Any]] = {}
    for pair in storage.read_table(job.run.path("preferences", "train")).to_pylist():
        ratings = {stem: pair[f"chosen_{stem}_rating"] for stem in STEMS}
        mean = None if None in ratings.values() else overall(ratings)
        held = best.get(pair["speech_id"])
        if held is None or (mean or 0.0) > (held["overall"] or 0.0):  # the first of those without ratings
            best[pair["speech_id"]] = pair | {"overall": mean}
    for pair in best.values():
        yield pair, {"id": f"{pair['ID']}/{pair['prefID']}", "response": pair["chosen"], "overall": pair["overall"]}


if __name__ == "__main__":
    main("train_sft", train_sft, __doc__)
