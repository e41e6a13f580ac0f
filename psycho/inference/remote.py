"""Responses of remote models: many requests open at once, in one asyncio loop, within pace and budget.

One loop for all remote models of the run, because limits and budget are the run's. Every request ends once, as an
answer or as an error that quarantines it; rows are on disk within a second, and what is on disk is not asked for (nor
paid for) again. A try that was lost after it was sent is booked at the most it can have cost.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pyarrow as pa

from psycho import storage
from psycho.config import GenerationConfig, ModelConfig
from psycho.errors import StageFailed
from psycho.inference.endpoint import Failed, api_key, most_tokens, payload, read
from psycho.inference.generate import ANSWER, Try, cost_of, settle
from psycho.inference.limits import LONGEST_PAUSE_S, Budget, BudgetSpent, Pace, backoff_s, retry_after_s
from psycho.inference.worker import Completion
from psycho.progress import Reporter
from psycho.waiting import wait_for

_GAVE_UP = "gave up after"
_WRITE_EVERY_S, _WRITE_ROWS = 1.0, 16
_LOST = "lost_cost.log"
_DEAD_AFTER = 10  # requests in a row that all their tries left without an answer


def ask_remote(
    generation: GenerationConfig, requests: pa.Table, folder: str, spent: float, reporter: Reporter | None = None
) -> None:
    """Answer the requests of the pool's remote models into Parquet files below `folder`.

    Args:
        spent: what the stage has cost before, out of the same budget.

    Raises:
        BadInput: a key or model is refused, or the budget is spent; what was answered is kept.
        StageFailed: an endpoint answers nothing.
    """
    entries = [entry for entry in generation.pool if entry.remote]
    sink = _Sink(folder, reporter)
    limit = max(e.remote.tries * (e.remote.timeout_s + e.remote.max_backoff_s) for e in entries if e.remote)
    wait_for(
        lambda: asyncio.run(_ask_all(generation, entries, requests.to_pylist(), sink, spent)),
        progress=lambda: sink.rows,
        what="an answer of a remote model",
        start_s=limit + LONGEST_PAUSE_S,
        step_s=limit + LONGEST_PAUSE_S,
    )


def lost_cost(folder: str) -> float:
    """What tries cost that left no row: their requests were stopped half-way, and are asked again."""
    return sum(float(line) for line in (storage.read_text(storage.join(folder, _LOST)) or "").split())


async def _ask_all(
    generation: GenerationConfig, entries: Sequence[ModelConfig], requests: list[Any], sink: _Sink, spent: float
) -> None:
    budget = Budget(generation.budget, spent)
    writing = asyncio.create_task(sink.write_now_and_then())
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    try:
        async with httpx.AsyncClient(limits=limits, timeout=None, follow_redirects=False) as client:
            stop = asyncio.Event()
            models = [_Model(entry, generation, client, budget, sink, stop) for entry in entries]
            mine = [[Try(request) for request in requests if request["model"] == e.name] for e in entries]
            await _end_together([model.serve(waiting) for model, waiting in zip(models, mine, strict=True)])
    finally:
        writing.cancel()
        sink.write()


async def _end_together(work: Sequence[Any]) -> None:
    """Wait for all; where one fails the others end what they have begun, and the failure that says most is raised."""
    results = await asyncio.gather(*work, return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    if failures:
        raise min(failures, key=lambda error: (isinstance(error, _Stopped), isinstance(error, BudgetSpent)))


class _Stopped(Exception):
    """Another request's failure ended the run."""


