"""Text that a judge's own language model finds impossible: an attack, or another language than it was trained on.

A judge of the compact format is small enough to be steered by words that it has never seen. The fluency floor sees one
bad token, a slip; here a whole sentence is foreign, which is what planted instructions, markup or other scripts are to
such a judge. What is foreign may lower a rating but never raise it (`judge.py`): the response is rated again without
it, and each principle keeps the lower of both ratings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_CUT = re.compile(r"(?<=[.?!])(?=[^\w.?!])|(?=[\n\r\v\f\x85\u2028\u2029])")


def pieces(text: str) -> list[str]:
    """The text cut after each sentence and before each new line; joined they are the text."""
    cuts = sorted({0, *(match.start() for match in _CUT.finditer(text)), len(text)})
    return [text[start:end] for start, end in pairwise(cuts)] or [text]


def without_foreign(parts: Sequence[str], means: Sequence[float], floor: float) -> str | None:
    """The text without its foreign pieces; None where nothing in it is foreign.

    A piece is foreign where even its mean token log-probability is under the floor, which in ordinary text not one
    token is. In the nano world all means of clean text are over -1.3 and those of attacks under -9.
    """
    kept = [part for part, mean in zip(parts, means, strict=True) if mean >= floor]
    return "".join(kept).strip() if len(kept) < len(parts) else None
