"""How long is left, from counts that grow: nothing until enough is known, then an estimate that does not jump.

Engines take a while to start, and the first rows of a stage come late and all at once; a rate over the whole time
would promise hours in the first half minute. So time counts from the first rows on, those rows are left out of the
rate, and the rate is taken where rows came in, not in the quiet between two batches of them.
"""

from __future__ import annotations

_MIN_UPDATES = 3  # after the first rows
_MIN_SECONDS = 15.0
_MIN_SHARE = 0.02  # of all rows, or this long after the first of them:
_LONG_ENOUGH_S = 60.0
_WEIGHT = 0.3  # of a new estimate against the one before, less the time that passed


class Eta:
    """Time left and tokens a second of one stage of `total` rows."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._first: tuple[float, int, int] | None = None  # seconds, rows, tokens when the first rows were there
        self._last: tuple[float, int, int] = (0.0, 0, 0)
        self._updates = 0
        self._left: tuple[float, float] | None = None  # when it was said, what was said

    def see(self, seconds: float, rows: int, tokens: int = 0) -> None:
        """Take note of what is done `seconds` after the start; fewer rows than before are a count that failed."""
        if rows <= self._last[1]:
            return
        self._last = (seconds, rows, tokens)
        if self._first is None:
            self._first = self._last
        else:
            self._updates += 1

    def left(self, seconds: float) -> float | None:
        """Seconds left, `seconds` after the start; None while too little is known, and when all is done."""
        known = self._rate(seconds)
        if known is None or self._last[1] >= self._total:
            return None
        rate, gap = known
        fresh = max(0.0, (self._total - self._last[1]) / rate - min(seconds - self._last[0], gap))
        if self._left is not None:
            said, before = self._left
            fresh = _WEIGHT * fresh + (1 - _WEIGHT) * max(0.0, before - (seconds - said))
        self._left = (seconds, fresh)
        return fresh

    def tokens_per_s(self) -> float | None:
        """Tokens a second since the first rows; None while there is no second sight of them."""
        if self._first is None or self._last[0] - self._first[0] < 1:
            return None
        return max(0, self._last[2] - self._first[2]) / (self._last[0] - self._first[0])

    def _rate(self, seconds: float) -> tuple[float, float] | None:
        """Rows a second, the first rows and the time before them left out, and seconds between arrivals of rows."""
        if self._first is None or self._updates < _MIN_UPDATES:
            return None
        since, rows = seconds - self._first[0], self._last[1] - self._first[1]
        if since < _MIN_SECONDS or (rows < _MIN_SHARE * self._total and since < _LONG_ENOUGH_S):
            return None
        gap = (self._last[0] - self._first[0]) / self._updates
        # Rows that are overdue make the rate fall; until then it stays what it was when they last came.
        return rows / (max(self._last[0], seconds - gap) - self._first[0]), gap


def said(seconds: float) -> str:
    """A time left as a person says it."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h left"
    return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"
