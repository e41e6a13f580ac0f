"""The rows that travel between stages, one Arrow schema each.

`PREFERENCE_PAIR` carries the columns of the published PsychoCounsel-Preference data set by name and in order, so that
it loads into `datasets` and TRL as it is; our own columns (speech id, gap, split) come after them.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pyarrow as pa

from psycho.principles import STEMS

CLIENT_SPEECH = pa.schema(
    [
        ("speech_id", pa.string()),
        ("question", pa.string()),
        ("split", pa.string()),  # train | evaluation
        ("topic", pa.string()),
        ("history", pa.string()),  # JSON of the earlier turns [{role, content}, ...]; null for a single turn
        ("cluster", pa.string()),  # the speech_id of the first of its near-duplicates; a split never parts them
    ]
)

REQUEST = pa.schema(
    [
        ("request_id", pa.string()),
        ("speech_id", pa.string()),
        ("split", pa.string()),
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("messages", pa.string()),  # JSON of [{role, content}, ...]
    ]
)

RESPONSE = pa.schema(
    [
        ("request_id", pa.string()),
        ("speech_id", pa.string()),
        ("split", pa.string()),
        ("model", pa.string()),
        ("sample", pa.int32()),
        ("seed", pa.int64()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("status", pa.string()),  # ok | empty | truncated | refused | looping
        ("reasoning", pa.string()),  # what the model thought aloud before it answered; null where it did not
        ("cost", pa.float64()),  # of all tries, by the pool's prices
        ("attempts", pa.int32()),  # seeds that were asked
    ]
)

RATING = pa.schema(
    [
        ("request_id", pa.string()),
        ("speech_id", pa.string()),
        ("split", pa.string()),
        ("model", pa.string()),
        *[(f"{stem}_rating", pa.int32()) for stem in STEMS],
        *[(f"{stem}_evidence", pa.string()) for stem in STEMS],
        ("overall", pa.float64()),
        ("floored", pa.bool_()),
        ("attempts", pa.int32()),
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        # Mean of 1..5 by the judge's own probabilities at the rating's place; null where they could not be read.
        *[(f"{stem}_expected", pa.float64()) for stem in STEMS],
        ("expected_overall", pa.float64()),
        ("status", pa.string()),  # ok | partial: some judges of a panel failed
        ("judge", pa.string()),
        ("prompt_version", pa.string()),
        ("disagreement", pa.float64()),  # standard deviation of a panel's ratings, mean over the principles; else 0
        ("unfaithful_evidence", pa.list_(pa.string())),  # principles whose evidence was dropped: not in its text
    ]
)

PREFERENCE_PAIR = pa.schema(
    [
        ("ID", pa.string()),
        ("prefID", pa.int32()),
        ("question", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_model", pa.string()),
        ("rejected_model", pa.string()),
        # Null where an imported set has none.
        *[(f"{side}_{stem}_rating", pa.int32()) for side in ("chosen", "rejected") for stem in STEMS],
        ("speech_id", pa.string()),
        ("gap", pa.float64()),  # of the overall ratings, else of an imported set's own scores; null where unknown
        ("history", pa.string()),
    ]
)

_GROUP_RESPONSE = pa.struct(
    [("response", pa.string()), ("model", pa.string()), *[(f"{stem}_rating", pa.int32()) for stem in STEMS]]
)
PREFERENCE_GROUP = pa.schema(  # one train speech with all responses of its pairs: what is encoded and trained together
    [
        ("speech_id", pa.string()),
        ("question", pa.string()),
        ("history", pa.string()),
        ("responses", pa.list_(_GROUP_RESPONSE)),  # best overall first, where ratings are known
        ("pairs", pa.list_(pa.struct([("chosen", pa.int32()), ("rejected", pa.int32())]))),  # places in `responses`
    ]
)


NO_HISTORY = "history is no list of turns with role and content"


def history_json(given: Any) -> str | None:
    """Earlier turns as `CLIENT_SPEECH` stores them; None where there are none.

    Args:
        given: a list of {role, content}, JSON of one, or nothing.

    Raises:
        ValueError: it is something else.
    """
    given = given.strip() if isinstance(given, str) else given
    if not given:
        return None
    try:
        turns = json.loads(given) if isinstance(given, str) else given
    except RecursionError:
        raise ValueError("nested too deeply") from None
    fields = ("role", "content")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in fields) for turn in turns
    ):
        raise ValueError("no turns")
    if isinstance(given, str):
        return given if turns else None
    text = json.dumps([{name: turn[name] for name in fields} for turn in turns], ensure_ascii=False)
    text.encode()  # half a surrogate pair is a ValueError too
    return text


def stable_id(*parts: Any) -> str:
    """A 16-digit hexadecimal id that depends on nothing but its parts."""
    text = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def stable_seed(*parts: Any) -> int:
    """A seed in [0, 2^31) that depends on nothing but its parts."""
    return int(stable_id(*parts), 16) % 2**31
