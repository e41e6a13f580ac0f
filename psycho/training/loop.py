"""The one training loop, on `deepspeed.initialize` under Ray Train, for SFT, reward, DPO and online DPO.

The objective says what a micro-step costs; the loop does the rest: the plan, ZeRO, the learning rate, statistics as
sums over all ranks, and a plain Hugging Face checkpoint at the end. The loss of an optimizer step is the mean over
everything in it, whatever the number of ranks and micro-steps.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from psycho.config import LoopConfig, TrainingConfig
from psycho.run import content_key
from psycho.training.checkpoint import Checkpoints
from psycho.training.groups import Group, response_key, split
from psycho.training.lora import add_lora, merged
from psycho.training.modules import use_packing
from psycho.training.objectives import OBJECTIVES, Preference, Row
from psycho.training.packing import Batch, packed, padded
from psycho.training.plan import Step, learning_rate, plan_epoch
from psycho.training.references import with_references

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
        self.objective = OBJECTIVES[kind](settings, self.tokenizer)
        loaded = self.objective.load(model, torch.bfloat16 if training.precision == "bf16" else torch.float32)
        self.unpacked = use_packing(loaded) if training.packing else "training.packing is off"
        if training.gradient_checkpointing:
            loaded.gradient_checkpointing_enable()
        self._config = loaded.config
        self._save_pretrained = loaded.save_pretrained
        if training.lora:
            loaded = add_lora(loaded, training.lora, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
        module = self.objective.wrap(loaded)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(settings, training),
        )

    def groups(self, rows: Sequence[Row]) -> tuple[list[Group], list[int]]:
        """Rows as speech groups that fit a bin; the second list holds the positions of rows that are too long.

        Every rank must call: each encodes its share of the rows and gets the rest from the others.
        """
        members = self.objective.members(rows)
        mine = [
            self.objective.encode([rows[index] for index in own], self.training.max_length)
            for own in members[self.rank :: self.world]
        ]
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, mine)
        groups: list[Group] = []
        too_long: list[int] = []
        for turn, own in enumerate(members):
            encoded, over = shares[turn % self.world][turn // self.world]
            groups += [part for group in encoded for part in split(group, self.training.bin_tokens)]
            too_long += [own[place] for place in over]
        return groups, sorted(too_long)

    def collate(self, groups: Sequence[Group]) -> Batch:
        """One micro-step's groups on this rank's device."""
        batch = padded(groups, self.tokenizer.pad_token_id) if self.unpacked else packed(groups)
        return batch.to(self.device)

    def fit(
        self,
        groups: Sequence[Group],
        seed: int,
        on_step: OnStep | None = None,
        shuffle: bool = True,
        references: str | None = None,
        checkpoints: str | None = None,
    ) -> list[dict[str, float]]:
        """Train for the configured epochs; returns the statistics of each optimizer step.

        Args:
            references: folder of the stored reference log-probabilities, where the objective needs them.
            checkpoints: folder of checkpoints that an interrupted training goes on from; none: it starts anew.
        """
        if self.objective.needs_reference:
            groups = self._with_references(groups, references)
        settings = self.settings
        sizes, counts = [group.tokens for group in groups], [group.count for group in groups]
        steps = [
            step
            for epoch in range(settings.epochs)
            for step in plan_epoch(
                sizes, counts, settings.batch_size, self.world, self.training.bin_tokens, seed + epoch, shuffle
            )
        ]
        saved = self._checkpoints(checkpoints, groups, seed)
        done, history = saved.resume(self.engine) if saved else (0, [])
        self.engine.train()
        for number, step in enumerate(steps[done:], start=done):
            rate = learning_rate(number, len(steps), settings.lr, settings.warmup_share, settings.schedule)
            for parameters in self.engine.optimizer.param_groups:
                parameters["lr"] = rate
            started = time.perf_counter()
            statistics = self._step(step, groups)
            read = sum(sizes[index] for index in step.groups)
            statistics |= {"step": number, "lr": rate, "tokens": read}
            statistics["tokens_per_s"] = read / (time.perf_counter() - started)
            history.append(statistics)
            if on_step:
                on_step(sum(counts[index] for index in step.groups), read, statistics)
            if saved:
                saved.save(self.engine, number + 1, len(steps), history)
        return history

    def _checkpoints(self, folder: str | None, groups: Sequence[Group], seed: int) -> Checkpoints | None:
        every = self.training.checkpoint_every_steps
        if folder is None or every is None:
            return None
        data = [response_key(group, index) for group in groups for index in range(len(group.responses))]
        training = self.training.model_dump(exclude={"env", "checkpoint_every_steps"})
        key = content_key(self.settings.model_dump(), training, self.world, seed, data)
        return Checkpoints(folder, key, every)

    def _step(self, step: Step, groups: Sequence[Group]) -> dict[str, float]:
        """One optimizer step. Nothing waits for the device before the sums are read at its end."""
        total = sum(self.objective.weight(groups[index]) for index in step.groups)
        count = sum(groups[index].count for index in step.groups)
        mine = step.of(self.rank, self.world)
        sums: dict[str, torch.Tensor] = {}
        for turn, members in enumerate(mine):
            # A rank without a group joins the collectives with somebody's smallest and adds nothing.
            batch = self.collate([groups[index] for index in members or step.groups[-1:]])
            share = 1.0 if members else 0.0
            self.engine.set_gradient_accumulation_boundary(turn == len(mine) - 1)
            loss, parts = self.objective.sums(self.engine(batch), batch)
            # DeepSpeed divides by the ranks; the mean over the whole step is wanted, whoever had which part of it.
            self.engine.backward(loss.float() * (share * self.world / max(total, 1e-9)), scale_wrt_gas=False)
            self.engine.step()
            for name, value in parts.items():
                sums[name] = sums.get(name, torch.zeros((), device=self.device)) + share * value
        names = sorted(sums)
        stacked = torch.stack([sums[name].double() for name in names])
        dist.all_reduce(stacked)
        merged = dict(zip(names, stacked.tolist(), strict=True))
        loss_value = merged.pop("loss") / (merged.pop("loss_weight", None) or count)
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        return {"loss": loss_value, "grad_norm": norm} | {name: value / count for name, value in merged.items()}

    def _with_references(self, groups: Sequence[Group], folder: str | None) -> list[Group]:
        assert isinstance(self.objective, Preference)
        objective = self.objective
        self.engine.eval()
        return with_references(
            groups,
            lambda batch: objective.logprobs(self.engine(batch), batch),
            self.collate,
            self.training.bin_tokens,
            folder,
        )

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (rank 0; every rank must call)."""
        if self.training.zero_stage == 3:
            state = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            state = {name: value.detach().cpu() for name, value in self.engine.module.state_dict().items()}
        if self.rank == 0:
            state = {name.removeprefix("model."): value for name, value in state.items()}
            if self.training.lora:
                state = merged(state, self.training.lora.alpha / self.training.lora.r)
            if getattr(self._config, "tie_word_embeddings", False):
                state.pop("lm_head.weight", None)
            self._save_pretrained(folder, state_dict=state, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)
        dist.barrier()

    def close(self) -> None:
        """Give back what the engine holds."""
        self.engine.destroy()


def deepspeed_config(settings: LoopConfig, training: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for one loop."""
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.device == "cuda"}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.device == "cuda"}
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # DeepSpeed's own fused Adam is for GPUs; on a CPU torch's is as fast and needs no compiled op.
    adam = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": [0.9, 0.95]}
    if training.device == "cpu":
        adam["torch_adam"] = True
    return {
        # The loop itself says where a step ends and by what the loss is divided (`Trainer._step`). Two, because with
        # one DeepSpeed overwrites gradients where it should add them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
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
