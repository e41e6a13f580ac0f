"""report.html: self-contained, escaped, whole and in parts, accessible."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace
from typing import Any, cast

import pytest

from psycho import storage
from psycho.errors import BadInput
from psycho.evaluation import findings, plots
from psycho.evaluation.report import render_report
from psycho.evaluation.steps import signed, step_sentence
from psycho.evaluation.summary import build_summary, stage_manifests
from psycho.job import Job
from psycho.run import Run
from psycho.stages import POLICIES
from ray_jobs.report import report

SECTIONS = ("summary", "win-rate", "reward-model", "judge", "training", "data", "stages", "examples", "settings")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Every tag with its attributes; fails on tags that do not close."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(run: Run) -> str:
    return render_report(run, build_summary(run, stage_manifests(run), 60.0, None))


def figures(html: str) -> set[str]:
    """Names of the figures in the page, from the ids matplotlib left in them."""
    return set(re.findall(r'<g id="([a-z-]+)-figure_1"', html))


def test_whole_page_holds_every_section_and_figure(fake_run: Any) -> None:
    html = page(fake_run.finish())
    for section in SECTIONS:
        assert f'<h2 id="{section}">' in html
        assert f'href="#{section}"' in html
    assert figures(html) == {
        *(
            "win-rate",
            "reliability",
            "correlation",
            "overall",
            "loss",
            "rewards",
            "rounds",
            "gap",
            "length",
            "who",
            "ratings",
        )
    }
    assert "never faces clients alone" in html
    assert "drafts that a" in html
    assert "gap under pairs.min_gap" in html
    assert "nano:reference" in html
    assert html.count("<summary>Comparison") == 3


def test_page_needs_nothing_from_outside(fake_run: Any) -> None:
    found = Page(page(fake_run.finish()))
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    for _, attributes in found.tags:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    styles = "".join(str(attributes.get("style")) for _, attributes in found.tags)
    assert "@import" not in styles and not re.search(r"url\((?!#)", styles)


def test_text_is_escaped(fake_run: Any) -> None:
    html = page(fake_run.finish())
    assert "<script" not in html
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in html
    assert "<i>it will pass" not in html and "&lt;i&gt;it will pass&lt;/i&gt; &amp; I feel stuck" in html


def test_page_is_accessible(fake_run: Any) -> None:
    found = Page(page(fake_run.finish()))
    assert found.of("html")[0]["lang"] == "en"
    assert all(svg["role"] == "img" and len(svg["aria-label"] or "") > 20 for svg in found.of("svg"))
    assert all(th.get("scope") in ("col", "row") for th in found.of("th"))
    assert len(found.of("caption")) == len(found.of("table"))
    assert len(found.of("figcaption")) == len(found.of("figure")) == len(found.of("svg"))
    assert len(found.of("h1")) == 1
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_figures_follow_the_colours_of_the_page(fake_run: Any) -> None:
    html = page(fake_run.finish())
    body = html[html.index("<body>") :]
    assert "prefers-color-scheme: dark" in html
    assert "var(--one)" in body and "var(--ink)" in body
    assert not any(colour in body for colour in (plots.INK, plots.MUTED, plots.GRID, plots.JUDGE))


@pytest.mark.parametrize(
    ("last", "there"),
    [
        ("prepare", set()),
        ("judge", {"ratings"}),
        ("pair", {"ratings", "gap", "length", "who"}),
        ("train_dpo", {"ratings", "gap", "length", "who", "loss", "rewards"}),
    ],
)
def test_a_partial_run_gives_a_partial_page(fake_run: Any, last: str, there: set[str]) -> None:
    html = page(fake_run.finish(last))
    Page(html)
    assert figures(html) == there
    assert '<h2 id="win-rate">' not in html and '<h2 id="examples">' not in html
    assert '<h2 id="data">' in html and '<h2 id="stages">' in html


def test_a_run_without_anything_still_renders(fake_run: Any) -> None:
    html = page(fake_run.run)
    Page(html)
    assert "This run holds nothing yet." in html


def test_without_gold_the_page_does_not_speak_of_it(fake_run: Any) -> None:
    fake_run.gold = False
    html = page(fake_run.finish())
    assert "correlation" not in figures(html)
    assert "by the truth" not in html and "truth (gold)" not in html and "true rating" not in html.lower()


def test_model_names_are_text_in_figures() -> None:
    """Neither markup nor mathematics: `$` would otherwise be read as TeX and fail."""
    history = [{"loss": 0.7, "reward_chosen": 0.1, "reward_rejected": -0.1}] * 3
    svg = plots.loss_curves({"<b>$\\frac{": history})
    assert "&lt;b&gt;$\\frac{" in svg and "<b>" not in svg


def test_a_long_training_is_thinned_out() -> None:
    short = plots.loss_curves({"sft": [{"loss": 1 / (1 + step)} for step in range(300)]})
    long = plots.loss_curves({"sft": [{"loss": 1 / (1 + step)} for step in range(30_000)]})
    assert len(long) < 1.5 * len(short)


def test_the_same_run_gives_the_same_page(fake_run: Any) -> None:
    run = fake_run.finish()
    assert page(run) == page(run)


def test_warnings_name_what_went_wrong(fake_run: Any) -> None:
    run = fake_run.finish()
    summary = build_summary(run, stage_manifests(run), 60.0, None)
    gain = {"n": 500, "difference": 0.2, "low": 0.1, "high": 0.3}
    summary["steps"] = [{"from": "sft", "to": "dpo", "win_rate": gain, "gold_win_rate": gain}]
    base = summary["win_rate"]["base"]
    for row in summary["win_rate"].values():
        row |= {"n": 500, "mean_chars": base["mean_chars"]}
        row["gold"] |= {"rate": row["rate"], "on_grammar": 1.0}
    assert findings.warnings(run.config, summary, 0.5, {"dpo": [{"reward_chosen": 0.2}]}) == []
    row = summary["win_rate"]["online"]
    row |= {"n": 20, "mean_chars": 2 * base["mean_chars"]}
    row["gold"] |= {"rate": row["rate"] - 0.3, "on_grammar": 0.5}
    summary["steps"][0]["gold_win_rate"] = gain | {"low": -0.1}
    found = findings.warnings(run.config, summary, 0.9, {"dpo": [{"reward_chosen": -0.2}]})
    words = ("but did not gain on it by the truth", "Only 20", "grew", "over-optimisation", "well-formed",
             "In dpo the reward", "prefers a place")  # fmt: skip
    assert len(found) == len(words)
    assert all(word in sentence for word, sentence in zip(words, found, strict=True))


def test_drift_of_a_policy_that_is_not_the_best_is_said_too(fake_run: Any) -> None:
    run = fake_run.finish()
    summary = build_summary(run, stage_manifests(run), 60.0, None)
    summary["win_rate"]["sft"]["gold"]["on_grammar"] = 0.4
    assert any("40.0" in text and "SFT" in text for text in findings.warnings(run.config, summary, None, {}))


def test_a_log_probability_below_nothing_is_no_warning(fake_run: Any) -> None:
    """Losses without a reference show log-probabilities, which are always below 0."""
    dpo = fake_run.run.config.training.dpo.model_copy(update={"loss": "simpo"})
    training = fake_run.run.config.training.model_copy(update={"dpo": dpo})
    config = fake_run.run.config.model_copy(update={"training": training})
    histories = {"dpo": [{"reward_chosen": -0.2}], "online": [{"reward_chosen": -0.2}]}
    found = findings.warnings(config, {"win_rate": {}}, None, histories)
    assert len(found) == 1 and "In online the reward" in found[0]


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(0.55, 0.8, "better than"), (0.2, 0.4, "worse than"), (0.4, 0.6, "not clearly")]
)
def test_story_says_no_more_than_the_interval(fake_run: Any, low: float, high: float, verdict: str) -> None:
    run = fake_run.finish()
    summary = build_summary(run, stage_manifests(run), 60.0, None)
    summary["win_rate"]["online"] |= {"low": low, "high": high}
    assert verdict in findings.story(run.config, summary)[1]


def test_the_page_is_about_the_best_policy_not_the_last(fake_run: Any) -> None:
    run = fake_run.finish()
    summary = build_summary(run, stage_manifests(run), 60.0, None)
    summary["best"] |= {"policy": "sft", "highest": "sft", "runner_up": "online", "not_told_apart": []}
    html = render_report(run, summary)
    assert "win rate of SFT" in html and "Best by the judge: SFT" in html
    assert "comparisons of SFT with the baseline" in html
    summary["best"] |= {"policy": None, "not_told_apart": ["dpo"]}
    assert "SFT and DPO cannot be told apart" in render_report(run, summary)


def test_every_step_is_on_the_page_in_words_and_figures(fake_run: Any) -> None:
    run = fake_run.finish()
    html = page(run)
    section = html[html.index("Did each step gain?") : html.index('<h2 id="reward-model">')]
    for step in build_summary(run, stage_manifests(run), 60.0, None)["steps"]:
        assert step_sentence(step) in section
        for figure in ("win_rate", "gold_win_rate", "gold_mean_rating"):
            assert f"{signed(step[figure])}<small>n = {step[figure]['n']}</small>" in section
    # a figure of the truth is over all speeches, also those that the judge failed at
    assert f"{html[html.index('true win rate') :].split('n = ')[1][:3]}" == str(fake_run.evaluation)


def test_recipe_writes_the_page_as_a_stage(fake_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run.finish()
    manifests: dict[str, Any] = {}
    said: list[str] = []

    def stage(name: str, body: Any) -> None:
        manifests[name] = run.execute(name, body)

    job = SimpleNamespace(
        run=run, config=run.config, manifests=manifests, stage=stage, progress=SimpleNamespace(say=said.append)
    )
    report(cast(Job, job))
    report(cast(Job, job))
    with open(run.path("report.html"), encoding="utf-8") as file:
        html = file.read()
    assert all(policy in html for policy in POLICIES)
    assert run.is_done("report") and manifests["report"]["status"] == "skipped"
    told = "".join(said) + "".join(capsys.readouterr())
    assert "stuck" not in told and "hard" not in told


def told_report(run: Run) -> tuple[dict[str, Any], list[str]]:
    """The recipe on a run folder: the manifests of stages it ran, and what it said."""
    manifests: dict[str, Any] = {}
    said: list[str] = []

    def stage(name: str, body: Any) -> None:
        manifests[name] = run.execute(name, body)

    job = SimpleNamespace(
        run=run, config=run.config, manifests={}, stage=stage, progress=SimpleNamespace(say=said.append)
    )
    report(cast(Job, job))
    return manifests, said


def test_recipe_writes_a_page_of_a_run_that_has_only_data(fake_run: Any) -> None:
    run = fake_run.finish("pair")
    storage.write_text(run.path("manifests", "report.json"), json.dumps({"key": run.key("report")}))
    manifests, said = told_report(run)
    html = storage.read_text(run.path("report.html")) or ""
    Page(html)
    assert figures(html) == {"ratings", "gap", "length", "who"}
    assert "Not done, and so not in this report: train_sft, train_reward, train_dpo, train_online, evaluate" in html
    assert html.count("not done yet") == 5 and "No model has been trained yet." in html
    assert "practice world" in html
    assert manifests == {} and run.why_not_done("report") == "not done yet"  # the whole page is still to come
    assert said == [f"report: of a run without evaluate -> {run.path('report.html')}"]
    run = fake_run.finish()
    told_report(run)
    assert "Not done" not in (storage.read_text(run.path("report.html")) or "") and run.is_done("report")


def test_recipe_refuses_a_run_that_holds_nothing(fake_run: Any) -> None:
    with pytest.raises(BadInput, match=r"nothing is done in .*; run the pipeline first"):
        told_report(fake_run.run)
    assert not storage.exists(fake_run.run.path("report.html"))


def test_a_stale_stage_is_named_with_its_reason(fake_run: Any) -> None:
    run = fake_run.finish()
    changed = run.config.model_copy(update={"pairs": run.config.pairs.model_copy(update={"min_gap": 2.0})})
    html = page(Run(changed, run.stages.values()))
    assert "Not done, and so not in this report: pair, train_reward, train_dpo, train_online, evaluate" in html
    assert html.count("<td>its settings or inputs changed</td>") == 5


def cells(html: str) -> list[list[str]]:
    """The text of the table of online rounds, row by row."""
    table = html[html.index("<caption>Each round") :]
    rows = table[table.index("<tbody>") : table.index("</tbody>")].split("</tr>")[:-1]
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    heads = table[: table.index("<tbody>")].count('scope="col"')
    assert all(len(row) == heads <= 10 for row in found)
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in found]


def test_a_run_of_one_round_has_the_table_and_no_plot(fake_run: Any) -> None:
    run = fake_run.finish()
    file = run.path("models", "online", "rounds.json")
    storage.write_text(file, json.dumps(json.loads(storage.read_text(file) or "")[1:2]))
    for name in ("sft", "reward", "dpo", "online"):  # no step whose figures are finite: no curve either
        storage.remove(run.path("models", name, "training.jsonl"))
    html = page(run)
    Page(html)
    assert "rounds" not in figures(html)
    [row] = cells(html)
    assert row[0] == "2 kept" and row[6:9] == ["0.40 1.50", "4.90", "3e-06"]


def test_online_rounds_say_which_policy_was_kept_and_draw_what_was_watched(fake_run: Any) -> None:
    html = page(fake_run.finish())
    assert "The policy after round 2 was kept" in html and "The policy after round 3" not in html
    old, kept, last = cells(html)
    assert old == ["1", "–", "1,600", "280", "3.40", "212", "–", "–", "–", "–"]
    assert kept == [
        "2 kept", "0", "1,600 1 unscored 3 too unsafe 4 cut off", "292 12 % ties 5 too long",
        "3.70 0.42", "243", "0.40 1.50", "4.90", "3e-06", "41",
    ]  # fmt: skip
    assert last[:2] == ["3", "1"] and last[7:] == ["3.90", "6e-06", "42"]
    drawn = html[html.index('id="rounds-figure_1"') :]
    assert all(word in drawn for word in ("dev, after the round", "to the first policy", "best of a speech", "entropy"))
    assert all(word in drawn for word in ("speeches that tie", "unsafe samples", "samples cut off"))


def test_online_rounds_show_what_the_held_out_judge_said(fake_run: Any) -> None:
    run = fake_run.finish()
    assert "held-out judge" not in page(run)
    file = run.path("models", "online", "rounds.json")
    rounds = json.loads(storage.read_text(file) or "")
    rounds[0]["before"] = {"dev_score": 3.5, "gold_score": 3.25}
    rounds[1] |= {"gold_score": 2.75, "gold_rated": 40, "gold_failed": 0, "gold_tokens": 9000}
    storage.write_text(file, json.dumps(rounds))
    html = page(run)
    assert "before the first round they had 3.25" in html and "The truth of the practice world rates" in html
    assert [row[7] for row in cells(html)] == ["– –", "4.90 2.75", "3.90 –"]
    assert "held-out judge, 1 to 5" in html[html.index('id="rounds-figure_1"') :]
