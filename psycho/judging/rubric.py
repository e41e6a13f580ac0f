"""What a judge is asked and what it may answer.

The judge quotes its evidence before each rating: a rating that follows a quotation is a rating of something, and
small models learn the task only this way (README, nano world). The answer is JSON under a grammar, so that it always
parses unless it is cut short; an answer that does not parse is a failed rating, counted and never given a default.
The prompt puts first what is shared (rubric, then the speech, then the response), so that prefix caching pays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from psycho.principles import MAX_RATING, MIN_RATING, PRINCIPLES, STEMS, overall, rubric

Template = Literal["rubric", "compact"]

_INTRODUCTION = f"""You are an experienced supervisor of counsellors. You rate responses to what a client says on \
seven principles, each from {MIN_RATING} to {MAX_RATING}:
{rubric()}
For each principle first quote, in a few words, the evidence in the client's words and in the response ("none" where \
there is none), then rate."""
_SINGLE = "Rate the response. Answer in JSON: an object with a key per principle, each with evidence and rating."
_PAIR = (
    "Rate both responses. Answer in JSON: the keys first and second, each an object with a key per principle, "
    "each with evidence and rating."
)


@dataclass(frozen=True)
class Rating:
    """Seven ratings of one response, with the evidence quoted for each."""

    ratings: dict[str, int]
    evidence: dict[str, str]

    @property
    def overall(self) -> float:
        """The mean of the seven ratings."""
        return overall(self.ratings)


def single_prompt(speech: str, response: str, template: Template) -> list[dict[str, str]]:
    """The messages that ask for the ratings of one response."""
    if template == "compact":
        return [{"role": "user", "content": f"{speech}\nReply: {response}"}]
    content = f"Client:\n{speech}\n\nResponse:\n{response}\n\n{_SINGLE}"
    return [{"role": "system", "content": _INTRODUCTION}, {"role": "user", "content": content}]


def pair_prompt(speech: str, first: str, second: str) -> list[dict[str, str]]:
    """The messages that ask for the ratings of two responses side by side."""
    content = f"Client:\n{speech}\n\nFirst response:\n{first}\n\nSecond response:\n{second}\n\n{_PAIR}"
    return [{"role": "system", "content": _INTRODUCTION}, {"role": "user", "content": content}]


def second_turn(response: str) -> dict[str, str]:
    """The user turn that asks a judge of the compact format for the ratings of another response to the same speech."""
    return {"role": "user", "content": f"\nReply: {response}"}


def single_schema(max_evidence_chars: int) -> dict[str, Any]:
    """The JSON schema of one response's ratings, keys in the order of the principles."""
    entry = {
        "type": "object",
        "properties": {
            "evidence": {"type": "string", "maxLength": max_evidence_chars},
            "rating": {"type": "integer", "enum": list(range(MIN_RATING, MAX_RATING + 1))},
        },
        "required": ["evidence", "rating"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": dict.fromkeys(STEMS, entry),
        "required": list(STEMS),
        "additionalProperties": False,
    }


def pair_schema(max_evidence_chars: int) -> dict[str, Any]:
    """The JSON schema of two responses' ratings."""
    side = single_schema(max_evidence_chars)
    return {
        "type": "object",
        "properties": {"first": side, "second": side},
        "required": ["first", "second"],
        "additionalProperties": False,
    }


def answer(ratings: Mapping[str, int], evidence: Mapping[str, str]) -> dict[str, Any]:
    """The object a judge should write, to be dumped by `dump`."""
    return {p.stem: {"evidence": evidence[p.stem], "rating": ratings[p.stem]} for p in PRINCIPLES}


def dump(value: Mapping[str, Any]) -> str:
    """JSON with the separators that the grammar allows."""
    return json.dumps(value, ensure_ascii=False)


def parse_single(text: str) -> Rating | None:
    """The ratings in a judge's answer, or None where it does not hold all seven."""
    return _rating(_loads(text))


def parse_pair(text: str) -> tuple[Rating, Rating] | None:
    """The ratings of first and second, or None where one is missing."""
    value = _loads(text)
    if not isinstance(value, dict):
        return None
    first, second = _rating(value.get("first")), _rating(value.get("second"))
    return (first, second) if first and second else None


def _loads(text: str) -> Any:
    try:
        return json.loads(text, strict=False)  # the grammar lets control characters into strings
    except (ValueError, RecursionError):
        return None


def _rating(value: Any) -> Rating | None:
    if not isinstance(value, dict):
        return None
    ratings, evidence = {}, {}
    for stem in STEMS:
        entry = value.get(stem)
        if not isinstance(entry, dict):
            return None
        rating = entry.get("rating")
        if not isinstance(rating, int) or isinstance(rating, bool) or not MIN_RATING <= rating <= MAX_RATING:
            return None
        ratings[stem], evidence[stem] = rating, str(entry.get("evidence", ""))
    return Rating(ratings, evidence)
