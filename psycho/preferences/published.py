"""Pairs that others published, read in by the columns of PsychoCounsel-Preference, so that a run starts at training.

`pairs.source` names a file (Parquet, JSONL, CSV), a folder of them (each local or on an object store, as `s3://`), or a
data set of the hub. Which side a row is on
comes from `pairs.test_source`, else from the file's name (train-..., test-...) or its column `split`, else a share of
the speeches is held out. A bad row goes to quarantine with its reason; a file that lacks a column is one sentence. The
published rows have no gap and no speech id of ours: the gap is that of the mean ratings, the id is theirs.
"""

from __future__ import annotations

import csv
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import PairsConfig
from psycho.errors import BadInput
from psycho.preferences.splits import held_out, same_words
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, overall, whole_rating
from psycho.schema import NO_HISTORY, PREFERENCE_PAIR, history_json, stable_id

Row = Mapping[str, Any]
RATINGS = tuple(f"{side}_{stem}_rating" for side in ("chosen", "rejected") for stem in STEMS)
REQUIRED = ("question", "chosen", "rejected", *RATINGS)
_OPTIONAL = ("ID", "prefID", "chosen_model", "rejected_model", "history", "split")
_MODELS = ("chosen_model", "rejected_model")
_MOST_PREF_ID = 2**31 - 1
_SPLITS = {"train": "train", "test": "test", "eval": "test", "evaluation": "test", "validation": "dev", "dev": "dev"}
_SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
DUPLICATE = "exact duplicate"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Published:
    """Good rows as `PREFERENCE_PAIR` with their `split`, their speeches, and the rows left out."""

    pairs: list[dict[str, Any]]
    speeches: dict[str, dict[str, Any]]
    quarantine: list[dict[str, Any]]


def read_published(config: PairsConfig, seed: int) -> Published:
    """All rows of `pairs.source` and `pairs.test_source`, checked and split by speech.

    A speech of a split `dev` stays a train speech: `pairs.dev_share` makes the dev split.

    Raises:
        BadInput: a source is missing, unreadable or lacks columns, or a speech is on two sides.
    """
    sources = [(config.source or "", "train" if config.test_source else None)]
    sources += [(config.test_source, "test")] if config.test_source else []
    found = Published([], {}, [])
    ids: dict[str, str] = {}
    seen: set[tuple[Any, ...]] = set()
    number = 0
    rows = ((row, side or named) for source, side in sources for row, named in _rows(source))
    for number, (row, named) in enumerate(rows, start=1):
        split = None if config.resplit else named
        same = (split, *(row.get(column) for column in ("question", "chosen", "rejected")))
        reason = _reason(row) or _id_reason(row, ids)
        if reason is None and same in seen:  # on two sides it is no duplicate but an overlap
            reason = DUPLICATE
        if reason:
            found.quarantine.append({"row": number, "reason": reason})
            continue
        seen.add(same)
        found.pairs.append(_pair(row, number) | {"split": split})
    if not number:
        raise BadInput(f"pairs.source {config.source} holds no rows; give preference pairs in the published schema")
    if not found.pairs:
        [(reason, _)] = Counter(row["reason"] for row in found.quarantine).most_common(1)
        raise BadInput(
            f"pairs.source {config.source} holds {number:,} rows and none that can be used (most often: {reason}); "
            "give preference pairs in the published schema"
        )
    _split(found, config, seed)
    return found


def _split(found: Published, config: PairsConfig, seed: int) -> None:
    """Decide each speech's side, and check that its rows agree on it."""
    by_name = any(row["split"] == "test" for row in found.pairs)
    sides: dict[str, dict[str, str]] = {}
    for row in found.pairs:
        cluster = same_words(row["question"])
        if by_name:
            test = row["split"] == "test"
        else:
            test = held_out(cluster, config.test_share, "test", seed)
        row["split"] = "evaluation" if test else "train"
        sides.setdefault(cluster, {}).setdefault(row["split"], row["ID"])
        found.speeches[row["speech_id"]] = {
            "speech_id": row["speech_id"],
            "question": row["question"],
            "split": row["split"],
            "topic": "",
            "history": row["history"],
            "cluster": stable_id("cluster", cluster),
        }
    both = sorted(ids["train"] for ids in sides.values() if len(ids) > 1)
    if both:
        raise BadInput(
            f"{len(both):,} client speeches of {config.source} (the first has ID {both[0]}) are in both train and "
            "test, so that test figures would be false; set pairs.resplit=true to split anew by speech"
        )


def _reason(row: Row) -> str | None:
    for column in ("question", "chosen", "rejected"):
        if not isinstance(row.get(column), str) or not row[column].strip():
            return f"no text in {column}"
    for column in (*REQUIRED, *_OPTIONAL):
        if isinstance(row.get(column), str) and not _can_be_stored(row[column]):
            return f"half a character in {column}"
    for column in _MODELS:
        if not isinstance(row.get(column), str | int | float | None):
            return f"{column} is no name"
    try:
        history_json(row.get("history"))
    except ValueError:
        return NO_HISTORY
    for column in RATINGS:
        if whole_rating(row.get(column)) is None:
            return f"{column} is not a whole number from {MIN_RATING} to {MAX_RATING}"
    if row["chosen"].strip() == row["rejected"].strip():
        return "same text"
    sums = [sum(whole_rating(row[f"{side}_{stem}_rating"]) or 0 for stem in STEMS) for side in ("chosen", "rejected")]
    return "rejected is rated higher" if sums[0] < sums[1] else None


