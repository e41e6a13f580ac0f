"""From the rows of a source to `speeches/`, in two passes and in flat memory.

The first pass cleans batches (here, or on a cluster's workers), writes them to shards of clean rows, and keeps a few
numbers a row in files (`pool.py`; an interrupted pass goes on behind its last shard). Those numbers alone decide what
is a duplicate and what is held out. The second pass streams the shards into the final ones and the rows left out into
the quarantine. Text is never stored before it was masked.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput, BadRows, said_counts
from psycho.run import QuarantineFile, StageResult, content_key
from psycho.schema import CLIENT_SPEECH
from psycho.speeches.clean import Cleaned, clean_batch
from psycho.speeches.pool import Pool
from psycho.speeches.read import RawSpeech, read_speeches
from psycho.speeches.select import EXACT, KEPT, NEAR, OVER_LIMIT, SAME_ID, exact_duplicates, hold_out, over_limit
from psycho.speeches.source import fingerprint
from psycho.speeches.topics import coarse_counts

BATCH_ROWS = 128
HUGE_CHARS = 1_000_000  # a text that goes no further than the reader
_ADVICE = {  # by what a reason holds
    "duplicate": "give more different speeches",
    r"speeches\.min_chars": "lower speeches.min_chars",
    r"speeches\.max_chars": "raise speeches.max_chars",
    r"speeches\.languages": "set speeches.languages",
    "min_language_confidence": "lower speeches.min_language_confidence",
    r"speeches\.limit": "raise speeches.limit",
    "no text": "check speeches.text_column",
    "id used twice": "check speeches.id_column",
    "turn": "check the transcripts in speeches.text_column",
}
Batches = Iterator[list[RawSpeech]]
CleanAll = Callable[[Batches], Iterable[Cleaned]]


def prepare_speeches(
    config: SpeechesConfig,
    seed: int,
    partial: str,
    clean_all: CleanAll | None = None,
    on_resume: Callable[[int], None] | None = None,
) -> StageResult:
    """Write the speeches of the configured source as Parquet shards into `speeches` below the folder `partial`.

    Args:
        clean_all: cleans batches, in their order; in this process by default.
        on_resume: told how many rows an interrupted run had cleaned, where it had any and `partial` is local.

    Raises:
        BadInput: the source cannot be used.
        BadRows: too little of it is left for a train and an evaluation split, or too many rows of a CSV do not fit its
            header; the rows left out stand below `partial`.
    """
    if config.languages:
        from psycho.speeches.language import check_languages

        check_languages(config.languages)
    with _work_folder(partial) as work:
        return _prepare(config, seed, partial, work, clean_all, on_resume)


@contextmanager
def _work_folder(partial: str) -> Iterator[Path]:
    """A local folder for what lies in between: beside the result where that is local, else a temporary one."""
    if storage.is_remote(partial):
        with tempfile.TemporaryDirectory(prefix="psycho-prepare-") as folder:
            yield Path(folder)
        return
    folder = storage.join(partial, "work")
    try:
        yield Path(storage.resolve(folder)[1])
    except BadInput:
        storage.remove(folder)
        raise
    storage.remove(folder)  # that of an interrupted run stays, for the next one to go on from


def _prepare(
    config: SpeechesConfig,
    seed: int,
    partial: str,
    work: Path,
    clean_all: CleanAll | None,
    on_resume: Callable[[int], None] | None,
) -> StageResult:
    notes: Counter[str] = Counter()
    clean_all = clean_all or (lambda batches: (clean_batch(batch, config, seed) for batch in batches))
    pool = Pool(work, config, content_key(config.model_dump(mode="json"), seed, fingerprint(config)))
    if pool.rows and on_resume:
        on_resume(pool.rows)
    rows = islice(read_speeches(config, notes), pool.rows, None)
    target, left_out = storage.join(partial, "speeches"), storage.join(partial, "quarantine.jsonl")
    refused: list[BadRows] = []
    for cleaned in clean_all(_batches(_until_refused(rows, refused), config)):
        pool.add(cleaned)
    pool.close()
    for error in refused:
        _write_left_out(pool, work / "quarantine.jsonl")
        storage.publish(str(work / "quarantine.jsonl"), left_out)
        raise BadRows(str(error), left_out)
    if not pool.rows:
        raise BadInput(f"{config.source} holds no rows; give a file with client speeches")
    decision = _decide(pool, config)
    storage.remove(target)
    topics, reasons = _write(pool, decision, config, target, work / "quarantine.jsonl")
    storage.publish(str(work / "quarantine.jsonl"), left_out)
    kept = int((decision.state == KEPT).sum())
    if not 0 < decision.held_out.sum() < kept:
        storage.remove(target)
        raise BadRows(_too_few(config.source, kept, pool.rows, reasons), left_out)
    extra = {
        "personal_data": dict(sorted(pool.counts["personal_data"].items())),
        "languages": dict(pool.counts["languages"].most_common()),
        "duplicates": {"exact": int((decision.state == EXACT).sum()), "near": int((decision.state == NEAR).sum())},
        "left_out": dict(reasons.most_common()),
        "topics": coarse_counts(topics.elements()) if config.topic_column else {},
        **({"ids_replaced": pool.counts["ids"]["replaced"]} if config.id_column else {}),
        **notes,
    }
    quarantine = QuarantineFile(left_out, pool.rows - kept)
    return StageResult(rows_in=pool.rows, rows_out=kept, quarantine=quarantine, extra=extra)


def _until_refused(rows: Iterable[RawSpeech], refused: list[BadRows]) -> Iterator[RawSpeech]:
    """`rows` to their end, so that each is accounted for also where the reader then says that they are too bad."""
    try:
        yield from rows
    except BadRows as error:
        refused.append(error)


def _batches(rows: Iterable[RawSpeech], config: SpeechesConfig) -> Batches:
    """Rows in batches; a text that no cleaning could make short enough stays behind."""

    def light(row: RawSpeech) -> RawSpeech:
        if isinstance(row.text, str) and len(row.text) > HUGE_CHARS + config.max_chars:
            reason = f"{len(row.text)} characters, over speeches.max_chars {config.max_chars}"
            return row._replace(text=None, reason=reason)
        return row

    rows = map(light, rows)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


@dataclass(frozen=True)
class _Decision:
    """What becomes of the fitting rows, one entry each: its state, its cluster's first, the split, its row number."""

    state: npt.NDArray[np.uint8]
    cluster: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    row: npt.NDArray[np.uint64]


