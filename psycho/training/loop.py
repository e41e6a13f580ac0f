"""The one training loop, on `deepspeed.initialize` under Ray Train, for SFT, reward, DPO and online DPO.

The objective says what a micro-step costs; the loop does the rest: the plan, ZeRO, the learning rate, statistics as
sums over all ranks, and a plain Hugging Face checkpoint at the end. The loss of an optimizer step is the mean over
everything in it, whatever the number of ranks and micro-steps.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from psycho import secrets, storage
from psycho.config import TRAINING_ROUNDING, LoopConfig, TrainingConfig
from psycho.errors import BadInput
from psycho.inference.models import local_model
from psycho.principles import STEMS
from psycho.run import content_key
from psycho.training.checkpoint import Best, Checkpoints
from psycho.training.engine import deepspeed_config
from psycho.training.flops import count_flops
from psycho.training.groups import Group, response_key, split
from psycho.training.launch import HISTORY
from psycho.training.lora import add_lora, dequantized, load_options, merged, unquantized
from psycho.training.modules import PolicyModel, use_packing
from psycho.training.objectives import OBJECTIVES, Preference, Row
from psycho.training.packing import Batch, packed, padded, shared
from psycho.training.plan import Step, learning_rate, plan_epoch
from psycho.training.references import with_references
from psycho.training.sequence import sequence_group

HEADS = "principle_heads"  # folder of a reward model's extra heads
OnStep = Callable[[int, int, dict[str, float]], None]


class Trainer:
    """A model in training: `fit` as often as there are rounds, `save` in between."""

    def __init__(self, kind: str, model: str, settings: LoopConfig, training: TrainingConfig, seed: int) -> None:
        _seed(seed)
        self.settings, self.training = settings, training
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sequence = sequence_group(training.sequence_parallel)
        # A lane is the ranks that share each of their bins; the plan deals bins to lanes.
        self.lane = self.rank // training.sequence_parallel, self.world // training.sequence_parallel
        self.device = torch.device("cpu" if training.device == "cpu" else f"cuda:{torch.cuda.current_device()}")
        model = local_model(model)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.objective = OBJECTIVES[kind](settings, self.tokenizer)
        dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        loaded = self.objective.load(model, dtype, **load_options(training.lora, self.device, dtype))
        self.unpacked = use_packing(loaded) if training.packing else "training.packing is off"
        if self.sequence:
            _check_sequence(loaded, training.sequence_parallel, self.unpacked)
        self._flops = count_flops(loaded, words=kind != "reward", frozen=training.lora is not None)
        if training.gradient_checkpointing:
            loaded.gradient_checkpointing_enable()
        self._config = loaded.config
        quantized = training.lora and training.lora.quantize
        self._save_pretrained = (unquantized(loaded) if quantized else loaded).save_pretrained
        if training.lora:
            loaded = add_lora(loaded, training.lora, "SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
        module = self.objective.wrap(loaded)
        if training.zero_stage == 3 and isinstance(module, PolicyModel):
            module.most = -(-training.bin_tokens // training.sequence_parallel)
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
        room = self.training.bin_tokens
        for turn, own in enumerate(members):
            encoded, over = shares[turn % self.world][turn // self.world]
            groups += [part for group in encoded for part in split(group, room, self.objective.listwise)]
            too_long += [own[place] for place in over]
        return groups, sorted(too_long)

    @property
    def notes(self) -> list[str]:
        """What the user should hear: that the model runs padded though packing was asked for, and why, and the like."""
        found = []
        if self.unpacked is not None and self.training.packing:
            found.append(f"not packed, a padded row for each response, which is slower: {self.unpacked}")
        return found

    def collate(self, groups: Sequence[Group]) -> Batch:
        """One micro-step's groups on this rank's device."""
        batch = padded(groups, self.tokenizer.pad_token_id) if self.unpacked else packed(groups)
        return (shared(batch, self.sequence) if self.sequence else batch).to(self.device)

    def fit(
        self,
        groups: Sequence[Group],
        seed: int,
        on_step: OnStep | None = None,
        shuffle: bool = True,
        references: str | None = None,
        checkpoints: str | None = None,
        dev: Sequence[Group] = (),
    ) -> list[dict[str, float]]:
        """Train for the configured epochs; returns the statistics of each optimizer step.

        Args:
            references: folder of the stored reference log-probabilities, where the objective needs them.
            checkpoints: folder of checkpoints that an interrupted training goes on from; none: it starts anew.
            dev: groups to choose the best weights by, whenever a checkpoint is due and at the end; needs `checkpoints`.
        """
        if self.objective.needs_reference:
            groups = self._with_references(groups, references)
            dev = self._with_references(dev, references) if dev else dev
        settings = self.settings
        sizes, counts = [group.tokens for group in groups], [group.count for group in groups]
        steps = [
            step
            for epoch in range(settings.epochs)
            for step in plan_epoch(
                sizes, counts, settings.batch_size, self.lane[1], self.training.bin_tokens, seed + epoch, shuffle
            )
        ]
        saved = self._checkpoints(checkpoints, groups, seed)
        best = Best(checkpoints, self.training.checkpoint_every_steps) if checkpoints and dev else None
        done, history = saved.resume(self.engine, lambda: self._prime(groups)) if saved else (0, [])
        self.engine.train()
        with closing(saved) if saved else nullcontext():
            for number, step in enumerate(steps[done:], start=done):
                rate = learning_rate(number, len(steps), settings.lr, settings.warmup_share, settings.schedule)
                for parameters in self.engine.optimizer.param_groups:
                    parameters["lr"] = rate
                started = time.perf_counter()
                statistics = self._step(step, groups)
                read = sum(sizes[index] for index in step.groups)
                statistics |= {"step": number, "lr": rate, "tokens": read}
                statistics |= self._speed(step, groups, read, time.perf_counter() - started)
                if best and best.due(number + 1, len(steps)):
                    statistics["dev_loss"] = self._mean_loss(dev)
                    best.offer(statistics["dev_loss"], number + 1, self.save)
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
        # Group by group: smaller bins may split some, and then the steps are others.
        data = [[response_key(group, index) for index in range(len(group.responses))] for group in groups]
        training = self.training.model_dump(exclude=set(TRAINING_ROUNDING))
        key = content_key(self.settings.model_dump(), training, seed, data)
        return Checkpoints(folder, key, every, self.training.collective_timeout_s)

    def _prime(self, groups: Sequence[Group]) -> None:
        """A step that changes nothing: without it the optimizer has no state to restore."""
        for parameters in self.engine.optimizer.param_groups:
            parameters["lr"] = 0.0
        batch = self.collate([min(groups, key=lambda group: group.tokens)])
        loss, _ = self.objective.sums(self.engine(batch), batch)
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.backward(loss.float() * 0.0, scale_wrt_gas=False)
        self.engine.step()

    def _step(self, step: Step, groups: Sequence[Group]) -> dict[str, float]:
        """One optimizer step. Nothing waits for the device before the sums are read at its end."""
        total = sum(self.objective.weight(groups[index]) for index in step.groups)
        count = sum(groups[index].count for index in step.groups)
        mine = step.of(*self.lane)
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
        # The ranks of a lane have all computed the same sums, though each has just its part of the gradient.
        stacked = torch.stack([sums[name].double() for name in names]) / self.training.sequence_parallel
        dist.all_reduce(stacked)
        merged = dict(zip(names, stacked.tolist(), strict=True))
        loss_value = merged.pop("loss") / (merged.pop("loss_weight", None) or count)
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        return {"loss": loss_value, "grad_norm": norm} | {name: value / count for name, value in merged.items()}

    def _speed(self, step: Step, groups: Sequence[Group], tokens: int, seconds: float) -> dict[str, float]:
        """Tokens/s, the share of the devices' peak that the model's own operations took (MFU, where the peak is
        configured), and the most memory that this rank has held so far."""
        found = {"tokens_per_s": tokens / seconds, "memory_gib": peak_memory_gib(self.device)}
        if self.training.peak_tflops:
            needed = sum(self._flops.of(groups[index]) for index in step.groups)
            found["mfu"] = needed / (seconds * self.world * self.training.peak_tflops * 1e12)
        return found

    def _mean_loss(self, groups: Sequence[Group]) -> float:
        """The objective's mean loss over groups, without training; every rank must call."""
        sizes, counts = [group.tokens for group in groups], [group.count for group in groups]
        (step,) = plan_epoch(sizes, counts, sum(counts), self.lane[1], self.training.bin_tokens, 0, shuffle=False)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.engine.eval()
        with torch.no_grad():
            for members in step.of(*self.lane):
                batch = self.collate([groups[index] for index in members or step.groups[-1:]])
                loss, _ = self.objective.sums(self.engine(batch), batch)
                total += loss.double() * bool(members)
        self.engine.train()
        dist.all_reduce(total)
        weight = sum(self.objective.weight(group) for group in groups) * self.training.sequence_parallel
        return total.item() / max(weight, 1e-9)

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
            self.lane,
        )

    def save(self, folder: str) -> None:
        """Write a Hugging Face folder (rank 0; every rank must call), on an object store too."""
        if self.training.zero_stage == 3:
            state = self.engine._zero3_consolidated_16bit_state_dict()
        else:
            state = {name: value.detach().cpu() for name, value in self._weights().items()}
        if self.rank == 0:
            heads = {name: value.contiguous() for name, value in state.items() if name.startswith("principles.")}
            state = {name.removeprefix("model."): value for name, value in state.items() if name not in heads}
            if self.training.lora:
                state = merged(state, self.training.lora.alpha / self.training.lora.r)
            if getattr(self._config, "tie_word_embeddings", False):
                state.pop("lm_head.weight", None)
            with storage.writing_folder(folder) as local:
                # In files that S3 copies by itself, which it does up to 5 GiB.
                self._save_pretrained(local, state_dict=state, safe_serialization=True, max_shard_size="4GB")
                self.tokenizer.save_pretrained(local)
                if heads:
                    save_heads(str(local), heads)
        dist.barrier()

    def _weights(self) -> dict[str, torch.Tensor]:
        lora, module = self.training.lora, self.engine.module
        return dequantized(module) if lora and lora.quantize else module.state_dict()

    def close(self) -> None:
        """Give back what the engine holds."""
        self.engine.destroy()
        if self.sequence:
            dist.destroy_process_group(self.sequence.ranks)


