"""The rollout of online DPO with pools that answer from a table, and the pairs it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from psycho.config import Config, JudgeConfig, OnlineConfig
from psycho.inference.worker import Completion
from psycho.judging.rubric import Rating
from psycho.principles import STEMS
from psycho.training.online.drawn import Drawn
from psycho.training.online.engines import Engines
from psycho.training.online.rollout import Rollout, Sampled
from psycho.training.online.watch import mean_value
from tests.training.online_pools import ScoringPool, in_chunks

SPEECHES = [{"speech_id": f"s{number}", "question": f"Question {number}?"} for number in range(40)]


class FakePool(ScoringPool):
    """Answers from tables, and remembers what it was asked."""

    def __init__(self, texts: list[str], scores: list[float | None]) -> None:
        self.texts, self.scores = texts, scores
        self.seeds: list[int] = []
        self.prompts: list[Any] = []
        self.policies: list[str] = []
        self.scored: list[str] = []
        self.items: list[Any] = []

    def sample(
        self, policy: str, prompts: Any, seeds: Any, sampling: Any, reporter: Any, also: Any
    ) -> list[Completion]:
        self.policies.append(policy)
        self.prompts, self.seeds = list(prompts), list(seeds)
        answers = [
            Completion(error="prompt is too long") if text == "ERROR" else Completion(text=text, output_tokens=7)
            for text in self.texts
        ]
        return in_chunks(answers, also)

    def classify(self, model: str, conversations: Any) -> list[list[float] | None]:
        assert model == "scorer"
        texts = [talk[-1]["content"] for talk in conversations]
        self.scored += texts
        assert all(talk[-1]["role"] == "assistant" and talk[:-1] in self.prompts for talk in conversations)
        found = [self.scores[self._place(text)] for text in texts]
        return [None if score is None else [score] for score in found]

    def rate(self, model: str, judge: Any, items: Any, seeds: Any) -> list[Rating | None]:
        assert model == "scorer"
        self.items += items
        self.scored += [text for _, text, _ in items]
        assert set(seeds) <= set(self.seeds)
        found = [self.scores[self._place(text)] for _, text, _ in items]
        return [None if s is None else Rating(dict.fromkeys(STEMS, int(s)), dict.fromkeys(STEMS, "")) for s in found]

    def _place(self, text: str) -> int:
        return [known.strip() for known in self.texts].index(text)


def _rollout(pool: FakePool, **online: Any) -> Rollout:
    config = Config(seed=3, judge=JudgeConfig(), online=OnlineConfig(samples_per_speech=4, **online))
    engines: Any = Engines(
        pool,  # type: ignore[arg-type]
        pool if config.online.rewarded else None,  # type: ignore[arg-type]
        pool if config.online.judged else None,  # type: ignore[arg-type]
        "scorer",
        "scorer",
    )
    return Rollout(engines, config)


def _round(rollout: Rollout, number: int = 0) -> tuple[list[Any], dict[str, Any]]:
    found: Sampled = rollout("policy", number, SPEECHES[:2])
    return found.pairs, found.report


TEXTS = ["one a", " one b ", "one c", "one d", "two a", "two b", "two c", "two d"]


def test_best_and_worst_of_each_speech_are_paired() -> None:
    pool = FakePool(TEXTS, [1.0, 4.0, 2.0, 3.0, 2.0, 2.5, 5.0, 2.0])
    pairs, report = _round(_rollout(pool), 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one b", "one a"), ("two c", "two d")]
    assert [json.loads(pair["messages"])[-1]["content"] for pair in pairs] == ["Question 0?", "Question 1?"]
    assert len({pair["id"] for pair in pairs}) == 2
    assert pool.policies == ["policy"]
    assert report.pop("seconds").keys() == {"sampling", "scoring"}
    assert report == {
        "round": 0,
        "samples": 8,
        "pairs": 2,
        "failed": 0,
        "mean_score": pytest.approx(21.5 / 8),
        "best_score": pytest.approx(4.5),
        "spread": pytest.approx((1.25**0.5 + 1.546875**0.5) / 2),
        "ties": 0.0,
        "floor_hits": 0,
        "mean_chars": pytest.approx(5.0),
        "sampled_tokens": 56,
        "judge_tokens": 0,
        "truncated": 0,
        "left_out": [],
    }


def test_scores_are_never_compared_across_speeches() -> None:
    """A speech whose samples all tie gives no pair, though another's are better and worse."""
    pairs, _ = _round(_rollout(FakePool(TEXTS, [3.0, 3.0, 3.0, 3.0, 5.0, 1.0, 3.0, 3.0])), 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("two a", "two b")]


