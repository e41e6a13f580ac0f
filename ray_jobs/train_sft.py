"""Supervised fine-tuning of the base policy on each train speech's best response.

python -m ray_jobs.train_sft --config configs/nano.yaml
"""

from __future__ import annotations

import json

from psycho.inference.requests import prompt
from psycho.job import Job, main
from psycho.models import resolve
from psycho.run import StageResult
from psycho.training.stage import train_stage
from ray_jobs.nano import ensure_nano
from ray_jobs.pair import rated_speeches


def train_sft(job: Job) -> None:
    """Write `models/sft/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        ensure_nano(job)
        said, speeches = rated_speeches(job)
        rows = []
        for speech_id, rated in sorted(speeches.items()):
            best = max(rated, key=lambda row: (row["overall"], row["request_id"]))
            if best["split"] == "train" and best["overall"] >= config.training.sft.min_overall:
                messages = prompt(said[speech_id], config.generation.system_prompt)
                messages.append({"role": "assistant", "content": best["response"]})
                rows.append({"id": best["request_id"], "messages": json.dumps(messages, ensure_ascii=False)})
        return train_stage(
            job, "sft", "sft", resolve(config, config.policy), rows, config.training.sft, partial,
            "no response is rated high enough to learn from; lower training.sft.min_overall",
        )  # fmt: skip

    job.stage("train_sft", body)


if __name__ == "__main__":
    main("train_sft", train_sft, __doc__)
