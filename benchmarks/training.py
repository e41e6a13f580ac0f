"""How fast the training engine is, beside TRL's trainers: same model, same pairs, same batch, one thread each.

    python -m benchmarks.training [--quick]

Every variant is a process of its own that waits for its turn; turns go round, so that what else the machine does hits
all alike, and the median of the turns counts. A turn is a few optimizer steps on the same pairs; what is timed is the
step, from the batch's tokens to the updated weights, without start-up. TRL runs as shipped (gradient checkpointing is
its default; the head works on every token where there is no Triton), and at its best on a CPU: no checkpointing, its
head on response tokens alone. Both sides have their reference log-probabilities precomputed, except for `epoch`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

VOCABULARY, WIDTH, LAYERS = 4096, 256, 4
SPEECHES, RESPONSES, BATCH = 8, 4, 8
LENGTHS = {"prompt": (230, 40), "response": (240, 90)}
DPO = ("ours", "trl", "trl_no_checkpointing", "trl_compact")
STEPS_OF_OURS = ("own_loop", "response_logits", "packed", "shared_by_pair", "ours")
LABELS = {
    "own_loop": "own loop, stored references, padded rows, all logits",
    "response_logits": "+ logits of response tokens alone",
    "packed": "+ packed, each response with its own prompt",
    "shared_by_pair": "+ prompt shared by the two of a pair",
    "ours": "+ prompt shared by all of a speech",
    "plain_torch": "ours without DeepSpeed",
    "trl": "TRL DPOTrainer as shipped",
    "trl_no_checkpointing": "TRL DPOTrainer, no gradient checkpointing",
    "trl_compact": "TRL DPOTrainer at its best on a CPU",
    "ours_single": "ours, one pair a speech",
    "trl_compact_single": "TRL at its best, one pair a speech",
    "ours_reward": "ours, reward model",
    "trl_reward": "TRL RewardTrainer as shipped",
    "trl_reward_no_checkpointing": "TRL RewardTrainer, no gradient checkpointing",
    "ours_epoch": "ours, an epoch with its reference pass",
    "trl_compact_epoch": "TRL at its best, an epoch with its reference pass",
}  # fmt: skip
Pair = tuple[list[int], list[int], list[int]]


def speeches(seed: int = 0) -> list[tuple[list[int], list[list[int]], list[tuple[int, int]]]]:
    """Prompt, responses and pairs of gap >= 1 as token ids, lengths as in the domain."""
    rng = random.Random(seed)

    def text(kind: str) -> list[int]:
        mean, spread = LENGTHS[kind]
        return [rng.randrange(8, VOCABULARY) for _ in range(max(20, round(rng.gauss(mean, spread))))]

    found = []
    for _ in range(SPEECHES):
        ratings = [sum(rng.randint(1, 5) for _ in range(3)) / 3 for _ in range(RESPONSES)]
        pairs = [(i, j) for i, a in enumerate(ratings) for j, b in enumerate(ratings) if a - b >= 1]
        found.append((text("prompt"), [[*text("response"), 2] for _ in ratings], pairs or [(0, 1)]))
    return found


def model_folder(root: Path) -> Path:
    """A random Llama of the benchmark's shape, with a tokenizer of one token a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=WIDTH * 8 // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(root)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(root)
    return root


def groups(single: bool = False) -> list[Any]:
    from psycho.training.groups import Encoded, Group, only

    found = [
        Group(prompt, tuple(Encoded(row, [1.0] * len(row)) for row in rows), tuple(pairs))
        for prompt, rows, pairs in speeches()
    ]
    return [only(group, [0]) for group in found] if single else found


def text_rows(single: bool = False) -> list[dict[str, str]]:
    """The same pairs as text, a word a token; TRL adds the end token itself."""
    rows = []
    for prompt, responses, pairs in speeches():
        for chosen, rejected in pairs[:1] if single else pairs:
            sides = (prompt, responses[chosen][:-1], responses[rejected][:-1])
            words = [" ".join(f"w{i}" for i in ids) for ids in sides]
            rows.append({"prompt": words[0], "chosen": f" {words[1]}", "rejected": f" {words[2]}"})
    return rows


