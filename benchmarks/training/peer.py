"""TRL's arms: its trainers as shipped and at their best on a CPU."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks.training.data import BATCH, Size, text_rows


def trl(variant: str, folder: str, size: Size) -> Callable[[], dict[str, float]]:
    """One turn: a trainer of its own on the same pairs, an epoch; only its steps are timed (and the reference pass,
    which its constructor makes, where the variant is an epoch)."""
    import torch
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    if "compact" in variant:
        trl.trainer.utils._use_triton = lambda device: True  # only decides on which tokens the head works
    rows = text_rows(size, variant.endswith("_single"))
    times: list[float] = []
    references: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter() - self.started)

    class Timed(DPOTrainer):
        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            references.append(time.perf_counter() - started)
            return found

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
        references.clear()
        rows.append(rows.pop(0))  # other data by its hash, or reference log-probabilities would come from a cache
        if "reward" in variant:
            model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
            data = Dataset.from_list([{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows])
            trainer: Any = RewardTrainer(model, RewardConfig(**common), train_dataset=data, processing_class=tokenizer)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            settings = DPOConfig(**common, beta=0.1, precompute_ref_log_probs=True)
            trainer = Timed(model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        trainer.add_callback(Clock())
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        seconds = sum(times) + (sum(references) if variant.endswith("_epoch") else 0.0)
        return {"seconds": seconds, "pairs": len(rows), "loss": float(losses[0])}

    return turn
