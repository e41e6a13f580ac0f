"""`report.html`: what a run did and how well, as one self-contained page that a counsellor can read.

Everything is read from the run folder, and only from stages that the summary names, so that a partial run gives a
partial report and a stale result never shows. Client text stands in the page and nowhere else.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from psycho import storage
from psycho.config import Config
from psycho.evaluation import captions, findings, plots
from psycho.evaluation.data import data_context
from psycho.evaluation.steps import NAMES, signed, step_sentence
from psycho.evaluation.summary import read_evaluation
from psycho.principles import PRINCIPLES, STEMS
from psycho.run import Run
from psycho.stages import CALIBRATION, POLICIES, evaluation_judge, starts_from_pairs
from psycho.training.launch import read_history

Summary = Mapping[str, Any]
Context = dict[str, Any]
EXAMPLES = 3


def render_report(run: Run, summary: Summary) -> str:
    """The page as HTML; `summary` is that of `summary.build_summary`."""
    rates = read_evaluation(run, "win_rate") if "evaluate" in summary["stages"] else {}
    histories = _histories(run, summary)
    preferences = {name: rows for name, rows in histories.items() if rows and "reward_chosen" in rows[0]}
    first_place = rates.get("first_place_rate")
    return _template().render(
        name=run.config.name,
        summary=summary,
        written=_last_entry(run),
        missing=_missing(run, summary),
        story=findings.story(run.config, summary),
        warnings=findings.warnings(run.config, summary, first_place, preferences),
        limits=findings.limits(run.config, summary),
        headline=findings.headline_policy(summary),
        nano=findings.is_nano(summary),
        labels=findings.LABELS,
        names=NAMES,
        steps=[{"row": step, "said": step_sentence(step)} for step in summary.get("steps", [])],
        compared_by=evaluation_judge(run.config).model,
        from_pairs=starts_from_pairs(run.config),
        principles=PRINCIPLES,
        config=run.config,
        win=_win_rate(rates, first_place),
        reward=_reward_model(run, summary),
        judge=_judge(run, summary),
        calibration=_calibration(run),
        training=_training(run.config, histories, preferences),
        online=_online(run, summary),
        data=data_context(run, summary),
        examples=_examples(run, summary),
        settings=yaml.safe_dump(summary["config"], sort_keys=False, allow_unicode=True),
    )


@lru_cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("psycho.evaluation"),
        autoescape=True,  # always: the pages hold text that people and models wrote
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": findings.percent,
        "interval": findings.interval,
        "count": _count,
        "signed": signed,
    }
    return environment.get_template("report.html.jinja")


def _count(number: float | None, decimals: int = 0) -> str:
    return "–" if number is None else f"{number:,.{decimals}f}"


def _last_entry(run: Run) -> str | None:
    """When the run folder last got a result (UTC)."""
    lines = (storage.read_text(run.path("ledger.jsonl")) or "").splitlines()
    return json.loads(lines[-1])["time"].replace("T", " ").removesuffix("Z") if lines else None


def _missing(run: Run, summary: Summary) -> dict[str, str]:
    """The stages whose results are not in this report, each with the reason; what this kind of run leaves out is not
    missing."""
    left_out = {"report", *(("generate", "judge") if starts_from_pairs(run.config) else ())}
    return {
        name: run.why_not_done(name) or "done since"
        for name in run.stages
        if name not in left_out and name not in summary["stages"]
    }


def _win_rate(rates: Mapping[str, Any], first_place: float | None) -> Context | None:
    policies = [name for name in POLICIES if name in rates]
    if not policies:
        return None
    rows = [rates[name] for name in policies]
    series = {
        "judge": rows,
        "at equal length": [_controlled(row) for row in rows],
        "truth (gold)": [row.get("gold", {}) for row in rows],
    }
    shown = {label: found for label, found in series.items() if any(found)}
    counts = [row["n"] for row in rows]
    n = "–".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
    return {
        "rows": dict(zip(policies, rows, strict=True)),
        "first_place": first_place,
        "svg": plots.win_rates(shown, policies, n),
    }


def _controlled(row: Mapping[str, Any]) -> dict[str, Any]:
    names = {"length_controlled": "rate", "length_controlled_low": "low", "length_controlled_high": "high"}
    return {new: row[old] for old, new in names.items()} if all(row.get(old) is not None for old in names) else {}


def _reward_model(run: Run, summary: Summary) -> Context | None:
    if not summary.get("reward_model"):
        return None
    audit = read_evaluation(run, "reward_model")
    return {"audit": audit, "svg": plots.reliability(audit["reliability"], audit["n"])}


def _judge(run: Run, summary: Summary) -> Context | None:
    audit = read_evaluation(run, "judge") if "evaluate" in summary["stages"] else {}
    if not audit.get("overall"):
        return None
    context: Context = {
        "audit": audit,
        "agreement": audit.get("pair_agreement_gold"),
        "correlation_svg": None,
    }
    context["overall_svg"] = plots.histogram(
        "overall", "Overall ratings by the judge.", audit["overall"], 1, 5, "overall rating", "responses"
    )
    if known := audit.get("correlation_gold"):
        names = [name for name in (*STEMS, "overall") if name in known]
        context["correlation_svg"] = plots.bars(
            "correlation",
            "Correlation of the judge's ratings with the truth.",
            names,
            [known[name] for name in names],
            f"n = {audit['n']:,} responses",
        )
    return context


def _calibration(run: Run) -> Context | None:
    """The comparison with people's ratings, where `judge --calibrate` was run."""
    found = json.loads(storage.read_text(run.path(*CALIBRATION)) or "{}")
    if not found.get("n"):
        return None
    return found | {"svg": plots.calibration(found)}