def _ours(variant: str, folder: str) -> Callable[[], dict[str, float]]:
    import torch
    import torch.distributed as dist

    from psycho.config import DPOConfig, RewardConfig, TrainingConfig
    from psycho.training import loop
    from psycho.training.groups import Encoded, Group, only

    os.environ["LOCAL_RANK"] = "0"
    store = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
    training = TrainingConfig(
        workers=1, gpus_per_worker=0, device="cpu", precision="fp32", zero_stage=2, threads_per_worker=1,
        max_length=2048, bin_tokens=8192, packing=variant not in ("own_loop", "response_logits"),
    )  # fmt: skip
    loop.setup_worker(training)
    kind = "reward" if variant == "ours_reward" else "dpo"
    batch = SPEECHES if variant == "ours_single" else BATCH
    settings: Any = (RewardConfig if kind == "reward" else DPOConfig)(lr=1e-5, batch_size=batch, epochs=1)
    trainer = loop.Trainer(kind, folder, settings, training, seed=0)
    if variant == "own_loop":
        _all_logits(trainer.engine.module)
    if variant == "plain_torch":
        trainer.engine = _PlainTorch(trainer.engine.module)
    rows = groups(variant == "ours_single")
    if variant in ("own_loop", "response_logits", "packed"):
        rows = [
            Group([], tuple(Encoded(g.prompt + r.ids, [0.0] * len(g.prompt) + r.weights) for r in g.responses), g.pairs)
            for g in rows
        ]
    if variant in ("own_loop", "response_logits", "shared_by_pair"):  # padded: a row for each side of each pair
        rows = [only(group, [pair]) for group in rows for pair in range(len(group.pairs))]
    if kind == "dpo" and variant != "ours_epoch":
        rows = trainer._with_references(rows, None)
    torch.manual_seed(0)

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        history = trainer.fit(rows, seed=0, shuffle=False)
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "pairs": sum(g.count for g in rows), "loss": history[0]["loss"]}

    if variant != "ours_epoch":  # references are there; `fit` must not compute them again
        trainer._with_references = lambda given, folder: list(given)
    return turn


def _all_logits(module: Any) -> None:
    """The plain way: logits of every token, of which the trained ones are picked."""
    from torch.nn import functional as F

    def forward(batch: Any) -> Any:
        logits = module.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        return -F.cross_entropy(logits[batch.source].float(), batch.targets, reduction="none")

    module.forward = forward


class _PlainTorch:
    """What the loop calls of a DeepSpeed engine, on torch's own AdamW."""

    def __init__(self, module: Any) -> None:
        import torch

        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
        self._last, self._norm = True, 0.0

    def __call__(self, batch: Any) -> Any:
        return self.module(batch)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self._last = last

    def backward(self, loss: Any, scale_wrt_gas: bool) -> None:
        loss.backward()

    def step(self) -> None:
        import torch

        if self._last:
            self._norm = float(torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0))
            self.optimizer.step()
            self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> float:
        return self._norm


