"""Two real ranks: what rank 0 says all hear, and what it knows all know."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from psycho import storage
from psycho.errors import BadInput, StageFailed
from psycho.training.groups import Encoded, Group
from psycho.training.online import ranks
from psycho.training.packing import Batch, packed
from psycho.training.references import with_references

GROUPS = [Group([number, 1], (Encoded([2, number], [1.0, 1.0]),), ()) for number in range(4, 10)]


def _as_two(work: Callable[[int, str], None], folder: Path) -> None:
    """Run `work(rank, folder)` on each."""
    context = multiprocessing.spawn(_rank, (work, str(folder)), nprocs=2, join=False)
    assert context is not None and any(context.join(300) for _ in range(2))  # it returns when one of them has ended


def _rank(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    work(rank, folder)
    dist.destroy_process_group()


def _hears(rank: int, folder: str) -> None:
    for _ in range(2):  # with and without a meeting
        assert ranks.on_first("asking", lambda: rank) == 0

        def refuse() -> None:
            raise ValueError("no")

        with pytest.raises(StageFailed, match="asking: ValueError: no"):
            ranks.on_first("asking", refuse)

        def wrong() -> None:
            raise BadInput("lower it")

        with pytest.raises(BadInput, match=r"^lower it$"):
            ranks.on_first("asking", wrong)
        ranks.meet(60)
    meeting = ranks._meetings[dist.group.WORLD]
    assert dist.get_backend(meeting) == "gloo" and dist.get_world_size(meeting) == 2


def _sum(batch: Batch) -> torch.Tensor:
    """Of each response's tokens."""
    sums = torch.zeros(len(batch.lengths), dtype=torch.float64)
    return sums.index_add(0, batch.response, batch.targets.double())


def _knows(rank: int, folder: str) -> None:
    """The second rank finds nothing in the folder, as where the first has just written it over the network."""
    if rank:
        storage.read_finished = lambda *args: []
    expected = [2.0 + number for number in range(4, 10)]
    for known in (GROUPS[:3], GROUPS):  # what the first call stored is a part of what the second asks for
        found = with_references(known, _sum, packed, 16, folder)
        assert [group.references for group in found] == [(value,) for value in expected[: len(known)]]
        dist.barrier()
        # Written by the first rank, which reads them: what another has written it may not see yet.
        assert len(list(Path(folder).glob("*.parquet"))) == (1 if len(known) == 3 else 2)


def test_all_ranks_hear_what_the_first_says(tmp_path: Path) -> None:
    _as_two(_hears, tmp_path)


def test_references_that_one_rank_does_not_see_yet_are_known_to_all(tmp_path: Path) -> None:
    _as_two(_knows, tmp_path)


def test_the_network_of_an_address() -> None:
    assert ranks.interface("127.0.0.1") and ranks.interface("192.0.2.1") is None
