"""How fast the training engine is, beside TRL's trainers: same model, same pairs, same batch, one thread each.

    python -m benchmarks.training [--quick] [--only dpo,single,reward,epoch]
    python -m benchmarks.training --size tiny --turns 1     # tries all arms in a few minutes; its figures mean nothing
    python -m benchmarks.training --model FOLDER --arms trl,ours,trl_reward,ours_reward     # a real model

Every arm is a process of its own that waits for its turn; turns go round, so that what else the machine does hits all
alike, and the median of the turns counts. A turn is a few optimizer steps on the same pairs; what is timed is the
step, from the batch's tokens to the updated weights, without start-up. TRL runs as shipped (gradient checkpointing is
its default; the head works on every token where there is no Triton), and at its best on a CPU: no checkpointing, its
head on response tokens alone. Both sides have their reference log-probabilities precomputed, except for `epoch`, where
that pass is timed too. Our tricks are added one by one; beside the measured ratio stands that of the operations that
really ran (matrix products and attention, recomputation included), which is what the ratio would be if all else were
free. Memory is what the process grew by in its first turn, from the loaded model on. A real model of 135 M parameters
takes 3 GiB an arm, and the arms of a run live side by side: name the few that are wanted.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.training.arms import Arm, compare, worker
from benchmarks.training.data import SIZES, model_folder

STEPS_OF_OURS = ("own_loop", "response_logits", "packed", "shared_by_pair")
RUNS: dict[str, tuple[str, ...]] = {
    "dpo": ("trl", "trl_no_checkpointing", "trl_compact", *STEPS_OF_OURS, "ours", "plain_torch"),
    "single": ("trl_compact_single", "ours_single"),
    "reward": ("trl_reward", "trl_reward_no_checkpointing", "ours_reward"),
    "epoch": ("trl_compact_epoch", "ours_epoch"),
}
LABELS = {
    "trl": "TRL DPOTrainer as shipped",
    "trl_no_checkpointing": "TRL DPOTrainer, no gradient checkpointing",
    "trl_compact": "TRL DPOTrainer at its best on a CPU",
    "own_loop": "own loop, stored references, padded rows, all logits",
    "response_logits": "+ logits of response tokens alone",
    "packed": "+ packed, each response with its own prompt",
    "shared_by_pair": "+ prompt shared by the two of a pair",
    "ours": "+ prompt shared by all of a speech",
    "plain_torch": "the same without DeepSpeed",
    "trl_compact_single": "TRL at its best, one pair a speech",
    "ours_single": "ours, one pair a speech",
    "trl_reward": "TRL RewardTrainer as shipped",
    "trl_reward_no_checkpointing": "TRL RewardTrainer, no gradient checkpointing",
    "ours_reward": "ours, reward model",
    "trl_compact_epoch": "TRL at its best, an epoch with its reference pass",
    "ours_epoch": "ours, an epoch with its reference pass",
}
RATIOS = {
    "dpo_vs_trl": ("ours", "trl"),
    "dpo_vs_trl_no_checkpointing": ("ours", "trl_no_checkpointing"),
    "dpo_vs_trl_compact": ("ours", "trl_compact"),
    "dpo_epoch_vs_trl": ("ours_epoch", "trl_compact_epoch"),
    "dpo_single_pair_vs_trl_compact": ("ours_single", "trl_compact_single"),
    "reward_vs_trl": ("ours_reward", "trl_reward"),
    "reward_vs_trl_no_checkpointing": ("ours_reward", "trl_reward_no_checkpointing"),
    "deepspeed_vs_torch": ("ours", "plain_torch"),
}


def table_of(runs: list[list[Arm]]) -> Table:
    """Each arm beside the first of its run, which is TRL's."""
    table = Table("arm", "pairs/s", "x TRL", "GFLOP/pair", "x TRL", "first loss", "memory grown by (GiB)", "x TRL")
    for arms in runs:
        base = arms[0]
        for arm in arms:
            table.add_row(
                LABELS[arm.name],
                f"{arm.pairs_per_s:.2f}",
                f"{arm.pairs_per_s / base.pairs_per_s:.2f}",
                f"{arm['gflop_per_pair']:.1f}",
                f"{base['gflop_per_pair'] / arm['gflop_per_pair']:.2f}",
                f"{arm['loss']:.4f}",
                f"{arm['grown_gib']:.2f}",
                f"{arm['grown_gib'] / base['grown_gib']:.2f}",
            )
        table.add_section()
    return table


def figures(found: dict[str, Arm]) -> dict[str, float]:
    """The ratios of what was run, measured and by operations, and the planner's efficiency."""
    result: dict[str, float] = {}
    for name, (ours, theirs) in RATIOS.items():
        if ours in found and theirs in found:
            one, other = found[ours], found[theirs]
            result[name] = round(one.pairs_per_s / other.pairs_per_s, 2)
            result[f"{name}_by_flops"] = round(other["gflop_per_pair"] / one["gflop_per_pair"], 2)
    for name in ("trl", "trl_compact"):
        if "ours" in found and name in found:
            result[f"memory_vs_{name}"] = round(found["ours"]["grown_gib"] / found[name]["grown_gib"], 2)
    waited, budget = efficiency()
    return result | {"packing_efficiency": round(waited, 4), "packing_efficiency_of_budget": round(budget, 4)}


def efficiency() -> tuple[float, float]:
    """Tokens / (bins x the step's largest bin), and / (bins x budget), at the domain's lengths: 1,024 pairs a step, 8
    ranks, a budget of 16k. A bin under the budget costs nothing; one under the step's largest is waited for."""
    from psycho.training.plan import plan_epoch

    rng = random.Random(0)
    sizes = [round(max(100, rng.gauss(230 + 4 * 240, 190))) for _ in range(20_000)]
    counts = [rng.randint(1, 5) for _ in sizes]
    used = bins = waited = 0
    for step in plan_epoch(sizes, counts, 1024, 8, 16384, 0):
        used += sum(sizes[index] for index in step.groups)
        bins += len(step.bins)
        waited += len(step.bins) * max(sum(sizes[index] for index in each) for each in step.bins)
    return used / waited, used / (bins * 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two turns, without our tricks one by one")
    parser.add_argument("--turns", type=int, help="of each arm (5; with --quick 2)")
    parser.add_argument("--only", default=",".join(RUNS), help="of dpo, single, reward, epoch")
    parser.add_argument("--size", choices=list(SIZES), help="full; real with --model")
    parser.add_argument("--model", help="a model folder; none: a random Llama of 4 layers")
    parser.add_argument("--arms", help="only these, of the runs of --only")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.model, options.size)
        return
    options.size = options.size or ("real" if options.model else "full")
    if (options.size == "real") != bool(options.model):
        parser.error("--size real and --model go together")
    wanted = options.arms.split(",") if options.arms else list(LABELS)
    console = Console(stderr=True)
    turns = options.turns or (2 if options.quick else 5)
    runs: list[list[Arm]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.model) if options.model else model_folder(SIZES[options.size], Path(scratch, "model"))
        log = Path(tempfile.gettempdir(), "psycho-benchmark-training.log")
        for name in options.only.split(","):
            arms = tuple(arm for arm in RUNS[name] if arm in wanted and not (options.quick and arm in STEPS_OF_OURS))
            if not arms:
                continue
            runs.append(
                compare(arms, folder, options.size, turns, log, lambda text: console.print(text, highlight=False))
            )
    Console(width=130).print(table_of(runs))
    print(json.dumps(figures({arm.name: arm for arms in runs for arm in arms})))


if __name__ == "__main__":
    main()
