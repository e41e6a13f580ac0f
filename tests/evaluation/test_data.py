"""The report's part on data: what stages write is shown, what they do not is left out, and pairs are audited."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from psycho import storage
from psycho.evaluation.data import data_context
from psycho.evaluation.report import render_report
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.run import Run

EXTRAS: dict[str, dict[str, Any]] = {
    "prepare": {
        "personal_data": {"name": 31, "phone": 4},
        "languages": {"en": 180, "de": 10},
        "duplicates": {"exact": 3, "near": 8},
        "topics": {"sleep": 90, "<b>grief</b>": 12},
    },
    "generate": {
        "status": {"ok": 750, "truncated": 10},
        "by_model": {
            "warm": {"responses": 380, "tokens": 30_100, "cost": 0.25, "truncated": 4, "refused": 1, "looping": 0},
            "brisk": {"responses": 380, "tokens": 20_400, "cost": 0.0, "truncated": 6, "empty": 2},
        },
        "cost": 0.25,
    },
    "judge": {
        "mode": "panel",
        "status": {"ok": 757, "failed": 3},
        "judges": [
            {
                "model": "first",
                "mode": "evidence",
                "status": {"ok": 758, "failed": 2},
                "retried": 9,
                "floored": 4,
                "output_tokens": 50_100,
            },
            {
                "model": "second",
                "mode": "direct",
                "status": {"ok": 757, "failed": 3},
                "retried": 0,
                "floored": 0,
                "output_tokens": 20_000,
            },
        ],
        "disagreement": 0.4172,
        "evidence": {"relevance": {"quoted": 1200, "unfaithful": 660, "unfaithful_share": 0.55}},
    },
}


def page(run: Run) -> str:
    html = render_report(run, build_summary(run, stage_manifests(run), 60.0, None))
    return re.sub(r"\s+", " ", html[html.index('<h2 id="data">') : html.index('<h2 id="stages">')])


def write(run: Run, extras: dict[str, dict[str, Any]]) -> None:
    for stage, found in extras.items():
        manifest = (run.manifest(stage) or {}) | found
        storage.write_text(run.path("manifests", f"{stage}.json"), json.dumps(manifest))


def test_what_the_stages_counted_is_shown(fake_run: Any) -> None:
    run = fake_run.finish("pair")
    write(run, EXTRAS)
    html = page(run)
    for row in ("name</th><td>31", "en</th><td>180", "near</th><td>8", "sleep</th><td>90", "truncated</th><td>10"):
        assert f'<th scope="row">{row}</td>' in html, row
    assert "&lt;b&gt;grief&lt;/b&gt;" in html
    assert (
        '<th scope="row">brisk</th><td>380</td><td>20,400</td><td>0</td><td>6</td><td>–</td><td>–</td><td>2</td>'
        in html
    )
    assert '<th scope="row">warm</th><td>380</td><td>30,100</td><td>0.25</td>' in html
    assert "cost 0.25" in html
    assert (
        '<th scope="row">first</th><td>evidence</td><td>758</td><td>2</td><td>9</td><td>4</td><td>50,100</td>' in html
    )
    assert '<th scope="row">relevance</th><td>1,200</td><td>660</td><td>55.0 %</td>' in html.replace("\xa0", " ")
    assert "made: mode panel; the judges of the panel lie 0.42 apart (standard deviation)." in html


@pytest.mark.parametrize("stage", EXTRAS)
def test_what_they_did_not_count_is_left_out(fake_run: Any, stage: str) -> None:
    run = fake_run.finish("pair")
    write(run, {name: found for name, found in EXTRAS.items() if name != stage})
    html = page(run)
    captions = {
        "prepare": ("Personal data", "Languages", "Duplicates", "Topics"),
        "generate": ("Responses by how", "Responses by model"),
        "judge": (
            "Ratings by how",
            "Ratings by judge",
            "How the ratings were made",
            "Evidence that the judge invented",
        ),
    }
    for name, texts in captions.items():
        assert all((text in html) is (name != stage) for text in texts), name


def test_empty_counts_give_no_table(fake_run: Any) -> None:
    run = fake_run.finish("pair")
    write(run, {"prepare": {"personal_data": {}, "topics": {}}, "generate": {"by_model": {}, "cost": 0}})
    html = page(run)
    assert "Personal data" not in html and "Responses by model" not in html and "cost" not in html


def test_the_pairs_of_each_split_and_their_shortcuts(fake_run: Any) -> None:
    run = fake_run.finish("pair")
    html = page(run)
    audit = json.loads(storage.read_text(run.path("preferences", "audit.json")) or "{}")
    for split in ("train", "test"):
        assert f'<th scope="row">{split}</th><td>{audit[split]["pairs"]:,}</td>' in html
    for rule in ("the longer response wins", "fitted on the two lengths", "fitted on the first five words"):
        assert f'<th scope="row">{rule}</th>' in html
    accuracy = audit["train"]["shortcuts"]["opening"]["accuracy"]
    assert f"{100 * accuracy:.1f}" in html
    assert f"In {audit['train']['safety']['inverted']:,} train pairs" in html


def test_a_run_of_before_the_audit_still_shows_what_was_left_out(fake_run: Any) -> None:
    run = fake_run.finish("pair")
    storage.remove(run.path("preferences", "audit.json"))
    html = page(run)
    assert "gap under pairs.min_gap" in html and "Shortcuts" not in html and "<figure>" in html  # that of the ratings
    assert data_context(run, build_summary(run, stage_manifests(run), 1.0, None))["pairs"]["gap_svg"] is None
