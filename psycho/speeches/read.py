"""Reading rows of client speeches, one at a time, out of whatever `source.py` found.

A row that holds no text has a reason and is quarantined by the caller. A file that cannot be read at all is one
sentence, naming the file and what to do; text never gets into it. Lines are decoded one by one: UTF-8, and Windows'
cp1252 where a line is not (counted, so that the run can say so). A line of 16 MiB or more loses its middle, for no
speech is that long and one such line must not cost the run its memory.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.speeches.source import SourceFile, find_files, is_hub_id, open_binary

CP1252 = "cp1252_lines"
MAX_LINE = 1 << 24
CUT = "a line of 16 MiB or more"
_NOT_UTF8 = "{} holds text that is not UTF-8; write it again from text that is"
_MAX_FIELD = 2**31 - 1
_BATCH_ROWS = 512
_DELIMITERS = ",;\t"
Row = Mapping[str, Any]


class RawSpeech(NamedTuple):
    """A row as it was read; `text` is a text or a transcript, `reason` says why the row cannot be used."""

    number: int
    text: Any
    id: str | None = None
    topic: str | None = None
    reason: str | None = None


def read_speeches(config: SpeechesConfig, notes: Counter[str] | None = None) -> Iterator[RawSpeech]:
    """Rows of the configured source, numbered from 1 over all its files.

    Args:
        notes: counts what was put right on the way (`cp1252_lines`).

    Raises:
        BadInput: the source is missing, of an unknown kind, unreadable, empty, or lacks a column.
    """
    notes = Counter() if notes is None else notes
    for number, row in enumerate(_rows(config, notes), start=1):
        if isinstance(row, str):
            yield RawSpeech(number, None, reason=row)
            continue
        yield RawSpeech(
            number,
            _valid(row.get(config.text_column)),
            _short(row, config.id_column),
            _short(row, config.topic_column),
        )


def _rows(config: SpeechesConfig, notes: Counter[str]) -> Iterator[Row | str]:
    """Rows, or the reason why one cannot be used."""
    if is_hub_id(config.source):
        yield from _hub(config)
        return
    for file in find_files(config):
        reader = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}[file.kind]
        try:
            yield from reader(file, config, notes)
        except PermissionError:
            raise BadInput(f"{file.uri} cannot be read (permission denied); check its mode") from None


def _valid(value: Any) -> Any:
    """Text that can be stored: JSON may hold half a surrogate pair."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, list):
        return [_valid(item) for item in value]
    return {key: _valid(item) for key, item in value.items()} if isinstance(value, dict) else value


def _short(row: Row, column: str | None) -> str | None:
    value = row.get(column) if column else None
    if isinstance(value, float) and value.is_integer():  # pandas makes such of whole numbers where one is missing
        value = int(value)
    return str(_valid(value)) if isinstance(value, str | int) else None


