"""Reading rows of client speeches, one at a time, out of whatever `source.py` found.

A row that holds no text has a reason and is quarantined by the caller. A file that cannot be read at all is one
sentence, naming the file and what to do; text never gets into it. Text files are read by `rowfile.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.rowfile import shown_columns, text_rows
from psycho.speeches.source import SourceFile, find_files, is_hub_id

_NOT_UTF8 = "{} holds text that is not UTF-8; write it again from text that is"
_BATCH_ROWS = 512
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
        try:
            yield from file_rows(file, config, notes)
        except PermissionError:
            raise BadInput(f"{file.uri} cannot be read (permission denied); check its mode") from None


def file_rows(file: SourceFile, config: SpeechesConfig, notes: Counter[str]) -> Iterator[Row | str]:
    """Rows of one file of the source, or the reason why one cannot be used.

    Raises:
        BadInput: as `read_speeches`.
    """
    if file.kind == "parquet":
        return _parquet(file, config)
    if file.kind == "arrow":
        return _arrow(file, config)
    return text_rows(file.uri, _wanted(config), lambda found: _check_columns(file.uri, found, config), notes)


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


def _parquet(file: SourceFile, config: SpeechesConfig) -> Iterator[Row]:
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


def _arrow(file: SourceFile, config: SpeechesConfig) -> Iterator[Row]:
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
            raise BadInput(
                f"{name} has no column {column}; its columns are {shown_columns(found)}: set speeches.{setting}"
            )
