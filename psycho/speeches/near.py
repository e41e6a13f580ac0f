"""Near-duplicates by MinHash and locality-sensitive hashing, in a few bytes a row.

The signatures are datasketch's. Its tables are not used: they hold Python objects, several GB for a million rows.
Here each band's keys are one file of 64-bit numbers; equal keys are found by sorting a band at a time, and a pair is
checked on sketches of one byte a permutation (Li & König 2010, b-bit minwise hashing) before it counts. So memory is
some tens of bytes a row, whatever the texts are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import numpy.typing as npt
import regex
from datasketch import MinHash
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from psycho.speeches.pool import open_cut

PERMUTATIONS = 128
SHINGLE_WORDS = 3
_WORDS = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]|[\w']+")
_RECALL_AT_THRESHOLD = 0.99
_NEIGHBOURS = 4  # equal keys are compared with the next few and the first: linear, however often a key occurs
_CHUNK = 1 << 14
Matrix = npt.NDArray[np.uint64]


def shingles(text: str) -> list[bytes]:
    """Three-word pieces of a text; a text of fewer words is one piece."""
    words = _WORDS.findall(text.lower())
    last = max(1, len(words) - SHINGLE_WORDS + 1)
    return [" ".join(words[at : at + SHINGLE_WORDS]).encode() for at in range(last)]


def signatures(texts: Iterable[str]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, [texts, PERMUTATIONS]."""
    # crc32 is enough: the affine32 scheme mixes what it is given before it permutes, and SHA-1 takes ten times as long.
    minhash = MinHash(num_perm=PERMUTATIONS, hashfunc=crc32, scheme="affine32")
    rows = []
    for text in texts:
        minhash.clear()
        minhash.update_batch(shingles(text))
        rows.append(minhash.digest())
    return np.stack(rows).astype(np.uint32) if rows else np.empty((0, PERMUTATIONS), np.uint32)


def banding(threshold: float) -> tuple[int, int]:
    """Bands and rows a band: the longest rows that still meet a pair at the threshold 99 times in 100."""
    for rows in range(16, 1, -1):
        bands = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= _RECALL_AT_THRESHOLD:
            return bands, rows
    return PERMUTATIONS, 1


def band_keys(signature: npt.NDArray[np.uint32], bands: int, rows: int) -> Matrix:
    """One 64-bit key a band, [texts, bands]; equal where the rows of the band are equal."""
    key = np.zeros((len(signature), bands), np.uint64)
    parts = signature[:, : bands * rows].reshape(len(signature), bands, rows).astype(np.uint64)
    for row in range(rows):
        key = (key ^ parts[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


class NearIndex:
    """Band keys and sketches of many rows, appended to files below `folder`, behind the first `rows` that lie there."""

    def __init__(self, folder: Path, threshold: float, rows: int = 0) -> None:
        self.bands, self.rows = banding(threshold)
        self._threshold = threshold
        self._folder = folder
        self._files = [open_cut(folder / f"band-{band}.bin", rows * 8) for band in range(self.bands)]
        self._sketches = open_cut(folder / "sketches.bin", rows * PERMUTATIONS)

    def add(self, signature: npt.NDArray[np.uint32]) -> None:
        """Append rows."""
        keys = band_keys(signature, self.bands, self.rows)
        for band, file in enumerate(self._files):
            file.write(np.ascontiguousarray(keys[:, band]).tobytes())
        self._sketches.write(signature.astype(np.uint8).tobytes())

    def flush(self) -> None:
        """Hand what was added to the system."""
        for file in (*self._files, self._sketches):
            file.flush()

    def close(self) -> None:
        """No more rows."""
        for file in (*self._files, self._sketches):
            file.close()

    def clusters(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """For each of `rows` (ascending places in the order added) the place in `rows` of its cluster's first."""
        first = np.arange(len(rows))
        for band in range(self.bands):
            keys = np.fromfile(self._folder / f"band-{band}.bin", np.uint64)[rows]
            left, right = self._checked(rows, first, _candidates(keys))
            if len(left):
                first = _join(first, left, right)
        return first

    def _checked(
        self,
        rows: npt.NDArray[np.int64],
        first: npt.NDArray[np.int64],
        pairs: Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Of the candidate pairs those not yet together and similar enough."""
        found = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        for left, right in pairs:
            apart = first[left] != first[right]
            left, right = left[apart], right[apart]
            for start in range(0, len(left), _CHUNK):
                a, b = left[start : start + _CHUNK], right[start : start + _CHUNK]
                similar = self._similarity(rows[a], rows[b]) >= self._threshold
                found.append((a[similar], b[similar]))
        return np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])

    def _similarity(self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Estimated Jaccard similarity; one byte of two different values is equal once in 256."""
        # Mapped anew for each chunk, so that the pages it touched do not add up.
        sketches = np.memmap(self._folder / "sketches.bin", np.uint8, mode="r").reshape(-1, PERMUTATIONS)
        equal = (sketches[a] == sketches[b]).mean(axis=1)
        return (equal - 1 / 256) / (1 - 1 / 256)


def _candidates(keys: Matrix) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs of places with equal keys: each with the next few of its key, and with the first."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    for distance in range(1, _NEIGHBOURS + 1):
        same = ordered[distance:] == ordered[:-distance]
        yield order[:-distance][same], order[distance:][same]
    begins = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.empty(0, bool)
    start = np.maximum.accumulate(np.where(begins, np.arange(len(ordered)), 0))
    far = np.arange(len(ordered)) - start > _NEIGHBOURS
    yield order[start[far]], order[far]


def _join(
    first: npt.NDArray[np.int64], left: npt.NDArray[np.int64], right: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Clusters after joining each left with its right; a cluster is named by its smallest place."""
    size = len(first)
    edges = coo_array((np.ones(len(left), bool), (first[left], first[right])), shape=(size, size))
    count, label = connected_components(edges, directed=False)
    smallest = np.full(count, size)
    np.minimum.at(smallest, label[first], first)
    return smallest[label[first]]
