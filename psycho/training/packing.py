"""Speech groups as tensors: packed into one row, each prompt encoded once, or padded, a row a response.

Both layouts give the same `Batch`, so the objectives do not know which it was: where the hidden state lies that
predicts a token, the token, its weight, and the response it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from psycho.training.attention import Layout
from psycho.training.groups import Group
from psycho.training.sequence import SequenceGroup


@dataclass(frozen=True)
class Batch:
    """Groups of one micro-step.

    `input_ids`, `position_ids`: [B, T]; B is 1 and `layout` is set when packed.
    `source`, `targets`, `weights`, `response`: [N], a trained token each; `source` counts in the flattened [B * T].
    `last`: [R], where each response ends, flattened. `lengths`: [R] trained tokens.
    `pairs`: [P, 2] chosen and rejected response. `references`: [R] or None. `gaps`: [P], 0 where unknown.
    `choice`: [P], which of the `choices` a pair belongs to: those of one chosen response are one choice out of a list.
    `scales`: [P], what a pair's value counts. `ratings`: [R, 7], NaN where unknown, or None.

    Where ranks share the tokens (`shared`), tokens, `source`, `targets` and `last` are this rank's slice, and
    `own_tokens` and `own_responses` say which of the N and R those are; everything else is of the whole bin.
    """

    input_ids: Tensor
    position_ids: Tensor | None
    layout: Layout | None
    source: Tensor
    targets: Tensor
    weights: Tensor
    response: Tensor
    last: Tensor
    lengths: Tensor
    pairs: Tensor
    gaps: Tensor
    choice: Tensor
    choices: int
    scales: Tensor
    references: Tensor | None
    ratings: Tensor | None = None
    own_tokens: Tensor | None = None
    own_responses: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device, copied without waiting."""
        moved: dict[str, Any] = {
            k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)
        }
        return replace(self, **moved)


class _Builder:
    """Collects the trained tokens of one response after the other."""

    def __init__(self) -> None:
        self.source: list[int] = []
        self.targets: list[int] = []
        self.weights: list[float] = []
        self.response: list[int] = []
        self.last: list[int] = []
        self.lengths: list[float] = []

    def add(self, ids: list[int], weights: list[float], start: int, before: int | None) -> None:
        """A response that starts at `start`; the token at `before` predicts its first (None: nothing does)."""
        number = len(self.last)
        sources = [before if before is not None else -1, *range(start, start + len(ids) - 1)]
        trained = 0
        for source, target, weight in zip(sources, ids, weights, strict=True):
            if weight and source >= 0:
                self.source.append(source)
                self.targets.append(target)
                self.weights.append(weight)
                self.response.append(number)
                trained += 1
        self.last.append(start + len(ids) - 1)
        self.lengths.append(float(trained))

    def batch(self, ids: Tensor, positions: Tensor | None, layout: Layout | None, groups: Sequence[Group]) -> Batch:
        first = 0
        pairs: list[tuple[int, int]] = []
        gaps: list[float] = []
        scales: list[float] = []
        references: list[float] = []
        ratings: list[tuple[float, ...]] = []
        for group in groups:
            pairs += [(first + chosen, first + rejected) for chosen, rejected in group.pairs]
            gaps += group.gaps or (0.0,) * len(group.pairs)
            scales += (group.scale,) * len(group.pairs)
            references += group.references or ()
            ratings += group.ratings
            first += len(group.responses)
        number: dict[int, int] = {}
        choice = [number.setdefault(chosen, len(number)) for chosen, _ in pairs]
        return Batch(
            ids,
            positions,
            layout,
            torch.tensor(self.source, dtype=torch.long),
            torch.tensor(self.targets, dtype=torch.long),
            torch.tensor(self.weights),
            torch.tensor(self.response, dtype=torch.long),
            torch.tensor(self.last, dtype=torch.long),
            torch.tensor(self.lengths),
            torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            torch.tensor(gaps, dtype=torch.float32),
            torch.tensor(choice, dtype=torch.long),
            len(number),
            torch.tensor(scales, dtype=torch.float32),
            torch.tensor(references, dtype=torch.float64) if len(references) == first else None,
            torch.tensor(ratings, dtype=torch.float32) if len(ratings) == first else None,
        )


def packed(groups: Sequence[Group]) -> Batch:
    """One row: prompt, its responses, the next prompt, ...; positions restart at each prompt's end."""
    builder = _Builder()
    ids: list[int] = []
    positions: list[int] = []
    spans = []
    for group in groups:
        begin, size = len(ids), len(group.prompt)
        ids += group.prompt
        positions += range(size)
        responses = []
        for row in group.responses:
            start = len(ids)
            builder.add(row.ids, row.weights, start, begin + size - 1 if size else None)
            ids += row.ids
            positions += range(size, size + len(row))
            responses.append((start, len(ids)))
        spans.append(((begin, begin + size), tuple(responses)))
    layout = Layout(tuple(spans), len(ids))
    return builder.batch(torch.tensor([ids]), torch.tensor([positions]), layout, groups)


def shared(batch: Batch, sequence: SequenceGroup) -> Batch:
    """This rank's slice of a packed bin whose tokens the ranks of a group share; the last slices are filled up."""
    assert batch.layout is not None and batch.position_ids is not None
    size = -(-batch.layout.length // sequence.size)
    first = sequence.rank * size
    rest = (0, size * sequence.size - batch.layout.length)
    tokens, responses = (
        ((where >= first) & (where < first + size)).nonzero()[:, 0] for where in (batch.source, batch.last)
    )
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, rest)[:, first : first + size],
        position_ids=F.pad(batch.position_ids, rest)[:, first : first + size],
        layout=replace(batch.layout, sequence=sequence),
        source=batch.source[tokens] - first,
        targets=batch.targets[tokens],
        last=batch.last[responses] - first,
        own_tokens=tokens,
        own_responses=responses,
    )


def padded(groups: Sequence[Group], pad: int) -> Batch:
    """A row per response with its prompt before it, padded on the right: under a causal mask that changes nothing."""
    rows = [(group.prompt, row) for group in groups for row in group.responses]
    width = max(len(prompt) + len(row) for prompt, row in rows)
    builder = _Builder()
    ids = torch.full((len(rows), width), pad)
    for number, (prompt, row) in enumerate(rows):
        begin, size = number * width, len(prompt)
        builder.add(row.ids, row.weights, begin + size, begin + size - 1 if size else None)
        ids[number, : size + len(row)] = torch.tensor([*prompt, *row.ids])
    return builder.batch(ids, None, None, groups)