def write_history(folder: str, history: list[dict[str, float]]) -> None:
    """The statistics of each step beside the model, one JSON line each."""
    lines = "".join(json.dumps({k: round(v, 6) for k, v in row.items()}) + "\n" for row in history)
    storage.write_text(storage.join(folder, HISTORY), lines)


def write_notes(folder: str, notes: list[str]) -> None:
    """What the user should hear of a training, for the stage to take."""
    if notes:
        storage.write_text(storage.join(folder, "notes.json"), json.dumps(notes))


def save_heads(folder: str, heads: dict[str, torch.Tensor]) -> None:
    """The heads of the principles in a folder below the model's: what reads all weights of a folder must not meet
    them, for to everyone else the model is a plain one-label classifier."""
    from safetensors.torch import save_file

    below = Path(folder, HEADS)
    below.mkdir(exist_ok=True)
    order = {"principles": ",".join(STEMS), "scale": "rating = output + 3"}
    save_file({name: value.cpu() for name, value in heads.items()}, below / "heads.safetensors", metadata=order)


def peak_memory_gib(device: torch.device) -> float:
    """The most that this process has held: on the GPU, or of the host's memory where it trains on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _check_sequence(model: Any, ranks: int, unpacked: str | None) -> None:
    """Refuse a model whose bins ranks cannot share.

    Raises:
        BadInput: its heads do not divide, or it does not go through our attention.
    """
    heads = model.config.get_text_config().num_attention_heads
    if unpacked:
        raise BadInput(f"training.sequence_parallel needs packed bins, and {unpacked}; set it to 1")
    if heads % ranks:
        raise BadInput(
            f"training.sequence_parallel {ranks} does not divide the {heads} attention heads of "
            f"{type(model).__name__}; set a number that does"
        )


def _seed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


def setup_worker(training: TrainingConfig) -> None:
    """Environment, threads and the process group, once per worker; Ray Train has made the group."""
    os.environ.update(secrets.given(training.env))
    # DeepSpeed builds its CPU op on first use and looks for ninja, which comes with the environment, on the PATH.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if training.threads_per_worker:
        torch.set_num_threads(training.threads_per_worker)
    deepspeed.init_distributed(dist_backend=None, verbose=False)
