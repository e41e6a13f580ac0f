"""Human (or gold) ratings of responses from a file, to hold a judge against.

One row a rating: the client's speech (`speech` or `question`), `response`, a whole rating from 1 to 5 in each
`{stem}_rating`, `rater` where several people rated, and `history` (a list of turns or its JSON) where more was said
before. A row without all of that is left out with its reason; the text of a row never gets into it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from psycho.errors import BadInput
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, whole_rating
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
    """Read a CSV, JSONL or Parquet file.

    Raises:
        BadInput: the file is missing, cannot be read, lacks a column, or holds no whole row.
    """
    table = _read(Path(file).expanduser(), file)
    speech = next((name for name in _SPEECH if name in table.columns), None)
    missing = [name for name in ("response", *_RATINGS) if name not in table.columns]
    if speech is None:
        missing.insert(0, "speech (or question)")
    if speech is None or missing:
        raise BadInput(f"--calibrate {file} has no column {', '.join(missing)}; add it and name it so")
    rows, quarantine = [], []
    records = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
    for number, record in enumerate(records, start=1):
        reason = _reason(record, speech)
        if reason:
            quarantine.append({"row": number, "reason": reason})
        else:
            rows.append(_row(record, speech))
    if not rows:
        raise BadInput(f"--calibrate {file} holds no row with a speech, a response and seven ratings from 1 to 5")
    digest = hashlib.sha256(repr([sorted(row.items(), key=str) for row in rows]).encode()).hexdigest()[:16]
    return HumanRatings(_responses(rows, seed), rows, quarantine, digest)


def _read(path: Path, file: str) -> pd.DataFrame:
    readers: dict[str, Any] = {
        ".csv": lambda: pd.read_csv(path, encoding="utf-8-sig"),
        ".jsonl": lambda: pd.read_json(path, lines=True, encoding="utf-8", dtype=False),
        ".ndjson": lambda: pd.read_json(path, lines=True, encoding="utf-8", dtype=False),
        ".parquet": lambda: pd.read_parquet(path),
    }
    if not path.is_file():
        raise BadInput(f"--calibrate {file} does not exist; give a CSV, JSONL or Parquet file")
    if path.suffix.lower() not in readers:
        raise BadInput(f"--calibrate {file} ends in {path.suffix!r}; give .csv, .jsonl or .parquet")
    try:
        return readers[path.suffix.lower()]()
    except UnicodeDecodeError:
        raise BadInput(f"--calibrate {file} is not UTF-8; save it as UTF-8") from None
    except PermissionError:
        raise BadInput(f"--calibrate {file} cannot be read (permission denied); check its mode") from None
    except (ValueError, pd.errors.ParserError, OSError, pa.ArrowInvalid) as error:
        kind = path.suffix.lower().removeprefix(".")
        raise BadInput(f"--calibrate {file} is not whole {kind} ({type(error).__name__}); write it again") from None


def _reason(record: dict[str, Any], speech: str) -> str | None:
    for name in (speech, "response"):
        if not isinstance(record[name], str) or not record[name].strip():
            return f"no {name}"
    for name in _RATINGS:
        if whole_rating(record[name]) is None:
            return f"{name} is not a whole number from {MIN_RATING} to {MAX_RATING}"
    if not isinstance(record.get("rater"), str | int | float | None):
        return "rater is no name"
    try:
        history_json(_given(record, "history"))
    except ValueError:
        return NO_HISTORY
    return None


def _given(record: dict[str, Any], name: str) -> Any:
    """The value of a column that need not be there; None where the cell is empty."""
    value = record.get(name)
    if isinstance(value, np.ndarray):  # as pandas reads the lists of a Parquet file
        return value.tolist()
    return None if isinstance(value, float) and np.isnan(value) else value


def _row(record: dict[str, Any], speech: str) -> dict[str, Any]:
    said, response = record[speech], record["response"]
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