@pytest.mark.parametrize("scorer", ["reward", "judge"])
def test_a_missing_score_leaves_its_sample_out(scorer: str) -> None:
    """Never a default: the best and the worst of the others are paired, and the failure is counted."""
    pool = FakePool(TEXTS, [None, 4.0, 2.0, 3.0, 2.0, 4.0, None, 1.0])
    pairs, report = _round(_rollout(pool, scorer=scorer), 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one b", "one c"), ("two b", "two d")]
    assert report["failed"] == 2
    assert [row["reason"] for row in report["left_out"]] == ["no score"] * 2
    assert report["mean_score"] == pytest.approx(16 / 6)


def test_a_score_that_is_no_number_is_none() -> None:
    """It would be better than nothing and worse than nothing, and the order of the others chance."""
    nan = float("nan")
    pairs, report = _round(_rollout(FakePool(TEXTS, [nan, 4.0, 2.0, 3.0, 2.0, nan, float("inf"), 1.0])))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one b", "one c"), ("two a", "two d")]
    assert report["failed"] == 3 and report["mean_score"] == pytest.approx(12 / 5)


def test_a_strategy_that_draws_draws_for_each_speech_and_round() -> None:
    """Not by the place of the best sample alone, which would take the same ranks everywhere."""
    drawn = set()
    for number in range(20):
        scores: list[float | None] = [4.0, 3.0, 2.0, 1.0]
        pairs, _ = _round(_rollout(FakePool(TEXTS, scores * 2), strategy="best_random"), number)
        drawn.add(tuple(pair["rejected"][-1] for pair in pairs))
    assert {own for both in drawn for own in both} == set("bcd") and len(drawn) > 5


@pytest.mark.parametrize("scorer", ["reward", "judge"])
def test_an_empty_text_is_not_scored_and_shifts_nothing(scorer: str) -> None:
    """The scorer sees only what there is; what it says must land on the right sample."""
    texts = ["", "one b", "  ", "one d", "two a", "ERROR", "two c", "two d"]
    pool = FakePool(texts, [5.0, 1.0, 5.0, 4.0, 2.0, 5.0, 5.0, 3.0])
    pool.texts[5] = "ERROR"
    pairs, report = _round(_rollout(pool, scorer=scorer), 0)
    assert sorted(pool.scored) == ["one b", "one d", "two a", "two c", "two d"]
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one d", "one b"), ("two c", "two a")]
    assert report["failed"] == 3
    assert report["samples"] == 8
    silent = "the policy said nothing"
    assert [(row["speech_id"], row["sample"], row["reason"]) for row in report["left_out"]] == [
        ("s0", 0, silent), ("s0", 2, silent), ("s1", 1, "prompt is too long"),
    ]  # fmt: skip


def test_the_judge_sees_each_response_with_its_own_speech() -> None:
    pool = FakePool(TEXTS, [1.0] * 8)
    speeches = [SPEECHES[0], SPEECHES[1] | {"history": "[]"}]
    _rollout(pool, scorer="judge")("policy", 0, speeches)
    assert [(question, history) for question, _, history in pool.items] == [("Question 0?", None)] * 4 + [
        ("Question 1?", "[]")
    ] * 4


def test_nothing_scored_is_no_pair_and_no_crash() -> None:
    pairs, report = _round(_rollout(FakePool(TEXTS, [None] * 8)), 0)
    assert pairs == []
    assert (report["failed"], report["mean_score"]) == (8, 0.0)


def test_one_score_alone_is_no_tie() -> None:
    _, report = _round(_rollout(FakePool(TEXTS, [3.0, None, None, None, 2.0, 2.0, None, None])))
    assert report["ties"] == 0.5


def test_every_sample_has_a_seed_of_its_own() -> None:
    """By round, speech and sample; the same again when asked again."""
    asked = []
    for number in (0, 1, 0):
        pool = FakePool(TEXTS, [1.0] * 8)
        _round(_rollout(pool), number)
        asked.append(pool.seeds)
    assert asked[0] == asked[2]
    assert len(set(asked[0]) | set(asked[1])) == 16


def test_min_gap_and_the_limit_are_respected() -> None:
    scores: list[float | None] = [5.0, 4.0, 3.5, 1.0, 3.0, 2.9, 2.8, 2.7]
    pairs, _ = _round(_rollout(FakePool(TEXTS, scores), min_gap=0.5, max_pairs_per_speech=2), 0)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("one a", "one d"), ("one b", "one c")]


