"""A few vLLM workers kept alive across rounds: the online loop and the evaluation work through them.

Batch jobs go through Ray Data (`batch.py`); here the same engines sample, rate and score in turn, taking new weights
each time, and starting an engine anew would cost more than the work. A worker has several chunks of the work at once,
so that its engine is full until the last is under way. One that dies is started again and asked again: every call names
its model, so it comes back with the right weights.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

import ray

from psycho import secrets
from psycho.config import InferenceConfig, JudgeConfig, SamplingConfig
from psycho.errors import StageFailed, WaitTimedOut
from psycho.inference.batch import MOST_AT_ONCE, RESTARTS, check_room, enough, layout
from psycho.inference.calls import Calls
from psycho.inference.loop import leave_if_dead
from psycho.inference.worker import Completion, EngineSpec, Messages, VLLMWorker
from psycho.judging.judge import Item, PairItem, rate_pairs, rate_single
from psycho.judging.rubric import Rating
from psycho.progress import Reporter

_OF_A_TRANSFER = ("transfer", "holds")  # calls that a trainer makes in the middle of it
_LIMIT = "inference.batch_timeout_s"
T = TypeVar("T")
Counted = tuple[list[T], int]
"""Answers, and the output tokens that they took, tries that failed included."""


def _call(work: Callable[..., list[T]]) -> Callable[..., Counted[T]]:
    """A call of a worker, its model first; several run at once, each in a thread, and each counts its own tokens."""

    @functools.wraps(work)
    def counted(self: _PoolWorker, model: str, *arguments: Any) -> Counted[T]:
        self._own.model, self._own.tokens = model, 0
        if self.model != model:  # else an engine in the middle of its work would have to come to its end first
            self.use(model, "pooling" if work.__name__ == "classify" else "generate")
        return work(self, *arguments), self._own.tokens

    return _leaving(counted)


def _leaving(work: Callable[..., T]) -> Callable[..., T]:
    """The call as it is, but for two states that this process does not come out of: it ends, and Ray starts another.

    The engine's own process may be gone. And a trainer may have died in the middle of a transfer, in which the engine
    may wait for it for ever; whoever asks for anything else then is the next trainer.
    """

    @functools.wraps(work)
    def call(self: _PoolWorker, *arguments: Any) -> T:
        if self.in_transfer and work.__name__ not in _OF_A_TRANSFER:
            os._exit(1)
        try:
            return work(self, *arguments)
        except Exception as error:
            leave_if_dead(error)
            raise

    del call.__wrapped__  # Ray would check the arguments against that one's
    return call


class _PoolWorker(VLLMWorker):
    """The worker as an actor: one call per kind of work, model included. Those at work at once name the same model."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._own = threading.local()

    def _asked(self) -> str:
        return str(self._own.model)

    def generate(self, *arguments: Any, **named: Any) -> list[Completion]:
        completions = super().generate(*arguments, **named)
        self._own.tokens += sum(completion.output_tokens for completion in completions)
        return completions

    @_call
    def sample(self, conversations: list[Messages], seeds: list[int], sampling: SamplingConfig) -> list[Completion]:
        return self.generate(conversations, seeds, sampling)

    @_call
    def rate(self, judge: JudgeConfig, items: list[Item], seeds: list[int]) -> list[tuple[Rating | None, int]]:
        found = rate_single(self, judge, items, seeds)
        return [(rating, done.prompt_tokens + done.output_tokens) for rating, _, _, done in found]

    @_call
    def compare(
        self, judge: JudgeConfig, items: list[PairItem], seeds: list[int]
    ) -> list[tuple[Rating, Rating] | None]:
        return rate_pairs(self, judge, items, seeds)

    @_call
    def classify(self, conversations: list[Messages]) -> list[list[float] | None]:
        return self.labels(conversations)

    @_call
    def read(self, rows: list[list[int]]) -> list[list[float] | None]:
        return self.logprobs(rows)

    use = _leaving(VLLMWorker.use)
    incarnation = _leaving(VLLMWorker.incarnation)
    transfer = _leaving(VLLMWorker.transfer)
    holds = _leaving(VLLMWorker.holds)
    sleep = _leaving(VLLMWorker.sleep)
    wake = _leaving(VLLMWorker.wake)


class Begun(NamedTuple):
    """Work that goes on while more of it is added: `add(place, ...)`, then `finish()` for the answers by place."""

    add: Callable[..., None]
    finish: Callable[[], dict[int, list[Any]]]


