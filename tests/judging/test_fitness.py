"""A judge's fitness: planted pairs, the truth of the nano world, and what the gates say of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from psycho.judging.fitness import Gate, truth_gates, verdict
from psycho.judging.probes import HOW, is_probe, probe_gates, probe_rows, probes
from psycho.principles import STEMS


def rated(better: float, worse: float, expected: bool = False) -> list[dict[str, Any]]:
    """Ratings of every planted response: one value for all that are better, one for all that are worse."""
    rows = []
    for row in probe_rows(0):
        value = better if row["model"] == "better" else worse
        written = {f"{stem}_rating": 3 if expected else value for stem in STEMS} | {"overall": 3 if expected else value}
        read = {f"{stem}_expected": value if expected else None for stem in STEMS}
        rows.append(
            {"request_id": row["request_id"], **written, **read, "expected_overall": value if expected else None}
        )
    return rows


def test_every_principle_has_as_many_planted_pairs():
    counts = {stem: sum(probe.principle == stem for probe in probes()) for stem in (*STEMS, "overall")}
    assert set(counts.values()) == {4}
    rows = probe_rows(0)
    assert len({row["request_id"] for row in rows}) == len(rows) and all(map(is_probe, rows))


@pytest.mark.parametrize("expected", [False, True])
def test_planted_pairs_tell_a_fit_judge_from_one_that_sees_nothing_and_one_that_sees_it_upside_down(expected):
    assert [gate.value for gate in probe_gates(rated(4, 2, expected))] == [1.0, 1.0]
    assert [gate.value for gate in probe_gates(rated(3, 3, expected))] == [0.5, 0.5]
    assert [gate.value for gate in probe_gates(rated(1, 2, expected))] == [0.0, 0.0]


def test_a_judge_that_guesses_is_unfit():
    rng = random.Random(0)
    guesses = [
        {
            "request_id": row["request_id"],
            "overall": rng.randint(1, 5),
            **{f"{stem}_rating": rng.randint(1, 5) for stem in STEMS},
        }
        for row in probe_rows(0)
    ]
    assert verdict(probe_gates(guesses), HOW)["fit"] is False


def test_a_pair_without_a_rating_is_not_told_apart():
    assert all(gate.value == 0.5 for gate in probe_gates([]))


def test_one_principle_under_its_gate_makes_a_judge_unfit_and_is_named():
    audit = {"n": 200, "pairs": 90, "pair_agreement_gold": 0.99}
    fine = dict.fromkeys(STEMS, 0.97)
    assert verdict(truth_gates(audit | {"kappa_gold": fine}), "a run")["fit"] is True
    found = verdict(truth_gates(audit | {"kappa_gold": fine | {"relevance": 0.125}}), "a run")
    assert found["fit"] is False
    assert "relevance: kappa with the truth 0.12 (must be 0.80), measured on a run" in found["why"]
    assert [gate["name"] for gate in found["gates"] if not gate["passed"]] == ["relevance: kappa with the truth"]


def test_a_figure_that_is_missing_is_a_missed_gate_and_no_gate_is_not_checked():
    assert verdict([Gate("clarity", None, 0.9, 0)], "nothing")["fit"] is False
    assert verdict([], "no response was rated") == {
        "fit": None, "why": "not checked: no response was rated", "gates": [],
    }  # fmt: skip
