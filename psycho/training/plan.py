"""Which examples a rank trains on, and when: the same number of micro-steps on every rank.

Ranks that run unequal micro-steps hang in the first collective under ZeRO. So all ranks compute the same plan from the
same seed: batches of similar length (little padding), dealt out evenly; where a batch does not divide, a rank gets an
empty micro-step, which it fills with an example of weight zero.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 8  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Step:
    """One optimizer step: the micro-batches of one rank, and all examples of the step over all ranks."""

    micro_batches: tuple[tuple[int, ...], ...]
    everything: tuple[int, ...]


def micro_steps(batch_size: int, workers: int, micro_batch_size: int | None) -> int:
    """Micro-batches that a worker handles in one optimizer step."""
    share = -(-batch_size // workers)
    return -(-share // (micro_batch_size or share))


def plan_epoch(
    lengths: Sequence[int],
    batch_size: int,
    workers: int,
    rank: int,
    micro_batch_size: int | None,
    seed: int,
    shuffle: bool = True,
) -> list[Step]:
    """The steps of one epoch for one rank; every example appears once over all ranks."""
    rng = random.Random(seed)
    order = list(range(len(lengths)))
    if shuffle:
        rng.shuffle(order)
    batches: list[list[int]] = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = sorted(order[start : start + batch_size * _WINDOW], key=lambda index: lengths[index])
        cut = [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
        rng.shuffle(cut)
        batches += cut
    count = micro_steps(batch_size, workers, micro_batch_size)
    size = micro_batch_size or -(-batch_size // workers)
    return [_step(batch, workers, rank, count, size) for batch in batches]


def _step(batch: list[int], workers: int, rank: int, count: int, size: int) -> Step:
    mine = batch[rank::workers]
    micro = tuple(tuple(mine[first * size : (first + 1) * size]) for first in range(count))
    return Step(micro, tuple(batch))


def learning_rate(step: int, steps: int, peak: float, warmup_share: float, schedule: str) -> float:
    """Linear warm-up, then the schedule, to zero at the end (constant: stays). `step` counts from 0."""
    import math

    warmup = int(steps * warmup_share)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (1 - done) if schedule == "linear" else peak
