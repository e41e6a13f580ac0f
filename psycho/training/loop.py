"""The one training loop, on `deepspeed.initialize` under Ray Train, for SFT, reward, DPO and online DPO.

The objective says what a micro-batch costs; the loop does the rest: the plan, ZeRO, the learning rate, statistics as
sums over all ranks, and a plain Hugging Face checkpoint at the end. The loss of an optimizer step is the mean over
everything in it, whatever the number of ranks and micro-batches.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from psycho.config import LoopConfig, TrainingConfig
from psycho.training.examples import Encoded, Pair, length, tokens
from psycho.training.objectives import DPO, OBJECTIVES, Row
from psycho.training.plan import learning_rate, micro_steps, plan_epoch

OnStep = Callable[[int, int, dict[str, float]], None]


class Trainer:
    """A model in training: `fit` as often as there are rounds, `save` in between."""

    def __init__(self, kind: str, model: str, settings: LoopConfig, training: TrainingConfig, seed: int) -> None:
        _seed(seed)
        self.settings, self.training = settings, training
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cpu" if training.device == "cpu" else f"cuda:{torch.cuda.current_device()}")
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.objective = OBJECTIVES[kind](settings, self.tokenizer, self.device)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        module = self.objective.load(model, dtype)
        if training.gradient_checkpointing:
            module.gradient_checkpointing_enable()  # type: ignore[operator]
        self._accumulate = micro_steps(settings.batch_size, self.world, settings.micro_batch_size)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(settings, training, self.world),
        )

    def examples(self, rows: Sequence[Row]) -> tuple[list[Encoded | Pair], list[int]]:
        """Encode rows; the second list holds the positions of rows that are over the maximal length."""
        kept: list[Encoded | Pair] = []
        too_long: list[int] = []
        for index, row in enumerate(rows):
            example = self.objective.example(row)
            if length(example) > self.training.max_length:
                too_long.append(index)
            else:
                kept.append(example)
        return kept, too_long

    def fit(
        self, examples: Sequence[Any], seed: int, on_step: OnStep | None = None, shuffle: bool = True
    ) -> list[dict[str, float]]:
        """Train on examples for the configured epochs; returns the statistics of each optimizer step."""
        if self.objective.needs_reference:
            examples = self._with_reference(examples)
        settings = self.settings
        sizes = [length(example) for example in examples]
        steps = [
            step
            for epoch in range(settings.epochs)
            for step in plan_epoch(
                sizes,
                settings.batch_size,
                self.world,
                self.rank,
                settings.micro_batch_size,
                seed + epoch,
                shuffle,
            )
        ]
        history = []
        self.engine.train()
        for number, step in enumerate(steps):
            rate = learning_rate(number, len(steps), settings.lr, settings.warmup_share, settings.schedule)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            statistics = self._step(
                [[examples[i] for i in micro] for micro in step.micro_batches],
                [examples[i] for i in step.everything],
            )
            statistics |= {
                "step": number,
                "lr": rate,
                "tokens": sum(tokens(examples[i]) for i in step.everything),
            }
            history.append(statistics)
            if on_step:
                on_step(len(step.everything), int(statistics["tokens"]), statistics)
        return history

    def _step(self, micro_batches: list[list[Any]], everything: list[Any]) -> dict[str, float]:
        total = sum(self.objective.weight(example) for example in everything)
        sums: dict[str, torch.Tensor] = {}
        for micro in micro_batches:
            loss, parts = self.objective.sums(self.engine, micro or everything[:1])
            share = 1.0 if micro else 0.0  # an empty micro-step joins the collectives and adds nothing
            # DeepSpeed divides by ranks and micro-steps; the mean over the whole step is wanted.
            self.engine.backward(loss * (share * self.world * self._accumulate / max(total, 1e-9)))
            self.engine.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + share * value
        names = sorted(sums)
        stacked = torch.stack([sums[name].float() for name in names])
        dist.all_reduce(stacked)
        merged = dict(zip(names, stacked.tolist(), strict=True))
        weight = merged.pop("loss_weight", None) or len(everything)
        loss_value = merged.pop("loss") / weight
        return {"loss": loss_value} | {name: value / len(everything) for name, value in merged.items()}

    def _with_reference(self, examples: Sequence[Pair]) -> list[Pair]:
        """Reference log-probabilities by the model as it stands, each computed once, by one rank."""
        assert isinstance(self.objective, DPO)
        order = sorted(range(len(examples)), key=lambda index: length(examples[index]))
        size = self.engine.train_micro_batch_size_per_gpu()  # what fits in training fits here
        batches = [order[first : first + size] for first in range(0, len(order), size)]
        found: dict[int, tuple[float, float]] = {}
        self.engine.eval()
        with torch.no_grad():
            for turn in range(0, len(batches), self.world):
                batch = batches[min(turn + self.rank, len(batches) - 1)]  # all ranks join every forward pass
                chosen, rejected = self.objective.logprobs(self.engine, [examples[index] for index in batch])
                found |= dict(zip(batch, zip(chosen.tolist(), rejected.tolist(), strict=True), strict=True))
        everyone: list[Any] = [None] * self.world
        dist.all_gather_object(everyone, found)
        merged: dict[int, tuple[float, float]] = {}
        for part in everyone:
            merged |= part
        return [replace(example, reference=merged[index]) for index, example in enumerate(examples)]

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (rank 0; every rank must call)."""
        module = self.engine.module
        if self.training.zero_stage == 3:
            state = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            state = {name: value.detach().cpu() for name, value in module.state_dict().items()}
        if self.rank == 0:
            if getattr(module.config, "tie_word_embeddings", False):
                state.pop("lm_head.weight", None)
            module.save_pretrained(folder, state_dict=state, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)
        dist.barrier()

    def close(self) -> None:
        """Give back what the engine holds."""
        self.engine.destroy()


def deepspeed_config(settings: LoopConfig, training: TrainingConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for one loop."""
    accumulate = micro_steps(settings.batch_size, world, settings.micro_batch_size)
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.device == "cuda"}
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # DeepSpeed's own fused Adam is for GPUs; on a CPU torch's is as fast and needs no compiled op.
    adam = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": [0.9, 0.95]}
    if training.device == "cpu":
        adam["torch_adam"] = True
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch_size or -(-settings.batch_size // world),
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def write_history(folder: str, history: list[dict[str, float]]) -> None:
    """The statistics of each step beside the model, one JSON line each."""
    lines = "".join(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n" for row in history)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "training.jsonl").write_text(lines, encoding="utf-8")


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def setup_worker(training: TrainingConfig) -> None:
    """Environment, threads and the process group, once per worker; Ray Train has made the group."""
    os.environ.update(training.env)
    # DeepSpeed builds its CPU op on first use and looks for ninja, which comes with the environment, on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if training.threads_per_worker:
        torch.set_num_threads(training.threads_per_worker)
    deepspeed.init_distributed(dist_backend=None, verbose=False)
