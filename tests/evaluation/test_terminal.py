"""What the pipeline prints at its end: first the judge's fitness, tables in 80 columns, each column explained."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.evaluation.terminal import show_results
from psycho.judging.fitness import Gate
from psycho.stages import POLICIES
from ray_jobs.nano import gates_table

UNFIT = {"fit": False, "why": "relevance .125 is under .90", "gates": []}


def printed(fake_run: Any, last: str = "evaluate", terminal: bool = False) -> str:
    run = fake_run.finish(last)
    file = io.StringIO()
    console = Console(width=80, file=file, force_terminal=terminal, no_color=True, highlight=False)
    show_results(console, build_summary(run, stage_manifests(run), 60.0, None))
    return file.getvalue()


def test_the_first_line_says_whether_the_judge_is_fit(fake_run: Any) -> None:
    fake_run.fitness = UNFIT
    text = " ".join(printed(fake_run).split())
    assert text.startswith("The judge is unfit (relevance .125 is under .90): figures below show the machinery only.")


@pytest.mark.parametrize("gold", [True, False])
def test_it_fits_eighty_columns_and_cuts_nothing(fake_run: Any, gold: bool) -> None:
    fake_run.gold = gold
    text = printed(fake_run)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    run = fake_run.run
    rates = build_summary(run, stage_manifests(run), 60.0, None)["win_rate"]
    for policy in POLICIES:
        row = rates[policy]
        found = next(line for line in text.splitlines() if line.split()[:1] == [policy])
        assert f"{100 * row['rate']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]" in found
    assert "AUC" in text and "ECE" in text and ("93.0 %" in text) == gold


def test_every_column_is_explained(fake_run: Any) -> None:
    text = printed(fake_run)
    legend = text[text.index("win rate:") :]
    for column in ("win rate:", "equal length:", "truth (gold):", "well-formed (on grammar):", "chars:"):
        assert column in legend
    assert "nano:reference" in legend


def test_without_truth_there_is_no_word_of_it(fake_run: Any) -> None:
    fake_run.gold = False
    text = printed(fake_run)
    assert "truth" not in text and "well-" not in text and "equal" in text


def test_every_step_and_the_best_are_said(fake_run: Any) -> None:
    text = " ".join(printed(fake_run).split())
    for words in ("SFT gained on the model before training: +", "DPO", "Online DPO", "by the judge: online DPO"):
        assert words in text
    assert "by the truth: online DPO" in text


@pytest.mark.parametrize("last", ["prepare", "pair", "train_dpo"])
def test_a_run_without_an_evaluation_says_so(fake_run: Any, last: str) -> None:
    assert "No policy has been compared with the baseline yet." in " ".join(printed(fake_run, last).split())


def test_the_gates_of_the_nano_world_fit_eighty_columns_and_are_explained() -> None:
    file = io.StringIO()
    gates = [
        Gate("judge on the policies' samples, rated as the truth: exploration", 0.91, 0.9, 600),
        Gate("judge on grammar, 10 % corrupted: relevance", None, 0.9, 600),
    ]
    Console(width=80, file=file).print(gates_table(gates, "nano world, held-out combinations"))
    assert max(map(len, file.getvalue().splitlines())) <= 80 and "…" not in file.getvalue()
    text = " ".join(file.getvalue().split())
    assert "on grammar: text that the grammar could have written" in text and "truth (gold):" in text
