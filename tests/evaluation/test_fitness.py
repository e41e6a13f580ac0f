"""Whether the judge is fit: read from its manifest, said first everywhere, and never silently taken for granted."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from psycho import storage
from psycho.evaluation.fitness import headline, read_fitness
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.judging.fitness import Gate, verdict

GATE = {"name": "relevance", "value": 0.125, "target": 0.9, "n": 600, "passed": False}
UNFIT = {"fit": False, "why": "relevance .125 is under .90", "gates": [GATE]}
FIT = {"fit": True, "why": "every gate passed", "gates": [GATE | {"value": 0.96, "passed": True}]}
SENTENCE = "The judge is unfit (relevance .125 is under .90): figures below show the machinery only."


def test_it_is_what_the_judges_manifest_says() -> None:
    assert read_fitness({"judge": {"rows_out": 3, "fitness": UNFIT}}) == UNFIT
    assert read_fitness({"judge": {"fitness": UNFIT | {"gates": [GATE | {"more": 1}]}}})["gates"] == [GATE]


@pytest.mark.parametrize("manifests", [{"judge": {}}, {"judge": {"fitness": None}}, {"evaluate": {}}])
def test_a_judge_that_nobody_checked_is_neither_fit_nor_unfit(manifests: dict[str, Any]) -> None:
    found = read_fitness(manifests)
    assert found == {"fit": None, "why": "not checked", "gates": []}
    assert "was not checked" in headline(found)


def test_without_a_judge_there_is_nothing_to_check() -> None:
    assert "no judge has rated anything yet" in headline(read_fitness({"prepare": {}}))


def test_the_headline_names_the_reason() -> None:
    assert headline(UNFIT) == SENTENCE
    assert headline(FIT) == "The judge is fit: every gate passed."


def test_it_reads_what_the_judging_says() -> None:
    """The verdict of `psycho.judging.fitness`, as the manifest holds it."""
    missed, passed = Gate("relevance", 0.125, 0.9, 600), Gate("relevance", 0.96, 0.9, 600)
    for gates, said in (
        ([missed], "The judge is unfit (relevance 0.12 (must be 0.90), measured on 600 responses): figures below show"),
        ([passed], "The judge is fit: all 1 gates passed, measured on 600 responses."),
        ([], "The judge was not checked against known ratings (600 responses); whether"),
    ):
        found = read_fitness({"judge": {"fitness": verdict(gates, "600 responses")}})
        assert headline(found).startswith(said)
        assert [gate["passed"] for gate in found["gates"]] == [gate.passed for gate in gates]


@pytest.mark.parametrize(
    ("fitness", "said"), [(UNFIT, SENTENCE), (FIT, "The judge is fit"), (None, "The judge was not checked")]
)
@pytest.mark.parametrize("last", ["judge", "evaluate"])
def test_summary_and_report_say_it_first(fake_run: Any, fitness: dict[str, Any] | None, said: str, last: str) -> None:
    fake_run.fitness = fitness
    run = fake_run.finish(last)
    summary = build_summary(run, stage_manifests(run), 60.0, None)
    assert next(iter(json.loads(json.dumps(summary)).items())) == ("headline", summary["headline"])
    assert summary["headline"].startswith(said)
    html = render_report(run, summary)
    body = html[html.index("<h1") :]
    assert re.sub(r"<h1>.*?</h1>", "", body, flags=re.DOTALL).lstrip().startswith("<p class=")
    first = re.search(r"<p[^>]*>(.*?)</p>", body, re.DOTALL)
    assert first and first[1].strip().startswith(said.replace("(", "("))
    assert ("relevance" in html and "0.125" in html) == (fitness is UNFIT)


def test_the_report_lists_the_gates(fake_run: Any) -> None:
    fake_run.fitness = UNFIT
    run = fake_run.finish("judge")
    storage.write_text(run.path("report.html"), "")
    html = render_report(run, build_summary(run, stage_manifests(run), 60.0, None))
    table = html[html.index("<caption>What the judge") :]
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", table[table.index("<tbody>") : table.index("</tbody>")])
    assert cells == ["relevance", "0.125", "0.90", "600", "missed"]
