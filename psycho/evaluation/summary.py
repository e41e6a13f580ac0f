"""`summary.json`: what a run came to, for machines.

The names in it are read by other tools and stay as they are. A partial run gives a partial summary: a stage that is
not done is left out, and so is what only that stage knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from psycho import secrets, storage
from psycho.evaluation.fitness import headline, read_fitness
from psycho.evaluation.steps import STEP_FIGURES, best_policy, steps
from psycho.run import Run
from psycho.stages import POLICIES

if TYPE_CHECKING:
    from psycho.job import Job

Summary = dict[str, Any]

_STAGE_KEYS = ("status", "seconds", "rows_in", "rows_out", "quarantined", "tokens")
_JUDGE_KEYS = ("pair_agreement_gold", "correlation_gold")
_REWARD_KEYS = ("n", "accuracy", "auc", "ece", "brier", "accuracy_low", "accuracy_high")
_WIN_KEYS = ("n", "rate", "low", "high", "length_controlled", "mean_chars")
_GOLD_KEYS = ("rate", "low", "high", "mean_rating", "on_grammar")


def build_summary(
    run: Run, manifests: dict[str, dict[str, Any]], seconds_total: float, peak_rss_gib: float | None
) -> Summary:
    """The summary of a run.

    Args:
        run: the run folder; evaluation results are read from it.
        manifests: by stage, of those that are done, each with its `status` ("done" or "skipped").
        seconds_total: wall-clock time of the pipeline.
        peak_rss_gib: largest resident memory of the pipeline; None where nobody measured it.
    """
    ordered = {name: manifests[name] for name in run.stages if name in manifests}
    fitness = read_fitness(ordered)
    summary: Summary = {
        "headline": headline(fitness),
        "fitness": fitness,
        "run": run.root,
        "config": secrets.hide(run.config.model_dump(mode="json")),
        "versions": _versions(ordered),
        "seconds_total": round(seconds_total, 2),
        "peak_rss_gib": None if peak_rss_gib is None else round(peak_rss_gib, 3),
        "stages": {name: _pick(manifest, _STAGE_KEYS) for name, manifest in ordered.items()},
        "counts": _counts(ordered),
    }
    return summary | (_evaluation(run) if "evaluate" in ordered else {})


def stage_manifests(run: Run, known: Mapping[str, dict[str, Any]] | None = None) -> dict[str, dict[str, Any]]:
    """Manifests of the stages that are done and not stale; those not in `known` count as skipped."""
    found = dict(known or {})
    for name in run.stages:
        if name not in found and run.is_done(name):
            found[name] = {**(run.manifest(name) or {}), "status": "skipped"}
    return found


def write_summary(job: Job, seconds_total: float, peak_rss_gib: float | None) -> Summary:
    """Write `<run>/summary.json`, whole or not at all, and return what it says.

    Where nothing was left to do, time and memory stay those of the run that did it.
    """
    summary = build_summary(job.run, stage_manifests(job.run, job.manifests), seconds_total, peak_rss_gib)
    before = json.loads(storage.read_text(job.run.path("summary.json")) or "{}")
    if before and all(stage["status"] == "skipped" for stage in summary["stages"].values()):
        summary |= {name: before[name] for name in ("seconds_total", "peak_rss_gib") if name in before}
    storage.write_text(job.run.path("summary.json"), json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _evaluation(run: Run) -> Summary:
    """The parts that the stage evaluate knows; gold figures are there in the nano world only."""
    judge = read_evaluation(run, "judge")
    reward = read_evaluation(run, "reward_model")
    rates = read_evaluation(run, "win_rate")
    return {
        "judge": _pick(judge, _JUDGE_KEYS),
        "reward_model": _pick(reward, _REWARD_KEYS),
        "win_rate": {name: _win_rate(rates[name]) for name in POLICIES if name in rates},
    } | compared(run)


def compared(run: Run) -> Summary:
    """`steps`, each of the training against the one before, and `best`, by the run's comparisons speech by speech."""
    table = storage.read_table(run.path("evaluation", "comparisons"))
    wanted = ["speech_id", "policy", *STEP_FIGURES.values()]
    rows = table.select([name for name in wanted if name in table.column_names]).to_pylist()
    best, by_gold = (best_policy(rows, POLICIES, figure) for figure in ("outcome", "gold_outcome"))
    if best and by_gold:
        best["gold"] = by_gold
    return {"steps": steps(rows, POLICIES), "best": best}


def read_evaluation(run: Run, name: str) -> dict[str, Any]:
    """`evaluation/<name>.json`, or an empty one."""
    return json.loads(storage.read_text(run.path("evaluation", f"{name}.json")) or "{}")


def _win_rate(row: Mapping[str, Any]) -> dict[str, Any]:
    gold = {"gold": _pick(row["gold"], _GOLD_KEYS)} if "gold" in row else {}
    return _pick(row, _WIN_KEYS) | gold


def _counts(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    where = {
        "speeches": ("prepare", "rows_out"),
        "responses": ("generate", "rows_out"),
        "ratings": ("judge", "rows_out"),
        "pairs_train": ("pair", "train"),
        "pairs_dev": ("pair", "dev"),
        "pairs_test": ("pair", "test"),
    }
    return {count: manifests[stage][key] for count, (stage, key) in where.items() if key in manifests.get(stage, {})}


def _versions(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Versions by package, commits by hub model; several, with a comma, where stages were done under different ones."""
    found: dict[str, list[str]] = {}
    for manifest in manifests.values():
        for package, version in (manifest.get("versions", {}) | manifest.get("commits", {})).items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: ", ".join(versions) for package, versions in found.items()}


def _pick(row: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: row[key] for key in keys if key in row}
