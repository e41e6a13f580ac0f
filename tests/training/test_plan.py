"""The plan: every example once, the same number of micro-steps on every rank, the same everywhere from one seed."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.training.plan import Step, learning_rate, micro_steps, plan_epoch

_WINDOW = 8


@st.composite
def plans(draw: Any) -> dict[str, Any]:
    return {
        "lengths": draw(st.lists(st.integers(1, 50), max_size=120)),
        "batch_size": draw(st.integers(1, 12)),
        "workers": draw(st.integers(1, 5)),
        "micro_batch_size": draw(st.none() | st.integers(1, 7)),
        "seed": draw(st.integers(0, 2**31)),
        "shuffle": draw(st.booleans()),
    }


def _ranks(plan: dict[str, Any]) -> list[list[Step]]:
    return [plan_epoch(rank=rank, **plan) for rank in range(plan["workers"])]


@given(plans())
def test_every_example_once_over_all_ranks(plan: dict[str, Any]) -> None:
    ranks = _ranks(plan)
    seen = [index for steps in ranks for step in steps for micro in step.micro_batches for index in micro]
    assert sorted(seen) == list(range(len(plan["lengths"])))
    assert sorted(chain.from_iterable(step.everything for step in ranks[0])) == list(range(len(plan["lengths"])))


@given(plans())
def test_every_rank_runs_the_same_number_of_micro_steps(plan: dict[str, Any]) -> None:
    """Unequal counts hang ZeRO in its first collective."""
    count = micro_steps(plan["batch_size"], plan["workers"], plan["micro_batch_size"])
    shapes = {tuple(len(step.micro_batches) for step in steps) for steps in _ranks(plan)}
    assert len(shapes) == 1
    assert set(shapes.pop()) <= {count}


@given(plans())
def test_steps_are_the_same_on_every_rank(plan: dict[str, Any]) -> None:
    ranks = _ranks(plan)
    for together in zip(*ranks, strict=True):
        assert len({step.everything for step in together}) == 1
        mine = chain.from_iterable(chain.from_iterable(step.micro_batches) for step in together)
        assert sorted(mine) == sorted(together[0].everything)


@given(plans())
def test_no_batch_or_micro_batch_is_over_its_size(plan: dict[str, Any]) -> None:
    limit = plan["micro_batch_size"] or -(-plan["batch_size"] // plan["workers"])
    for steps in _ranks(plan):
        for step in steps:
            assert 1 <= len(step.everything) <= plan["batch_size"]
            assert all(len(micro) <= limit for micro in step.micro_batches)
    total = sum(len(step.everything) for step in steps)
    assert len(steps) >= math.ceil(total / plan["batch_size"])


@given(plans())
def test_the_seed_decides(plan: dict[str, Any]) -> None:
    assert _ranks(plan) == _ranks(plan)


def test_another_seed_is_another_order() -> None:
    lengths = list(range(1, 101))
    first, second = (plan_epoch(lengths, 8, 1, 0, None, seed) for seed in (0, 1))
    assert first != second


@given(plans())
def test_without_shuffling_windows_keep_their_order(plan: dict[str, Any]) -> None:
    """A curriculum: what comes `_WINDOW` batches later in the data comes later in training."""
    steps = plan_epoch(rank=0, **(plan | {"shuffle": False}))
    size = plan["batch_size"] * _WINDOW
    windows = [{index // size for index in step.everything} for step in steps]
    assert all(len(window) == 1 for window in windows)
    order = [window.pop() for window in windows]
    assert order == sorted(order)


def test_batches_hold_examples_of_similar_length() -> None:
    lengths = [1, 50] * 32
    for step in plan_epoch(lengths, 8, 1, 0, None, 0):
        assert len({lengths[index] for index in step.everything}) == 1


def test_short_batches_are_not_always_last() -> None:
    """Within a window the order of lengths is mixed, or the last steps would all be long."""
    steps = plan_epoch(list(range(64)), 8, 1, 0, None, 0)
    firsts = [min(step.everything) for step in steps]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(
    ("batch", "workers", "micro", "count"), [(8, 1, None, 1), (8, 1, 1, 8), (8, 2, None, 1), (8, 3, 2, 2), (5, 2, 2, 2)]
)
def test_micro_steps(batch: int, workers: int, micro: int | None, count: int) -> None:
    assert micro_steps(batch, workers, micro) == count


@given(st.integers(1, 400), st.floats(0, 0.99), st.sampled_from(["cosine", "linear", "constant"]))
def test_learning_rate_never_leaves_its_bounds(steps: int, warmup: float, schedule: str) -> None:
    rates = [learning_rate(step, steps, 2.0, warmup, schedule) for step in range(steps)]
    assert all(0 < rate <= 2.0 for rate in rates)
    assert max(rates) == 2.0
    peak = rates.index(2.0)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_learning_rate_ends_at_zero(schedule: str) -> None:
    assert learning_rate(200, 200, 1.0, 0.1, schedule) == pytest.approx(0, abs=1e-12)
    assert learning_rate(199, 200, 1.0, 0.1, schedule) < 0.01


def test_learning_rate_points() -> None:
    assert [learning_rate(step, 100, 1.0, 0.04, "constant") for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(99, 100, 1.0, 0.04, "constant") == 1.0
    assert learning_rate(50, 100, 1.0, 0.0, "cosine") == pytest.approx(0.5)
    assert learning_rate(25, 100, 1.0, 0.0, "linear") == pytest.approx(0.75)
    assert learning_rate(25, 100, 1.0, 0.0, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
