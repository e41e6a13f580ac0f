"""Records of a CSV file, none of them cut or joined in silence.

Two mistakes lose text and look like success to a lenient reader. Text with a comma that is not quoted ends at its
comma: its row has more cells than the header. A quote that is never closed swallows the rows below it up to the next
quote: the strict reader then finds text right behind that quote, or the file's end. The row where it began is left
out, and reading goes on with the line below; a line there that does not begin like the rows before it is left out too.
Where the mistakes cancel out (a row that lacks its closing quote, then one that lacks its opening quote) a line within
the cell still splits as a row does. Cells of several lines are fine. A file with more than one such row, and more than
one in a hundred, is refused.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from psycho.errors import BadInput, BadRows, said_counts
from psycho.textfile import CUT, MAX_LINE, Line

OPEN, INNER = "a quote that is not closed", "a quote inside a quoted cell that is not doubled"
MORE, FEWER = "more cells than the header", "fewer cells than the header"
BEHIND = "behind a quote that is not closed, and not like the other rows"
MOST_SHARE = 0.01  # of rows that do not fit the header
_MOST_BEHIND = 20  # lines of a broken cell that are not counted as rows of their own
_MAX_FIELD = 2**31 - 1
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
_SEP = re.compile(r"sep=([,;\t|])\s*", re.IGNORECASE)  # Excel's own first line
_Look = tuple[bool, bool, bool]


class _Lines:
    """Lines for the CSV reader, which takes those of one record at a time (`taken`); they can be given back."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines, self._again = _split(lines), deque[Line]()
        self.taken: list[Line] = []
        self._size = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        self._size += len(line.text)
        if self._size > MAX_LINE and len(self.taken) > 1:
            raise csv.Error("no end of a quoted cell")
        return line.text

    def next_record(self) -> None:
        self.taken, self._size = [], 0

    def begin_with(self, line: str) -> None:
        """A line that was looked at already, as the first of a record."""
        self.next_record()
        self._again.appendleft(Line(line))

    def give_back(self) -> None:
        """All lines of the record but its first."""
        self._again.extendleft(reversed(self.taken[1:]))
        self.taken = self.taken[:1]


def _split(lines: Iterator[Line]) -> Iterator[Line]:
    """The old Macintosh's lines too."""
    for line in lines:
        if "\r" in line.text:
            yield from (Line(part, line.cut) for part in re.split(r"(?<=\r)(?!\n)", line.text) if part)
        else:
            yield line


