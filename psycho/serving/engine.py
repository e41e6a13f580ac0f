"""The two deployments around vLLM: the policy that answers, and the reward model that scores.

Each replica holds one `AsyncLLM` with continuous batching. Prompts are rendered and tokenized exactly as the
batch worker does it (`psycho/inference/worker.py`), so that served equals offline. A request that cannot be
served comes back as `Refused`, as a value: exceptions would land, with whatever text they carry, in Serve's
logs. When the engine itself dies the replica's process ends, and Serve starts a fresh one.
"""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from psycho import secrets
from psycho.config import InferenceConfig
from psycho.inference.engine import engine_arguments
from psycho.inference.models import local_model
from psycho.inference.template import conversation, stop_ids
from psycho.serving.protocol import Conversation, Delta, Refused, Scores

# Parts of a stream that come faster than a person sees go together: each costs two hops between processes.
_EMIT_EVERY_S = 0.02
_LONG_CHARS = 16384


@dataclass(frozen=True)
class ChatCall:
    """A chat request as the policy takes it."""

    messages: Conversation
    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None
    stop: tuple[str, ...] = ()
    top_k: int = 0
    repetition_penalty: float = 1.0


class _Server:
    """One engine; counts what it holds and what was given up."""

    def __init__(self, model: str, inference: InferenceConfig, runner: str, seed: int) -> None:
        os.environ.update(secrets.given(inference.env))
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        arguments = engine_arguments(inference.engine, runner, seed)
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(model=local_model(model), enable_log_requests=False, **arguments)
        )
        self._tokenizer = self._engine.get_tokenizer()
        self._stops = stop_ids(self._tokenizer)
        self._limit = self._engine.model_config.max_model_len
        self._ongoing = self._aborted = 0

    async def check_health(self) -> None:
        """Serve asks now and then; a raise here replaces the replica."""
        await self._engine.check_health()

    async def health(self) -> dict[str, int]:
        """Requests held now and given up so far by this replica; raises when the engine is dead."""
        await self._engine.check_health()
        return {"ongoing": self._ongoing, "aborted": self._aborted}

    async def _encode(self, messages: Conversation, answer: bool = False) -> list[int] | Refused:
        """Token ids of the rendered messages; long ones are done beside the event loop, not in it."""
        if sum(len(message["content"]) for message in messages) > _LONG_CHARS:
            return await asyncio.to_thread(self._encode_now, messages, answer)
        return self._encode_now(messages, answer)

    def _encode_now(self, messages: Conversation, answer: bool = False) -> list[int] | Refused:
        try:
            text = conversation(self._tokenizer, messages, answer)
        except ValueError as error:  # the template's own rules, say about the order of roles
            return Refused(400, str(error), param="messages")
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def _too_long(self, tokens: int, what: str) -> Refused:
        return Refused(
            400,
            f"{what} has {tokens} tokens, over the model's limit of {self._limit}; shorten it",
            code="context_length_exceeded",
            param="messages",
        )


class PolicyServer(_Server):
    """Answers chats."""

    def __init__(self, model: str, inference: InferenceConfig, seed: int) -> None:
        super().__init__(model, inference, "generate", seed)

    async def chat(self, call: ChatCall) -> Delta | Refused:
        """The whole answer."""
        answer: Delta | Refused = Refused(500, "the engine gave no answer")
        async for part in self._run(call, streaming=False):
            answer = part
        return answer

    async def stream(self, call: ChatCall) -> AsyncIterator[Delta | Refused]:
        """The answer in parts; ending the iteration early ends the generation."""
        async for part in self._run(call, streaming=True):
            yield part

    async def _run(self, call: ChatCall, streaming: bool) -> AsyncIterator[Delta | Refused]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        ids = await self._encode(call.messages, answer=True)
        if isinstance(ids, Refused):
            yield ids
            return
        if len(ids) >= self._limit:
            yield self._too_long(len(ids), "the prompt")
            return
        params = SamplingParams(
            temperature=call.temperature,
            top_p=call.top_p,
            top_k=call.top_k,
            repetition_penalty=call.repetition_penalty,
            max_tokens=min(call.max_tokens, self._limit - len(ids)),
            seed=call.seed,
            stop=list(call.stop),
            stop_token_ids=self._stops,
            output_kind=RequestOutputKind.DELTA if streaming else RequestOutputKind.FINAL_ONLY,
        )
        self._ongoing += 1
        try:
            outputs = self._engine.generate({"prompt_token_ids": ids}, params, uuid.uuid4().hex)
            async with aclosing(outputs), aclosing(_parts(outputs, len(ids))) as parts:
                async for part in parts:
                    yield part
        except (asyncio.CancelledError, GeneratorExit):  # vLLM has dropped the request by now
            self._aborted += 1
            raise
        except EngineDeadError:
            os._exit(1)
        except Exception as error:
            yield Refused(500, f"the engine could not answer ({type(error).__name__})")
        finally:
            self._ongoing -= 1


async def _parts(outputs: AsyncIterator[Any], prompt_tokens: int) -> AsyncGenerator[Delta, None]:
    """Deltas of one request, those close together in time joined into one."""
    text, tokens, sent = "", 0, float("-inf")
    async for output in outputs:
        best = output.outputs[0]
        text += best.text
        tokens += len(best.token_ids)
        now = time.monotonic()
        if output.finished or (text and now - sent >= _EMIT_EVERY_S):
            yield Delta(text, prompt_tokens, tokens, best.finish_reason if output.finished else None)
            text, sent = "", now


class RewardServer(_Server):
    """Scores conversations that end in a response."""

    def __init__(self, model: str, inference: InferenceConfig, seed: int) -> None:
        super().__init__(model, inference, "pooling", seed)

    async def score(self, conversations: list[Conversation]) -> Scores | Refused:
        """The reward of each conversation; all or none."""
        from vllm.v1.engine.exceptions import EngineDeadError

        rows: list[list[int]] = []
        for index, messages in enumerate(conversations):
            ids = await self._encode(messages)
            if isinstance(ids, Refused):
                return ids
            if len(ids) > self._limit:
                return self._too_long(len(ids), f"conversation {index}")
            rows.append(ids)
        self._ongoing += 1
        try:
            rewards = await asyncio.gather(*map(self._reward, rows))
        except asyncio.CancelledError:
            self._aborted += 1
            raise
        except EngineDeadError:
            os._exit(1)
        except Exception as error:
            return Refused(500, f"the engine could not score ({type(error).__name__})")
        finally:
            self._ongoing -= 1
        return Scores(rewards, sum(map(len, rows)))

    async def _reward(self, ids: list[int]) -> float:
        from vllm import PoolingParams

        params = PoolingParams(task="classify")
        reward = float("nan")
        async for output in self._engine.encode({"prompt_token_ids": ids}, params, uuid.uuid4().hex):
            reward = float(output.outputs.data.flatten()[0])
        return reward
