"""Calls to the workers of a pool: each worker has several at once, and the next goes to whoever has room.

A worker that had one chunk at a time would let its engine run empty at the end of each, waiting for the longest answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import ray

from psycho.errors import StageFailed, WaitTimedOut

Send = Callable[..., Any]
"""Asks an actor, its first argument; gives Ray's reference to (answers, output tokens)."""


class Calls:
    """Chunks of one kind of work; more may be added while others are answered."""

    def __init__(
        self,
        actors: Sequence[Any],
        what: str,
        limit_s: float,
        at_once: int,
        done: Callable[[int, list[Any], int], None],
        setting: str = "",
    ) -> None:
        """
        Args:
            what: what the workers are doing, for errors.
            limit_s: the longest wait for any answer.
            at_once: calls that a worker may have.
            done: told the place, the answers and the output tokens of each chunk as soon as they are there.
            setting: what the limit comes from, for errors.
        """
        self._what, self._limit_s, self._done, self._setting = what, limit_s, done, setting
        self._room = deque([*actors] * at_once)  # a worker is in it as often as it can take another call
        self._waiting: deque[tuple[int, Send, tuple[Any, ...]]] = deque()
        self._running: dict[Any, tuple[Any, int]] = {}
        self._answers: dict[int, list[Any]] = {}

    def add(self, place: int, send: Send, *arguments: Any) -> None:
        """Ask `send(actor, *arguments)` now, or when somebody has room.

        Raises:
            StageFailed: a worker died too often.
        """
        self._waiting.append((place, send, arguments))
        while self._running and self._take(0):
            pass
        self._hand_out()

    def finish(self) -> dict[int, list[Any]]:
        """All answers by the place of their chunk, in order of places.

        Raises:
            WaitTimedOut: nobody answered within the limit.
            StageFailed: a worker died too often.
        """
        while self._running:
            if not self._take(self._limit_s):
                raise WaitTimedOut(f"a vLLM worker that is {self._what}", self._limit_s, self._setting)
            self._hand_out()
        return dict(sorted(self._answers.items()))

    def _hand_out(self) -> None:
        while self._waiting and self._room:
            actor = self._room.popleft()
            place, send, arguments = self._waiting.popleft()
            self._running[send(actor, *arguments)] = actor, place

    def _take(self, limit_s: float) -> bool:
        """Take what has been answered; False where nothing was within the limit."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=limit_s)
        for reference in ready:
            actor, place = self._running.pop(reference)
            try:
                answers, tokens = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                raise StageFailed(f"a vLLM worker died while {self._what}; give the same command again") from error
            self._room.append(actor)
            self._answers[place] = answers
            self._done(place, answers, tokens)
        return bool(ready)
