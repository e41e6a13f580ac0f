"""What online rounds add to offline DPO in the nano world, by exact gold, over several seeds and at both stalenesses.

    python -m benchmarks.online_gain [--seeds 0,1,2] [--staleness 0,1] [--root runs/online_gain] [--quick]

Each seed runs the default pipeline with more online rounds, more evaluation speeches and the length penalty on; with
staleness 1 the run starts from a copy of the run with staleness 0, so that all before the online rounds is the same.
The win rates are against the reference policy, with 95 % Wilson intervals; `length_ratio` is mean characters by the
reference's. Half an hour for each staleness on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from statsmodels.stats.proportion import proportion_confint

SETTINGS = {
    "online.rounds": "6",
    "online.length_penalty": "0.5",
    "online.length_free_chars": "180",
    "speeches.evaluation": "600",
    "evaluation.speeches": "600",
}


class Found(NamedTuple):
    """Of one policy over all seeds: gold wins (ties count half), comparisons, mean characters by the reference's."""

    wins: float
    n: int
    length_ratio: float

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the win rate."""
        low, high = proportion_confint(self.wins, self.n, method="wilson")
        return float(low), float(high)


def run(seed: int, staleness: int, root: Path) -> dict[str, Any]:
    """Run (or find) one seed at one staleness and return its win rates."""
    folder, fresh = root / f"seed-{seed}-staleness-{staleness}", root / f"seed-{seed}-staleness-0"
    if staleness and fresh.is_dir() and not folder.exists():
        shutil.copytree(fresh, folder)
    settings = SETTINGS | {"seed": str(seed), "online.staleness": str(staleness)}
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "configs/nano.yaml", "--run-dir", str(folder)]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(command, check=True)
    rates: dict[str, Any] = json.loads((folder / "evaluation" / "win_rate.json").read_text(encoding="utf-8"))
    return rates


def pooled(rates: list[dict[str, Any]], policy: str) -> Found:
    """One policy over all seeds."""
    rows = [rate[policy] for rate in rates]
    n = sum(row["n"] for row in rows)
    ratio = sum(row["mean_chars"] / row["baseline_mean_chars"] * row["n"] for row in rows) / n
    return Found(sum(row["gold"]["rate"] * row["n"] for row in rows), n, ratio)


def table(found: dict[int, dict[int, dict[str, Any]]]) -> Table:
    """A row a seed and staleness, and one for all seeds."""
    out = Table("staleness", "seed", "base: gold", "dpo: gold", "online: gold", "length ratio: dpo", "online")
    for staleness, by_seed in found.items():
        for seed, chosen in [*((str(s), [each]) for s, each in by_seed.items()), ("all", list(by_seed.values()))]:
            rows = {policy: pooled(chosen, policy) for policy in ("base", "dpo", "online")}
            cells = [f"{r.wins / r.n:.3f} [{r.interval[0]:.3f}, {r.interval[1]:.3f}]" for r in rows.values()]
            out.add_row(str(staleness), seed, *cells, *(f"{rows[p].length_ratio:.2f}" for p in ("dpo", "online")))
    return out


def figures(found: dict[int, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    """What is claimed: intervals apart in each seed and over all, and lengths near the reference's."""
    result: dict[str, Any] = {}
    for staleness, by_seed in found.items():
        each = [{p: pooled([s], p) for p in ("dpo", "online")} for s in by_seed.values()]
        every = {p: pooled(list(by_seed.values()), p) for p in ("dpo", "online")}
        result[f"staleness_{staleness}"] = {
            "dpo": round(every["dpo"].wins / every["dpo"].n, 3),
            "online": round(every["online"].wins / every["online"].n, 3),
            "apart": every["online"].interval[0] > every["dpo"].interval[1],
            "seeds_apart": sum(row["online"].interval[0] > row["dpo"].interval[1] for row in each),
            "length_ratio": [round(row["online"].length_ratio, 2) for row in each],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--staleness", default="0,1")
    parser.add_argument("--root", type=Path, default=Path("runs/online_gain"))
    parser.add_argument("--quick", action="store_true", help="the first seed at the first staleness only")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")][: 1 if options.quick else None]
    stalenesses = [int(each) for each in options.staleness.split(",")][: 1 if options.quick else None]
    found = {staleness: {seed: run(seed, staleness, options.root) for seed in seeds} for staleness in stalenesses}
    Console(width=140).print(table(found))
    print(json.dumps(figures(found)))


if __name__ == "__main__":
    main()
