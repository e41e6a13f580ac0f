"""What the tests' own pools share: samples come in two chunks, the later first; scoring begins with the first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from psycho.inference.pool import Begun
from psycho.inference.worker import Completion


def in_chunks(answers: Sequence[Completion], also: Callable[[int, list[Completion]], None] | None) -> list[Completion]:
    """As a pool's `sample` gives its answers."""
    half = len(answers) // 2
    if also:
        also(half, list(answers[half:]))
        also(0, list(answers[:half]))
    return list(answers)


class ScoringPool:
    """`classify(model, conversations)` and `rate(model, judge, items, seeds)` of a subclass, a few at a time."""

    classify: Callable[..., list[list[float] | None]]
    rate: Callable[..., list[Any]]

    def classifying(self, model: str, reporter: Any) -> Begun:
        found: dict[int, list[Any]] = {}
        return Begun(lambda place, talks: found.update({place: self.classify(model, talks)}), lambda: found)

    def rating(self, model: str, judge: Any, reporter: Any) -> Begun:
        found: dict[int, list[Any]] = {}

        def add(place: int, items: Any, seeds: Any) -> None:
            found[place] = [(rating, 0) for rating in self.rate(model, judge, items, seeds)]

        return Begun(add, lambda: found)

    def rate_counted(self, model: str, judge: Any, items: Any, seeds: Any, reporter: Any) -> list[Any]:
        return [(rating, 0) for rating in self.rate(model, judge, items, seeds)]