def _can_be_stored(text: str) -> bool:
    """False for half a surrogate pair, which JSON may hold and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _id_reason(row: Row, ids: dict[str, str]) -> str | None:
    """An ID stands for one speech; the first to use it keeps it."""
    known = ids.setdefault(_speech_id(row), row["question"])
    return None if known == row["question"] else "its ID belongs to another question"


def _speech_id(row: Row) -> str:
    given = row.get("ID")
    return str(given) if given not in (None, "") else stable_id("speech", row["question"])


def _pair(row: Row, number: int) -> dict[str, Any]:
    ratings = {column: whole_rating(row[column]) for column in RATINGS}
    sides = [{stem: ratings[f"{side}_{stem}_rating"] or 0 for stem in STEMS} for side in ("chosen", "rejected")]
    pref = str(row.get("prefID", ""))
    pair = {
        "ID": _speech_id(row),
        "prefID": int(pref) if pref.isdecimal() and int(pref) <= _MOST_PREF_ID else number,
        "question": row["question"],
        "chosen": row["chosen"],
        "rejected": row["rejected"],
        **{column: str(row.get(column) or "unknown") for column in _MODELS},
        **ratings,
        "speech_id": _speech_id(row),
        "gap": overall(sides[0]) - overall(sides[1]),
        "history": history_json(row.get("history")),
    }
    return {name: pair[name] for name in PREFERENCE_PAIR.names}


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
        if path.suffix.lower() not in _SUFFIXES:
            raise BadInput(f"pairs.source {source} ends in {path.suffix!r}; give .parquet, .jsonl or .csv")
        return [path]
    if path.is_dir():
        below = path / "data" if (path / "data").is_dir() else path
        files = sorted(p for p in below.rglob("*") if p.suffix.lower() in _SUFFIXES and p.parent.name != "groups")
        if not files:
            raise BadInput(f"pairs.source {source} holds no .parquet, .jsonl or .csv file; give preference pairs")
        return files
    if _HUB.fullmatch(source) and not path.parent.is_dir():
        return []
    raise BadInput(f"pairs.source {source} does not exist; give a file, a folder or a data set's id (owner/name)")


def _rows(source: str) -> Iterator[tuple[Row, str | None]]:
    """Rows with the split that the file's place or the row names."""
    if storage.is_remote(source):
        source_facts(source)  # says what is wrong with the address, if anything is
        with tempfile.TemporaryDirectory(prefix="psycho-pairs-") as folder:
            local = str(Path(folder, PurePosixPath(source).name))
            storage.copy_dir(source, local)
            yield from _rows(local)
        return
    files = source_files(source)
    if not files:
        yield from _hub_rows(source)
    for file in files:
        try:
            rows = _read(file)
        except UnicodeDecodeError:
            raise BadInput(f"{file} is not UTF-8; save it as UTF-8") from None
        except (pa.ArrowInvalid, csv.Error, OSError) as error:
            kind = type(error).__name__
            raise BadInput(f"{file} cannot be read as {file.suffix} ({kind}); write it again") from None
        named = _named_split(file, Path(source).expanduser())
        for row in rows:
            yield row, named or _SPLITS.get(str(row.get("split")).lower())


def _named_split(file: Path, root: Path) -> str | None:
    """`train` of `data/train-00000-of-00002.parquet` or of `train/part-0.parquet`; a single file says nothing."""
    if file == root:
        return None
    for part in reversed(file.relative_to(root).parts):
        split = _SPLITS.get(re.split(r"[-_.]", part.lower())[0])
        if split:
            return split
    return None


def _read(file: Path) -> list[dict[str, Any]]:
    if file.suffix.lower() == ".csv":
        csv.field_size_limit(2**31 - 1)
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            _check_columns(file, reader.fieldnames or [])
            return list(reader)
    if file.suffix.lower() == ".parquet":
        _check_columns(file, pq.read_schema(file).names)
        wanted = [name for name in pq.read_schema(file).names if name in (*REQUIRED, *_OPTIONAL)]
        return pq.read_table(file, columns=wanted).to_pylist()
    return _read_lines(file)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines; one that is none becomes an empty row, which is quarantined."""
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8-sig") as stream:
        for line in stream:
            try:
                row = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                row = {}
            if row is not None:
                rows.append(row if isinstance(row, dict) else {})
    first = next((row for row in rows if row), None)
    if first is not None:
        _check_columns(file, first)
    return rows


def _hub_rows(source: str) -> Iterator[tuple[Row, str | None]]:
    import datasets

    try:
        found = datasets.load_dataset(source)
    except Exception as error:
        raise BadInput(
            f"pairs.source {source} is no file here and could not be read from the hub ({type(error).__name__}); "
            "check the name, the network and HF_TOKEN"
        ) from None
    for name, rows in found.items():
        _check_columns(source, rows.column_names)
        for row in rows:
            yield row, _SPLITS.get(str(name).lower())


def _check_columns(where: Any, found: Iterable[str]) -> None:
    missing = [name for name in REQUIRED if name not in set(found)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadInput(f"{where} has no column {missing[0]}{more}; pairs need the published schema (docs/PAPER.md)")
