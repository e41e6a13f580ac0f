"""Human (or gold) ratings of responses from a file, to hold a judge against.

One row a rating: the client's speech (`speech` or `question`), `response`, a whole rating from 1 to 5 in each
`{stem}_rating`, `rater` where several people rated, and `history` (a list of turns or its JSON) where more was said
before. A row without all of that is left out with its reason; the text of a row never gets into it.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho.errors import BadInput
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, whole_rating
from psycho.rowfile import ACCEPTED, kind_of, text_rows
from psycho.schema import NO_HISTORY, RESPONSE, history_json, stable_id, stable_seed

_RATINGS = tuple(f"{stem}_rating" for stem in STEMS)
_SPEECH = ("speech", "question")


@dataclass(frozen=True)
class HumanRatings:
    """Ratings to compare with: `responses` to be rated by the judge (each once), `rows` of ratings by `request_id`."""

    responses: pa.Table
    rows: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    digest: str


def read_human_ratings(file: str, seed: int) -> HumanRatings:
    """Read a CSV, JSONL, JSON (each also packed) or Parquet file.

    Raises:
        BadInput: the file is missing, cannot be read, lacks a column, or holds no whole row.
    """
    rows: list[dict[str, Any]] = []
    quarantine: list[dict[str, Any]] = []
    for number, record in enumerate(_read(Path(file).expanduser(), file), start=1):
        reason = record if isinstance(record, str) else _reason(record)
        if reason is None and not isinstance(record, str):
            rows.append(_row(record))
        else:
            quarantine.append({"row": number, "reason": reason})
    if not rows:
        raise BadInput(f"--calibrate {file} holds no row with a speech, a response and seven ratings from 1 to 5")
    digest = hashlib.sha256(repr([sorted(row.items(), key=str) for row in rows]).encode()).hexdigest()[:16]
    return HumanRatings(_responses(rows, seed), rows, quarantine, digest)


def _read(path: Path, file: str) -> Iterator[Mapping[str, Any] | str]:
    """Rows, or the reason why one cannot be used."""
    if not path.is_file():
        raise BadInput(f"--calibrate {file} does not exist; give a CSV, JSONL, JSON or Parquet file")
    kind = kind_of(file)
    if kind is None:
        raise BadInput(f"--calibrate {file} ends in {path.suffix!r}; give {ACCEPTED}")

    def check(found: Sequence[str]) -> None:
        missing = [name for name in ("response", *_RATINGS) if name not in found]
        if not any(name in found for name in _SPEECH):
            missing.insert(0, "speech (or question)")
        if missing:
            raise BadInput(f"--calibrate {file} has no column {', '.join(missing)}; add it and name it so")

    if kind != "parquet":
        return text_rows(str(path), (*_SPEECH, "response"), check, Counter())
    try:
        table = pq.read_table(path)
    except PermissionError:
        raise BadInput(f"--calibrate {file} cannot be read (permission denied); check its mode") from None
    except (OSError, pa.ArrowException) as error:
        raise BadInput(f"--calibrate {file} is not whole parquet ({type(error).__name__}); write it again") from None
    check(table.column_names)
    return iter(table.to_pylist())


def _reason(record: Mapping[str, Any]) -> str | None:
    for name in (_speech(record), "response"):
        if not isinstance(record.get(name), str) or not record[name].strip():
            return f"no {name}"
    for name in _RATINGS:
        if whole_rating(record.get(name)) is None:
            return f"{name} is not a whole number from {MIN_RATING} to {MAX_RATING}"
    if not isinstance(record.get("rater"), str | int | float | None):
        return "rater is no name"
    try:
        history_json(_given(record, "history"))
    except ValueError:
        return NO_HISTORY
    return None


def _speech(record: Mapping[str, Any]) -> str:
    """The column of what the client said."""
    return next((name for name in _SPEECH if name in record), _SPEECH[0])


def _given(record: Mapping[str, Any], name: str) -> Any:
    """The value of a column that need not be there; None where the cell is empty."""
    value = record.get(name)
    return None if value == "" or (isinstance(value, float) and math.isnan(value)) else value


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    said, response = record[_speech(record)], record["response"]
    history, rater = history_json(_given(record, "history")), _given(record, "rater")
    return {
        "request_id": stable_id("calibration", said, response, history),
        "speech_id": stable_id("speech", said),
        "question": said,
        "history": history,
        "response": response,
        "rater": "" if rater is None else str(rater),
        **{name: whole_rating(record[name]) for name in _RATINGS},
    }


def _responses(rows: list[dict[str, Any]], seed: int) -> pa.Table:
    schema = RESPONSE.append(pa.field("question", pa.string())).append(pa.field("history", pa.string()))
    once = {row["request_id"]: row for row in rows}
    blank = dict.fromkeys(schema.names)
    found = [
        blank
        | {name: row[name] for name in ("request_id", "speech_id", "question", "history", "response")}
        | {"split": "calibration", "model": "", "sample": 0, "seed": stable_seed("calibration", seed, request_id)}
        for request_id, row in once.items()
    ]
    found.sort(key=lambda row: (row["speech_id"], row["request_id"]))
    return pa.Table.from_pylist(found, schema=schema)
