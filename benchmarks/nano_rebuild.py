"""Does the nano recipe depend on luck? Rebuilds over seeds, threads, precision, reduction order and noise.

    python -m benchmarks.nano_rebuild [--only 0,1,2] [--root runs/rebuilds] [--story 3] [--quick]

Each variant is `psycho nano --rebuild` from the first weights on, in a process of its own; a rebuild that is there
already is read. `order` deals every step to two workers instead of one, so that gradients are summed in another order;
`noise` adds 1e-6 to every first weight; `default` and `avx2` take kernels of other CPUs. `--story N` then runs the
default pipeline on the first N rebuilt worlds and counts the steps (base, SFT, DPO, online) whose paired gain in gold
has an interval above 0.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Variant = dict[str, Any]
VARIANTS: tuple[Variant, ...] = (
    {"seed": 0},
    {"seed": 1},
    {"seed": 2},
    {"seed": 3, "threads": 2},
    {"seed": 4, "threads": 2},
    {"seed": 0, "precision": "bf16"},
    {"seed": 1, "precision": "bf16"},
    {"seed": 0, "noise": 1e-6},
    {"seed": 1, "noise": 1e-6, "order": 2},
    {"seed": 0, "order": 2},
    {"seed": 0, "kernels": "avx2"},
    {"seed": 0, "kernels": "default"},
)


def rebuild(number: int, variant: Variant, root: Path) -> dict[str, Any] | None:
    """Rebuild one variant, or find it; what its `nano.json` says, or None where the gates were not reached."""
    target = root / f"world-{number}"
    if not target.exists():
        settings = {
            "nano.seed": variant["seed"],
            "nano.precision": variant.get("precision", "fp32"),
            "nano.jitter": variant.get("noise", 0.0),
            "training.workers": variant.get("order", 1),
            "training.threads_per_worker": variant.get("threads", 1),
            "inference.workers": 1,
            "run_dir": root / f"run-{number}",
        }
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        command = [str(Path(sys.executable).parent / "psycho"), "nano", "--rebuild", "--to", str(target), *options]
        environment = dict(os.environ)
        if "kernels" in variant:
            environment["ATEN_CPU_CAPABILITY"] = variant["kernels"]
        with (root / f"world-{number}.log").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=False, env=environment, stdout=log, stderr=log)
    if not target.exists():
        return None
    facts: dict[str, Any] = json.loads((target / "nano.json").read_text(encoding="utf-8"))
    return facts


def story(number: int, root: Path) -> int:
    """Steps of the default pipeline on one rebuilt world whose paired gain in gold is above 0, of three."""
    folder = root / f"story-{number}"
    command = [sys.executable, "-m", "ray_jobs.pipeline", "--config", "configs/nano.yaml", "--run-dir", str(folder)]
    subprocess.run([*command, "--set", f"nano.models={(root / f'world-{number}').absolute()}"], check=True)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return sum(step["gold_win_rate"]["low"] > 0 for step in summary["steps"])


def worst_correlation(facts: dict[str, Any]) -> float:
    """The lowest correlation of the judge with the truth on any principle."""
    return min(float(gate["value"]) for gate in facts["gates"] if gate["name"].startswith("judge on grammar"))


def main() -> None:
    """Rebuild and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="numbers of variants, with commas; none: all")
    parser.add_argument("--root", type=Path, default=Path("runs/rebuilds"))
    parser.add_argument("--story", type=int, default=0, help="rebuilt worlds to run the default pipeline on")
    parser.add_argument("--quick", action="store_true", help="the first variant only")
    arguments = parser.parse_args()
    arguments.root.mkdir(parents=True, exist_ok=True)
    chosen = [int(part) for part in arguments.only.split(",") if part] or list(range(len(VARIANTS)))
    if arguments.quick:
        chosen = chosen[:1]
    found = {number: rebuild(number, VARIANTS[number], arguments.root) for number in chosen}
    table = Table("variant", "seed used", "worst principle", "gates")
    for number, facts in found.items():
        said = ", ".join(f"{key} {value}" for key, value in VARIANTS[number].items())
        if facts is None:
            table.add_row(said, "-", "-", "GIVEN UP")
            continue
        passed = sum(gate["passed"] for gate in facts["gates"])
        table.add_row(said, str(facts["seed"]), f"{worst_correlation(facts):.3f}", f"{passed} of {len(facts['gates'])}")
    Console(width=110).print(table)
    made = [facts for facts in found.values() if facts]
    steps = [story(number, arguments.root) for number in [n for n in chosen if found[n]][: arguments.story]]
    line: dict[str, Any] = {"rebuilds": len(found), "passed": len(made)}
    line["worst_principle_correlation"] = round(min(map(worst_correlation, made)), 4) if made else None
    line["steps_gained"] = min(steps) if steps else None
    print(json.dumps(line))


if __name__ == "__main__":
    main()
