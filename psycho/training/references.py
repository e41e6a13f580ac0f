"""Reference log-probabilities: computed once, sharded over the ranks, stored as Parquet, found again by key.

The reference policy never changes, so what it says of a response is a fact of the data. A row's key is a hash of the
tokens and their weights, and the folder is named by the model, so that a changed response or model never matches: what
is missing is found, and only that is computed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from psycho import storage
from psycho.training.groups import Group, response_key
from psycho.training.packing import Batch
from psycho.training.plan import plan_epoch

SCHEMA = pa.schema([("key", pa.string()), ("logprob", pa.float64())])


def with_references(
    groups: Sequence[Group],
    logprobs: Callable[[Batch], Tensor],
    collate: Callable[[Sequence[Group]], Batch],
    budget: int,
    folder: str | None,
    lane: tuple[int, int] | None = None,
) -> list[Group]:
    """The groups with the reference policy's summed log-probability of each response.

    Every rank must call; each computes its share of what `folder` does not hold yet (None: nothing is stored).

    Args:
        logprobs: a batch to [R] summed log-probabilities, fp64; a collective call under ZeRO-3.
        collate: groups to a batch on the right device.
        lane: this rank's place and their number, where ranks of one place are given the same groups; none: its own.
    """
    keys = [[response_key(group, index) for index in range(len(group.responses))] for group in groups]
    known = _known([key for own in keys for key in own], folder)
    missing = [index for index, own in enumerate(keys) if any(key not in known for key in own)]
    if missing:
        found = _compute(groups, keys, missing, logprobs, collate, budget, lane)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        found = {key: value for part in everyone for key, value in part.items()}
        if folder and dist.get_rank() == 0:  # which reads them, and sees at once what it has written itself
            rows = [{"key": key, "logprob": value} for key, value in found.items()]
            file = storage.join(folder, f"part-{uuid.uuid4().hex[:12]}.parquet")
            storage.write_rows(pa.Table.from_pylist(rows, schema=SCHEMA), file)
        known |= found
    return [
        replace(group, references=tuple(known[key] for key in own)) for group, own in zip(groups, keys, strict=True)
    ]


def _compute(
    groups: Sequence[Group],
    keys: Sequence[Sequence[str]],
    missing: Sequence[int],
    logprobs: Callable[[Batch], Tensor],
    collate: Callable[[Sequence[Group]], Batch],
    budget: int,
    lane: tuple[int, int] | None,
) -> dict[str, float]:
    rank, world = lane or (dist.get_rank(), dist.get_world_size())
    sizes = [groups[index].tokens for index in missing]
    (step,) = plan_epoch(sizes, [1] * len(sizes), len(sizes), world, budget, 0, shuffle=False)
    found: dict[str, float] = {}
    with torch.no_grad():
        for each in step.of(rank, world):
            members = [missing[place] for place in each] or missing[:1]  # all ranks join every forward pass
            values = logprobs(collate([replace(groups[index], references=None) for index in members])).tolist()
            if each:
                found |= dict(zip((key for index in members for key in keys[index]), values, strict=True))
    return found


def _known(asked: Sequence[str], folder: str | None) -> dict[str, float]:
    """What the folder holds of the keys asked for, as rank 0 sees it: another rank may already have stored its part."""
    if folder is None:
        return {}
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        wanted = set(asked)
        known: dict[str, float] = {}
        for table in storage.read_finished(folder):
            rows = zip(table["key"].to_pylist(), table["logprob"].to_pylist(), strict=True)
            known |= {key: value for key, value in rows if key in wanted}
        found = [known]
    dist.broadcast_object_list(found, src=0)
    return dict(found[0])
