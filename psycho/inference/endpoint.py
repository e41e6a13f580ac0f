"""One OpenAI-compatible chat endpoint: what is sent, what may come back, and what to do about it.

Whatever a server does, it ends in one of four ways: an answer; a try that failed and may be repeated; a request that
is refused for good, which is one row's trouble; or a sign that no request can work, which stops the run with a
sentence. Bodies are never quoted: they may hold what a client wrote.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psycho.config import ModelConfig, SamplingConfig
from psycho.errors import BadInput
from psycho.inference.worker import Completion, Messages

_TRY_AGAIN = {408, 409, 425, 429}
_NO_REQUEST_WORKS = {
    401: "refuses the key; check remote.api_key_env or remote.api_key_file",
    402: "asks for payment; top up the account",
    403: "refuses the key; check remote.api_key_env or remote.api_key_file",
    404: "knows no such model or path; check remote.url and model",
}


@dataclass(frozen=True)
class Failed:
    """A try that may be repeated; `billed`: the endpoint worked on it, so it may cost."""

    reason: str
    billed: bool = False
    retry_after: str | None = None


def api_key(entry: ModelConfig) -> str | None:
    """The key of a pool entry's endpoint; None where it needs none.

    Raises:
        BadInput: the variable is not set or the file cannot be read; the key itself is never shown.
    """
    remote = entry.remote
    if remote and remote.api_key_env:
        key = os.environ.get(remote.api_key_env, "").strip()
        if not key:
            raise BadInput(
                f"generation.pool ({entry.name}): environment variable {remote.api_key_env} is empty; put the key "
                "of the endpoint into it"
            )
        return key
    if remote and remote.api_key_file:
        try:
            return Path(remote.api_key_file).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(
                f"generation.pool ({entry.name}): {remote.api_key_file} cannot be read ({type(error).__name__}); "
                "put the key of the endpoint into it"
            ) from None
    return None


def payload(entry: ModelConfig, sampling: SamplingConfig, messages: Messages, seed: int) -> dict[str, Any]:
    """The body of one request; what only some endpoints know is sent only where it is set."""
    assert entry.remote is not None
    body: dict[str, Any] = {
        "model": entry.model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        entry.remote.token_limit_key: sampling.max_tokens,
        "seed": seed,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    if sampling.repetition_penalty != 1.0:
        body["repetition_penalty"] = sampling.repetition_penalty
    if entry.template_variables:
        body["chat_template_kwargs"] = entry.template_variables
    return {key: value for key, value in body.items() if key not in entry.remote.omit}


def most_tokens(messages: Messages, sampling: SamplingConfig) -> tuple[int, int]:
    """Tokens that a request can have at most: no tokenizer makes more of a text than it has bytes."""
    prompt = sum(len(message["content"].encode()) + 16 for message in messages) + 16
    return prompt, sampling.max_tokens


def read(entry: ModelConfig, status: int, headers: Mapping[str, str], body: bytes) -> Completion | Failed:
    """What an answer of the server means.

    Raises:
        BadInput: it says that no request of this entry can work.
    """
    if status == 200:
        return _completion(body)
    if status in _NO_REQUEST_WORKS:
        raise BadInput(
            f"generation.pool ({entry.name}): {entry.remote.url if entry.remote else ''} {_NO_REQUEST_WORKS[status]} "
            f"(HTTP {status})"
        )
    if status in _TRY_AGAIN or status >= 500:
        return Failed(f"HTTP {status}", retry_after=headers.get("retry-after"))
    if _code(body) == "content_filter":
        return Completion(finish_reason="content_filter")
    return Completion(error=f"the endpoint refuses the request (HTTP {status})")


def _completion(body: bytes) -> Completion | Failed:
    try:
        answer = json.loads(body)
        choice = answer["choices"][0]
        message, usage = choice["message"], answer.get("usage") or {}
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return Completion(
            text=_text(message.get("content")),
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=_count(usage, "prompt_tokens"),
            output_tokens=_count(usage, "completion_tokens"),
            reasoning=_text(reasoning) or None,
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return Failed("a body that is no chat completion", billed=True)


def _text(content: Any) -> str:
    """A message's content: text, nothing, or a list of parts."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content if part.get("type") == "text")


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage[name]
    if not isinstance(value, int) or value < 0:
        raise ValueError(name)
    return value


def _code(body: bytes) -> str | None:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, LookupError, TypeError):
        return None
