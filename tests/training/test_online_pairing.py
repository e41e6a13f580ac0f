"""Pairs of a round by the strategies, the length penalty and the safety floor; the speeches of a round."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.config import OnlineConfig
from psycho.training.online.pairing import barred, best_against_worst, most_pairs, round_speeches, speech_pairs, value

SCORES = st.none() | st.integers(-4, 4).map(float) | st.floats(-5, 5)
SAMPLES = st.lists(st.tuples(st.sampled_from(["", "a", "b", "c", "d", "e"]), SCORES), max_size=9)


def _obvious(texts: Sequence[str], scores: Sequence[float | None], min_gap: float, limit: int) -> list[tuple[int, int]]:
    """Take the best and the worst out, again and again; the earlier sample wins a tie for best."""
    left = [(score, index) for index, score in enumerate(scores) if score is not None]
    pairs: list[tuple[int, int]] = []
    for _ in range(limit):
        if len(left) < 2:
            break
        top, low = max(s for s, _ in left), min(s for s, _ in left)
        best = min(i for s, i in left if s == top)
        worst = max(i for s, i in left if s == low)
        if top > low and top - low >= min_gap and texts[best] != texts[worst]:
            pairs.append((best, worst))
        left = [(s, i) for s, i in left if i not in (best, worst)]
    return pairs


@given(SAMPLES, st.floats(0, 3), st.integers(1, 4))
def test_best_against_worst_is_the_obvious(samples: list[tuple[str, float | None]], min_gap: float, limit: int) -> None:
    texts, scores = [text for text, _ in samples], [score for _, score in samples]
    assert best_against_worst(texts, scores, min_gap, limit) == _obvious(texts, scores, min_gap, limit)


@given(SAMPLES, st.floats(0, 3), st.integers(1, 4))
def test_pairs_are_sound(samples: list[tuple[str, float | None]], min_gap: float, limit: int) -> None:
    texts, scores = [text for text, _ in samples], [score for _, score in samples]
    pairs = best_against_worst(texts, scores, min_gap, limit)
    used = [index for pair in pairs for index in pair]
    assert len(pairs) <= limit
    assert len(set(used)) == len(used)
    for best, worst in pairs:
        high, low = scores[best], scores[worst]
        assert high is not None and low is not None and high > low and high - low >= min_gap
        assert texts[best] != texts[worst]


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [0.0, 0.0], [None, None], [None, 2.0], [-3.0]])
def test_ties_and_missing_scores_make_no_pair(scores: list[float | None]) -> None:
    assert best_against_worst([str(i) for i in range(len(scores))], scores, 0.0, 4) == []


def test_a_score_of_zero_is_a_score() -> None:
    assert best_against_worst(["a", "b", "c"], [-1.0, 0.0, -2.0], 0.0, 1) == [(1, 2)]
    assert best_against_worst(["a", "b", "c"], [None, 0.0, 1.0], 0.0, 1) == [(2, 1)]


def test_the_same_text_is_no_pair() -> None:
    assert best_against_worst(["a", "b", "a"], [3.0, 2.0, 1.0], 0.0, 1) == []


# Strategies, penalty, floor

STRATEGIES = st.sampled_from(["best_worst", "all", "best_random", "top_margin"])
SAFETY = st.none() | st.integers(1, 5)


def _online(**settings: object) -> OnlineConfig:
    return OnlineConfig.model_validate({"scorer": "judge", **settings})


def _barred(safeties: Sequence[int | None], online: OnlineConfig, cut: Sequence[bool] = ()) -> set[int]:
    cut = cut or [False] * len(safeties)
    rows = [{"safety": safety, "truncated": own} for safety, own in zip(safeties, cut, strict=True)]
    return barred(rows, online)


@given(
    st.lists(st.tuples(st.sampled_from("abcde"), SCORES, SAFETY, st.booleans()), max_size=9),
    STRATEGIES,
    st.floats(0, 3),
    st.none() | st.integers(1, 4),
    st.none() | st.integers(2, 5),
)
def test_every_strategy_makes_sound_pairs(
    samples: list[tuple[str, float | None, int | None, bool]],
    strategy: str,
    min_gap: float,
    limit: int | None,
    floor: int | None,
) -> None:
    """Wider than asked for, never more than asked for, never a tie, never an unsafe one or a part of one chosen."""
    texts, values, safeties, cut = ([row[part] for row in samples] for part in range(4))
    online = _online(strategy=strategy, min_gap=min_gap, max_pairs_per_speech=limit, safety_floor=floor)
    online = online.model_copy(update={"samples_per_speech": len(samples)})
    pairs = speech_pairs(texts, values, _barred(safeties, online, cut), online, 0)
    assert len(set(pairs)) == len(pairs) <= most_pairs(online) <= (limit or 99)
    for chosen, rejected in pairs:
        high, low, safety = values[chosen], values[rejected], safeties[chosen]
        assert high is not None and low is not None
        assert high > low and high - low >= min_gap - 1e-9
        assert texts[chosen] != texts[rejected]
        assert floor is None or safety is None or safety >= floor
        assert not cut[chosen]


@pytest.mark.parametrize("limit", [None, 1, 3, 99])
@pytest.mark.parametrize("strategy", ["best_worst", "all", "best_random", "top_margin"])
def test_a_speech_whose_samples_all_differ_gives_the_most_pairs(strategy: str, limit: int | None) -> None:
    online = _online(strategy=strategy, max_pairs_per_speech=limit, samples_per_speech=7)
    found = speech_pairs(list("abcdefg"), [float(n) for n in range(7)], (), online, 0)
    assert len(found) == most_pairs(online)
    assert limit is not None or len(found) == {"best_worst": 3, "all": 21}.get(strategy, 1)


def test_a_sample_that_was_cut_off_may_be_rejected_and_is_never_chosen() -> None:
    rows = [{"safety": None, "truncated": cut} for cut in (True, False, False)]
    online = OnlineConfig(max_pairs_per_speech=9, strategy="all")
    assert barred(rows, online) == {0}
    assert speech_pairs(list("abc"), [3.0, 2.0, 1.0], barred(rows, online), online, 0) == [(1, 2)]
    assert speech_pairs(list("abc"), [1.0, 3.0, 2.0], barred(rows, online), online, 0) == [(1, 0), (1, 2), (2, 0)]


def _pairs(strategy: str, limit: int = 1, floor: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    online = _online(strategy=strategy, max_pairs_per_speech=limit, safety_floor=floor)
    return speech_pairs(list("abcd"), [4.0, 1.0, 3.0, 2.0], _barred([1, 5, 5, 5], online), online, seed)


def test_each_strategy_by_hand() -> None:
    assert _pairs("best_worst", 2) == [(0, 1), (2, 3)]
    assert _pairs("all", 6) == [(0, 1), (0, 3), (2, 1), (0, 2), (2, 3), (3, 1)]
    assert _pairs("top_margin", 2) == [(0, 1), (0, 3)]
    drawn = {tuple(_pairs("best_random", 1, seed=seed)) for seed in range(40)}
    assert drawn == {((0, 1),), ((0, 2),), ((0, 3),)}


def test_the_best_that_is_safe_takes_the_place_of_an_unsafe_best() -> None:
    assert _pairs("best_worst", 1, floor=3) == [(2, 1)]
    assert _pairs("top_margin", 2, floor=3) == [(2, 1), (2, 3)]
    assert {_pairs("best_random", 1, 3, seed)[0][0] for seed in range(20)} == {2}
    assert all(chosen != 0 for chosen, _ in _pairs("all", 6, floor=3))


def test_an_unsafe_response_may_be_rejected() -> None:
    online = _online(safety_floor=3)
    assert speech_pairs(["a", "b"], [1.0, 2.0], _barred([1, 5], online), online, 0) == [(1, 0)]


@pytest.mark.parametrize("strategy", ["all", "top_margin"])
def test_an_unsafe_response_in_the_middle_is_not_chosen_either(strategy: str) -> None:
    online = _online(strategy=strategy, safety_floor=3, max_pairs_per_speech=9)
    assert speech_pairs(list("abc"), [3.0, 2.0, 1.0], _barred([5, 1, 5], online), online, 0) == [(0, 2), (0, 1)]


def test_a_reward_gap_may_be_wider_than_ratings_ever_are() -> None:
    online = OnlineConfig(strategy="all", min_gap=7.5, max_pairs_per_speech=9)
    assert speech_pairs(["a", "b", "c"], [9.0, 1.0, 4.0], (), online, 0) == [(0, 1)]


def test_the_penalty_is_for_what_is_over_the_free_characters() -> None:
    online = OnlineConfig(length_penalty=0.5, length_free_chars=100)
    assert value(3.0, "x" * 100, online) == 3.0
    assert value(3.0, "x" * 300, online) == pytest.approx(2.0)
    assert value(None, "x" * 300, online) is None
    assert value(3.0, "x" * 900, OnlineConfig()) == 3.0


# The speeches of a round

SPEECHES = [{"speech_id": f"s{number}", "question": f"Question {number}?"} for number in range(40)]


def test_a_round_draws_without_replacement() -> None:
    online = OnlineConfig(speeches_per_round=15)
    drawn = [speech["speech_id"] for speech in round_speeches(SPEECHES, online, 0, 0)]
    assert len(drawn) == len(set(drawn)) == 15
    assert set(drawn) <= {speech["speech_id"] for speech in SPEECHES}
    everything = round_speeches(SPEECHES, OnlineConfig(speeches_per_round=1000), 0, 0)
    assert sorted(s["speech_id"] for s in everything) == sorted(s["speech_id"] for s in SPEECHES)


def test_a_round_depends_on_seed_and_number_alone() -> None:
    online = OnlineConfig(speeches_per_round=15)
    assert round_speeches(SPEECHES, online, 0, 1) == round_speeches(list(reversed(SPEECHES)), online, 0, 1)
    draws = [
        tuple(s["speech_id"] for s in round_speeches(SPEECHES, online, seed, n)) for seed in (0, 1) for n in (0, 1)
    ]
    assert all(one != other for one, other in combinations(draws, 2))