class WorkerPool:
    """`inference.workers` actors; use as a context manager, so that they end with the block.

    `output_tokens` is what all calls so far have generated, answers that were asked for again included.
    """

    def __init__(self, config: InferenceConfig, seed: int, judge: JudgeConfig | None = None, verbose: bool = False):
        """`judge`: the pool also judges, so its workers take the judge's engine and GPUs where it names its own."""
        engine, gpus = config.engine, config.gpus_per_worker
        if judge is not None:
            engine = judge.engine or engine
            gpus = gpus if judge.gpus_per_worker is None else judge.gpus_per_worker
        check_room("inference", config.cpus_per_worker, gpus)
        spec = EngineSpec(engine, seed, config.env, verbose)
        actor = ray.remote(_PoolWorker).options(
            num_cpus=config.cpus_per_worker,
            num_gpus=gpus or None,
            runtime_env={"env_vars": early} if (early := secrets.at_start(config.env)) else None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            max_concurrency=MOST_AT_ONCE,
        )
        self.output_tokens = 0
        self.shares_gpus = 0 < gpus < 1
        self._config, self._at_once = config, enough(engine)
        self._actors: list[Any] = [actor.remote(spec) for _ in range(config.workers)]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)

    def start(self, model: str, runner: str = "generate") -> None:
        """Let every worker start its engine with this model; returns at once."""
        for actor in self._actors:
            actor.use.remote(model, runner)

    def use(self, model: str, runner: str = "generate") -> None:
        """Every worker holds this model once this returns.

        Those that may lie on one GPU start one after the other, for each measures how much memory is free.
        """
        turns = [[actor] for actor in self._actors] if self.shares_gpus else [self._actors]
        for actors in turns:
            self._each("taking weights", lambda actor: actor.use.remote(model, runner), actors)

    def read(self, model: str, rows: Sequence[list[int]]) -> list[list[float] | None]:
        """Log-probabilities of each row's tokens after its first (`VLLMWorker.logprobs`)."""
        return self._map("reading", len(rows), lambda actor, a, b: actor.read.remote(model, list(rows[a:b])), None)

    def read_by_each(self, model: str, rows: Sequence[list[int]]) -> list[list[list[float] | None]]:
        """As `read`, all rows by every worker."""
        return [found for found, _ in self._each("reading", lambda actor: actor.read.remote(model, list(rows)))]

    def sample(
        self,
        model: str,
        conversations: Sequence[Messages],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        reporter: Reporter | None = None,
        also: Callable[[int, list[Completion]], None] | None = None,
    ) -> list[Completion]:
        """One completion per conversation, in order.

        Args:
            also: told the place of the first and the completions of each chunk as soon as they are there.
        """
        return self._map(
            "sampling",
            len(conversations),
            lambda actor, a, b: actor.sample.remote(model, list(conversations[a:b]), list(seeds[a:b]), sampling),
            reporter,
            also,
        )

    def rate(
        self,
        model: str,
        judge: JudgeConfig,
        items: Sequence[Item],
        seeds: Sequence[int],
        reporter: Reporter | None = None,
    ) -> list[Rating | None]:
        """Seven ratings per (speech, response); None where the judge's answer failed."""
        return [rating for rating, _ in self.rate_counted(model, judge, items, seeds, reporter)]

    def rate_counted(
        self,
        model: str,
        judge: JudgeConfig,
        items: Sequence[Item],
        seeds: Sequence[int],
        reporter: Reporter | None = None,
    ) -> list[tuple[Rating | None, int]]:
        """As `rate`, each with the tokens that the judge read and wrote for it."""
        return self._map(
            "rating",
            len(items),
            lambda actor, a, b: actor.rate.remote(model, judge, list(items[a:b]), list(seeds[a:b])),
            reporter,
        )

    def compare(
        self,
        model: str,
        judge: JudgeConfig,
        items: Sequence[PairItem],
        seeds: Sequence[int],
        reporter: Reporter | None = None,
    ) -> list[tuple[Rating, Rating] | None]:
        """Ratings of both responses of each (speech, first, second)."""
        return self._map(
            "comparing",
            len(items),
            lambda actor, a, b: actor.compare.remote(model, judge, list(items[a:b]), list(seeds[a:b])),
            reporter,
        )

    def reward(
        self, model: str, conversations: Sequence[Messages], reporter: Reporter | None = None
    ) -> list[float | None]:
        """The reward model's logit per whole conversation; None where it is too long."""
        return [None if row is None else row[0] for row in self.classify(model, conversations, reporter)]

    def classify(
        self, model: str, conversations: Sequence[Messages], reporter: Reporter | None = None
    ) -> list[list[float] | None]:
        """As `reward`, all labels of a classifier that has several."""
        return self._map(
            "scoring",
            len(conversations),
            lambda actor, a, b: actor.classify.remote(model, list(conversations[a:b])),
            reporter,
        )

    def rating(self, model: str, judge: JudgeConfig, reporter: Reporter | None = None) -> Begun:
        """As `rate`, for (items, seeds) that come a few at a time."""
        calls = self._calls("rating", MOST_AT_ONCE, reporter)

        def begin(start: int, items: list[Item], seeds: list[int]) -> None:
            calls.add(start, lambda actor: actor.rate.remote(model, judge, items, seeds))

        return Begun(begin, calls.finish)

    def classifying(self, model: str, reporter: Reporter | None = None) -> Begun:
        """As `classify`, for conversations that come a few at a time."""
        calls = self._calls("scoring", MOST_AT_ONCE, reporter)

        def begin(start: int, conversations: list[Messages]) -> None:
            calls.add(start, lambda actor: actor.classify.remote(model, conversations))

        return Begun(begin, calls.finish)

    def __len__(self) -> int:
        return len(self._actors)

    @property
    def gpus_per_engine(self) -> int:
        """Processes of an engine, one a GPU."""
        return self._config.engine.tensor_parallel_size

    def incarnations(self, model: str) -> list[str]:
        """The names of the engines (`VLLMWorker.incarnation`)."""
        return self._each("saying who it is", lambda actor: actor.incarnation.remote(model))

    def transfer(self, call: str, infos: Sequence[Mapping[str, Any]] | None = None) -> None:
        """One call of vLLM's weight transfer on every engine at once; `infos` has what each is told."""
        told: Iterator[Mapping[str, Any] | None] = iter(infos) if infos else repeat(None)
        self._each("taking weights", lambda actor: actor.transfer.remote(call, next(told)))

    def holds(self, model: str) -> None:
        """Every engine has been given the weights of `model`."""
        self._each("taking weights", lambda actor: actor.holds.remote(model))

    def sleep(self, level: int) -> None:
        """Every engine gives its GPU memory away (`VLLMWorker.sleep`)."""
        self._each("going to sleep", lambda actor: actor.sleep.remote(level))

    def wake(self, tags: list[str] | None = None) -> None:
        """Every engine takes its memory back."""
        self._each("waking", lambda actor: actor.wake.remote(tags))

    def _each(self, what: str, send: Callable[[Any], Any], actors: Sequence[Any] | None = None) -> list[Any]:
        """One call on every worker (or on these), at once; its answers in the workers' order."""
        try:
            return ray.get([send(actor) for actor in actors or self._actors], timeout=self._limit_s)
        except ray.exceptions.GetTimeoutError:
            raise WaitTimedOut(f"a vLLM worker that is {what}", self._limit_s, _LIMIT) from None
        except ray.exceptions.RayActorError as error:
            raise StageFailed(f"a vLLM worker died while {what}; give the same command again") from error

    def _map(
        self,
        what: str,
        count: int,
        send: Callable[[Any, int, int], Any],
        reporter: Reporter | None,
        also: Callable[[int, list[Any]], None] | None = None,
    ) -> list[Any]:
        """Answers of all workers together, in order."""
        _, size, at_once = layout(count, self._config, self._at_once)
        calls = self._calls(what, at_once, reporter, also)
        for start in range(0, count, size):
            calls.add(start, send, start, min(start + size, count))
        return [item for answers in calls.finish().values() for item in answers]

    def _calls(
        self,
        what: str,
        at_once: int,
        reporter: Reporter | None,
        also: Callable[[int, list[Any]], None] | None = None,
    ) -> Calls:
        def done(start: int, answers: list[Any], tokens: int) -> None:
            self.output_tokens += tokens
            if reporter:
                reporter.add(len(answers), tokens)
            if also:
                also(start, answers)

        return Calls(self._actors, what, self._limit_s, at_once, done, _LIMIT)

    @property
    def _limit_s(self) -> float:
        """Of any wait: the first call also starts an engine, which is what takes longest."""
        return self._config.start_timeout_s + self._config.batch_timeout_s
