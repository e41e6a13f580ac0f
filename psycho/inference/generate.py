"""From requests to response rows: the stage that answers on a vLLM worker, and what every kind of model shares.

Answers come as they are finished; each is cut from its reasoning, marked, and, where the policy says so, asked for
again with a new seed. Remote models (`remote.py`) make their rows with the same functions.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyarrow as pa

from psycho.config import MarksConfig, PriceConfig, SamplingConfig
from psycho.inference import marks
from psycho.inference.worker import Completion, EngineSpec, VLLMWorker
from psycho.progress import Reporter
from psycho.schema import RESPONSE, stable_seed

ANSWER = RESPONSE.append(pa.field("spent_tokens", pa.int64())).append(pa.field("error", pa.string()))
"""A response, the output tokens of all its tries, and why it is left out."""
_REPORT_EVERY_S = 0.5


@dataclass(frozen=True)
class Served:
    """How one model of the pool is asked."""

    model: str
    sampling: SamplingConfig
    price: PriceConfig
    variables: Mapping[str, Any]


@dataclass(frozen=True)
class Try:
    """A request on its way: the seeds asked so far, and what they cost in money and in output tokens."""

    request: Mapping[str, Any]
    attempts: int = 0
    cost: float = 0.0
    tokens: int = 0

    @property
    def seed(self) -> int:
        """The request's own seed first, then seeds made from it."""
        own = int(self.request["seed"])
        return own if not self.attempts else stable_seed("again", own, self.attempts)


class GenerateBatch:
    """Rows of `schema.REQUEST` to rows of `ANSWER`, as they are finished (a stage of `batch.py`)."""

    SCHEMA = ANSWER

    def __init__(
        self, spec: EngineSpec, models: Mapping[str, Served], policy: MarksConfig, reporter: Reporter | None
    ) -> None:
        self._worker = VLLMWorker(spec)
        self._models, self._policy = dict(models), policy
        self._reports = _Reports(reporter)

    def __call__(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
        for model, group in groupby(sorted(batch.to_pylist(), key=lambda r: r["model"]), key=lambda r: r["model"]):
            waiting = [Try(request) for request in group]
            while waiting:
                again: list[Try] = []
                for row, unsettled in self._ask(self._models[model], waiting):
                    if unsettled is not None:
                        again.append(unsettled)
                        continue
                    self._reports.add(row["spent_tokens"])
                    yield row
                waiting = again
        self._reports.send()

    def _ask(self, served: Served, tries: Sequence[Try]) -> Iterator[tuple[dict[str, Any], Try | None]]:
        talks = [json.loads(t.request["messages"]) for t in tries]
        seeds = [t.seed for t in tries]
        for index, answer in self._worker.stream(
            served.model, talks, seeds, served.sampling, variables=served.variables
        ):
            yield settle(tries[index], answer, served.price, self._policy)


class _Reports:
    """Rows and tokens gathered for a moment: a message for each row would cost more than the row."""

    def __init__(self, reporter: Reporter | None) -> None:
        self._reporter, self._lock = reporter, threading.Lock()
        self._rows = self._tokens = 0
        self._sent = time.monotonic()

    def add(self, tokens: int) -> None:
        with self._lock:
            self._rows, self._tokens = self._rows + 1, self._tokens + tokens
        if time.monotonic() - self._sent > _REPORT_EVERY_S:
            self.send()

    def send(self) -> None:
        with self._lock:
            rows, tokens, self._rows, self._tokens = self._rows, self._tokens, 0, 0
            self._sent = time.monotonic()
        if self._reporter and rows:
            self._reporter.add(rows, tokens)


def settle(
    asked: Try, answer: Completion, price: PriceConfig, policy: MarksConfig
) -> tuple[dict[str, Any], Try | None]:
    """The row of an answer; beside it what is to be asked again, where the policy wants a new seed."""
    text, reasoning = marks.split_reasoning(answer.text)
    reasoning = "\n".join(part for part in (answer.reasoning, reasoning) if part) or None
    status = None if answer.error else marks.mark(text, answer.finish_reason)
    cost, tokens = asked.cost + cost_of(answer, price), asked.tokens + answer.output_tokens
    now = replace(asked, attempts=asked.attempts + 1, cost=cost, tokens=tokens)
    wish = "keep" if status is None or status == marks.OK else getattr(policy, status)
    row = {
        **{name: asked.request[name] for name in ("request_id", "speech_id", "split", "model", "sample")},
        "seed": asked.seed,
        "response": text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "status": status,
        "reasoning": reasoning,
        "cost": now.cost,
        "attempts": now.attempts,
        "spent_tokens": now.tokens,
        "error": answer.error or _reason(text, status, wish),
    }
    return row, now if wish == "retry" and now.attempts <= policy.retries else None


def _reason(text: str, status: str | None, wish: str) -> str | None:
    if not text:
        return "empty response" if status == marks.EMPTY else f"{status} response without text"
    return f"{status} response" if wish == "quarantine" else None


def cost_of(answer: Completion, price: PriceConfig) -> float:
    """What an answer cost, in the currency of the prices."""
    return (answer.prompt_tokens * price.input + answer.output_tokens * price.output) / 1e6


def tally(answers: pa.Table) -> dict[str, Any]:
    """What the manifest says of all answers, retried and quarantined ones included: `status`, `by_model` and `cost`."""
    names = ("model", "status", "spent_tokens", "cost")
    rows = list(zip(*(answers[name].to_pylist() for name in names), strict=True))
    by_model: dict[str, dict[str, float]] = {}
    for model, status, tokens, cost in sorted(rows, key=lambda row: row[0]):
        counts = dict.fromkeys(("responses", "tokens", "cost", *marks.STATUSES[1:], "failed"), 0.0)
        found = by_model.setdefault(model, counts)
        found["responses"] += 1
        found["tokens"] += tokens
        found["cost"] += cost or 0.0
        if status != marks.OK:
            found[status or "failed"] += 1
    statuses = [status or "failed" for _, status, *_ in rows]
    return {
        "status": {name: statuses.count(name) for name in (*marks.STATUSES, "failed")},
        "by_model": {
            model: {k: round(v, 6) if k == "cost" else int(v) for k, v in found.items()}
            for model, found in by_model.items()
        },
        "cost": round(sum(cost or 0.0 for *_, cost in rows), 6),
    }
