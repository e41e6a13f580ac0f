"""The report's part on data: what the speeches, responses, ratings and pairs are like, and what they would teach.

Figures come from the stages' manifests and from `preferences/audit.json`. A figure that a stage did not write (an older
run, another way of starting) is left out, and nothing stands in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from psycho import storage
from psycho.evaluation import plots
from psycho.principles import STEMS
from psycho.run import Run

Summary = Mapping[str, Any]
Context = dict[str, Any]
SHORTCUTS = {
    "longer": "the longer response wins",
    "length": "fitted on the two lengths",
    "opening": "fitted on the first five words",
}
_FACTS = {
    "prepare": {
        "personal_data": ("Personal data masked in the client speeches before anything was stored", "type"),
        "languages": ("Languages of the client speeches", "language"),
        "duplicates": ("Duplicates left out", "kind"),
        "topics": ("Topics of the client speeches", "topic"),
    },
    "generate": {"status": ("Responses by how they ended", "status")},
    "judge": {"status": ("Ratings by how they were made", "status")},
}
_BY_MODEL = ("responses", "tokens", "cost", "truncated", "refused", "looping", "empty", "failed")
_BY_JUDGE = ("mode", "ok", "failed", "retried", "floored", "output_tokens")


def data_context(run: Run, summary: Summary) -> Context:
    """What `data.html.jinja` shows."""
    manifests = {
        name: run.manifest(name) or {} for name in ("prepare", "generate", "judge") if name in summary["stages"]
    }
    context: Context = {
        "tables": [table for name, found in manifests.items() for table in _tables(name, found)],
        "models": _records(manifests.get("generate", {}).get("by_model"), _BY_MODEL),
        "cost": manifests.get("generate", {}).get("cost"),
        "judging": _judging(manifests.get("judge", {})),
        "evidence": manifests.get("judge", {}).get("evidence") or {},
        "judges": _records(_judges(manifests.get("judge", {})), _BY_JUDGE),
        "pairs": _pairs(run) if "pair" in summary["stages"] else None,
        "ratings_svg": _ratings_by_model(run) if "judge" in manifests else None,
    }
    return context


def _tables(stage: str, manifest: Mapping[str, Any]) -> list[Context]:
    """Counts by kind, the most first; a table for each that the stage wrote."""
    found = []
    for key, (caption, head) in _FACTS.get(stage, {}).items():
        counts = manifest.get(key)
        if isinstance(counts, Mapping) and counts:
            rows = sorted(counts.items(), key=lambda item: -item[1])
            found.append({"caption": caption, "head": head, "rows": rows})
    return found


def _records(records: Mapping[str, Mapping[str, Any]] | None, order: Sequence[str]) -> Context | None:
    """A row per model, with the columns that any of them has."""
    if not records:
        return None
    columns = [name for name in order if any(name in row for row in records.values())]
    return {
        "columns": [name.replace("_", " ") for name in columns],
        "rows": {model: [row.get(name) for name in columns] for model, row in records.items()},
    }


def _judges(judge: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The reports of one judge or a panel, by model; how its ratings ended stands beside the rest."""
    return {report["model"]: {**report, **report.get("status", {})} for report in judge.get("judges") or []}


def _judging(judge: Mapping[str, Any]) -> list[str]:
    """How the ratings came about, a phrase each."""
    found = []
    if "mode" in judge:
        found.append(f"mode {judge['mode']}")
    if len(judge.get("judges") or []) > 1:
        found.append(f"the judges of the panel lie {judge.get('disagreement', 0):.2f} apart (standard deviation)")
    return found


def _pairs(run: Run) -> Context:
    manifest = run.manifest("pair") or {}
    left_out = sorted(manifest.get("left_out", {}).items(), key=lambda item: -item[1])
    audit = json.loads(storage.read_text(run.path("preferences", "audit.json")) or "{}")
    context: Context = {"left_out": dict(left_out), "less_safe": manifest.get("less_safe"), "audit": audit}
    train = audit.get("train")
    if not train:
        return context | {"gap_svg": None, "length": None}
    sevenths = train["gap"]["by_sevenths"] or []
    gaps = np.repeat(np.arange(len(sevenths)) / 7, sevenths).tolist()
    inverted, rated = train["safety"]["inverted"], train.get("rated", train["pairs"])
    length = train["length"]
    return context | {
        "gap_svg": plots.histogram(
            "gap", "Gaps of the train pairs.", gaps, 0, 4, "gap in overall rating", "train pairs"
        )
        if gaps
        else None,
        "length_svg": plots.differences(
            "length", "Length of the chosen less that of the rejected response, train pairs.",
            length["edges"], length["counts"], "chosen − rejected, characters", "train pairs",
        ),
        "who_svg": _chosen_by_rejected(train["wins"]),
        "few": _fits_half_a_page(train["wins"]),
        "shortcuts": {SHORTCUTS[name]: rule for name, rule in train["shortcuts"].items() if rule},
        "length": length,
        "safety": train["safety"] | {"share": None if inverted is None else inverted / rated},
    }  # fmt: skip


def _models(wins: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({win[side] for win in wins for side in ("chosen", "rejected")})


def _fits_half_a_page(wins: Sequence[Mapping[str, Any]]) -> bool:
    models = _models(wins)
    return len(models) <= 6 and max(map(len, models)) <= 16


def _chosen_by_rejected(wins: Sequence[Mapping[str, Any]]) -> Any:
    """Wins of model against model: rows won, columns lost."""
    models = _models(wins)
    place = {model: index for index, model in enumerate(models)}
    table = np.full((len(models), len(models)), np.nan)
    for win in wins:
        table[place[win["chosen"]], place[win["rejected"]]] = win["pairs"]
    chosen, rejected = np.nansum(table, axis=1), np.nansum(table, axis=0)
    shares = zip(models, chosen / np.maximum(1, chosen + rejected), strict=True)
    said = ", ".join(f"{model} {share:.0%}" for model, share in shares)
    return plots.heat_map(
        "who",
        f"Train pairs by model. Share of a model's pairs in which it was chosen: {said}.",
        table,
        models,
        models,
        ("chosen", "rejected"),
        0,
        (0.0, float(np.nanmax(table))),
    )


def _ratings_by_model(run: Run) -> Any:
    """Mean rating of each generator on each principle."""
    columns = [*(f"{stem}_rating" for stem in STEMS), "overall"]
    ratings = storage.read_table(run.path("ratings"), ["model", *columns])
    grouped = ratings.group_by("model").aggregate([*((c, "mean") for c in columns), ("overall", "count")])
    rows = grouped.sort_by([("overall_mean", "descending")]).to_pylist()
    if not rows:
        return None
    said = ", ".join(f"{row['model']} {row['overall_mean']:.2f}" for row in rows)
    return plots.heat_map(
        "ratings",
        f"Mean ratings per model and principle. Overall: {said}.",
        np.array([[row[f"{c}_mean"] for c in columns] for row in rows], dtype=float),
        [f"{row['model']} (n = {row['overall_count']:,})" for row in rows],
        [*STEMS, "overall"],
        ("", ""),
        2,
        (1.0, 5.0),
    )