def _lines(file: BinaryIO, name: str, notes: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Decoded lines with their ends, and whether the middle of one was left out.

    Raises:
        BadInput: the file is not text.
    """
    first = True
    while line := file.readline(MAX_LINE):
        cut = len(line) == MAX_LINE and not line.endswith(b"\n")
        if first:
            line, first = line.removeprefix(b"\xef\xbb\xbf"), False
            if b"\0" in line[: 1 << 16] or line.startswith((b"\x1f\x8b", b"PK\x03\x04", b"PAR1")):
                raise BadInput(f"{name} is not text in UTF-8 (binary or UTF-16?); save it as UTF-8")
        if cut:
            line += _rest(file)
        try:
            text = line.decode()
        except UnicodeDecodeError:
            text = line.decode("cp1252", errors="replace")
            notes[CP1252] += not cut
        yield text, cut


def _rest(file: BinaryIO) -> bytes:
    """The end of a line too long; a quote stands for an odd number of them left out, so that CSV goes on."""
    quotes, end = 0, b""
    while piece := file.readline(MAX_LINE):
        quotes += end.count(b'"')
        end = piece
        if piece.endswith(b"\n"):
            break
    return (b'"' if quotes % 2 else b"") + end


def _csv(file: SourceFile, config: SpeechesConfig, notes: Counter[str]) -> Iterator[Row | str]:
    csv.field_size_limit(_MAX_FIELD)
    cut: list[int] = []
    with open_binary(file.uri) as binary:
        lines = _csv_lines(_lines(binary, file.uri, notes), cut)
        header = next((line for line in lines if line.strip()), None)
        if header is None:
            raise BadInput(f"{file.uri} is empty; give a file with a header and rows")
        delimiter = max(_DELIMITERS, key=lambda d: config.text_column in next(csv.reader([header], delimiter=d), []))
        names = next(csv.reader(chain([header], lines), delimiter=delimiter))  # a name may hold a line end
        _check_columns(file.uri, names, config)
        reader = csv.DictReader(lines, fieldnames=names, delimiter=delimiter)
        try:
            for row in reader:
                yield CUT if cut else row
                cut.clear()
        except csv.Error as error:
            raise BadInput(f"{file.uri} line {reader.line_num} is not CSV ({error}); put it right") from None


def _csv_lines(lines: Iterable[tuple[str, bool]], cut: list[int]) -> Iterator[str]:
    """Lines for the CSV reader, the old Macintosh's too; a line without its middle leaves a mark in `cut`."""
    for line, is_cut in lines:
        cut += [1] * is_cut
        yield from re.split(r"(?<=\r)(?!\n)", line) if "\r" in line else [line]


def _jsonl(file: SourceFile, config: SpeechesConfig, notes: Counter[str]) -> Iterator[Row | str]:
    checked = False
    with open_binary(file.uri) as binary:
        for line, cut in _lines(binary, file.uri, notes):
            if cut:
                yield CUT
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and not checked:
                _check_columns(file.uri, list(row), config)
                checked = True
            yield row if isinstance(row, dict) else "not a JSON object"


def _parquet(file: SourceFile, config: SpeechesConfig, _: Counter[str]) -> Iterator[Row]:
    fs, path = storage.resolve(file.uri)
    try:
        with pq.ParquetFile(path, filesystem=fs) as parquet:
            _check_columns(file.uri, parquet.schema_arrow.names, config)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=_wanted(config)):
                yield from batch.to_pylist()
    except PermissionError:
        raise
    except UnicodeDecodeError:
        raise BadInput(_NOT_UTF8.format(file.uri)) from None
    except (pa.ArrowException, OSError):
        raise BadInput(f"{file.uri} is not a Parquet file or is cut short; write it again") from None


def _arrow(file: SourceFile, config: SpeechesConfig, _: Counter[str]) -> Iterator[Row]:
    """A file of a `datasets` folder."""
    fs, path = storage.resolve(file.uri)
    try:
        with fs.open_input_stream(path) as stream, pa.ipc.open_stream(stream) as batches:
            _check_columns(file.uri, batches.schema.names, config)
            for batch in batches:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield from batch.select(_wanted(config)).slice(start, _BATCH_ROWS).to_pylist()
    except PermissionError:
        raise
    except UnicodeDecodeError:
        raise BadInput(_NOT_UTF8.format(file.uri)) from None
    except (pa.ArrowException, OSError):
        raise BadInput(f"{file.uri} of a datasets folder is missing or cut short; save it again") from None


def _hub(config: SpeechesConfig) -> Iterator[Row]:
    import datasets

    datasets.disable_progress_bars()
    once = datasets.DownloadConfig(max_retries=1)
    rows = None
    try:
        rows = datasets.load_dataset(
            config.source, config.source_config, split=config.source_split, streaming=True, download_config=once
        )
        checked = False
        for row in rows:
            if not checked:
                _check_columns(config.source, list(row), config)
                checked = True
            yield row
    except BadInput:
        raise
    except Exception as error:  # the hub's client raises whatever its layers do
        what = "cannot be read on" if rows is not None else "is no file or folder here and was not found on the hub"
        raise BadInput(
            f"speeches.source {config.source} {what} ({type(error).__name__}); check the name, "
            "speeches.source_config, speeches.source_split and the network"
        ) from None


def _wanted(config: SpeechesConfig) -> list[str]:
    names = (config.text_column, config.id_column, config.topic_column)
    return list(dict.fromkeys(name for name in names if name))


def _check_columns(name: str, found: list[str], config: SpeechesConfig) -> None:
    for setting in ("text_column", "id_column", "topic_column"):
        column = getattr(config, setting)
        if column and column not in found:
            raise BadInput(f"{name} has no column {column}; its columns are {_shown(found)}: set speeches.{setting}")


def _shown(names: list[str]) -> str:
    """Column names, unless one reads like text: the first row of a file without a header is a client's speech."""
    if all(len(name) <= 40 and len(name.split()) <= 3 and name.isprintable() for name in names):
        return ", ".join(names[:20])
    return f"{len(names)} that read like text (is the header missing?)"
