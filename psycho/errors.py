"""The errors a user meets, and the exit code each one ends with.

A job exits 0 when done, 2 on bad input or configuration, 3 when the judge is unfit (`judge.unfit: stop`), 1 when it
failed, 130 when interrupted by Ctrl-C and 143 by SIGTERM. Everything a user can put right is a `BadInput`: one clear
sentence that names the file, row, key or value and says what to do. It never carries client speech.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_UNFIT = 3
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class BadInput(Exception):
    """Something the user can put right; printed as one sentence without a traceback, exit code 2."""


class BadRows(BadInput):
    """Input of which too few rows can be used; `left_out` is each row left out with its reason, or the file of them."""

    def __init__(self, sentence: str, left_out: str | list[dict[str, Any]] | None = None) -> None:
        super().__init__(sentence)
        self.left_out = left_out


class StageFailed(Exception):
    """A stage could not finish for a reason that is not the user's input; exit code 1."""


class UnfitJudge(Exception):
    """The judge missed a gate and `judge.unfit` is stop; one sentence, exit code 3. What is done stays."""


class WaitTimedOut(StageFailed):
    """A bounded wait ran out; the message names what was waited for, for how long, and the setting that bounds it."""

    def __init__(self, what: str, seconds: float, setting: str = "") -> None:
        advice = f"; raise {setting} if that takes longer here" if setting else ""
        super().__init__(f"waited {seconds:.0f} s for {what} and gave up{advice}")


def said_counts(counts: Counter[str]) -> str:
    """`59 exact duplicate, 3 under speeches.min_chars`, the most often first."""
    return ", ".join(f"{count:,} {what}" for what, count in counts.most_common())
