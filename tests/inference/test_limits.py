"""Pace, backoff and budget, on a clock of their own."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st

from psycho.inference.limits import LONGEST_PAUSE_S, Budget, BudgetSpent, Pace, backoff_s, retry_after_s


class Clock:
    """Time that passes only in sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def read(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


def paced(per_minute: float | None, units: list[float]) -> list[float]:
    clock = Clock()
    pace = Pace(per_minute, clock.read, clock.sleep)

    async def run() -> list[float]:
        times = []
        for amount in units:
            await pace.take(amount)
            times.append(clock.now)
        return times

    return asyncio.run(run())


def test_requests_keep_their_distance():
    assert paced(60, [1, 1, 1, 1]) == [0, 1, 2, 3]
    assert paced(600, [10, 20, 10]) == [0, 1, 3]
    assert paced(None, [1, 1e9, 1]) == [0, 0, 0]


@given(st.floats(1, 1e4), st.lists(st.floats(0, 100), max_size=40))
def test_never_more_a_minute_than_allowed(per_minute, units):
    times = paced(per_minute, units)
    for first in range(len(units)):
        for last in range(first, len(units)):
            used = sum(units[first:last])
            assert used <= per_minute / 60 * (times[last] - times[first]) + 1e-6 * (1 + used)


def test_what_was_not_used_is_given_back_and_a_pause_holds_all():
    clock = Clock()
    pace = Pace(60, clock.read, clock.sleep)

    async def run() -> None:
        await pace.take(30)
        pace.give_back(20)
        await pace.take(1)
        assert clock.now == 10
        pace.pause(100)
        await pace.take(1)
        assert clock.now == 110

    asyncio.run(run())


@given(st.integers(1, 60), st.integers(0, 99))
def test_backoff_doubles_within_its_jitter_and_its_limit(failures, seed):
    wait = backoff_s(failures, 1.0, 60.0, None, random.Random(seed))
    full = min(60.0, 2.0 ** (failures - 1))
    assert full / 2 <= wait <= full


def test_retry_after_is_heard():
    rng = random.Random(0)
    assert backoff_s(1, 1.0, 60.0, 90.0, rng) == 90.0
    assert backoff_s(1, 1.0, 60.0, 1e9, rng) == LONGEST_PAUSE_S
    assert len({backoff_s(3, 1.0, 60.0, None, rng) for _ in range(20)}) == 20
    assert retry_after_s("2.5", 0) == 2.5 and retry_after_s("-1", 0) == 0
    assert retry_after_s("Thu, 01 Jan 1970 00:01:00 GMT", 20.0) == 40.0
    assert retry_after_s(None, 0) is None and retry_after_s("soon", 0) is None


def test_a_budget_waits_for_what_is_set_aside_and_is_never_passed():
    budget = Budget(10.0, spent=2.0)
    costs: list[float] = []

    async def ask(most: float, cost: float) -> None:
        await budget.set_aside(most)
        await asyncio.sleep(0)
        await budget.settle(most, cost)
        costs.append(cost)
        assert budget.spent <= 10.0

    async def run() -> list[object]:
        return await asyncio.gather(*(ask(3.0, 1.0) for _ in range(9)), return_exceptions=True)

    failed = [result for result in asyncio.run(run()) if result is not None]
    assert len(costs) == 6 and budget.spent == 8.0  # the seventh might cost 3 and pass it
    assert len(failed) == 3 and all(isinstance(error, BudgetSpent) for error in failed)
    assert "budget of 10 is spent: 8.0000" in str(failed[0])