def _decide(pool: Pool, config: SpeechesConfig) -> _Decision:
    keys = pool.keys()
    state = exact_duplicates(keys[:, 0], keys[:, 1])
    places = np.arange(len(keys))
    cluster = places.copy()
    if pool.near:
        alive = np.flatnonzero(state == KEPT)
        cluster[alive] = alive[pool.near.clusters(alive)]
        if config.near_duplicates == "drop":
            state[(state == KEPT) & (cluster != places)] = NEAR
    state = over_limit(state, config.limit)
    kept = np.flatnonzero(state == KEPT)
    count = min(config.evaluation, int(len(kept) * config.max_evaluation_share))
    held_out = np.zeros(len(keys), bool)
    held_out[kept] = hold_out(keys[kept, 2], np.searchsorted(kept, cluster[kept]), count)
    return _Decision(state, cluster, held_out, keys[:, 3])


def _write(
    pool: Pool, decision: _Decision, config: SpeechesConfig, target: str, quarantine: Path
) -> tuple[Counter[str], Counter[str]]:
    """Write the final shards and the quarantine; count topics of kept rows and kinds of reasons of the others."""
    topics: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    firsts: dict[int, str] = {}
    place, part = 0, 0
    shared = np.bincount(decision.cluster, minlength=len(decision.cluster)) > 1
    with quarantine.open("w", encoding="utf-8") as left_out:
        for shard in pool.shards():
            kept = []
            for row in shard.to_pylist():
                reason = row.pop("reason")
                if reason is None:
                    reason = _reason(decision, place, config)
                    if reason is None:
                        kept.append(_speech(row, decision, place, shared, firsts))
                        topics[row["topic"]] += 1
                    place += 1
                if reason is not None:
                    left_out.write(json.dumps({"row": row["row"], "reason": reason}) + "\n")
                    reasons[_kind(reason)] += 1
            if kept:
                table = pa.Table.from_pylist(kept, schema=CLIENT_SPEECH)
                storage.write_rows(table, storage.join(target, f"part-{part:05d}.parquet"))
                part += 1
    return topics, reasons


def _speech(
    row: dict[str, Any], decision: _Decision, place: int, shared: npt.NDArray[np.bool_], firsts: dict[int, str]
) -> dict[str, Any]:
    """A row of `schema.CLIENT_SPEECH`; `firsts` holds the ids of clusters with more than one speech."""
    first = int(decision.cluster[place])
    if first == place and shared[first]:
        firsts[first] = row["speech_id"]
    split = "evaluation" if decision.held_out[place] else "train"
    return row | {"split": split, "cluster": firsts.get(first, row["speech_id"])}


def _reason(decision: _Decision, place: int, config: SpeechesConfig) -> str | None:
    state = decision.state[place]
    if state == NEAR:
        return f"near duplicate of row {decision.row[decision.cluster[place]]}"
    if state == OVER_LIMIT:
        return f"over speeches.limit {config.limit}"
    return {EXACT: "exact duplicate", SAME_ID: "id used twice"}.get(int(state))


def _write_left_out(pool: Pool, quarantine: Path) -> None:
    """The rows that cleaning left out, where no more is known of the others."""
    with quarantine.open("w", encoding="utf-8") as left_out:
        for shard in pool.shards():
            for row in shard.select(["row", "reason"]).to_pylist():
                if row["reason"] is not None:
                    left_out.write(json.dumps(row) + "\n")


def _too_few(source: str, kept: int, rows: int, reasons: Counter[str]) -> str:
    """The sentence for a source of which too little is left: how much went for which reason, and what helps."""
    counted = f" ({said_counts(reasons)})" if reasons else ""
    advice = [what for reason, _ in reasons.most_common() for mark, what in _ADVICE.items() if re.search(mark, reason)]
    told = " or ".join(list(dict.fromkeys(advice))[:2] or ["give more"])
    return f"only {kept} speeches of {source} are left of its {rows:,} rows{counted}, too few for two splits; {told}"


def _kind(reason: str) -> str:
    """A reason without what is of one row only, for counting."""
    return re.sub(r"^\d+ characters, | of row \d+| \d+$|(?<=uncertain) \(.*?\)|^turn \d+ ", "", reason)
