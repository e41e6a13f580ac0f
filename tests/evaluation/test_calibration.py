"""Calibration against slow and obvious versions, and on judges whose faults are known."""

from __future__ import annotations

import io
import random
from itertools import combinations

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import cohen_kappa_score, confusion_matrix

from psycho.evaluation import calibration as module
from psycho.evaluation.calibration import calibration, calibration_table, confusion, rank_correlation, weighted_kappa
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.principles import STEMS, overall


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(module, "BOOTSTRAPS", 60)


def data(speeches=40, per_speech=4, noise=0.5, bias=0.0, seed=0):
    """Human rows and a judge that hears them through noise."""
    rng = random.Random(seed)
    human, judged = [], []
    for s in range(speeches):
        level = rng.uniform(1.5, 4.5)
        for r in range(per_speech):
            ids = {"request_id": f"{s}-{r}", "speech_id": f"s{s}"}
            truth = {stem: min(5, max(1, round(level + rng.gauss(0, 1)))) for stem in STEMS}
            seen = {stem: value + bias + rng.gauss(0, noise) for stem, value in truth.items()}
            whole = {stem: min(5, max(1, round(value))) for stem, value in seen.items()}
            human.append(ids | {"rater": ""} | {f"{stem}_rating": value for stem, value in truth.items()})
            row = ids | {f"{stem}_rating": whole[stem] for stem in STEMS} | {"overall": overall(whole)}
            row |= {f"{stem}_expected": min(5.0, max(1.0, seen[stem])) for stem in STEMS}
            row["expected_overall"] = overall({stem: row[f"{stem}_expected"] for stem in STEMS})
            judged.append(row)
    return human, judged


def test_kappa_and_confusion_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, given = rng.integers(1, 6, 200).astype(float), rng.integers(1, 6, 200).astype(float)
    given[:120] = truth[:120]
    table = confusion(truth, given)
    assert (table == confusion_matrix(truth, given, labels=[1, 2, 3, 4, 5])).all()
    assert weighted_kappa(table) == pytest.approx(cohen_kappa_score(truth, given, weights="quadratic"))


def test_without_spread_there_is_no_kappa_and_no_correlation():
    assert weighted_kappa(confusion(np.full(5, 3.0), np.full(5, 3.0))) is None
    assert rank_correlation(np.full(5, 3.0), np.arange(5.0)) is None
    human, judged = data(5)
    for row in (*human, *judged):
        row["safety_rating"] = 5
    row = calibration(human, judged)["principles"]["safety"]
    assert row["kappa"] is None and row["kappa_low"] is None and row["bias"] == 0
    assert "no spread" in shown(calibration(human, judged))


def shown(result):
    out = io.StringIO()
    Console(file=out, width=160).print(
        calibration_table({"judge": "nano:judge", "left_out": {"no response": 2}} | result)
    )
    return out.getvalue()


def test_a_perfect_judge():
    human, _ = data()
    perfect = [row | {"overall": overall({s: row[f"{s}_rating"] for s in STEMS})} for row in human]
    result = calibration(human, perfect)
    for name, row in result["principles"].items():
        assert row["spearman"] == pytest.approx(1) and row["bias"] == 0 == row["bias_high"]
        assert name == "overall" or (row["kappa"] == 1 and np.trace(row["confusion"]) == result["n"] == 160)
    assert {row["agreement"] for row in result["pairs"]} == {1.0}


def test_a_lenient_judge_has_a_bias_and_keeps_the_order():
    human, judged = data(noise=0.01, bias=0.9)
    result = calibration(human, judged)
    row = result["principles"]["empathy"]
    assert row["bias_low"] > 0.3 and row["kappa"] < 0.9 and row["spearman_expected"] > 0.85
    assert all(r["agreement_expected"] > 0.9 for r in result["pairs"])


def test_intervals_hold_the_figure_and_widen_with_fewer_speeches():
    few, many = (calibration(*data(speeches=n, seed=3)) for n in (10, 160))
    for result in (few, many):
        for name, row in result["principles"].items():
            for figure in ("spearman", "bias") if name == "overall" else ("kappa", "spearman", "bias"):
                assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"]
    width = [r["principles"]["overall"]["bias_high"] - r["principles"]["overall"]["bias_low"] for r in (few, many)]
    assert width[1] < width[0]