def _histories(run: Run, summary: Summary) -> dict[str, list[dict[str, float]]]:
    """The steps of each training whose figures are finite."""
    found = {}
    for name in ("sft", "reward", "dpo", "online"):
        if f"train_{name}" in summary["stages"]:
            rows = [row for row in read_history(run.path("models", name)) if all(map(math.isfinite, row.values()))]
            if rows:
                found[name] = rows
    return found


def _training(
    config: Config,
    histories: Mapping[str, Sequence[dict[str, float]]],
    preferences: Mapping[str, Sequence[dict[str, float]]],
) -> Context | None:
    if not histories:
        return None
    return {
        "loss_svg": plots.loss_curves(histories),
        "loss_caption": captions.loss_caption(config, histories),
        "reward_svg": plots.reward_curves(preferences) if preferences else None,
        "reward_caption": captions.reward_caption(config, preferences),
    }


def _online(run: Run, summary: Summary) -> Context | None:
    if "train_online" not in summary["stages"]:
        return None
    rounds = json.loads(storage.read_text(run.path("models", "online", "rounds.json")) or "[]")
    if not rounds:
        return None
    svg = plots.online_rounds(rounds) if len(rounds) > 1 else None
    shown = [row | _said_of_round(row) for row in rounds]
    return {"rounds": shown, "watched": any("gold_score" in row for row in rounds), "svg": svg}


def _said_of_round(row: Mapping[str, Any]) -> Context:
    """What the table says in words; a figure that an earlier psycho did not note is left out."""
    counts = {"unscored": row["failed"], "too unsafe": row.get("floor_hits"), "cut off": row.get("truncated")}
    of_pairs = [f"{findings.percent(row['ties'], 0)} ties"] if row.get("ties") else []
    of_pairs += [f"{row['too_long']:,} too long"] if row.get("too_long") else []
    return {
        "sampled_by": _count(row.get("policy")),
        "proof": "–" if row.get("sync_error") is None else f"{row['sync_error']:.1g}",
        "of_samples": [f"{count:,} {what}" for what, count in counts.items() if count],
        "of_pairs": of_pairs,
    }


def _examples(run: Run, summary: Summary) -> list[dict[str, Any]]:
    """Comparisons of the policy with the highest rate: one it won, one undecided, one it lost, where there are such."""
    policy = findings.headline_policy(summary)
    if policy is None:
        return []
    rows = storage.read_table(run.path("evaluation", "comparisons")).to_pylist()
    rows = sorted((r for r in rows if r["policy"] == policy and r["outcome"] is not None), key=lambda r: r["speech_id"])
    groups = [[r for r in rows if r["outcome"] == outcome] for outcome in (1.0, 0.5, 0.0)]
    first = [group[0] for group in groups if group]
    rest = [row for row in rows if row not in first]
    picked = (first + rest)[:EXAMPLES]
    speeches = storage.read_table(run.path("speeches"), ["speech_id", "question"])
    ids = pa.array([row["speech_id"] for row in picked], pa.string())
    wanted = speeches.filter(pc.is_in(speeches["speech_id"], ids)).to_pylist()
    questions = {row["speech_id"]: row["question"] for row in wanted}
    return [row | {"question": questions.get(row["speech_id"], ""), "verdict": _verdict(row)} for row in picked]


def _verdict(row: Mapping[str, Any]) -> str:
    if row["outcome"] == 0.5:
        return "The judge was undecided."
    clear = "in both orders" if row["outcome"] in (0.0, 1.0) else "in one order, with a tie in the other"
    return f"The judge preferred the {'policy' if row['outcome'] > 0.5 else 'baseline'} {clear}."
