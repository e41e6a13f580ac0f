"""Batch inference as a Ray Data job: requests in, a pool of actors, answers on Parquet as they come.

Each actor writes its answers itself, a few rows a file, the moment they are there; what Ray Data hands on are counts.
So an interrupted job goes on with the requests that have no answer yet, and a batch that Ray gives to another actor
because its first one died does so too. A request that fails is a row with an error, not a failed job.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from psycho import secrets, storage
from psycho.cluster import AUTOSCALING
from psycho.config import EngineConfig, InferenceConfig
from psycho.errors import BadInput, StageFailed
from psycho.inference.loop import EngineFailed, leave_if_dead
from psycho.schema import stable_id
from psycho.waiting import wait_for

_BATCHES_A_WORKER = 8  # at least, so that workers end together
_LEAST_ROWS, MOST_AT_ONCE = 16, 16
_TIMES_ITS_SLOTS = 4
_UNWRITTEN = 0.02  # most of the answers that may be finished and not yet on disk
RESTARTS = 16  # of one worker; one that dies more often has a reason that a restart does not remove
_RESTART_LOG = "restarts.log"


def run_batches(
    requests: pa.Table,
    folder: str,
    stage: type,
    arguments: dict[str, Any],
    config: InferenceConfig,
    gpus_per_worker: float | None = None,
    on_resume: Callable[[int], None] | None = None,
    at_once: int = 1,
    say: Callable[[str], None] | None = None,
) -> list[pa.Table]:
    """Answer every request; `stage(**arguments)` maps a batch (a `pa.Table`) to a table with `request_id`, or to an
    iterator of rows (of its `SCHEMA`) as they are finished.

    Args:
        requests: rows with a unique `request_id`, in the order they should be served.
        folder: where answers are written; what is there already is not asked for again.
        on_resume: told how many answers were found.
        at_once: requests that an actor should have before it to be busy; over the batch size, several batches are
            given to it together, in threads.
        say: told in a sentence what a person should know.

    Returns:
        All answers, in no particular order, one table a file.

    Raises:
        BadInput: the cluster cannot hold one worker.
        WaitTimedOut: no batch finished within the configured limits.
        StageFailed: an answer is missing or doubled at the end.
    """
    wanted = unanswered(requests, folder)
    if wanted.num_rows < requests.num_rows and on_resume:
        on_resume(requests.num_rows - wanted.num_rows)
    if wanted.num_rows:
        check_room("inference", config.cpus_per_worker, _gpus(config, gpus_per_worker))
        before = _restarts(folder)
        try:
            _serve(wanted, folder, stage, arguments, config, gpus_per_worker, at_once)
        finally:
            died = _restarts(folder) - before
            if died and say:
                say(f"  {died} time(s) a worker died and was started again; what it had not finished was asked again")
    return collect(requests, folder)


def unanswered(requests: pa.Table, folder: str) -> pa.Table:
    """The requests that have no answer in the folder."""
    done = {i for table in storage.read_finished(folder, ["request_id"]) for i in table["request_id"].to_pylist()}
    return requests.filter(pa.array([i not in done for i in requests["request_id"].to_pylist()], pa.bool_()))


def collect(requests: pa.Table, folder: str) -> list[pa.Table]:
    """All answers in the folder, each once.

    An answer may lie in two files: a worker can outlive its killed driver long enough to finish what the next one asks
    for too. The first is kept. Twice in one file is our mistake, and stops.

    Raises:
        StageFailed: an answer is missing, or doubled within a file.
    """
    tables: list[pa.Table] = []
    seen: set[str] = set()
    for table in storage.read_finished(folder):
        names = table["request_id"].to_pylist()
        if len(names) > len(set(names)):
            raise StageFailed(f"{len(names) - len(set(names))} requests were answered twice; remove {folder}")
        new = pa.array([name not in seen for name in names], pa.bool_())
        seen.update(names)
        tables.append(table.filter(new))
    wanted = set(requests["request_id"].to_pylist())
    if not wanted <= seen:
        there = len(wanted & seen)
        raise StageFailed(f"{there} of {requests.num_rows} requests were answered; give the same command again")
    return tables


class Durable:
    """A stage whose answers are on disk, below a folder of the batch's own, before the batch is done."""

    def __init__(self, stage: type, arguments: dict[str, Any], folder: str, rows: int) -> None:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            storage.append_line(storage.join(folder, _RESTART_LOG), "a worker was started again")
        self._stage, self._folder, self._rows = stage(**arguments), folder, rows
        self._unwritable: OSError | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        place = storage.join(self._folder, stable_id(*batch["request_id"].to_pylist()))
        wanted = unanswered(batch, place)  # of a batch that an actor had before it died, some is there
        try:
            self._answer(wanted, place)
        except EngineFailed as error:
            leave_if_dead(error)
            raise
        return pa.table({"rows": [batch.num_rows]})

    def _answer(self, wanted: pa.Table, place: str) -> None:
        if not wanted.num_rows:
            return
        if self._unwritable:  # another batch found the disk full: what is made now would be lost, and may cost money
            raise self._unwritable
        answers = self._stage(wanted)
        if isinstance(answers, pa.Table):
            self._write(answers, place)
            return
        while rows := list(islice(answers, self._rows)):
            self._write(pa.Table.from_pylist(rows, schema=self._stage.SCHEMA), place)

    def _write(self, table: pa.Table, place: str) -> None:
        try:
            storage.write_rows(table, storage.join(place, f"{uuid.uuid4().hex}.parquet"))
        except OSError as error:
            self._unwritable = error
            raise


