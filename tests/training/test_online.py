"""The rollout of online DPO with a pool that answers from a table, and the pairs it makes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.config import Config, JudgeConfig, OnlineConfig
from psycho.inference.worker import Completion
from psycho.judging.rubric import Rating
from psycho.principles import STEMS
from psycho.training.online import Rollout, best_against_worst, round_speeches

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


class FakePool:
    """Answers from tables, and remembers what it was asked."""

    def __init__(self, texts: list[str], scores: list[float | None]) -> None:
        self.texts, self.scores = texts, scores
        self.seeds: list[int] = []
        self.prompts: list[Any] = []
        self.policies: list[str] = []
        self.scored: list[str] = []

    def sample(self, policy: str, prompts: Any, seeds: Any, sampling: Any, reporter: Any) -> list[Completion]:
        self.policies.append(policy)
        self.prompts, self.seeds = list(prompts), list(seeds)
        return [
            Completion(error="prompt is too long") if text == "ERROR" else Completion(text=text, output_tokens=7)
            for text in self.texts
        ]

    def reward(self, model: str, conversations: Any, reporter: Any) -> list[float | None]:
        assert model == "scorer"
        self.scored = [talk[-1]["content"] for talk in conversations]
        assert all(talk[-1]["role"] == "assistant" and talk[:-1] in self.prompts for talk in conversations)
        return [self.scores[self._place(text)] for text in self.scored]

    def rate(self, model: str, judge: Any, items: Any, seeds: Any, reporter: Any) -> list[Rating | None]:
        assert model == "scorer"
        self.scored = [text for _, text, _ in items]
        assert set(seeds) <= set(self.seeds)
        found = [self.scores[self._place(text)] for text in self.scored]
        return [None if s is None else Rating(dict.fromkeys(STEMS, int(s)), dict.fromkeys(STEMS, "")) for s in found]

    def _place(self, text: str) -> int:
        return [known.strip() for known in self.texts].index(text)


def _rollout(pool: FakePool, **online: Any) -> Rollout:
    config = Config(seed=3, online=OnlineConfig(samples_per_speech=4, **online))
    return Rollout(pool, config, JudgeConfig(), "scorer")  # type: ignore[arg-type]


TEXTS = ["one a", " one b ", "one c", "one d", "two a", "two b", "two c", "two d"]


def test_best_and_worst_of_each_speech_are_paired() -> None:
    pool = FakePool(TEXTS, [1.0, 4.0, 2.0, 3.0, 2.0, 2.5, 5.0, 2.0])
    pairs, report = _rollout(pool)("policy", 0, SPEECHES[:2])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one b", "one a"), ("two c", "two d")]
    assert [json.loads(pair["messages"])[-1]["content"] for pair in pairs] == ["Question 0?", "Question 1?"]
    assert len({pair["id"] for pair in pairs}) == 2
    assert pool.policies == ["policy"]
    assert report == {
        "round": 0,
        "samples": 8,
        "pairs": 2,
        "failed": 0,
        "mean_score": pytest.approx(21.5 / 8),
        "mean_chars": pytest.approx(5.0),
        "sampled_tokens": 56,
    }


def test_scores_are_never_compared_across_speeches() -> None:
    """A speech whose samples all tie gives no pair, though another's are better and worse."""
    pairs, _ = _rollout(FakePool(TEXTS, [3.0, 3.0, 3.0, 3.0, 5.0, 1.0, 3.0, 3.0]))("policy", 0, SPEECHES[:2])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("two a", "two b")]


@pytest.mark.parametrize("scorer", ["reward", "judge"])
def test_a_missing_score_leaves_its_sample_out(scorer: str) -> None:
    """Never a default: the best and the worst of the others are paired, and the failure is counted."""
    pool = FakePool(TEXTS, [None, 4.0, 2.0, 3.0, 2.0, 4.0, None, 1.0])
    pairs, report = _rollout(pool, scorer=scorer)("policy", 0, SPEECHES[:2])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one b", "one c"), ("two b", "two d")]
    assert report["failed"] == 2
    assert report["mean_score"] == pytest.approx(16 / 6)


@pytest.mark.parametrize("scorer", ["reward", "judge"])
def test_an_empty_text_is_not_scored_and_shifts_nothing(scorer: str) -> None:
    """The scorer sees only what there is; what it says must land on the right sample."""
    texts = ["", "one b", "  ", "one d", "two a", "ERROR", "two c", "two d"]
    pool = FakePool(texts, [5.0, 1.0, 5.0, 4.0, 2.0, 5.0, 5.0, 3.0])
    pool.texts[5] = "ERROR"
    pairs, report = _rollout(pool, scorer=scorer)("policy", 0, SPEECHES[:2])
    assert pool.scored == ["one b", "one d", "two a", "two c", "two d"]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one d", "one b"), ("two c", "two a")]
    assert report["failed"] == 3
    assert report["samples"] == 8


def test_nothing_scored_is_no_pair_and_no_crash() -> None:
    pairs, report = _rollout(FakePool(TEXTS, [None] * 8))("policy", 0, SPEECHES[:2])
    assert pairs == []
    assert (report["failed"], report["mean_score"]) == (8, 0.0)


def test_every_sample_has_a_seed_of_its_own() -> None:
    """By round, speech and sample; the same again when asked again."""
    asked = []
    for number in (0, 1, 0):
        pool = FakePool(TEXTS, [1.0] * 8)
        _rollout(pool)("policy", number, SPEECHES[:2])
        asked.append(pool.seeds)
    assert asked[0] == asked[2]
    assert len(set(asked[0]) | set(asked[1])) == 16


def test_min_gap_and_the_limit_are_respected() -> None:
    scores: list[float | None] = [5.0, 4.0, 3.5, 1.0, 3.0, 2.9, 2.8, 2.7]
    pairs, _ = _rollout(FakePool(TEXTS, scores), min_gap=0.5, max_pairs_per_speech=2)("policy", 0, SPEECHES[:2])
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one a", "one d"), ("one b", "one c")]
