"""Where preference pairs come from: files, folders of them (each local or on an object store), data sets of the hub.

Which side of the split a row is on is said by its file's name (train-..., test-...) or its column `split`, if at all.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from psycho import storage
from psycho.errors import BadInput
from psycho.preferences.shapes import COLUMNS, check_columns
from psycho.rowfile import ACCEPTED as ACCEPTED_FILES
from psycho.rowfile import data_files, kind_of, text_rows

Row = Mapping[str, Any]
SPLITS = {"train": "train", "test": "test", "eval": "test", "evaluation": "test", "validation": "dev", "dev": "dev"}
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def source_facts(source: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files that `source` stands for; nothing of a hub id.

    Raises:
        BadInput: there is no such file.
    """
    if not storage.is_remote(source):
        stats = [(file.name, file.stat()) for file in source_files(source)]
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    fs, path = storage.resolve(source)
    try:
        info = fs.get_file_info(path)
        folder = pafs.FileSelector(path, recursive=True, allow_not_found=True)
        found = [info] if info.type == pafs.FileType.File else fs.get_file_info(folder)
    except OSError as error:
        raise BadInput(f"{source} cannot be reached ({type(error).__name__}); check address and credentials") from None
    files = [one for one in found if one.type == pafs.FileType.File]
    if not files:
        raise BadInput(f"pairs.source {source} does not exist; give a file, a folder or a data set's id (owner/name)")
    return sorted((PurePosixPath(one.path).name, one.size, one.mtime_ns) for one in files)


def source_files(source: str) -> list[Path]:
    """The files that a local `source` stands for, sorted; of a folder with `data/`, those in it. Empty: a hub id.

    Raises:
        BadInput: there is no such file, nor does it look like the id of a data set.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if kind_of(source) is None:
            raise BadInput(f"pairs.source {source} ends in {path.suffix!r}; give {ACCEPTED_FILES}")
        return [path]
    if path.is_dir():
        below = path / "data" if (path / "data").is_dir() else path
        found = [str(path) for path in below.rglob("*") if path.is_file() and path.parent.name != "groups"]
        files = [Path(name) for name in data_files(found)]
        if not files:
            raise BadInput(f"pairs.source {source} holds no file of rows; give {ACCEPTED_FILES}")
        return files
    if _HUB.fullmatch(source) and not path.parent.is_dir():
        return []
    raise BadInput(f"pairs.source {source} does not exist; give a file, a folder or a data set's id (owner/name)")


def rows_of(source: str, notes: Counter[str]) -> Iterator[tuple[Row | str, str | None]]:
    """Rows, or the reason why one cannot be used, with the split that the file's place or the row names.

    Args:
        notes: counts what was put right on the way.

    Raises:
        BadInput: the source is missing, unreadable, or lacks columns.
    """
    if storage.is_remote(source):
        source_facts(source)  # says what is wrong with the address, if anything is
        with tempfile.TemporaryDirectory(prefix="psycho-pairs-") as folder:
            local = str(Path(folder, PurePosixPath(source).name))
            storage.copy_dir(source, local)
            yield from rows_of(local, notes)
        return
    files = source_files(source)
    if not files:
        yield from _hub_rows(source)
    for file in files:
        named = _named_split(file, Path(source).expanduser())
        for row in _read(file, notes):
            given = None if isinstance(row, str) else SPLITS.get(str(row.get("split")).lower())
            yield row, named or given


def _named_split(file: Path, root: Path) -> str | None:
    """`train` of `data/train-00000-of-00002.parquet` or of `train/part-0.parquet`; a single file says nothing."""
    if file == root:
        return None
    return next(filter(None, map(_split_word, reversed(file.relative_to(root).parts))), None)


def _split_word(name: str) -> str | None:
    """The split that a name begins with: train of `train-00000-of-00002.parquet` and of `train_prefs`."""
    return SPLITS.get(re.split(r"[-_.]", name.lower())[0])


def _read(file: Path, notes: Counter[str]) -> Iterator[Row | str]:
    if file.suffix.lower() != ".parquet":
        yield from text_rows(str(file), COLUMNS, lambda found: check_columns(file, found), notes)
        return
    try:
        with pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            check_columns(file, names)
            for batch in parquet.iter_batches(columns=[name for name in names if name in COLUMNS]):
                yield from batch.to_pylist()
    except UnicodeDecodeError:
        raise BadInput(f"{file} holds text that is not UTF-8; write it again from text that is") from None
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{file} cannot be read as {file.suffix} ({type(error).__name__}); write it again") from None


def _hub_rows(source: str) -> Iterator[tuple[Row | str, str | None]]:
    import datasets

    try:
        found = datasets.load_dataset(source)
    except Exception as error:
        raise BadInput(
            f"pairs.source {source} is no file here and could not be read from the hub ({type(error).__name__}); "
            "check the name, the network and HF_TOKEN"
        ) from None
    for name, rows in found.items():
        check_columns(source, rows.column_names)
        for row in rows:
            yield row, _split_word(str(name))
