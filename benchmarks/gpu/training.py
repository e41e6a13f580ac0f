"""Preference training on one GPU at real shapes, beside TRL: tokens/s, pairs/s, MFU, memory.

    python -m benchmarks.gpu.training [--shapes 1b,3b,8b-lora,8b-offload] [--bins 2048,8192] [--steps 6]
    python -m benchmarks.gpu.training --shapes tiny --bins 2048        # tries the script, without a GPU too

Needs one CUDA GPU of 80 GiB or more (3B in full and 8B with offload want an H200 or the host's memory: 8B-offload
takes 130 GiB of it), the `gpu` extra of pyproject.toml, and nothing from the network: weights are random. The lengths
are those of the domain (`benchmarks/training/data.py`): prompt 230, four responses of 240 +- 90 tokens, pairs by
gap >= 1. MFU is the loop's own statistic (`psycho/training/flops.py`) against the card's dense bf16 peak. TRL runs the
same pairs, precomputed references, gradient checkpointing as ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.training import data as cpu

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied head: Llama 3.x
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "tiny": (128, 256, 2, 4, 2, 4096, True),
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),
    "8b": (4096, 14336, 32, 32, 8, 128_256, False),
}
SIZE = cpu.SIZES["full"]
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16


def folder(shape: str, root: Path) -> Path:
    """A Llama of this shape with random weights, and the tokenizer of the CPU benchmark."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, kv, vocabulary, tied = SHAPES[shape]
    made = cpu.model_folder(SIZE, root)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(made)
    return made


def ours(name: str, model: str, bins: int, steps: int, cuda: bool, peak: float | None) -> dict[str, float]:
    """Median over optimizer steps of our loop; the first two warm it up."""
    import torch

    from psycho.config import DPOConfig, LoRAConfig, TrainingConfig
    from psycho.training import loop

    training = TrainingConfig(
        workers=1,
        gpus_per_worker=1 if cuda else 0,
        device="cuda" if cuda else "cpu",
        precision="bf16" if cuda else "fp32",
        zero_stage=2,
        offload_optimizer=name.endswith("offload"),
        gradient_checkpointing=True,
        max_length=1024,
        bin_tokens=bins,
        lora=LoRAConfig() if name.endswith("lora") else None,
        peak_tflops=peak,
    )
    loop.setup_worker(training)
    trainer = loop.Trainer("dpo", model, DPOConfig(lr=1e-6, batch_size=cpu.BATCH, epochs=steps), training, seed=0)
    groups = [part for group in cpu.groups(SIZE) for part in loop.split(group, bins)]
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    history = trainer.fit(groups, seed=0)[2:]
    pairs = sum(group.count for group in groups)
    tokens = sum(group.tokens for group in groups)
    speed = statistics.median(row["tokens_per_s"] for row in history)
    trainer.close()
    return {
        "tokens_per_s": speed,
        "pairs_per_s": speed * pairs / tokens,
        **({"mfu": statistics.median(row["mfu"] for row in history)} if peak else {}),
        "memory_gib": history[-1]["memory_gib"],
    }


def trl(model: str, cuda: bool) -> dict[str, float]:
    """Pairs a second of TRL's DPOTrainer on the same pairs; its reference pass is not counted."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = cpu.text_rows(SIZE)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - self.started)

    settings = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=cpu.BATCH // 4,
        num_train_epochs=4,
        learning_rate=1e-6,
        max_length=1024,
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=True,
        precompute_ref_log_probs=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if cuda else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer = DPOTrainer(loaded, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.add_callback(Clock())
    trainer.train()
    an_epoch = max(1, -(-len(rows) // cpu.BATCH))
    return {
        "pairs_per_s": len(rows) * (len(times) - an_epoch) / an_epoch / sum(times[an_epoch:]),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,3b,8b-lora,8b-offload")
    parser.add_argument("--bins", default="2048,8192")
    parser.add_argument("--steps", type=int, default=6, help="epochs over the benchmark's pairs")
    options = parser.parse_args()
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if cuda else "CPU"
    peak = next((value for name, value in PEAK_TFLOPS.items() if name in device), None)
    os.environ.setdefault("LOCAL_RANK", "0")
    store = tempfile.mkdtemp()
    dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
    table = Table("shape", "bin", "tokens/s", "pairs/s", "MFU", "GiB", "TRL pairs/s", "TRL GiB", title=device)
    result: dict[str, float | str] = {"device": device, "torch": torch.__version__}
    for name in options.shapes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            model = str(folder(name.partition("-")[0], Path(scratch, "model")))
            theirs = trl(model, cuda) if "-" not in name else {}
            for bins in map(int, options.bins.split(",")):
                mine = ours(name, model, bins, options.steps, cuda, peak)
                mfu = mine.get("mfu")
                table.add_row(
                    name,
                    f"{bins:,}",
                    f"{mine['tokens_per_s']:,.0f}",
                    f"{mine['pairs_per_s']:.2f}",
                    "–" if mfu is None else f"{mfu:.1%}",
                    f"{mine['memory_gib']:.1f}",
                    f"{theirs['pairs_per_s']:.2f}" if theirs else "–",
                    f"{theirs['memory_gib']:.1f}" if theirs else "–",
                )
                key = f"{name}_{bins}"
                result[f"{key}_pairs_per_s"] = round(mine["pairs_per_s"], 3)
                if mfu is not None:
                    result[f"{key}_mfu"] = round(mfu, 4)
                if theirs:
                    result[f"{key}_vs_trl"] = round(mine["pairs_per_s"] / theirs["pairs_per_s"], 2)
    Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
