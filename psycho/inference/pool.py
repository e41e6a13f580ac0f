"""A few vLLM workers kept alive across rounds: the online loop and the evaluation work through them.

Batch jobs go through Ray Data (`batch.py`); here the same engines sample, rate and score in turn, taking new weights
each time, and starting an engine anew would cost more than the work. A worker that dies is started again and asked
again: every call names its model, so it comes back with the right weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, TypeVar

import ray

from psycho.config import InferenceConfig, JudgeConfig, SamplingConfig
from psycho.errors import StageFailed, WaitTimedOut
from psycho.inference.batch import RESTARTS, check_room
from psycho.inference.worker import Completion, EngineSpec, Messages, VLLMWorker
from psycho.judging.judge import Item, PairItem, rate_pairs, rate_single
from psycho.judging.rubric import Rating
from psycho.progress import Reporter

T = TypeVar("T")
Counted = tuple[list[T], int]
"""Answers, and the output tokens that they took, tries that failed included."""


class _PoolWorker(VLLMWorker):
    """The worker as an actor: one call per kind of work, model included."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._tokens = 0

    def generate(self, *arguments: Any, **named: Any) -> list[Completion]:
        completions = super().generate(*arguments, **named)
        self._tokens += sum(completion.output_tokens for completion in completions)
        return completions

    def _counted(self, answers: list[T]) -> Counted[T]:
        tokens, self._tokens = self._tokens, 0
        return answers, tokens

    def sample(
        self, model: str, conversations: list[Messages], seeds: list[int], sampling: SamplingConfig
    ) -> Counted[Completion]:
        self.use(model)
        return self._counted(self.generate(conversations, seeds, sampling))

    def rate(
        self, model: str, judge: JudgeConfig, items: list[Item], seeds: list[int]
    ) -> Counted[tuple[Rating | None, int]]:
        self.use(model)
        found = rate_single(self, judge, items, seeds)
        return self._counted([(rating, done.prompt_tokens + done.output_tokens) for rating, _, _, done in found])

    def compare(
        self, model: str, judge: JudgeConfig, items: list[PairItem], seeds: list[int]
    ) -> Counted[tuple[Rating, Rating] | None]:
        self.use(model)
        return self._counted(rate_pairs(self, judge, items, seeds))

    def classify(self, model: str, conversations: list[Messages]) -> Counted[list[float] | None]:
        self.use(model, runner="pooling")
        return self._counted(self.labels(conversations))

    def read(self, model: str, rows: list[list[int]]) -> Counted[list[float] | None]:
        self.use(model)
        return self._counted(self.logprobs(rows))


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
            runtime_env={"env_vars": dict(config.env)} if config.env else None,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
        )
        self.output_tokens = 0
        self._config = config
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
        """Every worker holds this model once this returns."""
        self._each("taking weights", lambda actor: actor.use.remote(model, runner))

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
    ) -> list[Completion]:
        """One completion per conversation, in order."""
        return self._map(
            "sampling",
            len(conversations),
            lambda actor, a, b: actor.sample.remote(model, list(conversations[a:b]), list(seeds[a:b]), sampling),
            reporter,
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

    def _each(self, what: str, send: Callable[[Any], Any]) -> list[Any]:
        """One call on every worker, at once; its answers in the workers' order."""
        limit = self._config.start_timeout_s + self._config.batch_timeout_s
        try:
            return ray.get([send(actor) for actor in self._actors], timeout=limit)
        except ray.exceptions.GetTimeoutError:
            raise WaitTimedOut(f"a vLLM worker that is {what}", limit) from None
        except ray.exceptions.RayActorError as error:
            raise StageFailed(f"a vLLM worker died while {what}; give the same command again") from error

    def _map(self, what: str, count: int, send: Callable[[Any, int, int], Any], reporter: Reporter | None) -> list[Any]:
        """Hand chunks to whichever worker is free and put the answers in order."""
        size = max(1, min(self._config.batch_size, -(-count // len(self._actors))))
        chunks = [(start, min(start + size, count)) for start in range(0, count, size)]
        answers: dict[int, list[Any]] = {}
        running: dict[Any, tuple[Any, int]] = {}
        free = list(self._actors)
        # The first call also starts an engine, which is what takes longest.
        limit = self._config.start_timeout_s + self._config.batch_timeout_s
        while chunks or running:
            while chunks and free:
                actor = free.pop()
                start, stop = chunks.pop(0)
                running[send(actor, start, stop)] = (actor, start)
            ready, _ = ray.wait(list(running), timeout=limit)
            if not ready:
                raise WaitTimedOut(f"a vLLM worker that is {what}", limit)
            for reference in ready:
                actor, start = running.pop(reference)
                try:
                    answers[start], tokens = ray.get(reference)
                except ray.exceptions.RayActorError as error:
                    raise StageFailed(f"a vLLM worker died while {what}; give the same command again") from error
                free.append(actor)
                self.output_tokens += tokens
                if reporter:
                    reporter.add(len(answers[start]), tokens)
        return [item for start in sorted(answers) for item in answers[start]]
