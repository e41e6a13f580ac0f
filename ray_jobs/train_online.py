"""Online DPO from the DPO policy: sample with vLLM, score, best against worst, train, reload, again.

python -m ray_jobs.train_online --config configs/nano.yaml --set online.rounds=2
"""

from __future__ import annotations

import json
from pathlib import Path

from psycho import storage
from psycho.inference.models import cache_root
from psycho.inference.pool import WorkerPool
from psycho.job import Job, main
from psycho.models import resolve
from psycho.preferences.build import split_of
from psycho.run import StageResult
from psycho.training.launch import launch, read_history
from psycho.training.online import Rollout, online_worker
from psycho.training.stage import write_card
from ray_jobs.nano import ensure_nano


def train_online(job: Job) -> None:
    """Write `models/online/`."""
    config = job.config
    online = config.online

    def body(partial: str) -> StageResult:
        ensure_nano(job)
        job.need_ray()
        output, work = storage.join(partial, "models", "online"), storage.join(partial, "rounds")
        for folder in (output, work):
            storage.remove(folder)
            Path(folder).parent.mkdir(parents=True, exist_ok=True)
        start = storage.local_copy(job.run.path("models", "dpo"), cache_root() / "models")
        # The other ranks wait in a collective while rank 0 has a round sampled and scored.
        limit = max(config.training.collective_timeout_s, online.round_timeout_s)
        training = config.training.model_copy(update={"collective_timeout_s": limit})
        judged = online.scorer == "judge"
        scorer = resolve(config, config.judge.model)
        if not judged:
            scorer = storage.local_copy(job.run.path("models", "reward"), cache_root() / "models")
        found = storage.read_table(job.run.path("speeches")).to_pylist()
        speeches = [s for s in found if split_of(s, config.pairs, config.seed) == "train"]
        sampled = min(online.speeches_per_round, len(speeches)) * online.samples_per_speech
        with (
            WorkerPool(config.inference, config.seed, config.judge if judged else None, job.verbose) as pool,
            job.progress.stage("train_online", online.rounds * sampled * 2, "samples and scores") as reporter,
        ):
            launch(
                online_worker,
                {
                    "training": training,
                    "online": online,
                    "seed": config.seed,
                    "policy": start,
                    "work": work,
                    "output": output,
                    "speeches": speeches,
                    "rollout": Rollout(pool, config, config.judge, scorer, reporter),
                },
                training,
                storage.join(partial, "ray"),
            )
        rounds = json.loads(storage.read_text(storage.join(output, "rounds.json")) or "[]")
        write_card(output, config, "online", start)
        failed = sum(report["failed"] for report in rounds)
        samples = sum(report["samples"] for report in rounds)
        return StageResult(
            rows_in=samples,
            rows_out=samples - failed,
            tokens=int(sum(row["tokens"] for row in read_history(output)) + sum(r["sampled_tokens"] for r in rounds)),
            quarantine=[{"round": r["round"], "reason": "no score"} for r in rounds for _ in range(r["failed"])],
            extra={"rounds": rounds},
        )

    job.stage("train_online", body)


if __name__ == "__main__":
    main("train_online", train_online, __doc__)
