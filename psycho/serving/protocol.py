"""What travels over HTTP: requests, answers, errors, in the shapes that OpenAI's clients know.

Fields of OpenAI's API that we do not serve are ignored rather than refused, so that any client works; values
that would change the shape of an answer (`n` above 1, pictures) are refused. No error ever repeats what was
sent: a message may be a client's speech.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

NOTICE = "Drafts for a therapist to review; not to be given to clients unreviewed."
MAX_BODY_BYTES = 2**20
MAX_SCORES = 256  # conversations in one call of /v1/score

Conversation = list[dict[str, str]]

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer that is an error: HTTP status, one sentence, and what OpenAI calls code and param."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.status == 401:
            return {"www-authenticate": "Bearer"}
        return {"retry-after": "1"} if self.status in (429, 503) else {}


@dataclass(frozen=True)
class Refused:
    """What an engine says instead of an answer; the gateway makes an `ApiError` of it."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None


@dataclass(frozen=True)
class Delta:
    """The next part of an answer, or all of it; `finish_reason` is set on the last. Counts are so far."""

    text: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str | None = None


@dataclass(frozen=True)
class Scores:
    """Rewards as bare logits, one a conversation, in order."""

    rewards: list[float]
    prompt_tokens: int


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class Message(_Request):
    """One turn; content may come as OpenAI's list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return "" if value is None else value
        parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
        texts = [text for text in parts if isinstance(text, str)]
        if len(texts) != len(value):
            raise ValueError("only text parts are served")
        return "".join(texts)

    def plain(self) -> dict[str, str]:
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(_Request):
    include_usage: bool = False


class ChatRequest(_Request):
    """`POST /v1/chat/completions`. `max_tokens` is capped by `serving.max_tokens` and the model's context."""

    messages: list[Message] = Field(min_length=1)
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    max_tokens: int | None = Field(None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens"))
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or not all(stops):
            raise ValueError("give at most 16 stop texts, none of them empty")
        return stops

    @property
    def stops(self) -> list[str]:
        return list(self.stop or [])


class ScoreItem(_Request):
    """One conversation that ends in a response: `messages`, or `question` and `response`."""

    messages: list[Message] | None = Field(None, min_length=1)
    question: Text | None = None
    response: Text | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ScoreItem:
        pair = (self.question, self.response)
        if (self.messages is None) == (None in pair) or (self.messages is not None and pair != (None, None)):
            raise ValueError("give either messages, or question and response")
        if self.messages is not None and self.messages[-1].role != "assistant":
            raise ValueError("the last message must be the assistant's response that is scored")
        return self

    def conversation(self, system_prompt: str | None) -> Conversation:
        if self.messages is not None:
            return conversation(self.messages, system_prompt)
        turns = [
            {"role": "user", "content": self.question or ""},
            {"role": "assistant", "content": self.response or ""},
        ]
        return _with_system(turns, system_prompt)


class ScoreRequest(_Request):
    """`POST /v1/score`: the fields of one `ScoreItem`, or a list of them as `inputs`."""

    model: str | None = None
    inputs: Annotated[list[ScoreItem], Field(min_length=1, max_length=MAX_SCORES)] | None = None
    messages: list[Message] | None = None
    question: Text | None = None
    response: Text | None = None

    @model_validator(mode="after")
    def _one_form(self) -> ScoreRequest:
        if self.inputs is None:
            self.items()
        elif (self.messages, self.question, self.response) != (None, None, None):
            raise ValueError("give either inputs, or one conversation, not both")
        return self

    def items(self) -> list[ScoreItem]:
        if self.inputs is not None:
            return self.inputs
        return [ScoreItem(messages=self.messages, question=self.question, response=self.response)]


def conversation(messages: Sequence[Message], system_prompt: str | None) -> Conversation:
    """The turns as a chat template takes them; the run's system prompt stands first unless they bring one."""
    return _with_system([message.plain() for message in messages], system_prompt)


def _with_system(turns: Conversation, system_prompt: str | None) -> Conversation:
    if system_prompt and not any(turn["role"] == "system" for turn in turns):
        return [{"role": "system", "content": system_prompt}, *turns]
    return turns


class Reply:
    """The bodies of one chat answer, whole or as server-sent events."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, answer: Delta) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage(answer)}

    def chunk(self, part: Delta, first: bool) -> str:
        delta = {"role": "assistant", "content": part.text} if first else {"content": part.text}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": part.finish_reason}
        return event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})

    def usage_chunk(self, last: Delta) -> str:
        return event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage(last)})


def usage(answer: Delta) -> dict[str, int]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.output_tokens,
        "total_tokens": answer.prompt_tokens + answer.output_tokens,
    }


def score_body(model: str, scores: Scores, single: bool) -> dict[str, Any]:
    """`rewards` always; `reward` too where one conversation was asked about."""
    return {
        "object": "score",
        "model": model,
        **({"reward": scores.rewards[0]} if single else {}),
        "rewards": scores.rewards,
        "usage": {"prompt_tokens": scores.prompt_tokens, "total_tokens": scores.prompt_tokens},
    }


def event(body: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


DONE = "data: [DONE]\n\n"
