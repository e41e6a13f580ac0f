"""The plan: every group once, the same number of micro-steps on every rank, the same steps whatever the ranks."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.training.plan import Step, learning_rate, plan_epoch


@st.composite
def plans(draw: Any) -> dict[str, Any]:
    groups = draw(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), max_size=120))
    return {
        "tokens": [tokens for tokens, _ in groups],
        "counts": [count for _, count in groups],
        "batch_size": draw(st.integers(1, 24)),
        "workers": draw(st.integers(1, 5)),
        "budget": draw(st.integers(50, 300)),
        "seed": draw(st.integers(0, 2**31)),
        "shuffle": draw(st.booleans()),
    }


def _steps(plan: dict[str, Any], **changes: Any) -> list[Step]:
    return list(plan_epoch(**(plan | changes)))


@given(plans())
def test_every_group_once(plan: dict[str, Any]) -> None:
    assert sorted(index for step in _steps(plan) for index in step.groups) == list(range(len(plan["tokens"])))


@given(plans())
def test_every_rank_runs_the_same_number_of_micro_steps(plan: dict[str, Any]) -> None:
    """Unequal counts hang ZeRO in its first collective."""
    for step in _steps(plan):
        parts = [step.of(rank, plan["workers"]) for rank in range(plan["workers"])]
        assert len({len(part) for part in parts}) == 1
        assert sorted(i for part in parts for bin_ in part for i in bin_) == sorted(step.groups)


@given(plans())
def test_no_bin_is_over_the_budget(plan: dict[str, Any]) -> None:
    for step in _steps(plan):
        assert all(sum(plan["tokens"][i] for i in bin_) <= plan["budget"] for bin_ in step.bins)


@given(plans())
def test_steps_are_the_same_whatever_the_workers_and_the_budget(plan: dict[str, Any]) -> None:
    """1 x 8, 8 x 1 and 4 x 2 are the same optimizer steps."""
    one = [sorted(step.groups) for step in _steps(plan, workers=1, budget=10_000)]
    assert [sorted(step.groups) for step in _steps(plan)] == one


@given(plans())
def test_a_step_is_about_a_batch(plan: dict[str, Any]) -> None:
    """Off by less than the largest group and an even share of the rest; no error adds up over an epoch."""
    total, largest = sum(plan["counts"]), max(plan["counts"], default=0)
    steps = _steps(plan)
    aim = total / max(1, round(total / plan["batch_size"]))
    for step in steps:
        assert sum(plan["counts"][i] for i in step.groups) <= aim + largest
    assert len(steps) <= max(1, round(total / plan["batch_size"]))


@given(plans())
def test_the_seed_decides(plan: dict[str, Any]) -> None:
    assert _steps(plan) == _steps(plan)


def test_another_seed_is_another_order() -> None:
    first, second = (list(plan_epoch(range(1, 101), [1] * 100, 8, 1, 200, seed)) for seed in (0, 1))
    assert first != second


def test_without_shuffling_the_order_is_kept() -> None:
    """A curriculum: what comes later in the data comes later in training."""
    steps = list(plan_epoch([5] * 64, [1] * 64, 8, 2, 100, 0, shuffle=False))
    assert [sorted(step.groups) for step in steps] == [list(range(s, s + 8)) for s in range(0, 64, 8)]


def test_bins_are_full_and_even() -> None:
    """At the domain's lengths: 97 % of what all ranks wait for is work, and ranks are within 1 % of each other."""
    import random

    rng = random.Random(0)
    sizes = [round(max(100, rng.gauss(1190, 190))) for _ in range(4000)]
    counts = [rng.randint(1, 5) for _ in sizes]
    used, waited, loads = 0, 0, [0] * 8
    for step in plan_epoch(sizes, counts, 2048, 8, 16384, 0):
        waited += len(step.bins) * max(sum(sizes[i] for i in bin_) for bin_ in step.bins)
        for rank in range(8):
            load = sum(sizes[i] for bin_ in step.of(rank, 8) for i in bin_)
            loads[rank] += load
            used += load
    assert max(loads) / min(loads) < 1.01
    assert used / waited > 0.97


def test_a_group_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="60 tokens is over the budget of 50"):
        next(plan_epoch([10, 60], [1, 1], 2, 1, 50, 0))


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
