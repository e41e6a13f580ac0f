"""Start a training on Ray Train: workers, process group, timeouts; the loop itself is in `loop.py`.

Several trainings may share one group of workers, one after the other: starting a group costs more than training a
small model.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from psycho import secrets, storage
from psycho.cluster import AUTOSCALING, OWN_RAY
from psycho.config import LoopConfig, TrainingConfig
from psycho.errors import BadInput, StageFailed
from psycho.failures import explain
from psycho.progress import Reporter
from psycho.waiting import wait_for

HISTORY = "training.jsonl"  # beside a model, written last: with it the folder is whole
_LOST_CONNECTION = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")


@dataclass(frozen=True)
class TrainJob:
    """One training: rows in `data` (Parquet folder), from `model`, to `output` (a folder that does not exist yet).

    All of them may be on an object store.
    """

    kind: str
    model: str
    data: str
    output: str
    settings: LoopConfig
    seed: int
    shuffle: bool = True
    overrides: dict[str, Any] = field(default_factory=dict)  # of the training section
    name: str = ""
    references: str | None = None  # folder of stored reference log-probabilities
    dev: str | None = None  # rows as `data`, to keep the best weights by


def train(jobs: Sequence[TrainJob], training: TrainingConfig, reporter: Reporter | None, storage_path: str) -> None:
    """Run trainings one after the other in one worker group.

    Raises:
        StageFailed: a worker failed; the first line of its error is kept.
        BadInput: the cluster cannot give the workers that the configuration asks for.
    """
    launch(
        _train_worker,
        {"jobs": list(jobs), "training": training, "reporter": reporter},
        training,
        storage_path,
    )


def launch(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    training: TrainingConfig,
    storage_path: str,
) -> None:
    """Run `worker(config)` on every rank of a Ray Train group and wait for all."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    resources = {"CPU": training.cpus_per_worker}
    if training.gpus_per_worker:
        resources["GPU"] = training.gpus_per_worker
    missing = [
        f"{amount * training.workers:g} {name}"
        for name, amount in resources.items()
        if ray.cluster_resources().get(name, 0) < amount * training.workers
    ]
    if missing and not _autoscales():
        raise BadInput(
            f"training asks for {' and '.join(missing)} and the cluster has "
            f"{ {name: ray.cluster_resources().get(name, 0) for name in resources} }; lower training.workers, or "
            "set cluster.autoscaling=true where nodes come when they are asked for"
        )
    trainer = _trainer_class()(
        worker,
        train_loop_config=config,
        torch_config=TorchConfig(
            backend="gloo" if training.device == "cpu" else "nccl",
            timeout_s=int(training.collective_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=training.workers,
            use_gpu=training.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=storage_path,
            # Without the second limit (Ray Train V2) it asks for workers that do not come again and again, for ever.
            failure_config=FailureConfig(max_failures=training.max_failures, controller_failure_limit=0),  # type: ignore[call-arg]
            worker_runtime_env={"env_vars": _environment(training)},
        ),
    )
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(training.start_timeout_s)
    try:
        # Its own limits are the start of the workers and each collective; training as such takes as long as it takes.
        wait_for(trainer.fit, progress=lambda: 0, what="training", start_s=float("inf"), step_s=float("inf"))
    except Exception as error:
        models = ", ".join(dict.fromkeys(job.model for job in config.get("jobs", ()))) or "the policy"
        for cause in (*_failures(error), error):
            sentence = explain(cause)
            if sentence:
                raise BadInput(f"training of {models}: {sentence}") from error
        raise StageFailed(f"training of {models} failed: {_cause(error)}") from error
    finally:
        storage.remove(storage_path)


def read_history(folder: str) -> list[dict[str, float]]:
    """The statistics that a training left beside its model."""
    text = storage.read_text(storage.join(folder, HISTORY)) or ""
    return [json.loads(line) for line in text.splitlines()]


def read_rows(folder: str) -> list[dict[str, Any]]:
    """All rows of a Parquet folder, in order of file and row."""
    return [row for fs, path in storage.parquet_files(folder) for row in pq.read_table(path, filesystem=fs).to_pylist()]


def _train_worker(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    from psycho.training.checkpoint import best_folder
    from psycho.training.loop import Trainer, setup_worker, write_history, write_notes

    training: TrainingConfig = config["training"]
    reporter: Reporter | None = config["reporter"]
    setup_worker(training)
    for job in config["jobs"]:
        if _finished(job):  # before a worker was lost and the group started again
            continue
        own = training.model_copy(update=job.overrides)
        trainer = Trainer(job.kind, job.model, job.settings, own, job.seed)
        groups, too_long = trainer.groups(read_rows(job.data))

        def on_step(rows: int, tokens: int, statistics: dict[str, float], name: str = job.name) -> None:
            if reporter and trainer.rank == 0:  # noqa: B023 - used only while this job runs
                reporter.add(rows, tokens, f"{name} loss {statistics['loss']:.3f}".strip())

        if reporter and trainer.rank == 0 and trainer.notes:
            reporter.add(0, 0, "; ".join(trainer.notes))
        history = []
        checkpoints = f"{job.output}.checkpoints"
        dev = trainer.groups(read_rows(job.dev))[0] if job.dev else []
        if groups:
            history = trainer.fit(groups, job.seed, on_step, job.shuffle, job.references, checkpoints, dev)
        # By what all ranks know, not by what lies there: the first rank moves it while the others may still look.
        aside = storage.aside(job.output)
        if not (groups and dev):
            trainer.save(aside)
        if trainer.rank == 0:
            if groups and dev:
                storage.remove(aside)
                storage.link_dir(best_folder(checkpoints), aside)  # and not moved, lest a try that ends here lose it
            storage.write_text(storage.join(aside, "too_long.json"), json.dumps(too_long))
            write_notes(aside, trainer.notes)
            write_history(aside, history)
            storage.publish(aside, job.output)
            storage.remove(checkpoints)
        dist.barrier()  # the next training may start from it
        trainer.close()


def _finished(job: TrainJob) -> bool:
    """What the first rank sees: on a shared file system the others may see it later."""
    import torch.distributed as dist

    seen = [storage.exists(storage.join(job.output, HISTORY))]
    dist.broadcast_object_list(seen, src=0)
    return seen[0]


def _trainer_class() -> Any:
    """Ray Train's torch trainer; in a Ray of our own without the helper actors that only a shared cluster needs.

    They clean up after a dead controller, look out for drained nodes and feed Ray Data sets. Starting them costs a
    small training more than its steps, and without a dashboard the first takes up to 12 s to stop.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class Lean(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:  # private, and pinned with Ray
            left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
            every = super()._create_default_callbacks()  # type: ignore[misc]
            return [each for each in every if not isinstance(each, left_out)]

    if os.environ.get(OWN_RAY) != "1":
        return TorchTrainer
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"
    return Lean


def _environment(training: TrainingConfig) -> dict[str, str]:
    quiet = {"DS_ACCELERATOR": training.device, "TOKENIZERS_PARALLELISM": "false", "DS_SKIP_CUDA_CHECK": "1"}
    if training.threads_per_worker:
        quiet["OMP_NUM_THREADS"] = str(training.threads_per_worker)
    return quiet | secrets.at_start(training.env)


def _autoscales() -> bool:
    """True where nodes may come later, so that what is missing now is no reason to refuse."""
    return os.environ.get(AUTOSCALING) == "1"


def _failures(error: BaseException) -> list[BaseException]:
    """What went wrong on the ranks; when one fails the others lose their connection to it, so those come last."""
    by_rank: dict[int, BaseException] = getattr(error, "worker_failures", {})
    failures = [failure for _, failure in sorted(by_rank.items())]
    return sorted(failures, key=lambda failure: any(word in str(failure).lower() for word in _LOST_CONNECTION))


def _cause(error: BaseException) -> str:
    failures = _failures(error)
    if failures:
        first = next((line.strip() for line in str(failures[0]).splitlines() if line.strip()), "")
        return f"{type(failures[0]).__name__}: {first}"[:300]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