def _trl(variant: str, folder: str) -> Callable[[], dict[str, float]]:
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    if "compact" in variant:
        trl.trainer.utils._use_triton = lambda device: True  # only decides on which tokens the head works
    single, epoch = variant.endswith("_single"), variant.endswith("_epoch")
    rows = text_rows(single)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.started)

    batch = min(BATCH, len(rows))
    common: dict[str, Any] = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=max(1, batch // 4),
        gradient_accumulation_steps=4, num_train_epochs=1, learning_rate=1e-5, max_length=2048, use_cpu=True,
        bf16=False, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    if "compact" in variant or "no_checkpointing" in variant:
        common["gradient_checkpointing"] = False
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def turn() -> dict[str, float]:
        times.clear()
        rows.append(rows.pop(0))  # other data by its hash, or reference log-probabilities would come from a cache
        if "reward" in variant:
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
            data = Dataset.from_list([{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows])
            trainer: Any = RewardTrainer(model, RewardConfig(**common), train_dataset=data, processing_class=tokenizer)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            settings = DPOConfig(**common, beta=0.1, precompute_ref_log_probs=True)
            data = Dataset.from_list(rows)
            trainer = DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.add_callback(Clock())
        started = time.perf_counter()
        trainer.train()
        whole = time.perf_counter() - started
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return {"seconds": whole if epoch else sum(times), "pairs": len(rows), "loss": losses[0]}

    return turn


def worker(variant: str, folder: str) -> None:
    """Make the variant, then one turn per line on the standard input."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print
    turn = (_trl if variant.startswith("trl") else _ours)(variant, folder)
    before = psutil.Process().memory_info().rss / 2**30
    turn()  # warm
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
    print(json.dumps({"ready": True}), file=out, flush=True)
    for _ in sys.stdin:
        print(json.dumps(turn() | {"grown_gib": grown}), file=out, flush=True)


class Variant:
    """A worker process and what its turns said."""

    def __init__(self, name: str, folder: Path, log: Path) -> None:
        self.name, self.turns = name, list[dict[str, float]]()
        command = [sys.executable, "-m", "benchmarks.training", "--worker", name, "--model", str(folder)]
        self._log = log.open("a")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1",
                              "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, float]:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"{self.name} ended: see {self._log.name}")
        return dict(json.loads(line))

    def turn(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.turns.append(self._read())

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)

    @property
    def pairs_per_s(self) -> float:
        return statistics.median(turn["pairs"] / turn["seconds"] for turn in self.turns)

    @property
    def grown_gib(self) -> float:
        return self.turns[0]["grown_gib"]


def compare(names: tuple[str, ...], folder: Path, turns: int, log: Path, say: Callable[[str], None]) -> list[Variant]:
    """Run the variants turn by turn, side by side."""
    variants = []
    for name in names:
        say(f"starting {name}")
        variants.append(Variant(name, folder, log))
    for number in range(turns):
        say(f"turn {number + 1} of {turns}: {', '.join(names)}")
        for variant in variants:
            variant.turn()
    for variant in variants:
        variant.close()
        say(f"{variant.name}: {variant.pairs_per_s:.2f} pairs/s, grown by {variant.grown_gib:.2f} GiB")
    return variants


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
    parser.add_argument("--quick", action="store_true", help="two turns, the main figures")
    parser.add_argument("--turns", type=int, help="of each variant (5; with --quick 2)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.model)
        return
    console = Console(stderr=True)
    turns = options.turns or (2 if options.quick else 5)
    with tempfile.TemporaryDirectory() as scratch:
        folder, log = model_folder(Path(scratch, "model")), Path(tempfile.gettempdir(), "psycho-benchmark-training.log")
        runs = [
            (*DPO, *(() if options.quick else STEPS_OF_OURS[:-1]), "plain_torch"),
            ("ours_single", "trl_compact_single"),
            ("ours_reward", "trl_reward", "trl_reward_no_checkpointing"),
            ("ours_epoch", "trl_compact_epoch"),
        ]
        found = {
            variant.name: variant
            for names in runs
            for variant in compare(names, folder, turns, log, lambda text: console.print(text, highlight=False))
        }
    table = Table("variant", "pairs/s", "first loss", "memory grown by (GiB)")
    for name in LABELS:
        if name in found:
            one = found[name]
            table.add_row(LABELS[name], f"{one.pairs_per_s:.2f}", f"{one.turns[0]['loss']:.4f}", f"{one.grown_gib:.2f}")
    Console(width=110).print(table)

    def ratio(ours: str, theirs: str) -> float:
        return round(found[ours].pairs_per_s / found[theirs].pairs_per_s, 2)

    result = {
        "dpo_vs_trl": ratio("ours", "trl"),
        "dpo_vs_trl_no_checkpointing": ratio("ours", "trl_no_checkpointing"),
        "dpo_vs_trl_compact": ratio("ours", "trl_compact"),
        "dpo_epoch_vs_trl": ratio("ours_epoch", "trl_compact_epoch"),
        "dpo_single_pair_vs_trl_compact": ratio("ours_single", "trl_compact_single"),
        "reward_vs_trl": ratio("ours_reward", "trl_reward"),
        "reward_vs_trl_no_checkpointing": ratio("ours_reward", "trl_reward_no_checkpointing"),
        "memory_vs_trl": round(found["ours"].grown_gib / found["trl"].grown_gib, 2),
        "memory_vs_trl_compact": round(found["ours"].grown_gib / found["trl_compact"].grown_gib, 2),
        "deepspeed_vs_torch": ratio("ours", "plain_torch"),
        "packing_efficiency": round(efficiency()[0], 4),
        "packing_efficiency_of_budget": round(efficiency()[1], 4),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
