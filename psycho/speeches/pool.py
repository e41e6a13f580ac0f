"""Cleaned rows on disk while `prepare` reads: flat in memory, and a place to go on from.

The rows' text goes to shards; four numbers and the band keys of a row that fits go to files that only grow. With each
shard a small state file says how far all of them had come. A run that was interrupted cuts them back to it, and cleans
what comes after; reading the source again up to there costs little.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.speeches.clean import CLEANED, Cleaned

SHARD_ROWS = 20_000
_KEYS = 4
_COUNTS = ("personal_data", "languages", "ids")


def open_cut(path: Path, size: int) -> BinaryIO:
    """A file cut to so many bytes, to be written on from there."""
    file = path.open("r+b" if size else "wb")
    file.truncate(size)
    file.seek(size)
    return file


class Pool:
    """Cleaned rows: their text in shards, and four numbers and band keys a fitting row in files below `work`.

    `rows` is how many there are; where an interrupted pool of the same `key` lies in `work` it is not 0 at first.
    """

    def __init__(self, work: Path, config: SpeechesConfig, key: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._work, self._key, self._waiting = work, key, [CLEANED.empty_table()]
        state = self._state()
        self.rows, self._fitting, self._shards = state["rows"], state["fitting"], state["shards"]
        self.counts: dict[str, Counter[str]] = {name: Counter(state["counts"].get(name)) for name in _COUNTS}
        self._keys = open_cut(work / "keys.bin", self._fitting * _KEYS * 8)
        self.near = None
        if config.near_duplicates != "ignore":
            from psycho.speeches.near import NearIndex

            self.near = NearIndex(work, config.near_threshold, self._fitting)

    def add(self, cleaned: Cleaned) -> None:
        """Append a batch."""
        self.rows += cleaned.table.num_rows
        fitting = cleaned.table["row"].filter(pc.is_null(cleaned.table["reason"])).to_numpy()
        self._fitting += len(fitting)
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
        return np.fromfile(self._work / "keys.bin", np.uint64).reshape(-1, _KEYS)

    def shards(self) -> Iterator[pa.Table]:
        """The cleaned rows in order."""
        for number in range(self._shards):
            yield pq.read_table(self._shard(number))

    def _shard(self, number: int) -> Path:
        return self._work / f"clean-{number:05d}.parquet"

    def _flush(self) -> None:
        """A shard of what waits, then how far all files have come: what is behind that does not count."""
        pq.write_table(pa.concat_tables(self._waiting), self._shard(self._shards))
        self._shards, self._waiting = self._shards + 1, [CLEANED.empty_table()]
        self._keys.flush()
        if self.near:
            self.near.flush()
        state = {"key": self._key, "rows": self.rows, "fitting": self._fitting, "shards": self._shards}
        storage.write_text(str(self._work / "state.json"), json.dumps(state | {"counts": self.counts}))

    def _state(self) -> dict[str, Any]:
        """How far an interrupted pool had come; nothing where it was another's or its files are not whole."""
        begin = {"rows": 0, "fitting": 0, "shards": 0, "counts": {}}
        try:
            state: dict[str, Any] = json.loads(storage.read_text(str(self._work / "state.json")) or "{}")
            if state.get("key") != self._key:
                return begin
            rows = sum(pq.read_metadata(self._shard(number)).num_rows for number in range(state["shards"]))
            size = (self._work / "keys.bin").stat().st_size
        except (OSError, ValueError):
            return begin
        return state if rows == state["rows"] and size >= state["fitting"] * _KEYS * 8 else begin
