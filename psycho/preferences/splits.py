"""Train, dev and test: split by client speech with its near-duplicates, never by row.

A speech's `cluster` names its near-duplicates; a speech without one is a cluster of its own. A cluster goes to the dev
split by a hash, so that more speeches leave the earlier ones where they were. Overlap is an error and no warning: a
test figure over speeches that were trained on is wrong, not noisy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from psycho.errors import BadInput
from psycho.schema import stable_id

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]


def cluster_of(speech: Row) -> str:
    """The id that a speech shares with its near-duplicates."""
    return speech.get("cluster") or speech["speech_id"]


def same_words(text: str) -> str:
    """What is left of a text without case, punctuation and spacing."""
    return "".join(c for c in text.casefold() if c.isalnum())


def prompt_words(row: Row) -> str:
    """The words of a speech with those said before it: two clients may both end with "Yes, I think so"."""
    return same_words(f"{row.get('history') or ''} {row['question']}")


def held_out(cluster: str, share: float, name: str, seed: int) -> bool:
    """True for about `share` of all clusters, the same ones whatever else there is."""
    return int(stable_id(name, seed, cluster), 16) < share * 16**16


def check_overlap(splits: Mapping[str, Sequence[Row]], speeches: Mapping[str, Row], advice: str) -> None:
    """Look for speeches that are on two sides.

    Args:
        splits: pairs by split; each has `speech_id` and `question`.
        speeches: by id, with `cluster` where it is known.
        advice: what to do, the end of the error's sentence.

    Raises:
        BadInput: two splits share a speech, a near-duplicate or the words of one.
    """
    marks = {name: dict(_marks(rows, speeches)) for name, rows in splits.items()}
    for one, other in combinations(splits, 2):
        shared = sorted({marks[one][mark] for mark in marks[one].keys() & marks[other].keys()})
        if shared:
            raise BadInput(
                f"{len(shared):,} client speeches (the first is {shared[0]}) are in both {one} and {other}, as "
                f"themselves or as near-duplicates, so that test figures would be false; {advice}"
            )


def _marks(rows: Sequence[Row], speeches: Mapping[str, Row]) -> Iterator[tuple[tuple[str, str], str]]:
    """Everything by which a speech would be recognised on the other side, with its id."""
    for row in rows:
        speech = row["speech_id"]
        yield ("id", speech), speech
        yield ("cluster", cluster_of(speeches.get(speech, row))), speech
        yield ("words", prompt_words(row)), speech


def balance_length(pairs: Sequence[Row], seed: int) -> tuple[Rows, Rows]:
    """Leave out pairs until longer is no sign of better.

    Within each octave of length difference in characters as many pairs stay whose chosen side is the longer one as
    whose chosen side is the shorter one; which go is drawn by hash, so that gaps keep their spread.

    Returns:
        The pairs that stay, in their order, and the others with a reason.
    """
    octaves: dict[int, dict[bool, list[int]]] = defaultdict(lambda: {True: [], False: []})
    for place, pair in enumerate(pairs):
        difference = len(pair["chosen"]) - len(pair["rejected"])
        if difference:
            octaves[abs(difference).bit_length()][difference > 0].append(place)
    left_out: set[int] = set()
    for sides in octaves.values():
        few = min(map(len, sides.values()))
        for places in sides.values():
            drawn = sorted(places, key=lambda p: stable_id("length", seed, pairs[p]["ID"], pairs[p]["prefID"]))
            left_out.update(drawn[few:])
    kept = [dict(pair) for place, pair in enumerate(pairs) if place not in left_out]
    dropped = [_unbalanced(pair) for place, pair in enumerate(pairs) if place in left_out]
    return kept, dropped


def _unbalanced(pair: Row) -> dict[str, Any]:
    return {"pair": f"{pair['ID']}/{pair['prefID']}", "reason": "left out by pairs.balance_length"}
