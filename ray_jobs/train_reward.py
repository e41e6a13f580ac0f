"""The reward model on the train pairs: Bradley-Terry, or Plackett-Luce on the rankings that a speech's pairs make up.

python -m ray_jobs.train_reward --config configs/nano.yaml
"""

from __future__ import annotations

from psycho import storage
from psycho.job import Job, main
from psycho.models import resolve
from psycho.run import StageResult
from psycho.training.stage import dev_rows, reward_rows, train_stage


def train_reward(job: Job) -> None:
    """Write `models/reward/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        settings = config.training.reward
        start = config.policy if settings.init == "policy" else settings.init
        rows = reward_rows(config, storage.read_table(job.run.path("preferences", "train")))
        dev = dev_rows(job, reward_rows)
        return train_stage(job, "reward", "reward", resolve(config, start), rows, settings, partial, dev=dev)

    job.stage("train_reward", body)


if __name__ == "__main__":
    main("train_reward", train_reward, __doc__)
