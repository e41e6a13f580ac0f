"""What only the whole set can tell of a row: an exact or near duplicate, over the limit, held out for evaluation.

Everything here works on a few numbers a row (hashes and places), so that it costs tens of bytes a row. Rows are in
the order they were read, and of equal ones the first stays.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

KEPT, EXACT, SAME_ID, NEAR, OVER_LIMIT = range(5)
Places = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


def exact_duplicates(text: Keys, ids: Keys) -> npt.NDArray[np.uint8]:
    """KEPT, EXACT (the text of a row kept before) or SAME_ID (its id) for each row."""
    state = np.full(len(text), KEPT, np.uint8)
    texts_seen: set[int] = set()
    ids_seen: set[int] = set()
    for place in np.flatnonzero(_occurs_again(text) | _occurs_again(ids)):  # all others are kept at once
        if int(text[place]) in texts_seen:
            state[place] = EXACT
        elif int(ids[place]) in ids_seen:
            state[place] = SAME_ID
        else:
            texts_seen.add(int(text[place]))
            ids_seen.add(int(ids[place]))
    return state


def _occurs_again(keys: Keys) -> npt.NDArray[np.bool_]:
    """True for every occurrence of a key that occurs more than once."""
    order = np.argsort(keys)
    ordered = keys[order]
    equal = ordered[1:] == ordered[:-1]
    again = np.zeros(len(keys), bool)
    again[order[1:][equal]] = True
    again[order[:-1][equal]] = True
    return again


def over_limit(state: npt.NDArray[np.uint8], limit: int | None) -> npt.NDArray[np.uint8]:
    """The state with only the first `limit` rows kept."""
    kept = np.flatnonzero(state == KEPT)
    state = state.copy()
    if limit is not None:
        state[kept[limit:]] = OVER_LIMIT
    return state


def hold_out(order: Keys, cluster: Places, count: int) -> npt.NDArray[np.bool_]:
    """Which rows are held out: whole clusters by their first row's place in the seeded order, `count` rows at most.

    Args:
        order: a hash of seed and id, one a row.
        cluster: place of the first row of each row's cluster.
    """
    size = np.bincount(cluster, minlength=len(cluster))
    firsts = np.flatnonzero(size)
    chosen = np.zeros(len(cluster), bool)
    left = count
    for first in firsts[np.argsort(order[firsts], kind="stable")]:
        if left == 0:
            break
        if size[first] <= left:  # a cluster is never parted
            chosen[first] = True
            left -= int(size[first])
    return chosen[cluster]
