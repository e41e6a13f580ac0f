"""Why a round made no pair: what is said is so, and who follows it gets one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.config import OnlineConfig
from psycho.training.online.pairing import barred, speech_pairs
from psycho.training.online.unpaired import why_no_pair

FLOOR = {"safety_floor": 3, "scorer": "judge"}


def _rows(*samples: tuple[Any, ...], speech: str = "s") -> list[dict[str, Any]]:
    """(value, truncated, safety) each; texts differ."""
    whole = [(*sample, False, None)[:3] if len(sample) == 1 else (*sample, None)[:3] for sample in samples]
    return [
        {"speech_id": speech, "response": f"text {n}", "value": value, "truncated": cut, "safety": safety}
        | {"output_tokens": 1024 if cut else 7}
        for n, (value, cut, safety) in enumerate(whole)
    ]


@pytest.mark.parametrize(
    ("samples", "online", "said"),
    [
        ([(1.0,), (1.0,)], {}, "in 1 all answers tie; raise online.sampling.temperature"),
        (
            [(2.0, True), (1.0,), (1.0,)],
            {},
            "in 1 what could be chosen was cut off at online.sampling.max_tokens; raise online.sampling.max_tokens",
        ),
        ([(1.2,), (1.0,)], {"min_gap": 0.5}, "in 1 no gap reaches online.min_gap; lower online.min_gap"),
        (
            [(1.2, True), (1.0,)],
            {"min_gap": 0.5},
            "in 1 what could be chosen was cut off at online.sampling.max_tokens, in 1 no gap reaches online.min_gap; "
            "raise online.sampling.max_tokens, lower online.min_gap",
        ),
        (
            [(1.0, True), (1.0, True)],
            {},
            "in 1 all answers tie, in 1 what could be chosen was cut off at online.sampling.max_tokens; "
            "raise online.sampling.temperature, raise online.sampling.max_tokens",
        ),
        (
            [(4.0, False, 1), (2.0, False, 3), (2.0, False, 3)],
            FLOOR,
            "in 1 what could be chosen is under online.safety_floor; lower online.safety_floor",
        ),
        (
            [(None,), (2.0,)],
            {},
            "in 1 fewer than two answers have a score; raise max_model_len of the engines that sample and score",
        ),
    ],
)
def test_each_reason_with_what_to_do(samples: Any, online: Any, said: str) -> None:
    assert why_no_pair(_rows(*samples), OnlineConfig(**online)) == f"of 1 speeches, {said}"


def test_an_answer_that_the_engine_had_no_room_for_is_not_cut_off_at_max_tokens() -> None:
    rows = [row | {"output_tokens": 9} for row in _rows((2.0, True), (1.0,))]
    said = why_no_pair(rows, OnlineConfig())
    assert said.endswith("cut off at inference.engine.max_model_len; raise inference.engine.max_model_len")


def test_reasons_are_counted_by_speech() -> None:
    rows = _rows((1.0,), (1.0,), speech="a") + _rows((1.0,), (1.0,), speech="b") + _rows((2.0, True), (1.0,))
    said = why_no_pair(rows, OnlineConfig(min_gap=0.5))
    assert said.startswith("of 3 speeches, in 2 all answers tie, in 1 what could be chosen was cut off")
    assert "min_gap" not in said


@given(
    samples=st.lists(
        st.tuples(st.none() | st.sampled_from([1.0, 1.5, 2.0, 4.0]), st.booleans(), st.integers(1, 5)),
        min_size=2,
        max_size=5,
    ),
    min_gap=st.sampled_from([0.0, 1.0, 3.5]),
    strategy=st.sampled_from(["best_worst", "all", "best_random", "top_margin"]),
)
def test_who_follows_it_gets_a_pair(samples: list[Any], min_gap: float, strategy: Any) -> None:
    online = OnlineConfig(min_gap=min_gap, strategy=strategy, scorer="judge", safety_floor=3)

    def pairs(rows: list[dict[str, Any]], online: OnlineConfig) -> list[Any]:
        texts, values = [row["response"] for row in rows], [row["value"] for row in rows]
        return speech_pairs(texts, values, barred(rows, online), online, 0)

    rows = _rows(*samples)
    if pairs(rows, online):
        return
    said = why_no_pair(rows, online)
    if "raise online.sampling.max_tokens" in said:
        rows = [row | {"truncated": False} for row in rows]
    if "lower online.safety_floor" in said:
        online = online.model_copy(update={"safety_floor": None})
    if "raise online.sampling.temperature" in said:  # what may be chosen may then be the best
        rows = [row | {"value": n + 9 * (n not in barred(rows, online))} for n, row in enumerate(rows)]
        online = online.model_copy(update={"min_gap": 0.0})
    if "raise max_model_len" in said:
        rows = [row | {"value": n, "truncated": False, "safety": 5} for n, row in enumerate(rows)]
        online = online.model_copy(update={"min_gap": 0.0})
    if "lower online.min_gap" in said:
        online = online.model_copy(update={"min_gap": 0.0})
    assert pairs(rows, online)
