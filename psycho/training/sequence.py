"""Sequence parallelism for long transcripts (Ulysses; Jacobs et al. 2023): ranks that share the tokens of each bin.

Each rank of a sequence group holds an equal slice of a bin's tokens. Around the attention they exchange: before it
every rank gets the whole bin for its share of the heads, after it its slice for all heads. So the attention itself is
ours, with the layout of the whole bin, which DeepSpeed's own Ulysses would drop. What the model says of tokens or
responses is summed over the group, each value said by one rank and nought by the others; the gradient of a value goes
back to the rank that said it alone, so that the sum of the ranks' gradients is that of the whole bin, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share bins; `rank` is this one's place among them."""

    size: int
    rank: int
    ranks: Any

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """From all heads of a slice to this rank's heads of the whole bin.

        Args:
            query: [1, H, slice, D]; key, value: [1, H_kv, slice, D].
            length: tokens of the bin, without what fills up the last slice.

        Returns:
            [1, H / size, length, D] and [1, H_kv / size, length, D] twice (or of as many heads as the query).
        """
        if key.shape[1] % self.size:
            repeats = query.shape[1] // key.shape[1]
            key, value = (t.repeat_interleave(repeats, dim=1) for t in (key, value))
        parts = [t[0].unflatten(0, (self.size, -1)).transpose(1, 2) for t in (query, key, value)]  # [size, slice, h, D]
        got = self._exchange(torch.cat([part.flatten(2) for part in parts], dim=2)).flatten(0, 1)[:length]
        columns = got.split([part.shape[2] * part.shape[3] for part in parts], dim=1)
        whole = [
            own.unflatten(1, part.shape[2:]).transpose(0, 1)[None] for own, part in zip(columns, parts, strict=True)
        ]
        return whole[0], whole[1], whole[2]

    def to_tokens(self, found: Tensor) -> Tensor:
        """Back: [1, length, H / size, D] of the whole bin to [1, slice, H, D]."""
        _, length, _, width = found.shape
        own = -(-length // self.size)
        filled = F.pad(found[0].flatten(1), (0, 0, 0, own * self.size - length))
        got = self._exchange(filled.unflatten(0, (self.size, own)))  # [size, slice, h * D]
        return got.transpose(0, 1).flatten(1).unflatten(1, (-1, width))[None]

    def whole(self, own: Tensor, places: Tensor, count: int) -> Tensor:
        """[count, ...]: what each rank says, `own` for its `places`."""
        found = own.new_zeros(count, *own.shape[1:]).index_copy(0, places, own)
        summed: Tensor = _Sum.apply(found, self.ranks)
        return summed

    def _exchange(self, values: Tensor) -> Tensor:
        """[size, ...]: row i goes to rank i, and what comes from rank j becomes row j."""
        got: Tensor = _Exchange.apply(values, self.ranks)
        return got


def sequence_group(size: int) -> SequenceGroup | None:
    """This rank's group of `size` neighbours; None for one. Collective."""
    if size == 1:
        return None
    rank = dist.get_rank()
    found = None
    for first in range(0, dist.get_world_size(), size):  # every rank must make every group
        ranks = dist.new_group(list(range(first, first + size)))
        if first <= rank < first + size:
            found = SequenceGroup(size, rank - first, ranks)
    return found


class _Exchange(torch.autograd.Function):
    """All-to-all in equal parts, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Any) -> Tensor:
        ctx.ranks = ranks
        return _all_to_all(values, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradient, ctx.ranks), None


def _all_to_all(values: Tensor, ranks: Any) -> Tensor:
    values = values.contiguous()
    got = torch.empty_like(values)
    dist.all_to_all_single(got, values, group=ranks)
    return got


class _Sum(torch.autograd.Function):
    """The sum over the ranks. All of them compute the same loss from it, so each already has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Any) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed, group=ranks)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
