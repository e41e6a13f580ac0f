"""Offline DPO on the train pairs, from the base policy or from SFT.

python -m ray_jobs.train_dpo --config configs/nano.yaml --set training.dpo.beta=0.1
"""

from __future__ import annotations

from psycho import storage
from psycho.job import Job, main
from psycho.models import resolve
from psycho.run import StageResult
from psycho.training.stage import dev_rows, preference_rows, train_stage


def train_dpo(job: Job) -> None:
    """Write `models/dpo/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        start = resolve(config, config.policy)
        if config.training.dpo.init == "sft":
            start = job.run.path("models", "sft")
        rows = preference_rows(config, storage.read_table(job.run.path("preferences", "train")))
        dev = dev_rows(job, preference_rows)
        return train_stage(job, "dpo", "dpo", start, rows, config.training.dpo, partial, dev=dev)

    job.stage("train_dpo", body)


if __name__ == "__main__":
    main("train_dpo", train_dpo, __doc__)
