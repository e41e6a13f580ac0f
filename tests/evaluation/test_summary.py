"""summary.json: exactly the agreed names, partial runs, no secrets."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from psycho.evaluation.summary import build_summary, stage_manifests, write_summary
from psycho.job import Job
from psycho.principles import STEMS
from psycho.run import Run
from psycho.stages import POLICIES

TOP = {"headline", "fitness", "run", "config", "versions", "seconds_total", "peak_rss_gib", "stages", "counts"}
EVALUATION = {"judge", "reward_model", "win_rate", "steps", "best"}
DONE = ("prepare", "generate", "judge", "pair", "train_sft", "train_reward", "train_dpo", "train_online", "evaluate")


def summary_of(run: Run) -> dict[str, Any]:
    return build_summary(run, stage_manifests(run), 12.3, 1.5)


def test_has_exactly_the_agreed_names(fake_run: Any) -> None:
    summary = summary_of(fake_run.finish())
    assert set(summary) == TOP | EVALUATION
    assert tuple(summary["stages"]) == DONE
    stage = {"status", "seconds", "rows_in", "rows_out", "quarantined", "tokens"}
    assert all(set(row) == stage for row in summary["stages"].values())
    assert set(summary["counts"]) == {"speeches", "responses", "ratings", "pairs_train", "pairs_test"}
    assert set(summary["judge"]) == {"pair_agreement_gold", "correlation_gold"}
    assert set(summary["judge"]["correlation_gold"]) == {*STEMS, "overall"}
    reward = {"n", "accuracy", "auc", "ece", "brier", "accuracy_low", "accuracy_high"}
    assert set(summary["reward_model"]) == reward
    assert tuple(summary["win_rate"]) == POLICIES
    policy = {"n", "rate", "low", "high", "length_controlled", "mean_chars", "gold"}
    gold = {"rate", "low", "high", "mean_rating", "on_grammar"}
    for row in summary["win_rate"].values():
        assert set(row) == policy and set(row["gold"]) == gold
    assert set(summary["fitness"]) == {"fit", "why", "gates"}
    paired = {"n", "difference", "low", "high"}
    assert [(step["from"], step["to"]) for step in summary["steps"]] == list(pairwise(POLICIES))
    for step in summary["steps"]:
        assert set(step) == {"from", "to", "win_rate", "gold_win_rate", "gold_mean_rating"}
        assert all(set(step[name]) == paired for name in set(step) - {"from", "to"})
    best = {"policy", "highest", "rate", "not_told_apart", "runner_up"} | paired
    assert set(summary["best"]) == best | {"gold"} and set(summary["best"]["gold"]) == best


def test_steps_say_what_the_rates_say(fake_run: Any) -> None:
    """A step's difference is that of the rates, where every speech was judged; the truth knows every speech."""
    summary = summary_of(fake_run.finish())
    for step in summary["steps"]:
        gold = {side: summary["win_rate"][step[side]]["gold"] for side in ("from", "to")}
        for name, key in (("gold_win_rate", "rate"), ("gold_mean_rating", "mean_rating")):
            assert step[name]["difference"] == pytest.approx(gold["to"][key] - gold["from"][key])
            assert step[name]["n"] == fake_run.evaluation
        assert step["win_rate"]["n"] <= fake_run.evaluation
    assert summary["best"]["rate"] == max(row["rate"] for row in summary["win_rate"].values())


def test_a_run_evaluated_by_an_earlier_psycho_has_steps_by_the_judge_alone(fake_run: Any) -> None:
    fake_run.gold = False
    summary = summary_of(fake_run.finish())
    assert all(set(step) == {"from", "to", "win_rate"} for step in summary["steps"])
    assert "gold" not in summary["best"]


