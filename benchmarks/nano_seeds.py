"""The default run over several seeds: does preference learning work, and does the loop fool itself?

    python -m benchmarks.nano_seeds [--seeds 0,1,2] [--root runs/seeds] [--quick]

Each seed draws its own speeches, models per speech, samples and batches; the nano models stay the same. The last line
holds the worst figure over the seeds, for that is what a claim has to survive. `--quick` reads one seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

POLICIES = ("base", "sft", "dpo", "online")


def run_seed(seed: int, root: Path) -> dict[str, Any]:
    """Run (or find) one seed and return its summary."""
    folder = root / f"seed-{seed}"
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "configs/nano.yaml"]
    subprocess.run([*command, "--run-dir", str(folder), "--set", f"seed={seed}"], check=True)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary


def table(summaries: dict[int, dict[str, Any]]) -> Table:
    """A row a seed: gold and judge win rate and share on the grammar, per policy."""
    out = Table("seed", *[f"{p}: gold / judge / grammar" for p in POLICIES], "reward accuracy", "judge r")
    for seed, summary in summaries.items():
        cells = []
        for policy in POLICIES:
            row = summary["win_rate"][policy]
            cells.append(f"{row['gold']['rate']:.3f} / {row['rate']:.3f} / {row['gold']['on_grammar']:.3f}")
        judge = summary["judge"]["correlation_gold"]["overall"]
        out.add_row(str(seed), *cells, f"{summary['reward_model']['accuracy']:.3f}", f"{judge:.3f}")
    return out


def worst(summaries: dict[int, dict[str, Any]]) -> dict[str, float]:
    """The figure over all seeds that is worst for the claim."""
    rates = [summary["win_rate"] for summary in summaries.values()]
    rows = [rate[policy] for rate in rates for policy in POLICIES]
    return {
        "seeds": len(summaries),
        "n": min(row["n"] for row in rows),
        "gold_base_max": max(rate["base"]["gold"]["rate"] for rate in rates),
        "gold_dpo_min": min(rate["dpo"]["gold"]["rate"] for rate in rates),
        "gold_online_min": min(rate["online"]["gold"]["rate"] for rate in rates),
        "on_grammar_min": min(row["gold"]["on_grammar"] for row in rows),
        "judge_minus_gold_max": max(abs(row["rate"] - row["gold"]["rate"]) for row in rows),
        "reward_accuracy_min": min(summary["reward_model"]["accuracy"] for summary in summaries.values()),
    }


def main() -> None:
    """Run the seeds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--root", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--quick", action="store_true", help="the first seed only")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    summaries = {seed: run_seed(seed, arguments.root) for seed in (seeds[:1] if arguments.quick else seeds)}
    Console(width=160).print(table(summaries))
    print(json.dumps({key: round(value, 4) for key, value in worst(summaries).items()}))


if __name__ == "__main__":
    main()
