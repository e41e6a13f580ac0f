"""What the pipeline prints at its end: whether the judge is fit, a table that fits 80 columns, the steps, the best.

Every column is explained below the table, for a reader who sees it for the first time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from psycho.evaluation.steps import best_sentence, step_sentence
from psycho.stages import POLICIES

Summary = Mapping[str, Any]


def show_results(console: Console, summary: Summary) -> None:
    """Print what a run came to; a run without an evaluation says so in a line."""
    unfit = summary["fitness"]["fit"] is False
    console.print(summary["headline"], style="bold red" if unfit else "bold", highlight=False, markup=False)
    if not summary.get("win_rate"):
        console.print("No policy has been compared with the baseline yet.", highlight=False)
        return
    console.print(results_table(summary), highlight=False)
    for line in (*_legend(summary), "", *conclusions(summary)):
        console.print(line, highlight=False, markup=False)


def results_table(summary: Summary) -> Table:
    """Win rates of the policies in %, with what is known besides; columns that no policy has are left out."""
    rates = {name: summary["win_rate"][name] for name in POLICIES if name in summary["win_rate"]}
    columns = [
        ("policy", list(rates)),
        ("n", [f"{row['n']:,}" for row in rates.values()]),
        ("win rate, %\n[95 % interval]", [_rate(row) for row in rates.values()]),
        ("equal\nlength", [_percent(row.get("length_controlled")) for row in rates.values()]),
        ("truth, %\n[95 % interval]", [_rate(row.get("gold", {})) for row in rates.values()]),
        ("well-\nformed", [_percent(row.get("gold", {}).get("on_grammar")) for row in rates.values()]),
        ("chars", [f"{row['mean_chars']:.0f}" for row in rates.values()]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != "–" for cell in cells)]
    table = Table(title="Win rate against the baseline", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, _ in shown:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in zip(*(cells for _, cells in shown), strict=True):
        table.add_row(*row)
    return table


def _legend(summary: Summary) -> list[str]:
    """What the columns mean."""
    baseline = summary["config"]["evaluation"]["baseline"]
    rows = summary["win_rate"].values()
    lines = [
        f"win rate: how often the judge prefers the policy's answer to that of the baseline {baseline}, in % of n "
        "speeches that no model was trained on; a tie counts half",
    ]
    if any(row.get("length_controlled") is not None for row in rows):
        lines.append("equal length: what it would be were both answers equally long")
    if any("gold" in row for row in rows):
        lines.append("truth (gold): the same by the true quality of an answer, which the nano world alone knows")
        lines.append("well-formed (on grammar): answers in % that the nano world's grammar could have written")
    return [*lines, "chars: characters of an answer, on average"]


def conclusions(summary: Summary) -> list[str]:
    """What each step of the training came to, the best policy, and the reward model and judge, a line each."""
    lines = [step_sentence(step) for step in summary.get("steps", [])]
    if lines:
        lines.insert(0, "Steps, as differences of win rate on the same speeches (1 is all of them) [95 % interval]:")
    best = summary.get("best")
    if best:
        lines.append(best_sentence(best))
        if best.get("gold"):
            lines.append(best_sentence(best["gold"], by="the truth"))
    return lines + _models(summary)


def _models(summary: Summary) -> list[str]:
    lines = []
    reward, judge = summary.get("reward_model", {}), summary.get("judge", {})
    if reward:
        low, high = _percent(reward["accuracy_low"]), _percent(reward["accuracy_high"])
        lines.append(
            f"Reward model: {_percent(reward['accuracy'])} % right [{low}, {high}], AUC {reward['auc']:.3f}, "
            f"ECE {reward['ece']:.3f} on {reward['n']:,} test pairs"
        )
    if judge.get("pair_agreement_gold") is not None:
        lines.append(
            f"Judge: orders {_percent(judge['pair_agreement_gold'])} % of pairs that truly differ by a point or more "
            "as the truth does"
        )
    return lines


def _rate(row: Mapping[str, Any]) -> str:
    return f"{_percent(row['rate'])} [{_percent(row['low'])}, {_percent(row['high'])}]" if row else "–"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
