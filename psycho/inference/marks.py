"""What kind of answer came: reasoning cut off, and one mark of ok, empty, truncated, refused or looping.

Marks are cheap rules that a person can check, not a model: they are written to every row, and a setting
(`generation.marks`) says what becomes of an answer that is not ok. Where two fit, the one that says more stands:
a loop usually ends at the token limit, and is called a loop.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

OK, EMPTY, TRUNCATED, REFUSED, LOOPING = "ok", "empty", "truncated", "refused", "looping"
STATUSES = (OK, EMPTY, TRUNCATED, REFUSED, LOOPING)
REASONING_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"), ("[THINK]", "[/THINK]"))

# A refusal opens the answer; later on the same words set limits, as a counsellor may.
_SORRY = r"(?:(?:i(?:'|\u2019)?m|i am) (?:\w+ ){0,2}sorry\b|sorry\b|unfortunately\b)[^\n]{0,100}?[,.;]? ?(?:but )?"
_UNABLE = r"i(?:(?:'|\u2019)?m| am)? ?(?:can(?:'|\u2019)?t|cannot|can not|won(?:'|\u2019)?t|unable to|not able to)"
_HELP = r"(?:\w+ ){0,2}(?:assist|help|provide|comply|fulfil+|continue|engage|respond|answer|discuss|do that|support)"
_REFUSAL = re.compile(rf"\W*(?:(?:{_SORRY})?{_UNABLE} {_HELP}\b|as an ai\b[^.!?\n]{{0,60}}{_UNABLE}\b)", re.IGNORECASE)

_UNIT_WORDS, _LEAST_WORDS, _LEAST_TIMES = 30, 12, 4
_UNIT_CHARS, _TIMES_CHARS = 20, 12


def split_reasoning(text: str) -> tuple[str, str | None]:
    """The answer and, apart from it, what was thought aloud; None where nothing was.

    A template may open the block in the prompt, so that only its end is in the text; an answer cut off inside its
    reasoning is reasoning to the end, and the answer is empty.
    """
    thoughts: list[str] = []
    for start, end in REASONING_TAGS:
        head, closed, tail = text.partition(end)
        if closed and start not in head:
            thoughts.append(head)
            text = tail
        pattern = re.compile(rf"{re.escape(start)}(.*?)(?:{re.escape(end)}|\Z)", re.DOTALL)
        thoughts += pattern.findall(text)
        text = pattern.sub("", text)
    found = "\n".join(thought.strip() for thought in thoughts if thought.strip())
    return text.strip(), found or None


def mark(text: str, finish_reason: str) -> str:
    """The one status of an answer whose reasoning is cut off."""
    if finish_reason == "content_filter" or refuses(text):
        return REFUSED
    if not text.strip():
        return EMPTY
    if loops(text):
        return LOOPING
    return TRUNCATED if finish_reason == "length" else OK


def refuses(text: str) -> bool:
    """True when the answer opens by declining to help."""
    return bool(_REFUSAL.match(text))


def loops(text: str) -> bool:
    """True when up to 30 words follow themselves four times in a row, or a few characters twelve times."""
    codes: dict[str, int] = {}
    words = np.array([codes.setdefault(word, len(codes)) for word in text.split()], np.int64)
    for unit in range(1, min(_UNIT_WORDS, len(words) // _LEAST_TIMES) + 1):
        if _repeats(words, unit, max(unit * (_LEAST_TIMES - 1), _LEAST_WORDS - unit)):
            return True
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    units = range(1, min(_UNIT_CHARS, len(characters) // _TIMES_CHARS) + 1)
    # The pattern is slow on long texts, and few hold anything that it could match.
    if not any(_repeats(characters, unit, unit * (_TIMES_CHARS - 1)) for unit in units):
        return False
    return bool(re.search(rf"(\S(?:.{{0,{_UNIT_CHARS - 1}}}?))\1{{{_TIMES_CHARS - 1},}}", text, re.DOTALL))


def _repeats(codes: npt.NDArray[Any], distance: int, least: int) -> bool:
    """Whether so many codes in a row are each equal to the one at that distance before them."""
    same = codes[distance:] == codes[:-distance]
    if np.count_nonzero(same) < least:  # of most texts, and soon said
        return False
    ends = np.concatenate(([-1], np.flatnonzero(~same), [len(same)]))
    return bool((ends[1:] - ends[:-1]).max() > least)
