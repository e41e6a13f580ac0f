"""The pool of workers: answers in order, and every token that they took counted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from psycho.config import InferenceConfig, JudgeConfig, SamplingConfig
from psycho.errors import WaitTimedOut
from psycho.inference import pool as pooling
from psycho.inference.calls import Calls
from psycho.inference.loop import EngineFailed
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

    monkeypatch.setattr(VLLMWorker, "__init__", lambda self, spec: vars(self).update(model="", in_transfer=False))
    monkeypatch.setattr(_PoolWorker, "use", lambda self, model, runner="generate": None)
    monkeypatch.setattr(VLLMWorker, "generate", generate)
    return _PoolWorker(None)  # type: ignore[arg-type]


def test_the_tokens_of_all_that_was_asked_are_counted_once(worker: _PoolWorker) -> None:
    verdicts, tokens = worker.compare("m", JUDGE, [("s", "one", "other")], [1])
    assert verdicts != [None] and tokens == 2 * (7 + 11)  # both sides in turn, each asked twice
    assert worker.rate("m", JUDGE, [("s", "third")], [1])[1] == 7 + 11
    talks = [[{"role": "user", "content": text}] for text in ("a", "b")]
    assert worker.sample("m", talks, [1, 2], SamplingConfig())[1] == 2 * 7


def test_calls_at_once_count_each_its_own_tokens(worker: _PoolWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an engine that holds the model is not stopped to take it again."""
    taken: list[str] = []
    whole, both = VLLMWorker.generate, threading.Barrier(2)

    def together(self: Any, conversations: Sequence[Any], *arguments: Any, **named: Any) -> list[Completion]:
        both.wait(30)
        return whole(self, conversations, *arguments, **named)

    def use(self: Any, model: str, runner: str = "generate") -> None:
        taken.append(runner)
        self.model = model

    monkeypatch.setattr(VLLMWorker, "generate", together)
    monkeypatch.setattr(_PoolWorker, "use", use)
    monkeypatch.setattr(VLLMWorker, "labels", lambda self, talks: [[1.0] for _ in talks])
    worker.use("m")
    talks = [[{"role": "user", "content": text}] for text in "abc"]
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(worker.sample, "m", talks[:1], [1], SamplingConfig())
        two = threads.submit(worker.sample, "m", talks[1:], [2, 3], SamplingConfig())
        assert (one.result()[1], two.result()[1]) == (7, 14)
    assert taken == ["generate"]
    assert worker.classify("r", talks) == ([[1.0]] * 3, 0) and taken == ["generate", "pooling"]


def test_a_worker_whose_engine_is_gone_ends(worker: _PoolWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray then starts another and asks it again; any other failure is told."""

    class EngineDeadError(Exception):
        pass

    def fail(self: Any, *_: Any, **__: Any) -> list[Completion]:
        raise EngineFailed("the engine failed") from causes.pop()

    ended: list[int] = []
    gone = [EngineDeadError(), RuntimeError("Executor failed."), RuntimeError("Worker failed with error 'x'")]
    causes: list[Exception] = [ValueError("Worker"), *gone]
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(VLLMWorker, "generate", fail)
    for expected in (1, 2, 3, 3):
        with pytest.raises(EngineFailed):
            worker.sample("m", [], [], SamplingConfig())
        assert ended == [1] * expected


class Together:
    """An actor each of whose answers needs another call of it under way."""

    def __init__(self, spec: Any) -> None:
        self.both = threading.Barrier(2)

    def sample(self, model: str, talks: list[Any], seeds: list[int], sampling: Any) -> tuple[list[Any], int]:
        self.both.wait(60)
        return [Completion(text=str(seed)) for seed in seeds], len(seeds)

    def classify(self, model: str, talks: list[Any]) -> tuple[list[Any], int]:
        return [[float(talk)] for talk in talks], 0


def test_a_worker_has_several_chunks_at_once(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And each is told as soon as it is there, so that other workers may go on with it."""
    monkeypatch.setattr(pooling, "_PoolWorker", Together)
    config = InferenceConfig(workers=1, batch_size=8, cpus_per_worker=0.5, gpus_per_worker=0)
    with WorkerPool(config, 0) as pool:
        scoring = pool.classifying("r")
        told: list[int] = []

        def also(start: int, answers: list[Completion]) -> None:
            told.append(start)
            scoring.add(start, [answer.text for answer in answers])

        found = pool.sample("m", [[]] * 64, range(64), SamplingConfig(), also=also)
        assert [answer.text for answer in found] == [str(seed) for seed in range(64)]
        assert sorted(told) == list(range(0, 64, 8)) and pool.output_tokens == 64
        assert scoring.finish() == {start: [[float(start + n)] for n in range(8)] for start in range(0, 64, 8)}


def test_a_worker_that_a_trainer_left_in_a_transfer_ends(worker: _PoolWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it is asked for anything else: what is half there spoils every engine of the process."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    worker._llm = SimpleNamespace(
        update_weights=lambda info: None, collective_rpc=print, reset_prefix_cache=lambda: None
    )
    worker._loop = SimpleNamespace(run=lambda call: call())  # type: ignore[assignment]
    worker.transfer("update_weights", {})
    worker.holds("m")
    worker.sample("m", [], [], SamplingConfig())
    assert not ended
    worker.transfer("update_weights", {})
    worker.transfer("update_weights", {})
    assert not ended
    worker.sample("m", [], [], SamplingConfig())
    assert ended == [1]
    worker._llm = None
    with pytest.raises(RuntimeError, match="started again while it took weights"):
        worker.transfer("update_weights", {})


def test_an_answer_that_does_not_come_ends_the_wait(local_ray: None) -> None:
    @ray.remote(num_cpus=0)
    class Silent:
        def answer(self) -> None:
            threading.Event().wait()

    actor = Silent.remote()  # type: ignore[attr-defined]
    calls = Calls([actor], "sampling", 0.5, 1, lambda place, answers, tokens: None)
    calls.add(0, lambda each: each.answer.remote())
    with pytest.raises(WaitTimedOut, match="a vLLM worker that is sampling"):
        calls.finish()
    ray.kill(actor)


def test_a_pool_that_gives_up_names_what_bounds_its_wait(local_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        def __init__(self, spec: Any) -> None:
            pass

        def use(self, *arguments: Any) -> None:
            time.sleep(60)

        sample = use

    monkeypatch.setattr(pooling, "_PoolWorker", Slow)
    config = InferenceConfig(
        workers=1, cpus_per_worker=0.5, gpus_per_worker=0, start_timeout_s=0.2, batch_timeout_s=0.2
    )
    with WorkerPool(config, 0) as workers:
        with pytest.raises(WaitTimedOut, match=r"is taking weights and gave up; raise inference.batch_timeout_s"):
            workers.use("m")
        with pytest.raises(WaitTimedOut, match=r"is sampling and gave up; raise inference.batch_timeout_s"):
            workers.sample("m", [[]], [0], SamplingConfig())


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