class _Model:
    """One pool entry at work."""

    def __init__(
        self,
        entry: ModelConfig,
        generation: GenerationConfig,
        client: httpx.AsyncClient,
        budget: Budget,
        sink: _Sink,
        stop: asyncio.Event,
    ) -> None:
        assert entry.remote is not None
        self._entry, self._remote, self._client = entry, entry.remote, client
        self._sampling, self._policy = entry.sampling or generation.sampling, generation.marks
        self._budget, self._sink, self._stop = budget, sink, stop
        self._requests = Pace(entry.remote.requests_per_minute)
        self._tokens = Pace(entry.remote.tokens_per_minute)
        self._url = f"{entry.remote.url.rstrip('/')}/chat/completions"
        key = api_key(entry)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._given_up: list[dict[str, Any]] = []

    async def serve(self, waiting: Sequence[Try]) -> None:
        """Answer all of these, `concurrency` at a time."""
        queue = deque(waiting)
        try:
            await _end_together([self._work(queue) for _ in range(min(self._remote.concurrency, len(queue)))])
        except BaseException:  # whom it gave up may fare better next time
            self._sink.book_lost(sum(lost["cost"] for lost in self._given_up))
            raise
        self._sink.add(self._given_up)

    async def _work(self, queue: deque[Try]) -> None:
        while queue and not self._stop.is_set():
            try:
                await self._answer(queue.popleft())
            except BaseException:
                self._stop.set()
                raise

    async def _answer(self, asked: Try) -> None:
        """Bring one request to its end; new seeds included."""
        waiting: Try | None = asked
        row: dict[str, Any] | None = None
        while waiting is not None:
            try:
                answer, cost = await self._complete(waiting)
            except (BudgetSpent, _Stopped):
                self._sink.add([row] if row else [])  # there is an answer, only not the one we hoped for
                raise
            waiting = replace(waiting, cost=waiting.cost + cost - cost_of(answer, self._entry.price))
            row, waiting = settle(waiting, answer, self._entry.price, self._policy)
        assert row is not None
        if not (answer.error or "").startswith(_GAVE_UP):
            self._sink.add([*self._given_up, row])
            self._given_up.clear()
            return
        self._given_up.append(row)
        if len(self._given_up) >= max(_DEAD_AFTER, self._remote.concurrency):
            raise StageFailed(
                f"generation.pool ({self._entry.name}): {self._remote.url} answers nothing ({answer.error}); answers "
                "so far are kept, give the same command again when it is back"
            )

    async def _complete(self, asked: Try) -> tuple[Completion, float]:
        """The endpoint's answer after as many tries as it takes, and what they cost together."""
        messages = json.loads(asked.request["messages"])
        body = payload(self._entry, self._sampling, messages, asked.seed)
        prompt, output = most_tokens(messages, self._sampling)
        price = self._entry.price
        most = (prompt * price.input + output * price.output) / 1e6
        rng, cost, reason = random.Random(asked.seed), 0.0, ""
        for failures in range(1, self._remote.tries + 1):
            try:
                result, used = await self._try(body, prompt, output, most)
            except (BudgetSpent, _Stopped):
                self._sink.book_lost(cost)
                raise
            cost += used
            if isinstance(result, Completion):
                return result, cost
            reason = result.reason
            if failures < self._remote.tries:
                asked_for = retry_after_s(result.retry_after, time.time())
                if asked_for:
                    self._requests.pause(min(asked_for, LONGEST_PAUSE_S))
                wait = backoff_s(failures, self._remote.backoff_s, self._remote.max_backoff_s, asked_for, rng)
                with suppress(TimeoutError):  # the end of the run ends the wait
                    await asyncio.wait_for(self._stop.wait(), wait)
        return Completion(error=f"{_GAVE_UP} {self._remote.tries} tries: {reason}"), cost

    async def _try(
        self, body: Mapping[str, Any], prompt: int, output: int, most: float
    ) -> tuple[Completion | Failed, float]:
        """One try within pace and budget, and what it cost."""
        if self._stop.is_set():
            raise _Stopped
        await self._budget.set_aside(most)
        used = most
        try:
            await self._requests.take()
            await self._tokens.take(prompt + output)
            result = await self._send(body)
            used = cost_of(result, self._entry.price) if isinstance(result, Completion) else most * result.billed
        finally:
            await self._budget.settle(most, used)
        if isinstance(result, Completion):
            self._tokens.give_back(prompt + output - result.prompt_tokens - result.output_tokens)
        elif not result.billed:
            self._tokens.give_back(prompt + output)
        return result, used

    async def _send(self, body: Mapping[str, Any]) -> Completion | Failed:
        try:
            async with asyncio.timeout(self._remote.timeout_s):
                response = await self._client.post(self._url, json=body, headers=self._headers)
        except TimeoutError:
            return Failed(f"no answer within {self._remote.timeout_s:g} s", billed=True)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            return Failed(type(error).__name__)
        except httpx.HTTPError as error:
            return Failed(type(error).__name__, billed=True)
        return read(self._entry, response.status_code, response.headers, response.content)


class _Sink:
    """Rows on their way to disk."""

    def __init__(self, folder: str, reporter: Reporter | None) -> None:
        self.rows = 0
        self._folder, self._reporter = folder, reporter
        self._buffer: list[dict[str, Any]] = []

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        self._buffer += rows
        self.rows += len(rows)
        if len(self._buffer) >= _WRITE_ROWS:
            self.write()
        if self._reporter and rows:
            self._reporter.add(len(rows), sum(row["spent_tokens"] for row in rows))

    def book_lost(self, cost: float) -> None:
        """Money that went into requests which have no row yet."""
        if cost:
            storage.append_line(storage.join(self._folder, _LOST), repr(cost))

    async def write_now_and_then(self) -> None:
        with suppress(asyncio.CancelledError):
            while True:
                await asyncio.sleep(_WRITE_EVERY_S)
                with suppress(OSError):  # the next row, or the end, meets it again and says so
                    self.write()

    def write(self) -> None:
        """One file of all that came since the last."""
        if self._buffer:
            name = storage.join(self._folder, "remote", f"{uuid.uuid4().hex}.parquet")
            storage.write_rows(pa.Table.from_pylist(self._buffer, schema=ANSWER), name)
            self._buffer = []
