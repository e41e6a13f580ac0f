"""From the rows of a source to `speeches/`, in two passes and in flat memory.

The first pass cleans batches (here, or on a cluster's workers), writes them to shards of clean rows, and keeps a few
numbers a row in files. Those numbers alone decide what is a duplicate and what is held out. The second pass streams the
shards into the final ones and the rows left out into the quarantine. Text is never stored before it was masked.
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
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.run import QuarantineFile, StageResult
from psycho.schema import CLIENT_SPEECH
from psycho.speeches.clean import CLEANED, Cleaned, clean_batch
from psycho.speeches.read import RawSpeech, read_speeches
from psycho.speeches.select import EXACT, KEPT, NEAR, OVER_LIMIT, SAME_ID, exact_duplicates, hold_out, over_limit
from psycho.speeches.topics import coarse_counts

BATCH_ROWS = 128
SHARD_ROWS = 20_000
HUGE_CHARS = 1_000_000  # a text that goes no further than the reader
Batches = Iterator[list[RawSpeech]]
CleanAll = Callable[[Batches], Iterable[Cleaned]]


def prepare_speeches(config: SpeechesConfig, seed: int, partial: str, clean_all: CleanAll | None = None) -> StageResult:
    """Write the speeches of the configured source as Parquet shards into `speeches` below the folder `partial`.

    Args:
        clean_all: cleans batches, in their order; in this process by default.

    Raises:
        BadInput: the source cannot be used, or too little of it is left for a train and an evaluation split.
    """
    if config.languages:
        from psycho.speeches.language import check_languages

        check_languages(config.languages)
    with _work_folder(partial) as work:
        return _prepare(config, seed, partial, work, clean_all)


@contextmanager
def _work_folder(partial: str) -> Iterator[Path]:
    """A local folder for what lies in between: beside the result where that is local, else a temporary one."""
    if storage.is_remote(partial):
        with tempfile.TemporaryDirectory(prefix="psycho-prepare-") as folder:
            yield Path(folder)
        return
    folder = storage.join(partial, "work")
    storage.remove(folder)  # an interrupted one begins anew
    try:
        yield Path(storage.resolve(folder)[1])
    finally:
        storage.remove(folder)


def _prepare(config: SpeechesConfig, seed: int, partial: str, work: Path, clean_all: CleanAll | None) -> StageResult:
    notes: Counter[str] = Counter()
    clean_all = clean_all or (lambda batches: (clean_batch(batch, config, seed) for batch in batches))
    pool = _Pool(work, config)
    for cleaned in clean_all(_batches(read_speeches(config, notes), config)):
        pool.add(cleaned)
    pool.close()
    if not pool.rows:
        raise BadInput(f"{config.source} holds no rows; give a file with client speeches")
    decision = _decide(pool, config)
    target, left_out = storage.join(partial, "speeches"), storage.join(partial, "quarantine.jsonl")
    storage.remove(target)
    topics, reasons = _write(pool, decision, config, target, work / "quarantine.jsonl")
    storage.publish(str(work / "quarantine.jsonl"), left_out)
    kept = int((decision.state == KEPT).sum())
    extra = {
        "personal_data": dict(sorted(pool.counts["personal_data"].items())),
        "languages": dict(pool.counts["languages"].most_common()),
        "duplicates": {"exact": int((decision.state == EXACT).sum()), "near": int((decision.state == NEAR).sum())},
        "left_out": dict(reasons.most_common()),
        "topics": coarse_counts(topics.elements()) if config.topic_column else {},
        **notes,
    }
    quarantine = QuarantineFile(left_out, pool.rows - kept)
    return StageResult(rows_in=pool.rows, rows_out=kept, quarantine=quarantine, extra=extra)


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


class _Pool:
    """Cleaned rows on disk: their text in shards, and four numbers and band keys a fitting row in files."""

    def __init__(self, work: Path, config: SpeechesConfig) -> None:
        self.rows = 0
        self.counts: dict[str, Counter[str]] = {"personal_data": Counter(), "languages": Counter()}
        self.near = None
        self._work, self._shards, self._waiting = work, 0, [CLEANED.empty_table()]
        work.mkdir(parents=True, exist_ok=True)
        self._keys = (work / "keys.bin").open("wb")
        if config.near_duplicates != "ignore":
            from psycho.speeches.near import NearIndex

            self.near = NearIndex(work, config.near_threshold)

    def add(self, cleaned: Cleaned) -> None:
        """Append a batch."""
        self.rows += cleaned.table.num_rows
        fitting = cleaned.table["row"].filter(pa.compute.is_null(cleaned.table["reason"])).to_numpy()
        self._keys.write(np.column_stack([cleaned.keys, fitting.astype(np.uint64)]).tobytes())
        if self.near:
            self.near.add(cleaned.signature)
        for name, counts in cleaned.counts.items():
            self.counts[name].update(counts)
        self._waiting.append(cleaned.table)
        if sum(table.num_rows for table in self._waiting) >= SHARD_ROWS:
            self._flush()

    def close(self) -> None:
        """No more rows."""
        self._flush()
        self._keys.close()
        if self.near:
            self.near.close()

    def keys(self) -> npt.NDArray[np.uint64]:
        """[fitting rows, 4]: hash of the text, of the id, place in the order of the split, row number."""
        return np.fromfile(self._work / "keys.bin", np.uint64).reshape(-1, 4)

    def shards(self) -> Iterator[pa.Table]:
        """The cleaned rows in order."""
        for number in range(self._shards):
            yield pq.read_table(self._work / f"clean-{number:05d}.parquet")

    def _flush(self) -> None:
        pq.write_table(pa.concat_tables(self._waiting), self._work / f"clean-{self._shards:05d}.parquet")
        self._shards, self._waiting = self._shards + 1, [CLEANED.empty_table()]


@dataclass(frozen=True)
class _Decision:
    """What becomes of the fitting rows, one entry each: its state, its cluster's first, the split, its row number."""

    state: npt.NDArray[np.uint8]
    cluster: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]
    row: npt.NDArray[np.uint64]


def _decide(pool: _Pool, config: SpeechesConfig) -> _Decision:
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
    if not held_out.any() or held_out[kept].all():
        raise BadInput(
            f"only {len(kept)} speeches of {config.source} are left after cleaning; give more, "
            "or widen speeches.min_chars and speeches.max_chars"
        )
    return _Decision(state, cluster, held_out, keys[:, 3])


def _write(
    pool: _Pool, decision: _Decision, config: SpeechesConfig, target: str, quarantine: Path
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


def _kind(reason: str) -> str:
    """A reason without what is of one row only, for counting."""
    return re.sub(r"^\d+ characters, | of row \d+| \d+$|(?<=uncertain) \(.*?\)|^turn \d+ ", "", reason)
