"""Why a round made no pair, by its samples: what kept each speech from one is counted, and each has its own remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

from psycho.config import OnlineConfig
from psycho.training.online.pairing import unsafe

Row = Mapping[str, Any]
_REMEDIES = {  # by what is said of a speech
    "fewer than two answers have a score": "raise max_model_len of the engines that sample and score",
    "all answers tie": "raise online.sampling.temperature",
    "what could be chosen was cut off at online.sampling.max_tokens": "raise online.sampling.max_tokens",
    "what could be chosen was cut off at inference.engine.max_model_len": "raise inference.engine.max_model_len",
    "what could be chosen is under online.safety_floor": "lower online.safety_floor",
    "no gap reaches online.min_gap": "lower online.min_gap",
}
_NO_SCORE, _TIE, _CUT_OFF, _NO_ROOM, _UNSAFE, _NARROW = _REMEDIES


def why_no_pair(samples: Sequence[Row], online: OnlineConfig) -> str:
    """What kept the speeches from a pair and what to do, to end a sentence; `samples` are rows of `rollout.SAMPLE`."""
    by_speech: dict[str, list[Row]] = defaultdict(list)
    for row in samples:
        by_speech[row["speech_id"]].append(row)
    counts = Counter(reason for rows in by_speech.values() for reason in _reasons(rows, online))
    found = [reason for reason in _REMEDIES if counts[reason]]
    reasons = ", ".join(f"in {counts[reason]} {reason}" for reason in found)
    return f"of {len(by_speech)} speeches, {reasons}; {', '.join(_REMEDIES[reason] for reason in found)}"


def _cut_off(row: Row, online: OnlineConfig) -> set[str]:
    """An answer may be no longer than what its prompt leaves of the engine's length, whatever was asked for."""
    if not row["truncated"]:
        return set()
    return {_CUT_OFF if row["output_tokens"] >= online.sampling.max_tokens else _NO_ROOM}


def _reasons(rows: Sequence[Row], online: OnlineConfig) -> set[str]:
    """What would all have to change for a pair of this speech: of the pair that lacks least, the widest of those."""
    under = unsafe(rows, online)
    never = [_cut_off(row, online) for row in rows]
    for place in under:
        never[place].add(_UNSAFE)
    known = [place for place, row in enumerate(rows) if row["value"] is not None]
    if len(known) < 2:
        return {_NO_SCORE}
    candidates = []
    for one, other in permutations(known, 2):
        gap = rows[one]["value"] - rows[other]["value"]
        if gap > 0 and rows[one]["response"] != rows[other]["response"]:
            lacks = never[one] | ({_NARROW} if gap < online.min_gap else set())
            candidates.append((len(lacks), -gap, lacks))
    if not candidates:  # to differ is not enough where nothing may be chosen
        return {_TIE} | min((never[place] for place in known), key=len)
    return min(candidates, key=lambda candidate: candidate[:2])[2]
