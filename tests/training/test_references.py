"""Stored reference log-probabilities: computed once, found again, and only what is missing is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psycho import storage
from psycho.training.groups import Encoded, Group
from psycho.training.packing import Batch, packed
from psycho.training.references import with_references

pytestmark = pytest.mark.usefixtures("one_rank")


def _group(number: int) -> Group:
    return Group([number, 1], (Encoded([2, number], [1.0, 1.0]), Encoded([3], [1.0])), ((0, 1),))


class Model:
    """Says of a response the sum of its tokens, and remembers how many it was asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, batch: Batch) -> torch.Tensor:
        self.asked += len(batch.lengths)
        sums = torch.zeros(len(batch.lengths), dtype=torch.float64)
        return sums.index_add(0, batch.response, batch.targets.double())

    def run(self, groups: Sequence[Group], folder: Path | None) -> list[Group]:
        return with_references(groups, self, packed, 16, None if folder is None else str(folder))


GROUPS = [_group(number) for number in range(4, 11)]
EXPECTED = [(2.0 + number, 3.0) for number in range(4, 11)]


def test_every_response_has_its_own(tmp_path: Path) -> None:
    model = Model()
    assert [group.references for group in model.run(GROUPS, tmp_path)] == EXPECTED
    assert model.asked == 14
    assert [group.references for group in Model().run(GROUPS, None)] == EXPECTED


def test_what_is_stored_is_not_computed_again(tmp_path: Path) -> None:
    Model().run(GROUPS[:4], tmp_path)
    model = Model()
    assert [group.references for group in model.run(GROUPS, tmp_path)] == EXPECTED
    assert model.asked == 6
    model = Model()
    model.run(GROUPS, tmp_path)
    assert model.asked == 0


def test_a_changed_response_is_stale(tmp_path: Path) -> None:
    Model().run(GROUPS, tmp_path)
    changed = replace(GROUPS[0], responses=(Encoded([2, 9], [1.0, 1.0]), GROUPS[0].responses[1]))
    model = Model()
    assert [group.references for group in model.run([changed, *GROUPS[1:]], tmp_path)] == [(11.0, 3.0), *EXPECTED[1:]]
    assert model.asked == 2


def test_a_file_cut_short_is_made_again(tmp_path: Path) -> None:
    Model().run(GROUPS, tmp_path)
    (_, path), *_ = storage.parquet_files(str(tmp_path))
    Path(path).write_bytes(Path(path).read_bytes()[:100])
    model = Model()
    assert [group.references for group in model.run(GROUPS, tmp_path)] == EXPECTED
    assert model.asked == 14
