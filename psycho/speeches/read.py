"""Reading client speeches from CSV, JSONL or Parquet.

Every reader yields (row number, text, id or None); a row that holds no text yields None and is quarantined by the
caller. A file that cannot be read at all is one sentence, naming the file and what to do; text never gets into it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho.config import SpeechesConfig
from psycho.errors import BadInput

RawSpeech = tuple[int, str | None, str | None]
_MAX_FIELD = 2**31 - 1


def read_speeches(config: SpeechesConfig) -> Iterator[RawSpeech]:
    """Rows of the configured source, numbered from 1.

    Raises:
        BadInput: the file is missing, of an unknown kind, unreadable, not UTF-8, empty, or lacks the column.
    """
    path = Path(config.source).expanduser()
    if not path.exists():
        raise BadInput(f"speeches.source {config.source} does not exist; give a CSV, JSONL or Parquet file")
    if path.is_dir():
        raise BadInput(f"speeches.source {config.source} is a folder; give a CSV, JSONL or Parquet file")
    reader = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise BadInput(f"speeches.source {config.source} ends in {path.suffix!r}; give .csv, .jsonl or .parquet")
    number = 0
    try:
        for number, row in enumerate(reader(path, config), start=1):
            yield (
                number,
                _text(row, config.text_column),
                _text(row, config.id_column) if config.id_column else None,
            )
    except UnicodeDecodeError:
        raise BadInput(f"{config.source} is not UTF-8 (after row {number}); save it as UTF-8") from None
    except PermissionError:
        raise BadInput(f"{config.source} cannot be read (permission denied); check its mode") from None


def _text(row: Mapping[str, Any] | None, column: str) -> str | None:
    value = row.get(column) if row is not None else None
    if not isinstance(value, str | int):
        return None
    return str(value).encode(errors="replace").decode()  # JSON may hold half a surrogate pair


def _csv(path: Path, config: SpeechesConfig) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(_MAX_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if not reader.fieldnames:
            raise BadInput(f"{config.source} is empty; give a file with a header and rows")
        _check_columns(list(reader.fieldnames), config)
        try:
            yield from reader
        except csv.Error as error:
            raise BadInput(f"{config.source} line {reader.line_num} is not CSV ({error}); put it right") from None


def _jsonl(path: Path, config: SpeechesConfig) -> Iterator[Mapping[str, Any] | None]:
    checked = False
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and not checked:
                _check_columns(list(row), config)
                checked = True
            yield row if isinstance(row, dict) else None


def _parquet(path: Path, config: SpeechesConfig) -> Iterator[Mapping[str, Any]]:
    wanted = [name for name in (config.text_column, config.id_column) if name]
    try:
        file = pq.ParquetFile(path)
        _check_columns(file.schema_arrow.names, config)
        for batch in file.iter_batches(columns=wanted):
            yield from batch.to_pylist()
    except PermissionError:
        raise
    except (pa.ArrowInvalid, OSError):
        raise BadInput(f"{config.source} is not a Parquet file or is cut short; write it again") from None


def _check_columns(found: list[str], config: SpeechesConfig) -> None:
    for setting, column in (("text_column", config.text_column), ("id_column", config.id_column)):
        if column and column not in found:
            raise BadInput(
                f"{config.source} has no column {column}; its columns are {_shown(found)}: set speeches.{setting}"
            )


def _shown(names: list[str]) -> str:
    """Column names, unless one reads like text: the first row of a file without a header is a client's speech."""
    if all(len(name) <= 40 and len(name.split()) <= 3 and name.isprintable() for name in names):
        return ", ".join(names[:20])
    return f"{len(names)} that read like text (is the header missing?)"
