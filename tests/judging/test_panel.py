"""A panel keeps what its judges said, and leaves out what too few of them could rate."""

from __future__ import annotations

import pyarrow as pa
import pytest

from psycho.config import JudgeConfig, build_config
from psycho.errors import BadInput
from psycho.judging.panel import aggregate, join_panel, judge_report, round_rating, sum_evidence
from psycho.principles import STEMS
from psycho.schema import RATING

IDS = ["a", "b"]


def panel(*weights: float, **settings):
    judges = [{"model": f"judge {n}", "weight": weight} for n, weight in enumerate(weights)]
    return JudgeConfig(mode="panel", panel=judges, **settings)


def vote(request: str, judge: int, rating: int, expected: float | None = None, **more):
    row = {
        "request_id": request, "speech_id": "s", "split": "train", "model": "m", "floored": False, "attempts": 1,
        "prompt_tokens": 10, "output_tokens": 5, "status": "ok", "judge": f"judge {judge}", "prompt_version": "v",
        **{f"{stem}_rating": rating for stem in STEMS},
        **{f"{stem}_expected": float(rating) if expected is None else expected for stem in STEMS},
        **{f"{stem}_evidence": f"judge {judge} on {stem}" for stem in STEMS}, "unfaithful_evidence": [],
    }  # fmt: skip
    return row | more


def test_a_row_holds_the_panels_ratings_and_how_far_they_lie_apart():
    judged = [[vote("a", 0, 5, 4.8)], [vote("a", 1, 2, 2.4)]]
    [row], [left_out] = join_panel(IDS, judged, panel(1, 1))
    assert row["clarity_rating"] == 4 and row["overall"] == 4  # 3.5, a half goes up
    assert [row["clarity_expected"], row["expected_overall"]] == pytest.approx([3.6, 3.6])
    assert row["disagreement"] == pytest.approx(1.5)
    assert row["status"] == "ok" and row["output_tokens"] == 10 and row["judge"] == "mean of judge 0, judge 1"
    assert left_out == {"request_id": "b", "reason": "rated by 0 of 2 judges, the quorum is 2"}
    pa.Table.from_pylist([row], schema=RATING)
    assert set(row) == set(RATING.names)


@pytest.mark.parametrize(("quorum", "kept"), [(None, False), (1, True), (2, False)])
def test_a_row_under_the_quorum_is_left_out(quorum, kept):
    rows, left_out = join_panel(["a"], [[vote("a", 0, 3)], [], []], panel(1, 1, 1, quorum=quorum))
    assert bool(rows) is kept and len(rows) + len(left_out) == 1
    if kept:
        assert rows[0]["status"] == "partial" and rows[0]["disagreement"] == 0 and rows[0]["clarity_rating"] == 3


def test_weights_move_the_mean():
    [row], _ = join_panel(["a"], [[vote("a", 0, 5)], [vote("a", 1, 1)]], panel(3, 1))
    assert row["clarity_rating"] == 4 and row["clarity_expected"] == 4


def test_the_median_is_not_moved_by_one_judge():
    judged = [[vote("a", 0, 4)], [vote("a", 1, 4)], [vote("a", 2, 1)]]
    [row], _ = join_panel(["a"], judged, panel(1, 1, 1, aggregate="median"))
    assert row["clarity_rating"] == 4 and row["clarity_evidence"] == "judge 0 on clarity"


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([1, 5, 3], [1, 1, 1], 3),
        ([1, 5], [1, 1], 3),
        ([1, 5], [1, 2], 5),
        ([5, 1, 4, 2], [1, 1, 1, 1], 3),
        ([2], [7], 2),
    ],
)
def test_the_weighted_median(values, weights, expected):
    assert aggregate(values, weights, "median") == expected


def test_rounding_stays_on_the_scale():
    assert [round_rating(v) for v in (1.0, 2.49, 2.5, 3.5, 5.0)] == [1, 2, 3, 4, 5]


