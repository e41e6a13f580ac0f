"""Batch inference as a Ray Data job: requests on Parquet, a pool of vLLM actors, answers on Parquet.

Answers are written file by file as batches finish, so an interrupted job goes on with the requests that have no answer
yet. Requests of models that can take turns in one engine form one job, sorted by model; other models have a job of
their own. A request that fails is a row with an error, not a failed job.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import ray

from psycho import storage
from psycho.cluster import AUTOSCALING
from psycho.config import InferenceConfig
from psycho.errors import BadInput, StageFailed
from psycho.waiting import wait_for


def run_batches(
    requests: pa.Table,
    folder: str,
    stage: type,
    arguments: dict[str, Any],
    config: InferenceConfig,
    gpus_per_worker: float | None = None,
    on_resume: Callable[[int], None] | None = None,
) -> list[pa.Table]:
    """Answer every request; `stage(**arguments)` maps a batch (a `pa.Table`) to a table with `request_id`.

    Args:
        requests: rows with a unique `request_id`, in the order they should be served.
        folder: where answers are written; what is there already is not asked for again.
        on_resume: told how many answers were found.

    Returns:
        All answers, in no particular order, one table a file.

    Raises:
        BadInput: the cluster cannot hold one worker.
        WaitTimedOut: no batch finished within the configured limits.
        StageFailed: an answer is missing or doubled at the end.
    """
    done = {i for table in storage.read_finished(folder, ["request_id"]) for i in table["request_id"].to_pylist()}
    if done and on_resume:
        on_resume(len(done))
    wanted = [index for index, i in enumerate(requests["request_id"].to_pylist()) if i not in done]
    if wanted:
        check_room("inference", config.cpus_per_worker, _gpus(config, gpus_per_worker))
        _serve(requests.take(wanted), folder, stage, arguments, config, gpus_per_worker)
    tables = storage.read_finished(folder)
    found = [i for table in tables for i in table["request_id"].to_pylist()]
    if len(found) > len(set(found)):
        raise StageFailed(f"{len(found) - len(set(found))} requests were answered twice; remove {folder}")
    if len(found) < requests.num_rows:
        raise StageFailed(f"{len(found)} of {requests.num_rows} requests were answered; give the same command again")
    return tables


def check_room(what: str, cpus: float, gpus: float) -> None:
    """Refuse at once what would wait for ever.

    Raises:
        BadInput: no node of the cluster could ever hold one worker.
    """
    if os.environ.get(AUTOSCALING) == "1":
        return
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        return
    raise BadInput(
        f"a worker of {what} needs {cpus:g} CPU and {gpus:g} GPU and no node of this cluster has them; lower "
        f"{what}.cpus_per_worker or {what}.gpus_per_worker, or add a node"
    )


def _gpus(config: InferenceConfig, own: float | None) -> float:
    return config.gpus_per_worker if own is None else own


def _serve(
    requests: pa.Table,
    folder: str,
    stage: type,
    arguments: dict[str, Any],
    config: InferenceConfig,
    gpus_per_worker: float | None,
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not logging.getLogger("ray").isEnabledFor(logging.WARNING):  # a quiet run; Ray Data set itself up anew
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    workers = min(config.workers, max(1, -(-requests.num_rows // config.batch_size)))
    size = min(config.batch_size, -(-requests.num_rows // workers))
    blocks = [requests.slice(start, size) for start in range(0, requests.num_rows, size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        stage,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=_gpus(config, gpus_per_worker) or None,
        runtime_env={"env_vars": dict(config.env)} if config.env else None,
    )
    fs, path = storage.resolve(folder)
    fs.create_dir(path, recursive=True)
    wait_for(
        lambda: dataset.write_parquet(path, filesystem=fs, mode=ray.data.SaveMode.APPEND),
        progress=lambda: sum(1 for _ in storage.parquet_files(folder)),
        what=f"a batch of {stage.__name__}",
        start_s=config.start_timeout_s,
        step_s=config.batch_timeout_s,
    )


def split_errors(tables: Sequence[pa.Table]) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Good rows sorted by request id, and a quarantine row (`request_id`, `reason`) for each with an error."""
    table = pa.concat_tables(tables, promote_options="permissive").sort_by("request_id")
    good, bad = [], []
    for index, error in enumerate(table["error"].to_pylist()):
        if error is None:
            good.append(index)
        else:
            bad.append({"request_id": table["request_id"][index].as_py(), "reason": error})
    return table.take(good).drop_columns(["error"]), bad
