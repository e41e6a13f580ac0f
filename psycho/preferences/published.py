"""Pairs that others made, read in so that a run starts at training: each row checked, split by speech.

`pairs.source` names a file, a folder of them or a data set of the hub (`source.py`), in any of the usual shapes
(`shapes.py`). Which side a row is on comes from `pairs.test_source`, else from its file or its column `split`, else a
share of the speeches is held out. A bad row goes to quarantine with its reason; a file that lacks a column is one
sentence. Where a set has no ratings by principle they are unknown (null) and so is what hangs on them; the gap is that
of the mean ratings, else of the set's own scores in their scale, else unknown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from psycho.config import PairsConfig
from psycho.errors import BadInput, BadRows, said_counts
from psycho.preferences.shapes import ACCEPTED, MODELS, RATINGS, SIDES, Shaped, finite, shaped
from psycho.preferences.source import rows_of
from psycho.preferences.splits import held_out, prompt_words
from psycho.principles import MAX_RATING, MIN_RATING, STEMS, overall, whole_rating
from psycho.schema import stable_id

Row = Mapping[str, Any]
_MOST_PREF_ID = 2**31 - 1
DUPLICATE = "exact duplicate"
_LOOKED_AT = 200  # rows of a dry run


@dataclass
class Published:
    """Good rows as `PREFERENCE_PAIR` with their `split`, their speeches, and the rows left out."""

    pairs: list[dict[str, Any]]
    speeches: dict[str, dict[str, Any]]
    quarantine: list[dict[str, Any]]
    notes: Counter[str] = field(default_factory=Counter)  # what was put right while reading


def read_published(config: PairsConfig, seed: int) -> Published:
    """All rows of `pairs.source` and `pairs.test_source`, checked and split by speech.

    A speech of a split `dev` stays a train speech: `pairs.dev_share` makes the dev split.

    Raises:
        BadInput: a source is missing, unreadable or lacks columns, or a speech is on two sides.
        BadRows: no row can be used, or too many rows of a CSV do not fit its header.
    """
    found = Published([], {}, [])
    ids: dict[str, tuple[str, str | None]] = {}
    seen: set[tuple[Any, ...]] = set()
    number = 0
    try:
        for number, (row, side) in enumerate(_sided_rows(config, found.notes), start=1):
            split = None if config.resplit else side
            made = row if isinstance(row, str) else _pair(row, number)
            if isinstance(made, dict):
                reason = _id_reason(made, ids) or _duplicate(made, split, seen)
                made = reason or made | {"split": split}
            if isinstance(made, str):
                found.quarantine.append({"row": number, "reason": made})
            else:
                found.pairs.append(made)
    except BadRows as error:
        raise BadRows(str(error), found.quarantine) from None
    if not number:
        raise BadInput(f"pairs.source {config.source} holds no rows; give preference pairs: {ACCEPTED}")
    if not found.pairs:
        raise _no_pairs(config, number, found.quarantine)
    _split(found, config, seed)
    return found


def check_published(config: PairsConfig) -> None:
    """Look at the columns and the first rows, for a dry run; nothing is read to its end.

    Raises:
        BadInput: as `read_published`, as far as the first rows tell.
    """
    first = list(islice(_sided_rows(config, Counter()), _LOOKED_AT))
    made = [row if isinstance(row, str) else _pair(row, 1) for row, _ in first]
    reasons = [reason for reason in made if isinstance(reason, str)]
    if first and len(reasons) == len(first):
        raise _no_pairs(config, len(first), [{"reason": reason} for reason in reasons], "begins with")


def _no_pairs(config: PairsConfig, rows: int, left_out: list[dict[str, Any]], holds: str = "holds") -> BadRows:
    reasons = said_counts(Counter(row["reason"] for row in left_out))
    none = f"pairs.source {config.source} {holds} {rows:,} rows and none that can be used ({reasons})"
    return BadRows(f"{none}; {ACCEPTED}", left_out)


def _sided_rows(config: PairsConfig, notes: Counter[str]) -> Iterator[tuple[Row | str, str | None]]:
    """Rows of both sources with the side that their source, their file or they themselves name."""
    sources = [(config.source or "", "train" if config.test_source else None)]
    sources += [(config.test_source, "test")] if config.test_source else []
    for source, side in sources:
        for row, named in rows_of(source, notes):
            yield row, side or named


def _split(found: Published, config: PairsConfig, seed: int) -> None:
    """Decide each speech's side, and check that its rows agree on it."""
    by_name = any(row["split"] == "test" for row in found.pairs)
    sides: dict[str, dict[str, str]] = {}
    for row in found.pairs:
        cluster = prompt_words(row)
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


