"""The judge that is not the scorer: whom it is, what it says of dev answers, and what that cost."""

from __future__ import annotations

from typing import Any

import pytest

from psycho.config import Config
from psycho.errors import BadInput
from psycho.judging.rubric import Rating
from psycho.nano import gold, world
from psycho.principles import STEMS
from psycho.training.online import heldout
from psycho.training.online.engines import Engines
from psycho.training.online.heldout import held_out_model, opinion

JUDGE = {"model": "nano:judge", "template": "compact"}
PLAIN = [{"speech_id": f"s{n}", "question": "My sister does not call any more."} for n in range(3)]


def _config(**other: Any) -> Config:
    return Config.model_validate({"online": {"gold_every": 2}, "pairs": {"dev_share": 0.2}} | other)


def _rows(*texts: str) -> list[dict[str, Any]]:
    return [{"response": text, "output_tokens": 5} for text in texts]


class Judge:
    """Rates by the number in the text; 0 cannot be rated."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self.seeds: list[int] = []

    def rate_counted(self, model: str, judge: Any, items: Any, seeds: Any, reporter: Any) -> list[Any]:
        assert model == "held-out"
        self.items, self.seeds = list(items), list(seeds)
        scores = [int(text[-1]) for _, text, _ in items]
        return [
            (Rating(dict.fromkeys(STEMS, score), dict.fromkeys(STEMS, "")) if score else None, 100) for score in scores
        ]


def _engines(judge: Any) -> Any:
    return Engines(judge, gold=judge, gold_model="held-out")


def test_an_opinion_counts_what_it_rated_and_what_it_cost() -> None:
    judge = Judge()
    config = _config(evaluation={"judge": JUDGE})
    found = opinion(_engines(judge), config, PLAIN, _rows("answer 4", "", "answer 0"))
    assert found == {"gold_score": 4.0, "gold_rated": 1, "gold_failed": 2, "gold_tokens": 200}
    assert [text for _, text, _ in judge.items] == ["answer 4", "answer 0"]
    seeds = judge.seeds
    opinion(_engines(judge), config, PLAIN, _rows("answer 4", "answer 5", "answer 1"))
    assert len(set(judge.seeds)) == 3 and [judge.seeds[0], judge.seeds[2]] == seeds  # by speech, not by place


def test_nothing_rated_is_no_score() -> None:
    found = opinion(_engines(Judge()), _config(evaluation={"judge": JUDGE}), PLAIN[:1], _rows("answer 0"))
    assert (found["gold_score"], found["gold_failed"]) == (None, 1)


def test_the_truth_stands_for_the_judge_in_the_nano_world() -> None:
    config = _config()
    speeches = world.speeches(6, 2, 0)[:3]
    assert held_out_model(config, speeches) == ""
    texts = ["You feel tired.", "", "Cheer up."]
    found = opinion(_engines(None), config, speeches, _rows(*texts))
    parsed = [gold.parse_speech(speech["question"]) for speech in speeches]
    true = [gold.rate(speech, text).overall for speech, text in zip(parsed, texts, strict=True) if speech and text]
    assert found == {
        "gold_score": pytest.approx(sum(true) / 2),
        "gold_rated": 2,
        "gold_failed": 1,
        "gold_tokens": 0,
    }


def test_speeches_without_a_truth_need_a_judge() -> None:
    with pytest.raises(BadInput, match=r"name its model in evaluation.judge.model"):
        held_out_model(_config(), PLAIN)
    assert held_out_model(_config(evaluation={"judge": {"model": "org/other"}}), PLAIN) == "org/other"
    with pytest.raises(BadInput, match=r"the run has none; raise pairs.dev_share"):
        held_out_model(_config(), [])


def test_it_is_asked_before_the_first_round_and_every_so_many_rounds() -> None:
    """And after the last."""
    assert [index for index in range(6) if heldout.due(_config(online={"gold_every": 2, "rounds": 5}), index)] == [
        0,
        2,
        4,
        5,
    ]
    assert not heldout.due(Config(), 0)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"pairs.dev_share is 0"):
        Config.model_validate({"online": {"gold_every": 2}})
    same = {"judge": JUDGE, "evaluation": {"judge": JUDGE}, "online": {"gold_every": 2, "scorer": "judge"}}
    with pytest.raises(ValueError, match=r"evaluation.judge is judge.model itself"):
        _config(**same)
    assert _config(**same | {"online": {"gold_every": 2, "scorer": "reward"}}).online.gold_every == 2
