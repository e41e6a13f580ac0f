"""A row's text as turns: a single text, or a transcript `[{role, content}, ...]` as a list or as text.

The last client turn is the speech; what was said before it is its history. What a counsellor answered after it is not
used: the responses are ours to make.
"""

from __future__ import annotations

import ast
import json
import warnings
from contextlib import suppress
from typing import Any

Turn = dict[str, str]
_CLIENT = frozenset({"user", "client", "patient", "human", "seeker", "usr"})
_COUNSELLOR = frozenset(
    {"assistant", "counsellor", "counselor", "therapist", "supporter", "psychologist", "gpt", "bot", "sys"}
)


def read_turns(value: Any) -> tuple[list[Turn], str | None]:
    """Turns with roles `user` and `assistant`, up to the last client turn; or the reason why there are none."""
    if isinstance(value, str):
        value = turn_list(value)
    if isinstance(value, bool) or not isinstance(value, str | int | list):
        return [], "no text in this row"
    if not isinstance(value, list):
        return [{"role": "user", "content": str(value)}], None
    turns = all_turns(value)
    if isinstance(turns, str):
        return [], turns
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    return turns, None if turns else "no client turn in this transcript"


def all_turns(messages: list[Any]) -> list[Turn] | str:
    """Turns with roles `user` and `assistant`, without system messages; or the reason why there are none."""
    turns: list[Turn] = []
    for number, turn in enumerate(messages, start=1):
        role, content = _turn(turn)
        if role == "system":
            continue
        if role is None or content is None:
            return f"turn {number} has no role of a client or counsellor with a text"
        if turns and turns[-1]["role"] == role:  # two in a row by the same person are one turn
            turns[-1]["content"] += f"\n{content}"
        else:
            turns.append({"role": role, "content": content})
    return turns


def turn_list(text: str) -> str | list[Any]:
    """The list in a text of JSON objects, or of Python's as pandas writes them to CSV; any other text as it is."""
    if text.lstrip()[:1] != "[" or "{" not in text[:200]:
        return text
    value = None
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                value = read(text.strip())
                break
    return value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else text


def _turn(turn: Any) -> tuple[str | None, str | None]:
    if not isinstance(turn, dict):
        return None, None
    role = str(turn.get("role") or turn.get("from") or turn.get("speaker") or "").strip().lower()
    content = next((turn[key] for key in ("content", "value", "text") if isinstance(turn.get(key), str)), None)
    if role == "system":
        return "system", content
    return ("user" if role in _CLIENT else "assistant" if role in _COUNSELLOR else None), content