def test_the_evidence_is_of_a_judge_that_invented_none():
    invented = {"unfaithful_evidence": ["safety"], "safety_evidence": None}
    [row], _ = join_panel(["a"], [[vote("a", 0, 3, **invented)], [vote("a", 1, 3)]], panel(1, 1))
    assert row["safety_evidence"] == "judge 1 on safety" and row["unfaithful_evidence"] == []
    [row], _ = join_panel(["a"], [[vote("a", 0, 3, **invented)], [vote("a", 1, 5)]], panel(9, 1))
    assert row["safety_evidence"] is None and row["unfaithful_evidence"] == ["safety"]


def test_invented_evidence_is_counted_by_principle_over_all_judges():
    judge = JudgeConfig(model="m", template="rubric")
    silent = {f"{stem}_evidence": "none" for stem in STEMS}
    invented = vote("a", 0, 3, **silent | {"unfaithful_evidence": ["safety"], "safety_evidence": None})
    quoting = vote("b", 0, 3, **silent | {"safety_evidence": "You are weak."})
    reports = [judge_report(judge, [invented, quoting], []), judge_report(judge, [invented], [])]
    assert reports[0]["evidence"] == {"safety": {"quoted": 2, "unfaithful": 1}}
    assert sum_evidence(reports) == {"safety": {"quoted": 3, "unfaithful": 2, "unfaithful_share": pytest.approx(2 / 3)}}
    off = judge.model_copy(update={"evidence_check": "off"})
    assert sum_evidence([judge_report(off, [quoting], [])]) == {}, "nobody looked, so nothing is claimed"


def test_without_one_judges_probabilities_there_is_no_expected_rating():
    silent = vote("a", 1, 2) | {f"{stem}_expected": None for stem in STEMS}
    [row], _ = join_panel(["a"], [[vote("a", 0, 4)], [silent]], panel(1, 1))
    assert row["clarity_expected"] is None and row["expected_overall"] is None and row["clarity_rating"] == 3


def test_a_report_counts_what_failed_and_why():
    failed = [vote("a", 0, 1, status="truncated", attempts=2), vote("b", 0, 1, status="refused", attempts=2)]
    report = judge_report(JudgeConfig(model="m"), [vote("c", 0, 4, floored=True)], failed)
    assert report["status"] == {"ok": 1, "failed": 2, "truncated": 1, "refused": 1}
    assert (report["retried"], report["floored"], report["output_tokens"]) == (2, 1, 15)


def test_members_are_judges_of_their_own():
    judge = JudgeConfig(
        mode="panel", template="compact", fluency_floor=-7.0, retries=3, gpus_per_worker=2,
        panel=[{"model": "a"}, {"model": "b", "mode": "direct", "template": "rubric", "gpus_per_worker": 0}],
    )  # fmt: skip
    first, second = judge.members()
    assert (first.model, first.mode, first.template, first.gpus_per_worker) == ("a", "evidence", "compact", 2)
    assert (second.model, second.mode, second.template, second.gpus_per_worker) == ("b", "direct", "rubric", 0)
    assert first.fluency_floor is second.fluency_floor is None and first.retries == 3
    assert first.members() == (first,) and JudgeConfig(model="x").members() == (JudgeConfig(model="x"),)


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ({"mode": "panel"}, "list at least two"),
        ({"mode": "panel", "panel": [{"model": "a"}]}, "list at least two"),
        ({"mode": "panel", "panel": [{"model": "a"}, {"model": "b"}], "quorum": 3}, "quorum is 3"),
        ({"panel": [{"modell": "a"}]}, "judge.panel.0.model"),
        ({"mode": "both"}, "judge.mode"),
    ],
)
def test_a_panel_that_cannot_be_is_one_sentence(judge, said):
    with pytest.raises(BadInput, match=said):
        build_config({"judge": judge}, "test")
