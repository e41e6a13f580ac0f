"""The engine's thread on an engine that costs nothing: kept full, one model at a time, and it says when it dies."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from psycho.inference.loop import EngineFailed, EngineLoop


@dataclass
class Engine:
    """Each request takes as many steps as its prompt says; keeps a record of who was in it together."""

    model: str = ""
    running: dict[str, int] | None = None
    thread: set[int] | None = None
    together: list[int] | None = None
    mixed: bool = False
    poison: int | None = None

    def __post_init__(self) -> None:
        self.running, self.thread, self.together = {}, set(), []
        self.models: dict[str, str] = {}

    def hold(self, model: str) -> Engine:
        assert not self.running, "the weights changed under a request"
        self.model = model
        return self

    def add_request(self, name: str, prompt: int, params: str) -> None:
        self.thread.add(threading.get_ident())
        if prompt < 0:
            raise ValueError("a prompt that the engine refuses")
        assert params == self.model
        self.running[name] = prompt

    def step(self) -> list[Any]:
        self.together.append(len(self.running))
        done = []
        for name in list(self.running):
            self.running[name] -= 1
            if self.poison is not None and self.running[name] == self.poison:
                raise RuntimeError("the engine is dead")
            if self.running[name] <= 0:
                del self.running[name]
                done.append(SimpleNamespace(finished=True, request_id=name))
        return done


def ask(loop: EngineLoop, model: str, prompts: list[int]) -> list[int]:
    return [place for place, _ in loop.answers(model, prompts, [model] * len(prompts))]


def in_threads(calls: list[Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_answers_come_as_they_are_finished() -> None:
    loop = EngineLoop(Engine().hold, slots=8)
    assert ask(loop, "m", [5, 1, 3]) == [1, 2, 0]
    assert ask(loop, "m", []) == []


def gated(engine: Engine, slots: int, count: int) -> tuple[EngineLoop, Any]:
    """A loop that begins once so many requests are there, and what waits for them."""
    ready = threading.Event()

    def hold(model: str) -> Engine:
        assert ready.wait(30)
        return engine.hold(model)

    loop = EngineLoop(hold, slots)

    def wait() -> None:
        while loop._inbox.qsize() + len(loop._pending) < count:
            threading.Event().wait(0.01)
        ready.set()

    return loop, wait


def test_a_long_answer_leaves_no_gap() -> None:
    """Two batches at once: while the long answer of one goes on, the other's requests fill the engine."""
    engine = Engine()
    loop, wait = gated(engine, 4, 161)
    in_threads([lambda: ask(loop, "m", [60, *[2] * 80]), lambda: ask(loop, "m", [2] * 80), wait])
    assert engine.together == sorted(engine.together, reverse=True)
    assert engine.together[:16] == [4 + 16] * 16
    assert len(engine.together) == 60


def test_models_take_turns_and_never_mix() -> None:
    engine = Engine()
    loop, wait = gated(engine, 4, 60)
    calls = [lambda model=model: ask(loop, model, [3, 1, 2] * 5) for model in ("a", "b", "a", "c")]
    assert [sorted(places) for places in in_threads([*calls, wait])[:4]] == [list(range(15))] * 4
    assert len(engine.thread) == 1 and threading.get_ident() not in engine.thread


def test_one_refused_request_is_its_own_trouble() -> None:
    loop = EngineLoop(Engine().hold, slots=4)
    found = dict(loop.answers("m", [2, -1, 3], ["m"] * 3))
    assert isinstance(found[1], ValueError) and found[0].finished and found[2].finished


def test_work_waits_until_the_engine_is_empty_and_its_error_is_its_callers() -> None:
    engine = Engine()
    loop = EngineLoop(engine.hold, slots=4)
    left = in_threads([lambda: ask(loop, "m", [9] * 5), lambda: loop.run(lambda: len(engine.running))])
    assert left[1] == 0
    with pytest.raises(KeyError, match="none such"):
        loop.run(lambda: {}["none such"])
    assert ask(loop, "m", [1]) == [0]


def test_an_engine_that_dies_says_so_to_all_who_wait() -> None:
    engine = Engine()
    loop = EngineLoop(engine.hold, slots=4)
    engine.poison = 2

    def asked() -> str:
        with pytest.raises(EngineFailed, match="RuntimeError: the engine is dead"):
            ask(loop, "m", [4] * 30)
        return "told"

    assert in_threads([asked, asked]) == ["told", "told"]


def test_a_request_that_kills_the_engine_is_told_too() -> None:
    """It is in nobody's hands when it is added."""

    class Fragile(Engine):
        def add_request(self, name: str, prompt: int, params: str) -> None:
            raise RuntimeError("the engine is dead")

    loop = EngineLoop(Fragile().hold, slots=4)
    with pytest.raises(EngineFailed, match="RuntimeError: the engine is dead"):
        ask(loop, "m", [1])


@pytest.mark.parametrize("by", ["work", "request"])
def test_nobody_keeps_the_engine_that_another_follows(by: str) -> None:
    """Its weights and its cache are free before the next one asks for room."""
    known: list[weakref.ref[Engine]] = []
    alive: list[bool] = []

    def hold(model: str) -> Engine:
        gc.collect()
        alive.append(any(one() is not None for one in known))
        engine = Engine(model)
        known.append(weakref.ref(engine))
        return engine

    loop = EngineLoop(hold, slots=4)
    assert ask(loop, "a", [1, 2]) == [0, 1]
    if by == "work":
        loop.run(lambda: hold("b").model)
    else:
        assert ask(loop, "b", [1]) == [0]
    assert alive == [False, False]
