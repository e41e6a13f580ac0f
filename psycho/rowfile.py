"""Rows of the files people have: CSV with any usual delimiter, JSON lines, a JSON list; packed or not, one at a time.

A row that cannot be read comes as the reason why, for the caller's quarantine. A file that cannot be read at all is one
sentence, naming the file and what to do; text never gets into it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import ijson

from psycho.csvfile import CsvFile
from psycho.errors import BadInput
from psycho.textfile import CP1252, CUT, PACKED, lines, open_utf8, plain_path

TEXT_KINDS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json"}
KINDS = {**TEXT_KINDS, ".parquet": "parquet"}
ACCEPTED = ".csv (a sheet saved as CSV UTF-8), .jsonl, .json (each also .gz) or .parquet"
NO_OBJECT = "not a JSON object"
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # of a `datasets` folder
Row = Mapping[str, Any]
CheckColumns = Callable[[list[str]], None]


def kind_of(path: str) -> str | None:
    """csv, jsonl, json or parquet by the end of a file's name; None for any other."""
    name = PurePosixPath(plain_path(path)).name.lower()
    packed = name.endswith(PACKED)
    return (TEXT_KINDS if packed else KINDS).get(PurePosixPath(name.removesuffix(PACKED)).suffix)


def data_files(paths: Collection[str]) -> list[str]:
    """The files of a folder that hold rows, sorted: one kind of JSON file is often about the data, so that they count
    only where there is nothing else."""
    found = sorted(path for path in paths if kind_of(path) and PurePosixPath(path).name not in _NOT_DATA)
    return [path for path in found if kind_of(path) != "json"] or found


def text_rows(uri: str, wanted: Collection[str], check: CheckColumns, notes: Counter[str]) -> Iterator[Row | str]:
    """Rows of a CSV or JSON file by column, or the reason why one cannot be used.

    Args:
        wanted: columns by which a CSV's delimiter is known.
        check: told the columns of the file before its first row; raises where they are not enough.
        notes: counts what was put right on the way (`cp1252_lines`).

    Raises:
        BadInput: the file cannot be read, or what `check` raises.
    """
    kind = kind_of(uri)
    try:
        with open_utf8(uri) as file:
            if kind == "csv":
                yield from _csv(file, uri, wanted, check, notes)
            elif kind == "json" and file.peek(1 << 16)[: 1 << 16].lstrip()[:1] == b"[":  # type: ignore[attr-defined]
                yield from _checked(_json_list(file, uri), check)
            else:
                yield from _checked(_json_lines(file, notes), check)
    except PermissionError:
        raise BadInput(f"{uri} cannot be read (permission denied); check its mode") from None


def _csv(
    file: BinaryIO, uri: str, wanted: Collection[str], check: CheckColumns, notes: Counter[str]
) -> Iterator[Row | str]:
    table = CsvFile(lines(file, notes), uri, wanted)
    check(table.names)
    for cells in table.records():
        yield cells if isinstance(cells, str) else dict(zip(table.names, cells, strict=True))


def _checked(rows: Iterator[Row | str], check: CheckColumns) -> Iterator[Row | str]:
    """`rows`, the columns of the first one checked."""
    for row in rows:
        if isinstance(row, Mapping):
            check(list(row))
            yield row
            break
        yield row
    yield from rows


def _json_lines(file: BinaryIO, notes: Counter[str]) -> Iterator[Row | str]:
    for line, cut in lines(file, notes):
        if cut:
            yield CUT
            continue
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        yield row if isinstance(row, dict) else NO_OBJECT


def _json_list(file: BinaryIO, uri: str) -> Iterator[Row | str]:
    """Objects of one list, however long, held one at a time."""
    number = 0
    try:
        for row in ijson.items(file, "item", use_float=True):
            number += 1
            yield row if isinstance(row, dict) else NO_OBJECT
    except (ijson.JSONError, UnicodeDecodeError):
        raise BadInput(
            f"{uri} is not a whole JSON list in UTF-8 (it breaks off behind row {number:,}); write it again, or give "
            "one object a line"
        ) from None


def say_notes(notes: Mapping[str, int], say: Callable[[str], None]) -> None:
    """Tell a person what was put right while reading."""
    if count := notes.get(CP1252):
        say(f"  note: {count:,} lines are not UTF-8 and were read as Windows-1252 (cp1252); save the file as UTF-8")


def shown_columns(names: Sequence[str]) -> str:
    """Column names, unless one reads like text: the first row of a file without a header is a client's speech."""
    if all(len(name) <= 40 and len(name.split()) <= 3 and name.isprintable() for name in names):
        return ", ".join(names[:20])
    return f"{len(names)} that read like text (is the header missing?)"
