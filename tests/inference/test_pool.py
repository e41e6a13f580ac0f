"""The pool of workers: answers in order, and every token that they took counted."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from psycho.config import InferenceConfig, JudgeConfig, SamplingConfig
from psycho.inference import pool as pooling
from psycho.inference.pool import WorkerPool, _PoolWorker
from psycho.inference.worker import Completion, VLLMWorker
from psycho.judging.rubric import answer, dump
from psycho.principles import STEMS

WHOLE = dump(answer(dict.fromkeys(STEMS, 4), dict.fromkeys(STEMS, "none")))
JUDGE = JudgeConfig(model="m", template="compact", retries=1)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> _PoolWorker:
    """A worker whose engine answers each prompt nonsense first (7 tokens), and then as it should (11)."""
    seen: set[str] = set()

    def generate(self: Any, conversations: Sequence[Any], *_: Any, **__: Any) -> list[Completion]:
        found = []
        for messages in map(repr, conversations):
            found.append(Completion(WHOLE if messages in seen else "{", "stop", 5, 11 if messages in seen else 7))
            seen.add(messages)
        return found

    monkeypatch.setattr(VLLMWorker, "__init__", lambda self, spec: None)
    monkeypatch.setattr(VLLMWorker, "use", lambda self, model, runner="generate": None)
    monkeypatch.setattr(VLLMWorker, "generate", generate)
    return _PoolWorker(None)  # type: ignore[arg-type]


def test_the_tokens_of_all_that_was_asked_are_counted_once(worker: _PoolWorker) -> None:
    verdicts, tokens = worker.compare("m", JUDGE, [("s", "one", "other")], [1])
    assert verdicts != [None] and tokens == 2 * (7 + 11)  # both sides in turn, each asked twice
    assert worker.rate("m", JUDGE, [("s", "third")], [1])[1] == 7 + 11
    talks = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert worker.sample("m", talks, [1, 2], SamplingConfig())[1] == 2 * 7


def test_a_pool_adds_up_the_tokens_of_its_workers(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting:
        def __init__(self, spec: Any) -> None:
            pass

        def compare(self, model: str, judge: Any, items: list[Any], seeds: list[int]) -> tuple[list[Any], int]:
            return [item[0] for item in items], 10 * len(items)

        def read(self, model: str, rows: list[list[int]]) -> tuple[list[Any], int]:
            return [[0.0] for _ in rows], 0

    monkeypatch.setattr(pooling, "_PoolWorker", Counting)
    told: list[tuple[int, int]] = []
    reporter: Any = SimpleNamespace(add=lambda rows, tokens: told.append((rows, tokens)))
    config = InferenceConfig(workers=2, batch_size=2, cpus_per_worker=0.5, gpus_per_worker=0)
    items = [(str(number), "one", "other") for number in range(7)]
    with WorkerPool(config, 0) as pool:
        found: list[Any] = pool.compare("m", JUDGE, items, list(range(7)), reporter)
        assert found == [item[0] for item in items]
        assert pool.output_tokens == 70 and [sum(told) for told in zip(*told, strict=True)] == [7, 70]
        assert pool.read_by_each("m", [[1, 2]]) == [[[0.0]], [[0.0]]] and pool.read("m", [[1, 2]]) == [[0.0]]
        assert pool.output_tokens == 70
