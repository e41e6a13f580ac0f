"""Where client speeches come from: files, folders of files, `datasets` folders, hub data sets.

A path is local or any URI that pyarrow opens (`s3://`, `gs://`). What it stands for is found out here, once; reading
rows out of it is `read.py`'s business.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow.fs as pafs

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.rowfile import ACCEPTED, data_files, kind_of

_GIVE = "give a CSV, JSONL, JSON or Parquet file, a folder of them, a datasets folder, or a hub id (owner/name)"
_EXAMPLES = Path(__file__).parents[1] / "examples"  # in a checkout a link to the folder beside the package
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class SourceFile:
    """One file of rows; `kind` is csv, jsonl, json, parquet or arrow."""

    uri: str
    kind: str


def is_hub_id(source: str) -> bool:
    """True for `owner/name` where nothing of that name lies here."""
    if storage.is_remote(source) or not _HUB_ID.fullmatch(source) or kind_of(source):
        return False
    return not Path(source).exists()


def find_files(config: SpeechesConfig) -> list[SourceFile]:
    """The files that hold the rows, in order.

    Raises:
        BadInput: there is nothing, nothing of a known kind, or it may not be read.
    """
    source = _expand(config.source)
    info = _info(source)
    if info.type == pafs.FileType.NotFound:
        raise BadInput(f"speeches.source {config.source} does not exist; {_GIVE}")
    if info.type == pafs.FileType.Directory:
        return _folder(source, config)
    kind = kind_of(info.path)
    if kind is None:
        suffix = PurePosixPath(info.path).suffix
        raise BadInput(f"speeches.source {config.source} ends in {suffix!r}; give {ACCEPTED}")
    return [SourceFile(source, kind)]


def fingerprint(config: SpeechesConfig) -> list[Any]:
    """What a stage's key says of the source: sizes and times of its files; a hub id as it is."""
    if is_hub_id(config.source):
        return [config.source, config.source_config, config.source_split]
    source = _expand(config.source)
    info = _info(source)
    if info.type == pafs.FileType.NotFound:
        return [config.source, None]
    files = _listed(source) if info.type == pafs.FileType.Directory else [info]
    return [[PurePosixPath(file.path).name, file.size, file.mtime_ns] for file in files]


def _expand(source: str) -> str:
    """A path that names no file here but an example that psycho ships, as `examples/speeches.csv`, is that one."""
    if storage.is_remote(source):
        return source
    path = Path(source.removeprefix("file://")).expanduser()
    shipped = _EXAMPLES / path.name
    return str(shipped if path.parent == Path("examples") and not path.exists() and shipped.is_file() else path)


def _info(uri: str) -> pafs.FileInfo:
    fs, path = storage.resolve(uri)
    try:
        return fs.get_file_info(path)
    except OSError as error:
        raise BadInput(f"{uri} cannot be reached ({type(error).__name__}); check address and credentials") from None


def _listed(folder: str) -> list[pafs.FileInfo]:
    fs, path = storage.resolve(folder)
    found = fs.get_file_info(pafs.FileSelector(path, recursive=True))
    return sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)


def _folder(folder: str, config: SpeechesConfig) -> list[SourceFile]:
    splits = _json(storage.join(folder, "dataset_dict.json"))
    if splits is not None:
        if config.source_split not in splits.get("splits", []):
            held = ", ".join(splits.get("splits", [])) or "none"
            raise BadInput(f"{config.source} has no split {config.source_split} but {held}: set speeches.source_split")
        folder = storage.join(folder, config.source_split)
    state = _json(storage.join(folder, "state.json"))
    if state is not None and "_data_files" in state:
        return [SourceFile(storage.join(folder, file["filename"]), "arrow") for file in state["_data_files"]]
    root = storage.resolve(folder)[1].rstrip("/")
    below = [info.path[len(root) + 1 :] for info in _listed(folder)]
    seen = [path for path in below if not any(part.startswith((".", "_")) for part in PurePosixPath(path).parts)]
    files = [SourceFile(storage.join(folder, path), kind_of(path) or "") for path in data_files(seen)]
    if not files:
        raise BadInput(f"speeches.source {config.source} is a folder without files of rows; {_GIVE}")
    return files


def _json(uri: str) -> dict[str, Any] | None:
    try:
        text = storage.read_text(uri)
        value = json.loads(text) if text is not None else None
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