def test_counts_come_from_the_manifests(fake_run: Any) -> None:
    run = fake_run.finish()
    summary = summary_of(run)
    pair = run.manifest("pair")
    assert summary["counts"]["speeches"] == len(fake_run.speeches)
    assert summary["counts"]["responses"] == len(fake_run.responses)
    assert summary["counts"]["ratings"] == len(fake_run.responses) - 3
    assert summary["counts"]["pairs_train"] + summary["counts"]["pairs_test"] == pair["rows_out"]
    assert summary["stages"]["judge"]["quarantined"] == 3
    assert summary["run"] == run.root
    assert summary["config"]["judge"]["model"] == "nano:judge"
    assert summary["versions"] == run.manifest("evaluate")["versions"]


def test_status_is_that_of_this_job(fake_run: Any) -> None:
    run = fake_run.finish()
    known = {"evaluate": run.manifest("evaluate") | {"status": "done"}}
    statuses = {name: row["status"] for name, row in stage_manifests(run, known).items()}
    assert statuses == {name: "done" if name == "evaluate" else "skipped" for name in DONE}


def test_no_gold_outside_the_nano_world(fake_run: Any) -> None:
    fake_run.gold = False
    summary = summary_of(fake_run.finish())
    assert summary["judge"] == {}
    assert all("gold" not in row for row in summary["win_rate"].values())


@pytest.mark.parametrize("last", ["prepare", "judge", "pair", "train_dpo"])
def test_a_partial_run_gives_a_partial_summary(fake_run: Any, last: str) -> None:
    summary = summary_of(fake_run.finish(last))
    assert set(summary) == TOP
    assert tuple(summary["stages"]) == DONE[: DONE.index(last) + 1]
    assert ("pairs_train" in summary["counts"]) == (last in ("pair", "train_dpo"))


def test_a_stale_stage_is_left_out(fake_run: Any) -> None:
    run = fake_run.finish()
    changed = run.config.model_copy(update={"pairs": run.config.pairs.model_copy(update={"min_gap": 2.0})})
    summary = summary_of(Run(changed, run.stages.values()))
    assert set(summary) == TOP
    assert tuple(summary["stages"]) == ("prepare", "generate", "judge", "train_sft")


def test_environment_secrets_are_hidden(fake_run: Any) -> None:
    run = fake_run.run
    env = {"HF_TOKEN": "hf_abc", "OMP_NUM_THREADS": "1"}
    run.config = run.config.model_copy(update={"inference": run.config.inference.model_copy(update={"env": env})})
    config = build_summary(run, {}, 0.0, None)["config"]
    assert config["inference"]["env"] == {"HF_TOKEN": None, "OMP_NUM_THREADS": "1"}
    assert config["judge"]["max_tokens"] == 160


def test_write_summary_writes_what_it_returns(fake_run: Any) -> None:
    run = fake_run.finish()
    job = cast(Job, SimpleNamespace(run=run, manifests={}))
    summary = write_summary(job, 612.345, 3.21)
    with open(run.path("summary.json"), encoding="utf-8") as file:
        assert json.load(file) == json.loads(json.dumps(summary))
    assert (summary["seconds_total"], summary["peak_rss_gib"]) == (612.35, 3.21)


def test_a_rerun_with_nothing_to_do_keeps_time_and_memory(fake_run: Any) -> None:
    run = fake_run.finish()
    manifests = {name: {**(run.manifest(name) or {}), "status": "done"} for name in run.stages}
    write_summary(cast(Job, SimpleNamespace(run=run, manifests=manifests)), 600.0, 9.9)
    skipped = {name: manifest | {"status": "skipped"} for name, manifest in manifests.items()}
    again = write_summary(cast(Job, SimpleNamespace(run=run, manifests=skipped)), 0.4, 0.2)
    assert (again["seconds_total"], again["peak_rss_gib"]) == (600.0, 9.9)
    again = write_summary(
        cast(Job, SimpleNamespace(run=run, manifests=skipped | {"report": manifests["report"]})), 3, 1
    )
    assert (again["seconds_total"], again["peak_rss_gib"]) == (3.0, 1)
