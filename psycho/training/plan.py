"""Which groups a rank trains on, and when: the same number of micro-steps on every rank.

Ranks that run unequal micro-steps hang in the first collective under ZeRO. So all ranks compute the same plan from the
same seed. First the steps are cut from the shuffled groups by their number of pairs, whatever the number of ranks;
then a step's groups are packed into the fewest bins under the token budget that every rank gets equally many of, the
largest group first, each into the emptiest bin. Bins of one step are of nearly one size, so ranks wait little for each
other, and a bin smaller than the budget costs nothing.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Step:
    """One optimizer step: bins of group positions, micro-step by micro-step; rank r takes `bins[r::workers]`."""

    bins: tuple[tuple[int, ...], ...]

    @property
    def groups(self) -> tuple[int, ...]:
        """All groups of the step over all ranks."""
        return tuple(index for each in self.bins for index in each)

    def of(self, rank: int, workers: int) -> tuple[tuple[int, ...], ...]:
        """The bins of one rank; where there are too few groups a bin is empty."""
        return self.bins[rank::workers]


def plan_epoch(
    tokens: Sequence[int] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    batch_size: int,
    workers: int,
    budget: int,
    seed: int,
    shuffle: bool = True,
) -> Iterator[Step]:
    """The steps of one epoch; every group appears in exactly one bin.

    Args:
        tokens: of each group, at most `budget`.
        counts: pairs (or texts) of each group.
        batch_size: a step ends with the group that brings its count nearest to this.
        budget: tokens of a bin.

    Raises:
        ValueError: a group is over the budget; it has to be split before (`groups.split`).
    """
    sizes = np.asarray(tokens, dtype=np.int64)
    if len(sizes) and sizes.max() > budget:
        raise ValueError(f"a group of {sizes.max()} tokens is over the budget of {budget}")
    order = np.arange(len(sizes), dtype=np.int64)
    if shuffle:
        np.random.default_rng(seed).shuffle(order)
    for number, (begin, end) in enumerate(_cuts(np.asarray(counts, dtype=np.int64)[order], batch_size)):
        members = order[begin:end]
        bins = _pack(members.tolist(), sizes[members].tolist(), workers, budget)
        yield Step(tuple(_deal(bins, workers, number)))


def _cuts(counts: np.ndarray, batch_size: int) -> list[tuple[int, int]]:
    """Spans of groups whose counts sum to about `batch_size`; over an epoch the error does not add up."""
    if not len(counts):
        return []
    total = np.cumsum(counts)
    steps = max(1, round(int(total[-1]) / batch_size))
    aims = np.arange(1, steps) * (total[-1] / steps)
    after = np.searchsorted(total, aims)
    before = np.where(after > 0, total[after - 1], 0)
    ends = np.where(aims - before < total[after] - aims, after, after + 1)
    bounds = [0, *np.unique(np.clip(ends, 1, len(counts) - 1)).tolist(), len(counts)] if len(counts) > 1 else [0, 1]
    return [(a, b) for a, b in pairwise(bounds) if b > a]


def _deal(bins: list[tuple[int, ...]], workers: int, step: int) -> Iterator[tuple[int, ...]]:
    """Each turn's bins to the ranks, every other turn backwards and every step one rank on: no rank has more to do."""
    for number, first in enumerate(range(0, len(bins), workers)):
        turn = bins[first : first + workers]
        turn = turn[::-1] if number % 2 else turn
        shift = step % workers
        yield from turn[shift:] + turn[:shift]


def _pack(members: list[int], sizes: list[int], workers: int, budget: int) -> list[tuple[int, ...]]:
    order = sorted(range(len(members)), key=sizes.__getitem__, reverse=True)
    turns = max(1, math.ceil(sum(sizes) / (budget * workers)))
    while (bins := _fill(order, sizes, turns * workers, budget)) is None:
        turns += 1
    # The fullest together: what the ranks do at the same time takes equally long.
    bins.sort(key=lambda each: sum(sizes[index] for index in each), reverse=True)
    return [tuple(members[index] for index in each) for each in bins]


def _fill(order: list[int], sizes: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Each group into the emptiest bin; None where it does not fit there, so fits nowhere."""
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for index in order:
        load, number = heap[0]
        if load + sizes[index] > budget:
            return None
        bins[number].append(index)
        heapq.heapreplace(heap, (load + sizes[index], number))
    return bins


def learning_rate(step: int, steps: int, peak: float, warmup_share: float, schedule: str) -> float:
    """Linear warm-up, then the schedule, to zero at the end (constant: stays). `step` counts from 0."""
    warmup = int(steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if schedule == "linear" else peak