def test_intervals_are_clustered_by_speech():
    """The same ratings four times under one speech are one observation, not four."""
    human, judged = data(speeches=30, per_speech=1, seed=1)
    copies = [
        [row | {"request_id": f"{row['request_id']}-{copy}"} for row in rows for copy in range(4)]
        for rows in (human, judged)
    ]
    once, often = calibration(human, judged), calibration(*copies)
    for figure in ("bias", "spearman"):
        one, four = (
            r["principles"]["overall"][f"{figure}_high"] - r["principles"]["overall"][f"{figure}_low"]
            for r in (once, often)
        )
        assert four > 0.7 * one


def test_pairs_by_gap_are_counted_one_by_one():
    human, judged = data(speeches=12, noise=1.0, seed=2)
    result = calibration(human, judged)
    truth = {row["request_id"]: overall({s: row[f"{s}_rating"] for s in STEMS}) for row in human}
    given = {row["request_id"]: row["overall"] for row in judged}
    finer = {row["request_id"]: row["expected_overall"] for row in judged}
    pairs = [(a["request_id"], b["request_id"]) for a, b in combinations(human, 2) if a["speech_id"] == b["speech_id"]]
    assert sum(row["n"] for row in result["pairs"]) == sum(abs(truth[a] - truth[b]) > 1e-9 for a, b in pairs)
    for row in result["pairs"]:
        inside = [
            (a, b) for a, b in pairs
            if max(row["gap"] - 1e-9, 1e-9) < abs(truth[a] - truth[b]) < (row["below"] or 9) - 1e-9
        ]  # fmt: skip
        for name, judge in (("agreement", given), ("agreement_expected", finer)):
            ties = sum(abs(judge[a] - judge[b]) < 1e-9 for a, b in inside)
            right = sum((truth[a] - truth[b]) * (judge[a] - judge[b]) > 1e-9 for a, b in inside)
            assert row["n"] == len(inside) and row[name] == pytest.approx((right + ties / 2) / len(inside))
        assert row["low"] <= row["agreement"] <= row["high"]


def test_several_raters_stand_for_one_and_are_compared_with_each_other():
    human, judged = data()
    second = [row | {"rater": "B"} for row in human]
    twice = calibration([*human, *second], judged)
    once = calibration(human, judged)
    assert twice["n"] == once["n"] and twice["raters"] == 2 and once["raters_kappa"] is None
    assert twice["principles"] == once["principles"]
    assert twice["raters_kappa"]["empathy"] == 1
    shifted = [row | {"rater": "B", "empathy_rating": 6 - row["empathy_rating"]} for row in human]
    assert calibration([*human, *shifted], judged)["raters_kappa"]["empathy"] < 0


def test_what_the_judge_could_not_rate_is_counted_and_never_scored():
    human, judged = data(10)
    result = calibration(human, judged[:-3])
    assert (result["n"], result["unrated"]) == (37, 3)
    assert calibration(human, []) == {
        "n": 0, "unrated": 40, "raters": 1, "speeches": 0, "principles": {}, "pairs": []
    }  # fmt: skip
    text = shown(result)
    assert "37 rated responses to 10 speeches" in text and "2 left out" in text and "empathy" in text


def test_the_report_shows_a_calibration_and_only_then(fake_run):
    import json

    from psycho import storage
    from psycho.stages import CALIBRATION

    run = fake_run.finish()
    page = render_report(run, build_summary(run, stage_manifests(run), 60.0, None))
    assert 'id="calibration"' not in page
    result = {"judge": "nano:judge <b>", "left_out": {}} | calibration(*data())
    storage.write_text(run.path(*CALIBRATION), json.dumps(result))
    page = render_report(run, build_summary(run, stage_manifests(run), 60.0, None))
    assert 'id="calibration"' in page and "nano:judge &lt;b&gt;" in page and 'id="calibration-figure_1"' in page
    assert "160 responses" in page and "ordered as people do" in page


def test_the_table_fits_eighty_columns_and_explains_itself():
    human, judged = data(40)
    result = {"judge": "nano:judge"} | calibration(human, judged)
    for row in result["principles"].values():  # the widest that can be
        row |= {"bias": -1.25, "bias_low": -1.5, "bias_high": -1.125}
        row |= {"spearman": -0.5, "spearman_low": -0.75, "spearman_high": -0.25}
        if row.get("kappa") is not None:
            row |= {"kappa": -0.5, "kappa_low": -0.75, "kappa_high": -0.25}
    out = io.StringIO()
    Console(file=out, width=80).print(calibration_table(result))
    assert max(map(len, out.getvalue().splitlines())) <= 80 and "…" not in out.getvalue()
    assert out.getvalue().count("-1.25 [-1.50, -1.12]") == len(result["principles"])
    text = " ".join(out.getvalue().split())
    assert "weighted κ: agreement beyond chance" in text and "bias: mean rating of the judge less" in text
