"""Online DPO from the DPO policy: sample with vLLM, score, pair, train, reload the engines, again.

python -m ray_jobs.train_online --config configs/nano.yaml --set online.rounds=2
"""

from __future__ import annotations

import json
from typing import Any

from psycho import storage
from psycho.errors import BadInput
from psycho.job import Job, main
from psycho.models import resolve
from psycho.preferences.build import split_of
from psycho.run import StageResult
from psycho.training.launch import launch, read_history
from psycho.training.online.engines import engines
from psycho.training.online.heldout import held_out_model
from psycho.training.online.rollout import Rollout
from psycho.training.stage import say_notes, write_card


def train_online(job: Job) -> None:
    """Write `models/online/` and, of every round, `online/samples/` and `online/pairs/`."""
    config = job.config
    online = config.online

    def body(partial: str) -> StageResult:
        job.need_ray()
        from psycho.training.online.rounds import OnlineJob, online_worker
        from psycho.training.online.state import RoundStore

        output, work = storage.join(partial, "models", "online"), storage.join(partial, "rounds")
        storage.remove(output)
        start = job.run.path("models", "dpo")
        # The other ranks wait in a collective while rank 0 asks the engines, and must not give up first.
        inference = config.inference
        first = max(online.round_timeout_s, inference.start_timeout_s + inference.batch_timeout_s)
        limit = max(config.training.collective_timeout_s, first + 60)
        training = config.training.model_copy(update={"collective_timeout_s": limit})
        reward = job.run.path("models", "reward") if online.rewarded else ""
        if online.heads:
            from psycho.training.online.heads import with_heads

            reward = with_heads(reward, storage.join(partial, "reward-with-heads"))
        judge = resolve(config, config.judge.model) if online.judged else ""
        train, dev = sides(job)
        gold = held_out_model(config, dev)
        sampled = min(online.speeches_per_round, len(train)) * online.samples_per_speech
        touched = 1 + bool(reward) + bool(judge)
        with (
            engines(config, start, reward, judge, job.verbose, gold) as workers,
            job.progress.stage("train_online", online.rounds * sampled * touched, "samples and scores") as reporter,
        ):
            workers.start(start)
            rollout = Rollout(workers, config, reporter)
            task = OnlineJob(config, training, start, work, output, train, dev, rollout)
            launch(online_worker, {"job": task}, training, storage.join(partial, "ray"))
        write_card(output, config, "online", start)
        evidence = storage.join(partial, "online")
        storage.remove(evidence)
        RoundStore(work).evidence(evidence)
        result = _result(output)
        result.extra.update(say_notes(job, "online", output))
        return result

    job.stage("train_online", body)


def sides(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train and dev speeches.

    Raises:
        BadInput: there is no train speech to sample answers to.
    """
    config = job.config
    found = storage.read_table(job.run.path("speeches")).to_pylist()
    train, dev = (
        [speech for speech in found if split_of(speech, config.pairs, config.seed) == name] for name in ("train", "dev")
    )
    if not train:
        raise BadInput(
            f"online training samples answers to train speeches, and beside the {len(dev):,} of its dev split the run "
            "has none; lower pairs.dev_share or give more speeches"
        )
    return train, dev


def _result(output: str) -> StageResult:
    rounds = json.loads(storage.read_text(storage.join(output, "rounds.json")) or "[]")
    sampled = [*rounds, *(report["dropped"] for report in rounds if "dropped" in report)]
    failed = sum(report["failed"] for report in sampled)
    samples = sum(report["samples"] for report in sampled)
    spent = [rounds[0].get("before", {}), *sampled] if rounds else []
    kinds = ("sampled_tokens", "judge_tokens", "dev_tokens", "gold_tokens")
    tokens = sum(row["tokens"] for row in read_history(output)) + sum(r.get(kind, 0) for r in spent for kind in kinds)
    return StageResult(
        rows_in=samples,
        rows_out=samples - failed,
        tokens=int(tokens),
        quarantine=[{"round": r["round"]} | row for r in sampled for row in r.pop("left_out")],
        extra={"rounds": rounds},
    )


if __name__ == "__main__":
    main("train_online", train_online, __doc__)
