"""The recipe's rows carry the truth of each speech, the same that the gold win rate is made of."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest

from psycho.nano.grammar import sample_response, sample_speech
from ray_jobs.evaluate import BASELINE, add_gold, gold_of_answers, win_rates


def test_each_comparison_knows_its_true_outcome_and_rating() -> None:
    rng = random.Random(0)
    spoken = [sample_speech(rng) for _ in range(30)]
    speeches = [{"speech_id": f"s{n}", "question": speech.text} for n, speech in enumerate(spoken)]
    answers: dict[str, Any] = {
        name: [SimpleNamespace(text=f" {sample_response(rng, speech, 'any')}\n") for speech in spoken]
        for name in ("base", "sft", BASELINE)
    }
    rows = [
        {"policy": name, "speech_id": s["speech_id"], "outcome": 1.0, "policy_chars": 9, "baseline_chars": 9}
        for name in ("base", "sft")
        for s in speeches
    ]
    known = gold_of_answers(speeches, answers)
    add_gold(rows, known)
    rates = win_rates(rows, speeches, known, 0.5)
    for name in ("base", "sft"):
        own = [row for row in rows if row["policy"] == name]
        assert sum(row["gold_outcome"] for row in own) / 30 == pytest.approx(rates[name]["gold"]["rate"])
        assert sum(row["gold_rating"] for row in own) / 30 == pytest.approx(rates[name]["gold"]["mean_rating"])
    assert len({row["gold_outcome"] for row in rows}) > 1


def test_without_a_truth_the_rows_stay_as_they_are() -> None:
    answers: dict[str, Any] = {name: [SimpleNamespace(text="x")] for name in ("base", BASELINE)}
    assert gold_of_answers([{"speech_id": "s", "question": "A speech of a real person."}], answers) is None
    rows = [{"policy": "base", "speech_id": "s"}]
    add_gold(rows, None)
    assert rows == [{"policy": "base", "speech_id": "s"}]
