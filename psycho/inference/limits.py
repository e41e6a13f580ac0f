"""How fast and how far a remote model may be asked: pace, backoff, and a budget that is never passed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime

from psycho.errors import BadInput

LONGEST_PAUSE_S = 3600.0  # an endpoint that asks for more is taken at this


class Pace:
    """So many units a minute, evenly: each take waits for its place in the line. None: no limit."""

    def __init__(
        self,
        per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._each_s = 60 / per_minute if per_minute else 0.0
        self._clock, self._sleep = clock, sleep
        self._free_at = float("-inf")

    async def take(self, units: float = 1) -> None:
        """Wait until these units may be used."""
        start = max(self._free_at, self._clock())
        self._free_at = start + units * self._each_s
        wait = start - self._clock()
        if wait > 0:
            await self._sleep(wait)

    def give_back(self, units: float) -> None:
        """Units that were taken and not used (below zero: used and not taken)."""
        self._free_at -= units * self._each_s

    def pause(self, seconds: float) -> None:
        """Nobody goes before so many seconds have passed."""
        self._free_at = max(self._free_at, self._clock() + seconds)


def backoff_s(failures: int, first_s: float, longest_s: float, asked_s: float | None, rng: random.Random) -> float:
    """Seconds to wait after so many failures: doubling, half to all of it at random, and never less than asked for."""
    own = min(longest_s, first_s * 2 ** min(failures - 1, 30)) * rng.uniform(0.5, 1.0)
    return max(own, min(asked_s or 0.0, LONGEST_PAUSE_S))


def retry_after_s(header: str | None, now: float) -> float | None:
    """The header in seconds, given as a number or as a date (RFC 9110, 10.2.3); None where it says nothing."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except (ValueError, TypeError):
        return None


class BudgetSpent(BadInput):
    """The next request could pass the budget; `cost` is what the stage has cost so far."""

    def __init__(self, limit: float, cost: float) -> None:
        super().__init__(
            f"generation.budget of {limit:g} is spent: {cost:.4f} so far, and the next answer could pass it; "
            "answers so far are kept, raise generation.budget and give the same command again"
        )
        self.cost = cost


class Budget:
    """Money for remote answers. What a request may cost at most is set aside before it is sent."""

    def __init__(self, limit: float | None, spent: float = 0.0) -> None:
        self.limit, self.spent = limit, spent
        self._aside = 0.0
        self._changed = asyncio.Condition()

    async def set_aside(self, most: float) -> None:
        """Wait until `most` fits beside what others have set aside.

        Raises:
            BudgetSpent: it would not fit if all others came back unused.
        """
        async with self._changed:
            while self.limit is not None and self.spent + self._aside + most > self.limit * (1 + 1e-12):
                if self._aside <= 1e-12:
                    raise BudgetSpent(self.limit, self.spent)
                await self._changed.wait()
            self._aside += most

    async def settle(self, most: float, cost: float) -> None:
        """Give back what was set aside, and book what was used of it."""
        async with self._changed:
            self._aside -= most
            self.spent += cost
            self._changed.notify_all()