class CsvFile:
    """A CSV file: its `names` (of the columns), then its records.

    Args:
        lines: of the file, decoded.
        name: of the file, for errors.
        wanted: names of columns that tell which delimiter it is; without any, the one with the most cells.

    Raises:
        BadInput: there is no header.
    """

    def __init__(self, lines: Iterator[Line], name: str, wanted: Collection[str]) -> None:
        csv.field_size_limit(_MAX_FIELD)
        self._lines, self._name = _Lines(lines), name
        header = next((line for line in self._lines if line.strip()), None)
        given = _SEP.fullmatch(header) if header else None
        if given:
            header = next((line for line in self._lines if line.strip()), None)
        if header is None:
            raise BadInput(f"{name} is empty; give a file with a header and rows")

        def fit(delimiter: str) -> tuple[int, int]:
            cells = next(csv.reader([header], delimiter=delimiter), [])
            return sum(cell.strip() in wanted for cell in cells), len(cells)

        self._delimiter = given[1] if given else max(_DELIMITERS, key=fit)
        self._lines.begin_with(header)
        spaced = re.search(rf"{re.escape(self._delimiter)} +\S", header) is not None
        self._reader = csv.reader(self._lines, delimiter=self._delimiter, skipinitialspace=spaced, strict=True)
        try:
            self.names = [cell.strip() for cell in next(self._reader)]  # a name may hold a line end
        except csv.Error:
            raise BadInput(f"the header of {name} has a broken quote; put it right") from None
        self._looks: set[_Look] = set()
        self.rows = 0
        self.misshapen: Counter[str] = Counter()

    def records(self) -> Iterator[list[str] | str]:
        """The cells of each row, as many as the header's, or the reason why it cannot be used.

        Raises:
            BadRows: too many rows do not fit the header.
        """
        behind = 0
        lost = False  # behind a quote that is not closed, where rows may not begin with lines
        while True:
            self._lines.next_record()
            try:
                cells: list[str] | None = next(self._reader)
            except StopIteration:
                break
            except csv.Error:
                cells = None
            if cells == [] or (cells is not None and len(cells) == 1 < len(self.names) and not cells[0].strip()):
                continue  # a blank line
            self.rows += 1
            reason = self._broken() if cells is None else self._reason(cells, lost)
            if reason is None and cells is not None:
                lost = False
                self._looks.add(self._look(cells))
                yield cells[: len(self.names)]
                continue
            lost = lost or cells is None or reason == OPEN
            behind = behind + 1 if reason == BEHIND else 0
            if any(line.cut for line in self._lines.taken):
                reason = CUT
            elif reason != BEHIND or behind > _MOST_BEHIND:
                self.misshapen[reason or OPEN] += 1
            if cells is None or reason == OPEN:
                self._lines.give_back()
            yield reason or OPEN
        self._check()

    def _broken(self) -> str:
        """What is wrong with a record that the reader refused."""
        if len(self._lines.taken) > 1 or self._lines.taken[-1].text.count('"') == 1:
            return OPEN
        return INNER

    def _reason(self, cells: Sequence[str], lost: bool) -> str | None:
        if any(line.cut for line in self._lines.taken):
            return CUT
        wanted = len(self.names)
        if lost and not (self._clean(cells) and (not self._looks or self._look(cells) in self._looks)):
            return BEHIND
        if len(cells) < wanted:
            return FEWER
        if any(cells[wanted:]):  # a delimiter at the end of a row adds an empty cell, and nothing is lost
            return MORE
        return OPEN if len(self._lines.taken) > 1 and self._holds_a_row(cells) else None

    def _clean(self, cells: Sequence[str]) -> bool:
        """True for as many cells as the header, every quote in them doubled in the file, as it has to be."""
        raw = "".join(line.text for line in self._lines.taken)
        return len(cells) == len(self.names) and all(cell.replace('"', '""') in raw for cell in cells if '"' in cell)

    def _look(self, cells: Sequence[str]) -> _Look:
        """How a row begins: in quotes, with a number, with more than a word."""
        return self._lines.taken[0].text[:1] == '"', cells[0].isdecimal(), " " in cells[0].strip()

    def _holds_a_row(self, cells: Sequence[str]) -> bool:
        """True where a line inside a cell splits as the file's rows do, and not as prose does."""
        count, inner = len(self.names), [line.text.rstrip("\r\n") for line in self._lines.taken[1:]]
        if count < 2:
            return False
        places = [place for place, cell in enumerate(cells) if "\n" in cell or "\r" in cell]
        *within, last = (line.split(self._delimiter) for line in inner)  # the last has the cells behind this one, too
        found = [parts for parts in within if len(parts) == count]
        if len(last) == count and len(places) == 1 and places[0]:
            found.append(last[: places[0] + 1])
        return any(map(self._like_a_row, found))

    def _like_a_row(self, parts: Sequence[str]) -> bool:
        """No blanks around its cells, no number parted at its comma, and it begins as rows do here."""
        whole = all(part and part == part.strip() for part in parts)
        numbers = any(one[-1:].isdecimal() and other[:1].isdecimal() for one, other in pairwise(parts))
        return whole and not numbers and (False, parts[0].isdecimal(), " " in parts[0]) in self._looks

    def _check(self) -> None:
        count = self.misshapen.total()
        if not count or (count < self.rows and count <= max(1, MOST_SHARE * self.rows)):
            return
        columns = "1 column" if len(self.names) == 1 else f"{len(self.names)} columns"
        raise BadRows(
            f"{count:,} of {self.rows:,} rows of {self._name} do not fit its header of {columns} "
            f"({said_counts(self.misshapen)}), so that text would be cut or joined; put quotes around every text that "
            f"holds a {_DELIMITERS[self._delimiter]}, a quote or a line end, double the quotes inside it "
            '("He said ""no""."), or save it as JSON lines'
        )
