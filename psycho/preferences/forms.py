"""The forms in which an export gives a run's responses, beside its pairs: one row schema and one pure function each.

`responses`: every rated response with its evidence. `sft`: the responses that supervised training learns from, as
messages. `kto`: single responses that are wanted or not, for training without pairs. `ranked`: a speech's responses,
best first, with their scores. Messages are those of TRL's conversational types.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from psycho.principles import STEMS, overall

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
RESPONSES = pa.schema(
    [
        *[(name, pa.string()) for name in ("request_id", "speech_id", "question", "history", "model", "response")],
        *[(f"{stem}_rating", pa.int32()) for stem in STEMS],
        *[(f"{stem}_evidence", pa.string()) for stem in STEMS],
        ("unfaithful_evidence", pa.list_(pa.string())),
        ("overall", pa.float64()),
        ("expected_overall", pa.float64()),
        ("floored", pa.bool_()),
        ("disagreement", pa.float64()),
        ("judge", pa.string()),
    ]
)
SFT = pa.schema([("messages", MESSAGES), ("speech_id", pa.string()), ("model", pa.string()), ("overall", pa.float64())])
KTO = pa.schema(
    [
        ("prompt", MESSAGES),
        ("completion", MESSAGES),
        ("label", pa.bool_()),
        ("speech_id", pa.string()),
        ("model", pa.string()),
    ]
)
RANKED = pa.schema(
    [
        ("prompt", MESSAGES),
        ("responses", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float64())),
        ("models", pa.list_(pa.string())),
        ("speech_id", pa.string()),
    ]
)
FORMS = ("pairs", "responses", "sft", "kto", "ranked")


def turns(row: Row) -> list[dict[str, str]]:
    """The conversation that a response answers, as messages; `row` has `question` and perhaps `history`."""
    return [*json.loads(row.get("history") or "[]"), {"role": "user", "content": row["question"]}]


def reply(response: str) -> list[dict[str, str]]:
    """A response as messages."""
    return [{"role": "assistant", "content": response}]


def response_rows(rated: Iterable[Row]) -> Rows:
    """Rows of `RESPONSES`; a column that an older run did not write is null."""
    return [{name: row.get(name) for name in RESPONSES.names} for row in _ordered(rated)]


def sft_rows(rated: Iterable[Row], min_overall: float) -> Rows:
    """Each speech's best response where it is rated at least that high: what `train_sft` learns from."""
    best = [responses[0] for responses in _by_speech(rated).values()]
    return [
        {**row, "messages": [*turns(row), *reply(row["response"])]}
        for row in best
        if (row["wins"] > 0 if row["overall"] is None else row["overall"] >= min_overall)
    ]


def ranked_rows(rated: Iterable[Row]) -> Rows:
    """A row for each speech with two or more rated responses; scores are the overall ratings."""
    return [
        {
            "prompt": turns(responses[0]),
            "responses": [row["response"] for row in responses],
            "scores": [row["overall"] for row in responses],
            "models": [row["model"] for row in responses],
            "speech_id": speech_id,
        }
        for speech_id, responses in _by_speech(row for row in rated if row["overall"] is not None).items()
        if len(responses) > 1
    ]


def kto_rows(pairs: Iterable[Row]) -> Rows:
    """Each response of the pairs once: wanted where it was chosen more often than rejected, unwanted where less often;
    one that was both as often says nothing and is left out."""
    chosen: Counter[tuple[str, str, str]] = Counter()
    first: dict[tuple[str, str, str], Row] = {}
    for pair in pairs:
        for side, point in (("chosen", 1), ("rejected", -1)):
            key = (pair["speech_id"], pair[f"{side}_model"], pair[side])
            first.setdefault(key, pair)
            chosen[key] += point
    return [
        {
            "prompt": turns(first[key]),
            "completion": reply(key[2]),
            "label": chosen[key] > 0,
            "speech_id": key[0],
            "model": key[1],
        }
        for key in first
        if chosen[key]
    ]


def responses_of_pairs(pairs: Iterable[Row]) -> Rows:
    """Responses of a run that has pairs and none of its own: each once, without evidence.

    `wins`: how often it was chosen less how often rejected, which orders responses that nobody rated (`overall` None).
    """
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for pair in pairs:
        for side, point in (("chosen", 1), ("rejected", -1)):
            ratings = {f"{stem}_rating": pair[f"{side}_{stem}_rating"] for stem in STEMS}
            row = found.setdefault(
                (pair["speech_id"], pair[f"{side}_model"], pair[side]),
                {
                    **{name: pair.get(name) for name in ("speech_id", "question", "history")},
                    "model": pair[f"{side}_model"],
                    "response": pair[side],
                    **ratings,
                    "overall": None
                    if None in ratings.values()
                    else overall({stem: ratings[f"{stem}_rating"] for stem in STEMS}),
                    "wins": 0,
                },
            )
            row["wins"] += point
    return list(found.values())


def _by_speech(rated: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in _ordered(rated):
        found[row["speech_id"]].append(row)
    return found


def _ordered(rated: Iterable[Row]) -> Sequence[Row]:
    """By speech, best first; of equals the one whose id (or text) comes later, as `train_sft` takes it."""
    tied = sorted(rated, key=lambda row: (row.get("request_id") or "", row["response"]), reverse=True)
    return sorted(
        tied, key=lambda row: (row["speech_id"], -(row["wins"] if row["overall"] is None else row["overall"]))
    )