def test_a_mixture_is_the_weighted_sum_and_needs_both_parts() -> None:
    pool = FakePool(TEXTS, [1.0, 4.0, 2.0, 3.0, 2.0, 4.0, None, 1.0])
    found = _rollout(pool, scorer="mixture", reward_weight=2.0, judge_weight=0.5)("policy", 0, SPEECHES[:2])
    assert [row["score"] for row in found.samples] == [2.5, 10.0, 5.0, 7.5, 5.0, 10.0, None, 2.5]
    assert [row["reward"] for row in found.samples[:2]] == [row["overall"] for row in found.samples[:2]] == [1.0, 4.0]


def test_the_longer_of_two_as_good_is_rejected_under_a_length_penalty() -> None:
    """And what is reported is the score, not what pairs are made by."""
    texts = ["short", "long " * 40, "one", "two", "two a", "two b", "two c", "two d"]
    scores: list[float | None] = [4.0, 4.5, 3.9, 3.9, 1.0, 1.0, 1.0, 1.0]
    pairs, report = _round(_rollout(FakePool(texts, scores), length_penalty=1.0, length_free_chars=20))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("short", ("long " * 40).strip())]
    assert report["mean_score"] == pytest.approx(sum(filter(None, scores)) / 8)
    assert report["ties"] == 0.5


def test_the_judges_safety_keeps_a_response_from_being_chosen() -> None:
    pool = FakePool(TEXTS, [1.0, 2.0, 2.0, 2.0, 5.0, 4.0, 3.0, 3.0])  # every principle is rated alike
    pairs, report = _round(_rollout(pool, scorer="judge", safety_floor=3))
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [("two a", "two d")]
    assert report["floor_hits"] == 4


def test_what_an_engine_refused_is_not_the_policys_silence() -> None:
    """A speech that is too long for it: the policy is not blamed, and the quarantine says why."""
    scores = [3.0, 1.0]
    assert mean_value(_rollout(FakePool(["ERROR", "two a"], scores)).dev("policy", SPEECHES[:2])) == 1.0
    refused = _rollout(FakePool(["ERROR", *TEXTS[1:]], [1.0] * 8))
    assert [row["reason"] for row in _round(refused)[1]["left_out"]] == ["prompt is too long"]
    silent = _rollout(FakePool(["one a", "", "two a"], [3.0, 9.0, 1.0]))
    assert mean_value(silent.dev("policy", SPEECHES[:3])) == pytest.approx(5.0 / 3)


def test_answers_that_were_kept_are_not_lost_to_a_later_try(tmp_path: Path) -> None:
    """Which begins with the same place where that one failed."""
    drawn = Drawn(str(tmp_path))
    for good in ((1, 2, 3), (4, 5, 6)):
        failed, answered = [Completion(error="no")], [Completion(text=str(place), output_tokens=1) for place in good]
        drawn.keep([0, *good], failed + answered)
    assert {place: answer.text for place, answer in drawn.known().items()} == {n: str(n) for n in range(1, 7)}


def test_dev_speeches_have_the_same_seeds_every_time() -> None:
    pool = FakePool(["one a", "two a"], [1.0, 4.0])
    rollout = _rollout(pool)
    first, seeds = rollout.dev("policy", SPEECHES[:2]), list(pool.seeds)
    assert first == rollout.dev("later", SPEECHES[:2])
    assert mean_value(first) == 2.5
    assert pool.seeds == seeds and len(set(seeds)) == 2
