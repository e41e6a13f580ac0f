"""The one thread that touches a vLLM engine, and keeps it full.

Several batches are in the engine at once, so that the long answers of one are no gap for the next: requests queue
here, the engine gets new ones as old ones finish, and each answer goes to its caller the moment it is there. A request
for another model waits until the engine is empty, then the weights change.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from psycho.errors import BadInput, StageFailed

T = TypeVar("T")
_LOST_RANK = ("Executor failed", "Worker failed")  # vLLM's executor of several processes
_SPARE = 16  # requests beyond the engine's slots, so that a slot never waits for us


@dataclass(frozen=True)
class _Ask:
    model: str
    prompt: Any
    params: Any
    place: int
    box: queue.SimpleQueue[tuple[int, Any]]


@dataclass(frozen=True)
class _Work:
    call: Callable[[], Any]
    box: queue.SimpleQueue[tuple[int, Any]]


class EngineFailed(Exception):
    """The engine raised while it worked; nothing it holds will be answered. Restart the process.

    `cause` is an error of ours that it comes from: what an exception was raised from does not travel to the driver.
    """

    cause: Exception | None = None


def leave_if_dead(error: BaseException) -> None:
    """End this process where the engine's own, or a rank of it, is gone: Ray gives what was asked to a fresh one."""
    for each in (error, error.__cause__):
        if type(each).__name__ == "EngineDeadError" or str(each).startswith(_LOST_RANK):
            os._exit(1)


class EngineLoop:
    """Owns the thread; `hold(model)` gives vLLM's `LLMEngine` with that model's weights in it."""

    def __init__(self, hold: Callable[[str], Any], slots: int) -> None:
        self._hold, self._room = hold, slots + _SPARE
        self._inbox: queue.SimpleQueue[_Ask | _Work] = queue.SimpleQueue()
        self._pending: deque[_Ask | _Work] = deque()
        self._running: dict[str, _Ask] = {}
        self._model, self._count = "", 0
        self._engine: Any = None
        self._failure: EngineFailed | None = None
        threading.Thread(target=self._serve, daemon=True, name="engine").start()

    def answers(self, model: str, prompts: Sequence[Any], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(place, vLLM's output or the error that refused it) of each prompt, as they finish.

        Raises:
            EngineFailed: the engine died.
        """
        box: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        for place, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
            self._inbox.put(_Ask(model, prompt, own, place, box))
        for _ in prompts:
            place, outcome = box.get()
            if isinstance(outcome, EngineFailed):
                raise outcome
            yield place, outcome

    def run(self, call: Callable[[], T]) -> T:
        """Run something on the engine's thread once the engine is empty of what was asked before."""
        box: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._inbox.put(_Work(call, box))
        failed, outcome = box.get()
        if failed:
            raise outcome
        return outcome

    def _serve(self) -> None:
        while True:
            self._take()
            try:
                if self._failure:
                    raise self._failure
                self._admit()
                self._step()
            except BaseException as error:  # to whoever waits; this thread must outlive it to say so
                self._fail(error)

    def _take(self) -> None:
        if not self._running and not self._pending:
            self._pending.append(self._inbox.get())
        while not self._inbox.empty():
            self._pending.append(self._inbox.get())

    def _admit(self) -> None:
        while self._pending and len(self._running) < self._room:
            head = self._pending[0]
            if isinstance(head, _Work) or head.model != self._model:
                if self._running:
                    return
                if isinstance(head, _Work):
                    self._pending.popleft()
                    self._do(head)
                    continue
                self._engine = None  # the last to know it, where another is started: its memory must be free by then
                self._engine, self._model = self._hold(head.model), head.model
            self._pending.popleft()
            self._add(head)

    def _do(self, work: _Work) -> None:
        self._engine, self._model = None, ""  # whatever it does, the next request asks for its model anew
        try:
            work.box.put((0, work.call()))
        except BaseException as error:
            work.box.put((1, error))

    def _add(self, ask: _Ask) -> None:
        name = str(self._count)
        self._count += 1
        self._running[name] = ask  # from here on, or nobody would tell it of an engine that dies over it
        try:
            self._engine.add_request(name, ask.prompt, ask.params)
        except ValueError as error:  # this request is refused, the others are served
            del self._running[name]
            ask.box.put((ask.place, error))

    def _step(self) -> None:
        if not self._running:
            return
        for output in self._engine.step():
            if output.finished:
                ask = self._running.pop(output.request_id)
                ask.box.put((ask.place, output))

    def _fail(self, error: BaseException) -> None:
        if not self._failure:
            self._failure = EngineFailed(f"the engine failed: {type(error).__name__}: {error}")
            self._failure.__cause__ = error
            if isinstance(error, BadInput | StageFailed):
                self._failure.cause = error
        waiting: list[_Ask | _Work] = [*self._running.values(), *self._pending]
        for item in waiting:
            item.box.put((getattr(item, "place", 1), self._failure))
        self._running.clear()
        self._pending.clear()
