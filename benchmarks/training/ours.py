"""Our arms: the engine as it is, and with its tricks taken away one after the other."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.training.data import BATCH, Size, groups

BIN_TOKENS = 2048  # about what TRL's micro-step of two pairs holds; the batch is the same on both sides


def ours(variant: str, folder: str, size: Size) -> Callable[[], dict[str, float]]:
    """One turn: a few optimizer steps over the pairs."""
    import torch
    import torch.distributed as dist

    from psycho.config import DPOConfig, RewardConfig, TrainingConfig
    from psycho.training import loop

    os.environ["LOCAL_RANK"] = "0"
    store = tempfile.mkdtemp()
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=0, world_size=1)
    training = TrainingConfig(
        workers=1, gpus_per_worker=0, device="cpu", precision="fp32", zero_stage=2, threads_per_worker=1,
        max_length=BIN_TOKENS // 2, bin_tokens=BIN_TOKENS, packing=variant not in ("own_loop", "response_logits"),
    )  # fmt: skip
    loop.setup_worker(training)
    kind = "reward" if variant == "ours_reward" else "dpo"
    settings: Any = (RewardConfig if kind == "reward" else DPOConfig)(lr=1e-5, batch_size=BATCH, epochs=1)
    trainer = loop.Trainer(kind, folder, settings, training, seed=0)
    if variant == "own_loop":
        _all_logits(trainer.engine.module)
    if variant == "plain_torch":
        trainer.engine = PlainTorch(trainer, folder)
    rows = [part for group in _rows(variant, size) for part in loop.split(group, BIN_TOKENS)]
    if kind == "dpo" and variant != "ours_epoch":  # references are there; `fit` must not compute them again
        rows = trainer._with_references(rows, None)
        trainer._with_references = lambda given, folder: list(given)
    torch.manual_seed(0)
    losses: list[float] = []  # the weights go on from turn to turn

    def turn() -> dict[str, float]:
        started = time.perf_counter()
        history = trainer.fit(rows, seed=0, shuffle=False)
        seconds = time.perf_counter() - started
        losses.append(history[0]["loss"])
        return {"seconds": seconds, "pairs": sum(g.count for g in rows), "loss": losses[0]}

    return turn


def _rows(variant: str, size: Size) -> list[Any]:
    """The pairs as groups that share as much of the prompt as the variant does."""
    from psycho.training.groups import Encoded, Group, only

    rows = groups(size, variant == "ours_single")
    if variant in ("own_loop", "response_logits", "packed"):
        rows = [
            Group([], tuple(Encoded(g.prompt + r.ids, [0.0] * len(g.prompt) + r.weights) for r in g.responses), g.pairs)
            for g in rows
        ]
    if variant in ("own_loop", "response_logits", "shared_by_pair"):  # padded: a row for each side of each pair
        rows = [only(group, [pair]) for group in rows for pair in range(len(group.pairs))]
    return rows


def _all_logits(module: Any) -> None:
    """The plain way: logits of every token, of which the trained ones are picked."""
    from torch.nn import functional as F

    def forward(batch: Any) -> Any:
        logits = module.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1)
        return -F.cross_entropy(logits[batch.source].float(), batch.targets, reduction="none")

    module.forward = forward


class PlainTorch:
    """What the loop calls of a DeepSpeed engine, on torch's own AdamW and a model that DeepSpeed never saw."""

    def __init__(self, trainer: Any, folder: str) -> None:
        import torch

        from psycho.training.modules import use_packing

        model = trainer.objective.load(folder, torch.float32)
        assert use_packing(model) is None
        self.module = trainer.objective.wrap(model)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
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
