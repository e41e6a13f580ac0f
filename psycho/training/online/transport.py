"""New weights from the trainer into the engines that sample: by the folder on disk, or from GPU to GPU.

What has been trained is on disk in any case, for a rerun and for an engine that died; on GPUs the running engines need
not read it. There vLLM's own weight transfer is used: it packs the stream of `weights.py` into buckets and sends them
by NCCL to GPUs of their own, or by CUDA IPC to engines on the trainer's GPUs, which sleep while it trains.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from psycho.config import Config
from psycho.training.online.engines import Engines
from psycho.training.online.placement import transport_of
from psycho.training.online.ranks import on_first
from psycho.training.online.weights import WeightStream, check_names

_GRACE_S = 30.0


class Transport(Protocol):
    """Every rank calls each of these; rank 0 alone talks to the engines."""

    def send(self, policy: str, before: str) -> None:
        """The engines hold the weights in training, which lie in the folder `policy` too, once this returns.

        Args:
            before: the policy that the engines sampled by, for one that was started again meanwhile.
        """


class DiskTransport:
    """The engines read the folder when they are first asked for it."""

    def send(self, policy: str, before: str) -> None:
        """Nothing is to be done: every call of an engine names its model."""


class DirectTransport:
    """From GPU to GPU by vLLM's weight transfer; `connect` makes its trainer side."""

    def __init__(
        self, trainer: Any, engines: Engines, policy: str, connect: Callable[[Any, Any], Any], limit_s: float
    ) -> None:
        """
        Args:
            policy: the folder that the engines started from.
            limit_s: the longest that a send may take.

        Raises:
            BadInput: this architecture cannot be sent so.
        """
        self._engines, self._connect = engines, connect
        self._stream = WeightStream(trainer)
        check_names(self._stream, policy)
        self._limit_s = limit_s
        self._sender: Any = None
        self._seen: list[str] = []

    def send(self, policy: str, before: str) -> None:
        """Connects anew where an engine was started again. A send that hangs ends the process, and says so: the other
        side of a collective cannot be told, and the job goes on from disk when it is given again."""
        pool = self._engines.rollout
        seen = on_first("asking the engines", lambda: pool.incarnations(before))
        late = threading.Timer(self._limit_s, _give_up, (self._limit_s,))
        late.daemon = True
        late.start()
        faulthandler.dump_traceback_later(self._limit_s + _GRACE_S, exit=True, file=2)  # where no thread gets a turn
        try:
            if seen != self._seen:
                self._sender, self._seen = self._connect(PoolClient(pool), as_source(self._stream)), seen
            self._sender.send_weights()
        finally:
            late.cancel()
            faulthandler.cancel_dump_traceback_later()
        on_first("new weights", lambda: pool.holds(policy))


def _give_up(limit_s: float) -> None:
    """The sentence of a send that hangs, and the end of this process."""
    said = f"waited {limit_s:.0f} s (training.collective_timeout_s) for the engines to take new weights and gave up"
    print(
        f"{said}; give the same command again, with online.transport=disk if it stays so", file=sys.stderr, flush=True
    )
    faulthandler.dump_traceback(file=2)
    os._exit(1)


class PoolClient:
    """What vLLM's trainer side drives the engines by (its `VLLMWeightSyncClient`), over a pool of ours."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @property
    def ranks(self) -> int:
        """Processes of all engines."""
        return len(self._pool) * int(self._pool.gpus_per_engine)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every engine takes the ranks after those of the engine before it, where there is a group with ranks."""
        size, first = self._pool.gpus_per_engine, init_info.get("rank_offset")
        infos = [
            {"init_info": init_info if first is None else init_info | {"rank_offset": first + turn * size}}
            for turn in range(len(self._pool))
        ]
        self._pool.transfer("init_weight_transfer_engine", infos)

    def start_weight_update(self) -> None:
        self._pool.transfer("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._pool.transfer("update_weights", [{"update_info": update_info}] * len(self._pool))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._pool.transfer("finish_weight_update")


def as_source(stream: WeightStream) -> Any:
    """The stream as vLLM's `WeightSource`."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[Any]:
            return [ParamMeta(*shape) for shape in stream.shapes()]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(stream)

    return Source()


def transport(config: Config, trainer: Any, engines: Engines, policy: str) -> Transport:
    """The way that fits the configuration (`placement.transport_of`); collective."""
    way = transport_of(config)
    if way == "disk":
        return DiskTransport()
    size, limit_s = config.online.sync_bucket_mib * 2**20, config.training.collective_timeout_s
    return DirectTransport(
        trainer, engines, policy, lambda client, source: _connect(way, client, source, size), limit_s
    )


def bucket_bytes(source: Any, size: int) -> int:
    """Bytes of a bucket: what is asked for, or the largest weight, which must fit one."""
    largest = max(torch.Size(meta.shape).numel() * meta.dtype.itemsize for meta in source.metadata())
    return max(size, largest)


def _connect(way: str, client: PoolClient, source: Any, size: int) -> Any:
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    size, rank = bucket_bytes(source, size), dist.get_rank()
    if way == "ipc":
        info = ipc_engine.IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=size)
        return ipc_engine.IPCTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
    import ray

    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    info = nccl_engine.NCCLTrainerInitInfo(
        rank=rank,
        master_address=ray.util.get_node_ip_address(),
        master_port=port,
        world_size=1 + client.ranks,
        packed_buffer_size_bytes=size,
    )
    # vLLM gives this thread a stream of its own and leaves it there, and the training goes on in this thread.
    with torch.cuda.stream(torch.cuda.current_stream()):
        return nccl_engine.NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)
