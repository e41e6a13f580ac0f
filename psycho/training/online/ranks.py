"""What one rank does for all: rank 0 alone talks to the engines and writes the rounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import ray
import torch.distributed as dist

from psycho.errors import BadInput, StageFailed

T = TypeVar("T")
_meetings: dict[Any, Any] = {}


def meet(limit_s: float) -> None:
    """Let the ranks wait for rank 0 on their hosts, at most so long; collective, and to be called once a job.

    Where all of them meet on their GPUs, those that wait for the samples would keep the GPU busy that an engine samples
    on: a rank waits in a kernel there.
    """
    if dist.get_backend() != "gloo" and (network := interface(ray.util.get_node_ip_address())):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", network)
    _meetings[dist.group.WORLD] = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit_s))


def together() -> None:
    """All ranks have come as far as this."""
    dist.barrier(group=_meetings.get(dist.group.WORLD))


def interface(address: str) -> str | None:
    """The network interface with this address.

    Left alone, gloo takes the one that the host's name stands for, which on many hosts nobody else can reach.
    """
    held = psutil.net_if_addrs().items()
    return next((name for name, addresses in held if any(own.address == address for own in addresses)), None)


def on_first(what: str, call: Callable[[], T]) -> T:
    """What rank 0 says, on all ranks; they wait for it, and hear of it where it fails.

    Raises:
        StageFailed: the call raised on rank 0.
        BadInput: it raised that.
    """
    outcome: list[Any] = [None, None, StageFailed]
    if dist.get_rank() == 0:
        try:
            outcome[0] = call()
        except StageFailed as error:
            outcome[1] = str(error)
        except Exception as error:  # every rank must hear of it, or the others would wait for ever
            cause = getattr(error, "cause", None) or error  # what a worker raised, without its traceback
            own = isinstance(cause, BadInput)
            outcome[1:] = (str(cause), BadInput) if own else (f"{what}: {type(cause).__name__}: {cause}", StageFailed)
    dist.broadcast_object_list(outcome, src=0, group=_meetings.get(dist.group.WORLD))
    if outcome[1]:
        raise outcome[2](outcome[1])
    return outcome[0]
