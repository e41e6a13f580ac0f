"""Files of a run folder, on a local path or any URI that pyarrow opens (`s3://`, `gs://`).

A local write goes aside and is renamed, so that a reader sees the old file or the new one, never half of it. On an
object store a put is atomic by itself, and a folder counts only once its manifest, written last, names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from psycho.errors import BadInput, WaitTimedOut

_COPY_LIMIT_S = 3600.0  # the longest that one worker waits for another of its node to fetch a model
_ORIGIN, _PART = ".origin", ".part"
_MOST_COPIED_THERE = 5 * 2**30  # bytes of an object that S3 copies by itself


def cache_root() -> Path:
    """Where a machine keeps models between runs, and temporary files: PSYCHO_CACHE, else ~/.cache/psycho."""
    return Path(os.environ.get("PSYCHO_CACHE") or Path.home() / ".cache" / "psycho")


def is_remote(uri: str) -> bool:
    """True for `scheme://...` other than `file://`."""
    return "://" in uri and not uri.startswith("file://")


def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path inside it.

    Raises:
        BadInput: pyarrow knows no such scheme or cannot reach it.
    """
    if not is_remote(uri):
        return pafs.LocalFileSystem(), str(Path(uri.removeprefix("file://")).expanduser().resolve())
    try:
        return pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{uri} cannot be opened ({type(error).__name__}); check the scheme and credentials") from None


def join(uri: str, *parts: str) -> str:
    """A path below `uri`; the query that a URI may end with (`?region=...`) stays at its end."""
    path, mark, query = uri.partition("?") if is_remote(uri) else (uri, "", "")
    return "/".join([path.rstrip("/"), *parts]) + mark + query


def exists(uri: str) -> bool:
    fs, path = resolve(uri)
    return fs.get_file_info(path).type != pafs.FileType.NotFound


def names(uri: str) -> list[str]:
    """What lies directly below a folder, sorted; none where there is no folder."""
    fs, path = resolve(uri)
    found = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    return sorted(info.base_name for info in found)


def listing(uri: str) -> list[tuple[str, int, int]]:
    """(path inside, bytes, time in ns) of every file below a folder, sorted: another content is another listing."""
    fs, path = resolve(uri)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    files = [info for info in found if info.type == pafs.FileType.File]
    return sorted((info.path[len(path) :].lstrip("/"), info.size, info.mtime_ns or 0) for info in files)


def read_text(uri: str) -> str | None:
    """The text of a file, or None where there is none."""
    content = read_bytes(uri)
    return None if content is None else content.decode()


def read_bytes(uri: str) -> bytes | None:
    """The content of a file, or None where there is none."""
    fs, path = resolve(uri)
    try:
        with fs.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        return None


def write_text(uri: str, text: str) -> None:
    """Write a file whole or not at all."""
    fs, path = resolve(uri)
    if is_remote(uri):
        with fs.open_output_stream(path) as stream:
            stream.write(text.encode())
        return
    with writing(uri) as file:
        file.write_text(text, encoding="utf-8")


def append_line(uri: str, line: str) -> None:
    """Add a line to a small log file (rewritten whole on an object store)."""
    if is_remote(uri):
        write_text(uri, (read_text(uri) or "") + line + "\n")
        return
    _, path = resolve(uri)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def remove(uri: str) -> None:
    """Remove a folder or file if it is there."""
    fs, path = resolve(uri)
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def aside(uri: str) -> str:
    """Where to write a folder that is to stand at `uri` whole: beside it, for `publish`. An object store renames
    nothing: there it is the place itself, and a file that is written last says that the folder is whole."""
    return uri if is_remote(uri) else f"{uri}.unfinished"


def publish(source: str, target: str) -> None:
    """Put a finished folder or file in its place; what stood there before is replaced."""
    if source == target:
        return
    if not is_remote(source) and not is_remote(target):
        _, old = resolve(source)
        _, new = resolve(target)
        Path(new).parent.mkdir(parents=True, exist_ok=True)
        replaced = f"{new}.{uuid.uuid4().hex[:8]}.old"
        if os.path.exists(new):
            os.rename(new, replaced)
        os.rename(old, new)
        remove(replaced)
        return
    remove(target)
    copy_dir(source, target)
    remove(source)


