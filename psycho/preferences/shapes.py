"""The shapes that preference pairs come in, made into one: what was said before, the client's turn, two responses.

Read are the published columns (`question`, `chosen`, `rejected` as text), TRL's `prompt`, `chosen`, `rejected` as text
or as messages, and `chosen` and `rejected` alone as whole conversations that share all but the last answer (TRL's
implicit prompt, UltraFeedback's messages; as text those of HH-RLHF, "Human: ... Assistant: ..."). Ratings by principle
and overall scores are optional; what a set does not say stays unknown. System messages are left out, as they are in
transcripts of speeches: the run has its own (`generation.system_prompt`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from psycho.errors import BadInput
from psycho.principles import STEMS
from psycho.rowfile import shown_columns
from psycho.schema import NO_HISTORY, history_json
from psycho.speeches.transcript import Turn, all_turns, turn_list

Row = Mapping[str, Any]
SIDES = ("chosen", "rejected")
RATINGS = tuple(f"{side}_{stem}_rating" for side in SIDES for stem in STEMS)
PROMPTS = ("question", "prompt", "instruction")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
MODELS = (("chosen_model", "rejected_model"), ("chosen-model", "rejected-model"))
COLUMNS = (
    *PROMPTS, *SIDES, *RATINGS, *(name for both in (*SCORES, *MODELS) for name in both),
    "ID", "prefID", "history", "split", "gap",
)  # fmt: skip
ACCEPTED = (
    "accepted are chosen and rejected with question (PsychoCounsel-Preference) or prompt (TRL), as text or as "
    "messages, or chosen and rejected alone as whole conversations; beside them score_chosen and score_rejected (or "
    "chosen_rating and rejected_rating), fourteen {chosen,rejected}_{principle}_rating, history, ID, prefID, "
    "chosen_model, rejected_model and split"
)
_SPOKEN = re.compile(
    r"^[ \t]*(human|user|client|patient|assistant|therapist|counsellor|counselor|bot)[ \t]*:[ \t]*",
    re.IGNORECASE | re.MULTILINE,
)


class Shaped(NamedTuple):
    """One pair; `scores` of the chosen and the rejected response, None where the set gives none."""

    question: str
    history: str | None
    chosen: str
    rejected: str
    scores: tuple[float, float] | None


def check_columns(where: Any, found: Iterable[str]) -> None:
    """Refuse a file that cannot hold pairs.

    Raises:
        BadInput: a side is missing, or some but not all of the fourteen ratings are there.
    """
    names = list(found)
    lacking = [side for side in SIDES if side not in names]
    rated = [name for name in RATINGS if name in names]
    if rated:
        lacking += [name for name in RATINGS if name not in names]
    if lacking:
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise BadInput(
            f"{where} has no column {lacking[0]}{more}; its columns are {shown_columns(names)}, and {ACCEPTED}"
        )


def shaped(row: Row) -> Shaped | str:
    """The pair of a row, or the reason why it is none."""
    column = next((name for name in PROMPTS if row.get(name)), None)
    given = turn_list(row[column]) if column and isinstance(row[column], str) else row[column] if column else None
    sides: list[Any] = []
    for side in SIDES:
        value = turn_list(row[side]) if isinstance(row.get(side), str) else row.get(side)
        value = [value] if isinstance(value, Mapping) else value
        if not value or not isinstance(value, str | list) or (isinstance(value, str) and not value.strip()):
            return f"no text in {side}"
        sides.append(value)
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        return "chosen is a text and rejected is none, or the other way round"
    if isinstance(given, str) and not given.strip():
        given = None
    found = _messages(given, sides) if isinstance(sides[0], list) else _texts(column, given, sides)
    if isinstance(found, str):
        return found
    turns, chosen, rejected = found
    try:
        before = history_json(turns[:-1]) or history_json(row.get("history"))
    except ValueError:
        return NO_HISTORY
    return Shaped(turns[-1]["content"], before, chosen, rejected, _scores(row))


_Found = tuple[list[Turn], str, str] | str


def _texts(column: str | None, given: Any, sides: Sequence[str]) -> _Found:
    """Sides that are texts, behind a prompt or as whole conversations."""
    if column is None or given is None:
        spoken = [_spoken(side) for side in sides]
        if not all(spoken):
            return "no text in question or prompt, and chosen is no conversation"
        return _whole(spoken)
    if not isinstance(given, str | list):
        return f"no text in {column}"
    turns = [{"role": "user", "content": given}] if column == "question" and isinstance(given, str) else _prompt(given)
    if isinstance(turns, str):
        return turns
    repeated = isinstance(given, str) and column != "question" and all(side.startswith(given) for side in sides)
    chosen, rejected = (side[len(given) :].strip() if repeated else side for side in sides)
    for name, text in zip(SIDES, (chosen, rejected), strict=True):
        if not text.strip():
            return f"no text in {name}"
    return turns, chosen, rejected


def _messages(given: Any, sides: Sequence[list[Any]]) -> _Found:
    """Sides that are messages: an answer each behind a prompt, or whole conversations."""
    read = [all_turns(side) for side in sides]
    for name, turns in zip(SIDES, read, strict=True):
        if isinstance(turns, str):
            return f"{name}: {turns}"
    whole = [turns for turns in read if not isinstance(turns, str)]
    if any(turn["role"] == "user" for turns in whole for turn in turns):
        return _whole(whole)
    if given is None:
        return "no prompt, and chosen and rejected hold no client turn"
    turns = _prompt(given)
    if isinstance(turns, str):
        return turns
    if not all(len(side) == 1 for side in whole):
        return "no text in chosen or rejected"
    return turns, whole[0][0]["content"], whole[1][0]["content"]


def _prompt(given: Any) -> list[Turn] | str:
    """A prompt's turns, the last one a client's; or the reason why there are none."""
    if isinstance(given, str):
        turns: list[Turn] | str = _spoken(given) or [{"role": "user", "content": given.strip()}]
    else:
        turns = all_turns(given) if isinstance(given, list) else "it is neither a text nor messages"
    if isinstance(turns, str):
        return f"prompt: {turns}"
    return turns if turns and turns[-1]["role"] == "user" else "the prompt does not end with a client turn"


def _whole(sides: Sequence[list[Turn]]) -> _Found:
    """Two conversations that part at the last answer."""
    one, other = sides
    if one == other:
        return "same text"
    shared = next((place for place, both in enumerate(zip(one, other, strict=False)) if both[0] != both[1]), 0)
    ends = [one[shared:], other[shared:]]
    if not shared or one[shared - 1]["role"] != "user" or [len(end) for end in ends] != [1, 1]:
        return "chosen and rejected differ in more than their last answer"
    return one[:shared], ends[0][0]["content"], ends[1][0]["content"]


def _spoken(text: str) -> list[Turn]:
    """The turns of "Human: ... Assistant: ..."; none where a text does not begin so. An empty last one is no turn."""
    parts = _SPOKEN.split(text)
    if parts[0].strip() or len(parts) < 3:
        return []
    named = [
        {"role": role.lower(), "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    if not named[-1]["content"]:
        named.pop()
    turns = all_turns(named)
    return [] if isinstance(turns, str) or not turns or turns[0]["role"] != "user" else turns


def _scores(row: Row) -> tuple[float, float] | None:
    for names in SCORES:
        one, other = (finite(row.get(name)) for name in names)
        if one is not None and other is not None:
            return one, other
    return None


def finite(value: Any) -> float | None:
    """A number that a cell holds, also as text; None for anything else."""
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