def _restarts(folder: str) -> int:
    return (storage.read_text(storage.join(folder, _RESTART_LOG)) or "").count("\n")


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
        f"{what}.cpus_per_worker or {what}.gpus_per_worker, add a node, or set cluster.autoscaling=true where nodes "
        "come when they are asked for"
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
    at_once: int,
) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    if not logging.getLogger("ray").isEnabledFor(logging.WARNING):  # a quiet run; Ray Data set itself up anew
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it says of an error, the error says too
    workers, size, batches = layout(requests.num_rows, config, at_once)
    rows = int(min(size, max(1, requests.num_rows * _UNWRITTEN / (workers * batches))))
    blocks = [requests.slice(start, size) for start in range(0, requests.num_rows, size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        Durable,
        fn_constructor_kwargs={"stage": stage, "arguments": arguments, "folder": folder, "rows": rows},
        batch_format="pyarrow",
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(
            size=workers,
            max_tasks_in_flight_per_actor=batches + 1,
            max_concurrent_calls_per_actor=batches,
            enable_true_multi_threading=batches > 1,
        ),
        num_cpus=config.cpus_per_worker,
        num_gpus=_gpus(config, gpus_per_worker) or None,
        max_restarts=RESTARTS,
        runtime_env={"env_vars": early} if (early := secrets.at_start(config.env)) else None,
    )
    wait_for(
        dataset.materialize,
        progress=lambda: sum(1 for _ in storage.parquet_files(folder)),
        what=f"a batch of {stage.__name__}",
        start_s=config.start_timeout_s,
        step_s=config.batch_timeout_s,
        settings=("inference.start_timeout_s", "inference.batch_timeout_s"),
    )


def enough(engine: EngineConfig) -> int:
    """Requests that keep an engine's slots taken while others of the same batch are still under way (`at_once`)."""
    return _TIMES_ITS_SLOTS * engine.max_num_seqs


def layout(requests: int, config: InferenceConfig, at_once: int) -> tuple[int, int, int]:
    """Workers, requests a batch, and batches that a worker is given together."""
    workers = min(config.workers, max(1, -(-requests // config.batch_size)))
    if at_once <= 1:
        return workers, min(config.batch_size, -(-requests // workers)), 1
    size = min(config.batch_size, max(_LEAST_ROWS, -(-requests // (workers * _BATCHES_A_WORKER))))
    return workers, size, max(1, min(MOST_AT_ONCE, -(-at_once // size)))


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
