"""The answers of a round that is still being sampled, on disk as they come: an interrupted round asks for the rest.

A round may be tens of thousands of samples, so that its half is too much to lose. What they are worth is asked again.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import pyarrow as pa

from psycho import storage
from psycho.inference.worker import Completion

_SCHEMA = pa.schema(
    [("place", pa.int32()), ("text", pa.string()), ("finish_reason", pa.string()), ("output_tokens", pa.int32())]
)


class Drawn:
    """Answers by their place in the round, a file a chunk, below a folder (none: nothing is kept)."""

    def __init__(self, folder: str | None) -> None:
        self._folder = folder

    def known(self) -> dict[int, Completion]:
        """What earlier tries have drawn."""
        if self._folder is None:
            return {}
        rows = [row for table in storage.read_finished(self._folder) for row in table.to_pylist()]
        return {row.pop("place"): Completion(**row) for row in sorted(rows, key=lambda row: row["place"])}

    def keep(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        """Those that are answers; what failed is asked again by the next try."""
        rows = [
            {"place": place, "text": own.text, "finish_reason": own.finish_reason, "output_tokens": own.output_tokens}
            for place, own in zip(places, completions, strict=True)
            if own.error is None
        ]
        if self._folder and rows:
            table = pa.Table.from_pylist(rows, schema=_SCHEMA)
            storage.write_rows(table, storage.join(self._folder, f"{uuid.uuid4().hex}.parquet"))