def _duplicate(pair: Row, split: str | None, seen: set[tuple[Any, ...]]) -> str | None:
    """A row that was there before; on two sides it is no duplicate but an overlap."""
    same = (split, *(pair[column] for column in ("question", "history", *SIDES)))
    if same in seen:
        return DUPLICATE
    seen.add(same)
    return None


def _id_reason(pair: Row, ids: dict[str, tuple[str, str | None]]) -> str | None:
    """An ID stands for one speech; the first to use it keeps it."""
    said = (pair["question"], pair["history"])
    return None if ids.setdefault(pair["speech_id"], said) == said else "its ID belongs to another question"


def _pair(row: Row, number: int) -> dict[str, Any] | str:
    """A row of `PREFERENCE_PAIR`, or the reason why there is none."""
    pair = shaped(row)
    if isinstance(pair, str):
        return pair
    for column, text in zip(("question", *SIDES), (pair.question, pair.chosen, pair.rejected), strict=True):
        if not _can_be_stored(text):
            return f"half a character in {column}"
    names = [next((row[name] for name in both if row.get(name)), None) for both in zip(*MODELS, strict=True)]
    for side, name in zip(SIDES, names, strict=True):
        if not isinstance(name, str | int | float | None):
            return f"{side}_model is no name"
        if not _can_be_stored(str(name)):
            return f"half a character in {side}_model"
    if pair.chosen.strip() == pair.rejected.strip():
        return "same text"
    ratings = _ratings(row)
    if isinstance(ratings, str):
        return ratings
    gap = _gap(row, ratings, pair)
    if gap is not None and gap < 0:
        return "rejected is rated higher"
    return _stored(row, number, pair, names, ratings, gap)


def _ratings(row: Row) -> dict[str, int | None] | str:
    """All fourteen, or all unknown; or which one is none."""
    if all(row.get(column) in (None, "") for column in RATINGS):
        return dict.fromkeys(RATINGS)
    for column in RATINGS:
        if whole_rating(row.get(column)) is None:
            return f"{column} is not a whole number from {MIN_RATING} to {MAX_RATING}"
    return {column: whole_rating(row[column]) for column in RATINGS}


def _gap(row: Row, ratings: Mapping[str, int | None], pair: Shaped) -> float | None:
    """Of the mean ratings, else of the set's scores, else the one it gives; None where it has none of these."""
    known = {column: value for column, value in ratings.items() if value is not None}
    if known:
        sides = [{stem: known[f"{side}_{stem}_rating"] for stem in STEMS} for side in SIDES]
        return overall(sides[0]) - overall(sides[1])
    return pair.scores[0] - pair.scores[1] if pair.scores else finite(row.get("gap"))


def _stored(
    row: Row, number: int, pair: Shaped, names: list[Any], ratings: Mapping[str, int | None], gap: float | None
) -> dict[str, Any] | str:
    given = row.get("ID")
    derived = ("speech", pair.question, pair.history) if pair.history else ("speech", pair.question)
    speech_id = str(given) if given not in (None, "") else stable_id(*derived)
    if not _can_be_stored(speech_id):
        return "half a character in ID"
    pref = str(row.get("prefID", ""))
    return {
        "ID": speech_id,
        "prefID": int(pref) if pref.isdecimal() and int(pref) <= _MOST_PREF_ID else number,
        "question": pair.question,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        **{f"{side}_model": str(name or "unknown") for side, name in zip(SIDES, names, strict=True)},
        **ratings,
        "speech_id": speech_id,
        "gap": gap,
        "history": pair.history,
    }


def _can_be_stored(text: str) -> bool:
    """False for half a surrogate pair, which JSON may hold and UTF-8 not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
