"""Paired differences between steps, and the best policy: right intervals, and no more said than they show."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.evaluation.steps import best_policy, best_sentence, compare, paired_difference, step_sentence, steps

ORDER = ("base", "sft", "dpo", "online")
OUTCOME = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
Rows = list[dict[str, Any]]


def rows(**outcomes: list[float | None]) -> Rows:
    """One row per policy and speech."""
    return [
        {"policy": policy, "speech_id": f"s{n}", "outcome": value}
        for policy, values in outcomes.items()
        for n, value in enumerate(values)
    ]


def flips(n: int, wins: int, losses: int) -> tuple[list[float], list[float]]:
    """Outcomes of two policies that differ on `wins` + `losses` of n speeches."""
    before = [0.0] * wins + [1.0] * losses + [float(i % 2) for i in range(n - wins - losses)]
    return before, [1 - value for value in before[: wins + losses]] + before[wins + losses :]


@settings(deadline=None)
@given(st.lists(st.tuples(OUTCOME, OUTCOME), min_size=2, max_size=30))
def test_the_interval_holds_the_difference_and_turns_round_with_it(pairs):
    before, after = zip(*pairs, strict=True)
    ids = list(range(len(pairs)))
    there, back = paired_difference(before, after, ids, 1.0), paired_difference(after, before, ids, 1.0)
    assert there["difference"] == pytest.approx(np.mean(after) - np.mean(before))
    assert -1 <= there["low"] <= there["difference"] <= there["high"] <= 1
    assert there["low"] < there["high"]
    assert (back["low"], back["high"]) == (pytest.approx(-there["high"]), pytest.approx(-there["low"]))


@pytest.mark.parametrize(("n", "p", "q"), [(30, 0.5, 0.5), (120, 0.6, 0.75), (120, 0.95, 0.98)])
def test_the_interval_covers(n: int, p: float, q: float) -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(600):
        easy = rng.random(n)  # the same for both: what pairing takes out
        own = rng.random((2, n)) < 0.3
        before, after = (np.where(own[i], rng.random(n), easy) < chance for i, chance in enumerate((p, q)))
        found = paired_difference(before, after, np.arange(n), 1.0)
        covered += found["low"] <= q - p <= found["high"]
    assert covered / 600 >= 0.93


def test_pairing_shows_a_gain_that_two_intervals_hide() -> None:
    """Twelve speeches of 120 turn from loss to win, none back; each rate alone is known to nine points or so."""
    before, after = flips(120, 12, 0)
    found = paired_difference(before, after, range(120), 1.0)
    assert found["difference"] == pytest.approx(0.1) and found["low"] > 0.03
    rng = np.random.default_rng(0)
    shuffled = paired_difference(rng.permutation(before), after, range(120), 1.0)
    assert shuffled["low"] < 0


def test_repeated_rows_of_a_speech_count_once() -> None:
    before, after = flips(40, 12, 4)
    one = paired_difference(before, after, range(40), 1.0)
    ids = np.repeat(np.arange(40), 5)
    five = paired_difference(np.repeat(before, 5), np.repeat(after, 5), ids, 1.0)
    assert five["high"] - five["low"] == pytest.approx(one["high"] - one["low"], rel=0.1)


def test_policies_that_never_differ_are_known_to_be_close_and_no_more() -> None:
    found = paired_difference([1.0] * 100, [1.0] * 100, range(100), 1.0)
    assert found["difference"] == 0 and -0.05 < found["low"] < 0 < found["high"] < 0.05
    assert paired_difference([0.0], [1.0], ["a"], 1.0) == {"n": 1, "difference": 1.0, "low": -1.0, "high": 1.0}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="before 2, after 1"):
        paired_difference([1, 0], [1], ["a", "b"])
    with pytest.raises(ValueError, match="not finite"):
        paired_difference([1, float("nan")], [1, 0], ["a", "b"])


def test_only_speeches_that_both_were_judged_on_are_compared() -> None:
    found = compare(rows(base=[0.0, 0.0, None, 1.0], sft=[1.0, None, 1.0, 1.0]), "base", "sft")
    assert found is not None and (found["n"], found["difference"]) == (2, 0.5)
    assert compare(rows(base=[0.0, None], sft=[None, 1.0]), "base", "sft") is None


def test_a_step_is_compared_with_the_policy_before_it() -> None:
    table = rows(base=[0.0] * 20, dpo=[0.5] * 20, online=[1.0] * 20)
    for row in table:
        row |= {"gold_outcome": row["outcome"], "gold_rating": 1 + 4 * row["outcome"]}
    found = steps(table, ORDER)
    assert [(step["from"], step["to"]) for step in found] == [("base", "dpo"), ("dpo", "online")]
    assert all(step["win_rate"] == step["gold_win_rate"] for step in found)
    assert [step["gold_mean_rating"]["difference"] for step in found] == [2.0, 2.0]
    assert all("gold_win_rate" not in step for step in steps(rows(base=[0.0, 1.0], sft=[1.0, 1.0]), ORDER))


def test_a_step_says_whether_it_gained() -> None:
    def said(wins: int, losses: int) -> str:
        before, after = flips(200, wins, losses)
        return step_sentence(steps(rows(sft=before, dpo=after), ORDER)[0])

    assert said(30, 28) == "DPO did not gain on SFT: +.01 [-.07, .09]."
    assert said(60, 10).startswith("DPO gained on SFT: +.25 [")
    assert said(10, 60).startswith("DPO lost against SFT: -.25 [")


def test_a_step_says_where_judge_and_truth_part() -> None:
    (before, after), (low, high) = flips(200, 60, 10), flips(200, 10, 60)
    table = rows(dpo=before, online=after)
    for row, gold in zip(table, low + high, strict=True):
        row |= {"gold_outcome": gold, "gold_rating": 3.0}
    text = step_sentence(steps(table, ORDER)[0])
    assert text.startswith("Online DPO gained on DPO by the judge, +.25 [")
    assert "], but lost against it by the truth, -.25 [" in text and "; true rating +.00 [" in text


def test_a_bound_close_to_nothing_keeps_its_sign() -> None:
    step = {"from": "sft", "to": "dpo", "win_rate": {"n": 9, "difference": 0.05, "low": 0.004, "high": 0.1}}
    assert step_sentence(step) == "DPO gained on SFT: +.050 [.004, .100]."


def test_the_best_is_named_only_where_it_stands_apart() -> None:
    before, after = flips(200, 60, 10)
    found = best_policy(rows(base=[0.0] * 200, sft=after, dpo=before), ORDER)
    assert found is not None
    assert (found["policy"], found["highest"], found["runner_up"], found["not_told_apart"]) == ("sft", "sft", "dpo", [])
    assert found["low"] > 0 and "Best by the judge: SFT" in best_sentence(found) and "over DPO" in best_sentence(found)


def test_two_that_cannot_be_told_apart_are_both_named() -> None:
    before, after = flips(200, 30, 28)
    found = best_policy(rows(base=[0.0] * 200, dpo=before, online=after), ORDER)
    assert found is not None
    assert (found["policy"], found["highest"], found["not_told_apart"]) == (None, "online", ["dpo"])
    text = best_sentence(found)
    assert "online DPO and DPO cannot be told apart" in text and "+.01 [-.07, .09] over DPO, n = 200" in text


def test_a_rival_without_a_shared_speech_is_never_beaten() -> None:
    found = best_policy(rows(sft=[1.0, 1.0, None, None], dpo=[None, None, 0.0, 0.0]), ORDER)
    assert found is not None and found["policy"] is None and found["not_told_apart"] == ["dpo"]
    assert "low" not in found and "SFT and DPO cannot be told apart (SFT: win rate 100 %)" in best_sentence(found)


def test_without_rivals_or_rows_nothing_is_claimed() -> None:
    assert best_policy([], ORDER) is None and steps([], ORDER) == []
    only = best_policy(rows(sft=[1.0, 0.0]), ORDER)
    assert only is not None and best_sentence(only) == "Only SFT was compared, by the judge: win rate 50 %."
