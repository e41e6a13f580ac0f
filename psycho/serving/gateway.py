"""The HTTP ingress: validation, the routes, and server-sent events.

Ray Serve has neither authentication nor middleware of its own, so this is one ASGI application of ours around
two deployment handles: `guard` stands around it, `calls` asks the deployments.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from psycho.config import SamplingConfig
from psycho.serving.calls import Admission, call, stream
from psycho.serving.engine import ChatCall
from psycho.serving.guard import Guard, respond
from psycho.serving.protocol import (
    DONE,
    NOTICE,
    ApiError,
    ChatRequest,
    Delta,
    Reply,
    ScoreRequest,
    Scores,
    conversation,
    event,
    score_body,
)

_HEALTH_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Settings:
    """What the gateway knows of the configuration; `key_digest` is SHA-256 of the key clients must send.

    `sampling` is that of the evaluation, so that what is served is what was measured, unless a request says otherwise.
    """

    policy_name: str
    reward_name: str
    sampling: SamplingConfig
    max_tokens: int
    policy_slots: int
    reward_slots: int
    max_queued_requests: int
    request_timeout_s: float
    system_prompt: str | None = None
    key_digest: bytes | None = None


class EventStream(StreamingResponse):
    """Closes its source when the client goes away, wherever that finds it."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]


def build_api(settings: Settings, policy: Any, reward: Any) -> ASGIApp:
    """The application; `policy` and `reward` are deployment handles (`chat`, `stream`, `score`, `health`)."""
    api = FastAPI(title="psycho", description=NOTICE, version="1")
    _answer_errors(api)
    gateway = _Gateway(settings, policy, reward)
    api.get("/health")(gateway.health)
    api.get("/v1/models")(gateway.models)
    api.post("/v1/chat/completions", response_model=None)(gateway.chat)
    api.post("/v1/score")(gateway.score)
    return Guard(api, settings.key_digest)


def _answer_errors(api: FastAPI) -> None:
    """Every error in the one form of `ApiError`."""

    @api.exception_handler(ApiError)
    async def _api_error(_: Request, error: ApiError) -> Response:
        return respond(error)

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"][1:]) or None
        message = first["msg"].removeprefix("Value error, ")
        return respond(ApiError(400, f"{param or 'the body'}: {message}", "invalid_value", param))

    @api.exception_handler(HTTPException)
    async def _http_error(_: Request, error: HTTPException) -> Response:
        return respond(ApiError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def _unforeseen(_: Request, error: Exception) -> Response:
        return respond(ApiError(500, "something went wrong here; the server's log names the error"))


class _Gateway:
    """The routes, each a method, and what they share: who may come in, and for how long."""

    def __init__(self, settings: Settings, policy: Any, reward: Any) -> None:
        self._settings, self._policy, self._reward = settings, policy, reward
        self._streams = policy.options(stream=True)
        self._chats = Admission(settings.policy_slots, settings.max_queued_requests)
        self._scorings = Admission(settings.reward_slots, settings.max_queued_requests)

    async def health(self) -> Response:
        """200 when both engines are up and answer."""
        until = asyncio.get_running_loop().time() + _HEALTH_TIMEOUT_S
        names, handles = ("policy", "reward"), (self._policy, self._reward)
        found = await asyncio.gather(*(call(handle.health, until) for handle in handles), return_exceptions=True)
        engines = {
            name: {"ready": False} if isinstance(result, BaseException) else {"ready": True, **result}
            for name, result in zip(names, found, strict=True)
        }
        ready = all(engine["ready"] for engine in engines.values())
        return JSONResponse(
            {"status": "ready" if ready else "unavailable", "engines": engines, "notice": NOTICE},
            status_code=200 if ready else 503,
        )

    async def models(self) -> dict[str, Any]:
        """The names of what is served."""
        names = (self._settings.policy_name, self._settings.reward_name)
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "created": 0, "owned_by": "psycho"} for name in names],
        }

    async def chat(self, request: ChatRequest) -> Response:
        """A draft of a response to the conversation."""
        settings = self._settings
        sampling = settings.sampling
        _check_model(request.model, settings.policy_name)
        until = self._deadline()
        asked = ChatCall(
            messages=conversation(request.messages, settings.system_prompt),
            temperature=sampling.temperature if request.temperature is None else request.temperature,
            top_p=sampling.top_p if request.top_p is None else request.top_p,
            max_tokens=min(request.max_tokens or settings.max_tokens, settings.max_tokens),
            seed=request.seed,
            stop=(*sampling.stop, *request.stops),
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
        )
        reply = Reply(settings.policy_name)
        if not request.stream:
            async with self._chats.slot(until):
                return JSONResponse(reply.whole(await call(self._policy.chat, until, asked)))
        parts = self._admitted(asked, until)
        first = await anext(parts)  # an error before the first word still has its own status
        with_usage = request.stream_options is not None and request.stream_options.include_usage
        return EventStream(_events(reply, first, parts, with_usage), headers={"cache-control": "no-cache"})

    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        """The reward model's bare logit of each conversation; only differences mean something."""
        _check_model(request.model, self._settings.reward_name)
        until = self._deadline()
        conversations = [item.conversation(self._settings.system_prompt) for item in request.items()]
        async with self._scorings.slot(until):
            scores: Scores = await call(self._reward.score, until, conversations)
        return score_body(self._settings.reward_name, scores, single=request.inputs is None)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.request_timeout_s

    async def _admitted(self, asked: ChatCall, until: float) -> AsyncGenerator[Delta, None]:
        async with self._chats.slot(until):
            parts = stream(self._streams.stream, until, asked)
            try:
                async for part in parts:
                    yield part
            finally:
                await parts.aclose()


def _check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        message = f"there is no such model here; this endpoint serves {served}"
        raise ApiError(404, message, "model_not_found", "model")


async def _events(
    reply: Reply, first: Delta, parts: AsyncGenerator[Delta, None], with_usage: bool
) -> AsyncGenerator[str, None]:
    """Server-sent events of an answer."""
    try:
        last = first
        yield reply.chunk(first, first=True)
        async for last in parts:
            yield reply.chunk(last, first=False)
        if with_usage:
            yield reply.usage_chunk(last)
        yield DONE
    except ApiError as error:  # too late for a status
        yield event(error.body())
    finally:
        await parts.aclose()