def copy_dir(source: str, target: str) -> None:
    """Copy a folder or file between any two places."""
    source_fs, source_path = resolve(source)
    target_fs, target_path = resolve(target)
    found = source_fs.get_file_info(source_path)
    alone = found.type == pafs.FileType.File
    sizes = [found.size] if alone else [size for _, size, _ in listing(source)]
    target_fs.create_dir(str(PurePosixPath(target_path).parent) if alone else target_path, recursive=True)
    if not is_remote(source) or max(sizes, default=0) > _MOST_COPIED_THERE:
        target_fs = _in_step(target_fs)
    pafs.copy_files(source_path, target_path, source_filesystem=source_fs, destination_filesystem=target_fs)


def _in_step(fs: pafs.FileSystem) -> pafs.FileSystem:
    """The same store, whose writes wait until what came before is sent.

    In the background Arrow holds in memory all that a disk reads faster than the network takes it, up to whole files.
    Another file system than the source's, it also has bytes go through here rather than be copied there.
    """
    if not isinstance(fs, pafs.S3FileSystem):
        return fs
    make, (options, *rest) = fs.__reduce__()
    return make(options | {"background_writes": False}, *rest)


def link_dir(source: str, target: str) -> None:
    """Copy a folder; where both are on one disk its files get a second name, which costs nothing."""
    if is_remote(source) or is_remote(target):
        copy_dir(source, target)
        return

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:  # another disk, or one without links
            shutil.copy2(one, other)

    shutil.copytree(resolve(source)[1], resolve(target)[1], copy_function=link)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder where there is room for models, which is seldom /tmp."""
    root = cache_root() / "tmp"
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        yield Path(folder)


@contextmanager
def writing(uri: str) -> Iterator[Path]:
    """A local path to write a file to, for what writes to nothing else; it stands at `uri` once the block has ended."""
    if is_remote(uri):
        with _scratch() as folder:
            yield folder / "file"
            copy_dir(str(folder / "file"), uri)
        return
    target = Path(resolve(uri)[1])
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def writing_folder(uri: str) -> Iterator[Path]:
    """A local folder whose files lie below `uri` once the block has ended: `uri` itself where that is local.

    It may be entered by several processes, each with files of its own. A folder that is only half there is told by a
    file that is written last, after the block.
    """
    if is_remote(uri):
        with _scratch() as folder:
            yield folder
            copy_dir(str(folder), uri)
        return
    target = Path(resolve(uri)[1])
    target.mkdir(parents=True, exist_ok=True)
    yield target


def local_copy(uri: str) -> str:
    """A local path that holds the folder `uri`: itself when local, else a copy in the cache.

    A node makes one copy of a content, however many of its workers ask. Copies whose original is gone or has changed
    since go when the next is made, so that the policies of a long job do not fill the disk.

    Raises:
        BadInput: there is no such folder on the object store.
        WaitTimedOut: another worker of this node did not finish the copy within an hour.
    """
    if not is_remote(uri):
        return resolve(uri)[1]
    content = _content(uri)
    if content is None:
        raise BadInput(f"{uri} does not exist or is empty; check the address")
    cache = cache_root() / "models"
    target = cache / f"{PurePosixPath(uri.partition('?')[0]).name}-{content}"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cache / f"{target.name}.lock", timeout=_COPY_LIMIT_S):
            if not target.is_dir():
                _drop_old_copies(cache)
                part = cache / f"{target.name}{_PART}"
                try:
                    copy_dir(uri, str(part))
                    write_text(str(cache / f"{target.name}{_ORIGIN}"), json.dumps([uri, content]))
                    part.rename(target)
                finally:
                    shutil.rmtree(part, ignore_errors=True)
    except Timeout:
        raise WaitTimedOut(f"another worker's copy of {uri}", _COPY_LIMIT_S) from None
    return str(target)


def _content(uri: str) -> str | None:
    """A short name of what a folder holds; none where it holds nothing."""
    found = listing(uri)
    return hashlib.sha256(repr((uri, found)).encode()).hexdigest()[:16] if found else None


def _drop_old_copies(cache: Path) -> None:
    """Several workers of a node may do so at once."""
    for origin in cache.glob(f"*{_ORIGIN}"):
        try:
            uri, content = json.loads(read_text(str(origin)) or "[null, null]")
            stands = uri is None or _content(uri) == content  # None: another worker was first
        except (OSError, BadInput):  # a store that cannot be reached just now says nothing of its models
            continue
        if not stands:
            shutil.rmtree(cache / origin.name.removesuffix(_ORIGIN), ignore_errors=True)
            origin.unlink(missing_ok=True)
    for part in cache.glob(f"*{_PART}"):
        try:
            with FileLock(cache / f"{part.name.removesuffix(_PART)}.lock", timeout=0):
                shutil.rmtree(part, ignore_errors=True)  # whose worker was killed, since nobody holds its lock
        except Timeout:
            continue


def write_table(table: pa.Table, uri: str, files: int = 1) -> None:
    """Write Parquet files `part-0.parquet`, `part-1.parquet`, ... of about as many rows each into the folder `uri`."""
    fs, path = resolve(uri)
    fs.create_dir(path, recursive=True)
    rows = max(1, -(-table.num_rows // files))
    for number, start in enumerate(range(0, max(1, table.num_rows), rows)):
        pq.write_table(table.slice(start, rows), f"{path}/part-{number}.parquet", filesystem=fs)


def write_rows(table: pa.Table, uri: str) -> None:
    """Write one Parquet file of this name whole or not at all: a crash leaves nothing that looks like one."""
    fs, path = resolve(uri)
    if is_remote(uri):
        pq.write_table(table, path, filesystem=fs)
        return
    with writing(uri) as file:
        pq.write_table(table, file)


def parquet_files(uri: str) -> Iterator[tuple[pafs.FileSystem, str]]:
    """The Parquet files below a folder, sorted; none where there is no folder."""
    fs, path = resolve(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    for info in sorted(fs.get_file_info(selector), key=lambda info: info.path):
        if info.type == pafs.FileType.File and info.path.endswith(".parquet"):
            yield fs, info.path


def parquet_sizes(uri: str) -> dict[str, int]:
    """Bytes of each Parquet file below a folder, by its path inside the folder; none of what is no folder."""
    fs, path = resolve(uri)
    if fs.get_file_info(path).type != pafs.FileType.Directory:
        return {}
    return {name: size for name, size, _ in listing(uri) if name.endswith(".parquet")}


def read_table(uri: str, columns: list[str] | None = None, schema: pa.Schema | None = None) -> pa.Table:
    """All rows of a folder of Parquet files.

    Raises:
        BadInput: the folder holds no Parquet file and no `schema` says what an empty table would be.
    """
    tables = [pq.read_table(path, filesystem=fs, columns=columns) for fs, path in parquet_files(uri)]
    if tables:
        return pa.concat_tables(tables, promote_options="permissive")
    if schema is None:
        raise BadInput(f"{uri} holds no Parquet file; run the stage that writes it")
    return schema.empty_table()


def read_finished(uri: str, columns: list[str] | None = None) -> list[pa.Table]:
    """Rows of an unfinished folder; a file cut short by a crash is removed, its rows are made again.

    A file that cannot be reached just now stays, for its rows may have cost money.

    Raises:
        OSError: a file is there and cannot be read.
    """
    tables = []
    for fs, path in list(parquet_files(uri)):
        try:
            tables.append(pq.read_table(path, filesystem=fs, columns=columns))
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and (error.errno or is_remote(uri)):  # a torn page has no error number
                raise
            fs.delete_file(path)
    return tables
