"""The one class around vLLM: it generates, rates, scores, and takes new weights without a restart.

Ray Data places it in its actor pools for batch jobs; the online loop and the evaluation keep a few of them alive
(`psycho/inference/pool.py`). The engine runs inside the worker's process (one process a worker, no sockets between)
unless the configuration's environment says otherwise. A request that cannot be served comes back with an error; it
never takes its batch down with it.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from psycho import secrets
from psycho.config import EngineConfig, SamplingConfig
from psycho.failures import engine_failure
from psycho.inference.engine import WeightReload, engine_arguments
from psycho.inference.loop import EngineLoop
from psycho.inference.models import engine_signature, local_model
from psycho.inference.template import Messages, conversation, reasoning_is_control, render, stop_ids, without_control
from psycho.judging.digits import DigitLogprobs, digit_parameters, read_digits


@dataclass(frozen=True)
class Completion:
    """One answer; `error` says why there is none. Token counts are of this request alone."""

    text: str = ""
    finish_reason: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    span_floors: tuple[float, ...] = ()
    span_means: tuple[float, ...] = ()
    digits: DigitLogprobs = ()
    error: str | None = None
    reasoning: str | None = None
    """What came apart from the text already, as some endpoints send it."""


@dataclass(frozen=True)
class EngineSpec:
    """What a worker needs to build its engine."""

    engine: EngineConfig
    seed: int = 0
    env: secrets.Env = field(default_factory=dict, repr=False)
    verbose: bool = False


class VLLMWorker:
    """One engine in one process."""

    def __init__(self, spec: EngineSpec) -> None:
        os.environ.update(secrets.given(spec.env))
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "0")
        if not spec.verbose:
            os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
            logging.disable(logging.WARNING)
        self.spec = spec
        self.model = ""
        self.in_transfer = False
        self._signature = ""
        self._name = ""
        self._llm: Any = None
        self._tokenizer: Any = None
        self._stops: list[int] = []
        self._thinks_in_control = False
        self._tokenizing = threading.Lock()  # a fast tokenizer is for one thread at a time
        self._loop = EngineLoop(lambda model: self._hold(model).llm_engine, spec.engine.max_num_seqs)

    def use(self, model: str, runner: str = "generate") -> None:
        """Hold `model` from here on: by new weights where the architectures agree, else by a new engine."""
        self._loop.run(lambda: self._hold(model, runner))

    def generate(
        self,
        conversations: Sequence[Messages],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        schema: str | None = None,
        spans: Sequence[Sequence[str]] | None = None,
        digits: Literal["read", "only"] | None = None,
    ) -> list[Completion]:
        """Answer each conversation with the model in use.

        Args:
            conversations: chat messages, one list a request.
            seeds: one seed a request; the same request and seed give the same answer.
            schema: a JSON schema (as text) that every answer must follow.
            spans: texts that occur in each rendered prompt, in order; `Completion.span_floors` then holds the lowest
                token log-probability of each by the model itself, `Completion.span_means` the mean.
            digits: `Completion.digits` then holds the log-probabilities of 1..5 at each digit of the answer; `only`:
                the answer is made of such digits alone.

        Returns:
            A completion per conversation, in order; never raises for a single bad request.
        """
        done = dict(self.stream(self._asked(), conversations, seeds, sampling, schema, spans, digits=digits))
        return [done[index] for index in range(len(conversations))]

    def _asked(self) -> str:
        """The model that answers where a call names none."""
        return self.model

    def stream(
        self,
        model: str,
        conversations: Sequence[Messages],
        seeds: Sequence[int],
        sampling: SamplingConfig,
        schema: str | None = None,
        spans: Sequence[Sequence[str]] | None = None,
        variables: Mapping[str, Any] | None = None,
        digits: Literal["read", "only"] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) of each conversation as it is answered; several threads may ask at once.

        Args:
            model: as for `use`; it must be able to take turns with the others that are asked for meanwhile.
            variables: of the chat template.

        Raises:
            EngineFailed: the engine died.
        """
        if self._llm is None:
            self.use(model)
        prompts, params, places, texts = [], [], [], []
        for index, (messages, seed) in enumerate(zip(conversations, seeds, strict=True)):
            try:
                text, ids = self._render(messages, variables)
            except ValueError as error:
                yield index, Completion(error=str(error))
                continue
            prompts.append(self._prompt(ids))
            params.append(self._params(sampling, seed, len(ids), schema, bool(spans), digits))
            places.append(index)
            texts.append(text)
        for place, output in self._loop.answers(model, prompts, params):
            index = places[place]
            if isinstance(output, Exception):
                yield index, Completion(error=f"the engine refuses the request ({type(output).__name__})")
                continue
            found = self._span_logprobs(texts[place], spans[index], output) if spans else []
            best = output.outputs[0]
            said, read = self._said(best, digits)
            yield (
                index,
                Completion(
                    text=said,
                    finish_reason=best.finish_reason or "",
                    prompt_tokens=len(output.prompt_token_ids),
                    output_tokens=len(best.token_ids),
                    span_floors=tuple(min(values, default=0.0) for values in found),
                    span_means=tuple(sum(values) / max(1, len(values)) for values in found),
                    digits=read,
                ),
            )

    def _render(self, messages: Messages, variables: Mapping[str, Any] | None) -> tuple[str, list[int]]:
        with self._tokenizing:
            text, ids = render(self._tokenizer, messages, variables)
        limit = self._llm.model_config.max_model_len
        if len(ids) >= limit:
            raise ValueError(f"prompt of {len(ids)} tokens is over the model's limit of {limit}")
        return text, ids

    def _span_logprobs(self, text: str, spans: Sequence[str], output: Any) -> list[list[float]]:
        with self._tokenizing:
            return _span_logprobs(self._tokenizer, text, spans, output)

    def _said(self, best: Any, digits: str | None) -> tuple[str, DigitLogprobs]:
        """The text of an answer, and its digits' log-probabilities where they were asked for."""
        if digits:
            with self._tokenizing:
                return read_digits(self._tokenizer, best)
        return (without_control(self._tokenizer, best.text) if self._thinks_in_control else best.text), ()

    def _prompt(self, ids: list[int]) -> Any:
        from vllm.inputs.engine import tokens_input

        return tokens_input(ids)

    def _params(
        self,
        sampling: SamplingConfig,
        seed: int,
        prompt_tokens: int,
        schema: str | None,
        floors: bool,
        digits: str | None,
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        with self._tokenizing:
            reading = digit_parameters(self._tokenizer, digits == "only") if digits else {}
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            stop=list(sampling.stop),
            stop_token_ids=self._stops,
            skip_special_tokens=not self._thinks_in_control,
            max_tokens=min(sampling.max_tokens, self._llm.model_config.max_model_len - prompt_tokens),
            seed=seed,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
            prompt_logprobs=0 if floors else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **reading,
        )

    def labels(self, conversations: Sequence[Messages]) -> list[list[float] | None]:
        """The labels of each whole conversation by a classifier (in use with runner `pooling`); None when too long.

        A reward model has one, its reward.
        """
        from vllm import PoolingParams

        limit = self._llm.model_config.max_model_len
        with self._tokenizing:
            rendered = [conversation(self._tokenizer, messages) for messages in conversations]
            ids = [self._tokenizer(text, add_special_tokens=False).input_ids for text in rendered]
        places = [index for index, row in enumerate(ids) if len(row) <= limit]
        prompts = [self._prompt(ids[index]) for index in places]
        # A bare logit: the default activation would squash rewards through a sigmoid.
        params = [PoolingParams(task="classify", use_activation=False) for _ in places]
        scores: list[list[float] | None] = [None] * len(ids)
        for turn, output in self._answers(prompts, params):
            scores[places[turn]] = output.outputs.data.flatten().tolist()
        return scores

    def _answers(self, prompts: Sequence[Any], params: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(place, vLLM's output) of each prompt; what the engine refuses raises."""
        for place, output in self._loop.answers(self._asked(), prompts, params):
            if isinstance(output, Exception):
                raise output
            yield place, output

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float] | None]:
        """Log-probability of each token of each row (token ids) after its first, by the model in use.

        Returns:
            A list of `len(row) - 1` values a row; None where a row leaves no room for the token that vLLM must add.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        limit = self._llm.model_config.max_model_len
        places = [place for place, row in enumerate(rows) if 1 < len(row) < limit]
        prompts = [self._prompt(list(rows[place])) for place in places]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, output_kind=RequestOutputKind.FINAL_ONLY)
        found: list[list[float] | None] = [None] * len(rows)
        for turn, output in self._answers(prompts, [params] * len(prompts)):
            asked = rows[places[turn]][1:]
            entries = output.prompt_logprobs[1:]
            found[places[turn]] = [entry[token].logprob for entry, token in zip(entries, asked, strict=True)]
        return found

    def incarnation(self, model: str) -> str:
        """The name of the engine, which is started with `model` where there is none: another after every start."""
        if self._llm is None:
            self.use(model)
        return self._name

    def transfer(self, call: str, info: Mapping[str, Any] | None = None) -> None:
        """One call of vLLM's weight transfer; until `holds` says what they are, the weights are nobody's.

        Half a transfer leaves traces in the process that neither a reload nor another engine in it gets rid of: counts
        of what is loaded, a rotary embedding without data that all engines share. So a process in which `in_transfer`
        stays is to be ended.

        Raises:
            RuntimeError: the engine that the transfer began with is gone.
        """

        def work() -> None:
            if self._llm is None:
                raise RuntimeError("an engine was started again while it took weights; give the same command again")
            self.model = ""
            getattr(self._llm, call)(*([] if info is None else [dict(info)]))

        self.in_transfer = True
        self._loop.run(work)

    def holds(self, model: str) -> None:
        """The weights that were transferred are those of `model`."""

        def work() -> None:
            if self._llm is not None:  # else it was started again, and reads them when it is asked for them
                self._llm.collective_rpc("renew_head")
                self._llm.reset_prefix_cache()
                self.model = model
            self.in_transfer = False

        self._loop.run(work)

    def sleep(self, level: int) -> None:
        """Give the engine's memory on the GPU away: 1 keeps the weights in the host's memory, 2 lets go of them."""

        def work() -> None:
            if self._llm is not None:
                self._llm.sleep(level)
                self.model = "" if level == 2 else self.model

        self._loop.run(work)

    def wake(self, tags: list[str] | None) -> None:
        """Take the memory back, or that of `weights` or `kv_cache` alone."""
        self._loop.run(lambda: self._llm.wake_up(tags) if self._llm is not None else None)

    def _hold(self, model: str, runner: str = "generate") -> Any:
        """The engine with `model` in it; on the engine's thread."""
        if model == self.model:
            return self._llm
        folder = local_model(model)
        signature = f"{runner}:{engine_signature(folder)}"
        if self._llm is not None and signature == self._signature:
            self._llm.collective_rpc("take_weights", args=(folder,))
            self._llm.reset_prefix_cache()
        else:
            self._stop()
            self._llm, self._name = self._start(folder, runner), uuid.uuid4().hex
            self._signature = signature
            self._tokenizer = copy.deepcopy(self._llm.get_tokenizer())
            self._stops = stop_ids(self._tokenizer)
            self._thinks_in_control = reasoning_is_control(self._tokenizer)
        self.model = model
        return self._llm

    def _start(self, folder: str, runner: str) -> Any:
        from vllm import LLM

        arguments = engine_arguments(self.spec.engine, runner, self.spec.seed)
        arguments["worker_extension_cls"] = f"{WeightReload.__module__}.{WeightReload.__name__}"
        if runner != "pooling":
            # Without this a weak model fills its answer with white space until it is cut.
            structured = {"backend": "xgrammar", "disable_any_whitespace": True}
            arguments = {"structured_outputs_config": structured} | arguments
        try:
            return LLM(folder, **arguments)
        except Exception as error:
            raise engine_failure(error, folder) from error

    def _stop(self) -> None:
        if self._llm is None:
            return
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm = None
        gc.collect()
        cleanup_dist_env_and_memory()


def _span_logprobs(tokenizer: Any, text: str, spans: Sequence[str], output: Any) -> list[list[float]]:
    """The log-probabilities of the tokens that lie wholly in each span of the prompt.

    Spans are looked for from the end: what is asked about comes last, and its words may occur before it.
    """
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    found: list[list[float]] = []
    end = len(text)
    for span in reversed(spans):
        begin = text.rfind(span, 0, end)
        if begin < 0:  # a chat template may trim; then there is nothing to say
            found.append([])
            continue
        logprobs = [
            next(iter(entry.values())).logprob
            for entry, (low, high) in zip(output.prompt_logprobs, offsets, strict=True)
            if entry and begin <= low < high <= begin + len(span)
        ]
        found.append(logprobs)
        end = begin
    return found[::-1]
