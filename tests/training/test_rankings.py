"""Training on rankings, a speech's pairs read as one Plackett-Luce term: steps of the loop on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from psycho.config import DPOConfig, LoopConfig, RewardConfig, TrainingConfig, build_config
from psycho.errors import BadInput
from psycho.training.loop import Trainer

Rows = Callable[[int], list[dict[str, Any]]]

TRAINING = TrainingConfig(
    workers=1, gpus_per_worker=0, device="cpu", precision="fp32", zero_stage=0, threads_per_worker=1, max_length=64,
    bin_tokens=400,
)  # fmt: skip


def _history(kind: str, model: str, settings: LoopConfig, rows: list[dict[str, Any]], **changes: Any) -> list[Any]:
    trainer = Trainer(kind, model, settings, TRAINING.model_copy(update=changes), seed=0)
    groups, too_long = trainer.groups(rows)
    assert not too_long
    history = trainer.fit(groups, seed=0)
    trainer.close()
    steady = ("loss", "accuracy", "margin", "rating_error")
    return [{key: row[key] for key in steady if key in row} for row in history]


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_pairs_alone_train_as_bradley_terry(
    kind: str, one_rank: None, tiny_llama: Callable[..., str], ranking_rows: Rows
) -> None:
    plain: dict[str, Any] = {"lr": 5e-4, "batch_size": 3, "epochs": 3}
    one: LoopConfig
    other: LoopConfig
    if kind == "reward":
        plain |= {"margin_per_gap": 0.2, "centring": 0.01}
        one, other = RewardConfig(**plain), RewardConfig(**plain, loss="plackett_luce")
    else:
        plain |= {"nll_weight": 0.1}
        one, other = DPOConfig(**plain), DPOConfig(**plain, loss="plackett_luce")
    expected = _history(kind, tiny_llama(0), one, ranking_rows(2))
    found = _history(kind, tiny_llama(0), other, ranking_rows(2))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_ranking_cut_into_bins_is_the_same_step(
    kind: str, one_rank: None, tiny_llama: Callable[..., str], ranking_rows: Rows
) -> None:
    """One division by all choices of the step, and pairs that came twice count once."""
    made = RewardConfig if kind == "reward" else DPOConfig
    settings = made(lr=5e-4, batch_size=100, epochs=3, loss="plackett_luce")
    expected = _history(kind, tiny_llama(0), settings, ranking_rows(4))
    found = _history(kind, tiny_llama(0), settings, ranking_rows(4), bin_tokens=100)
    once = _history(kind, tiny_llama(0), settings, ranking_rows(4)[:-2])
    for mine, single, theirs in zip(found, once, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4)
        assert single == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("key", "value"), [("label_smoothing", 0.1), ("ld_alpha", 0.5)])
def test_what_is_about_pairs_is_refused(key: str, value: float) -> None:
    tree = {"training": {"dpo": {"loss": "plackett_luce", key: value}}}
    with pytest.raises(BadInput, match=f"{key} is about pairs and loss plackett_luce about rankings"):
        build_config(tree, "run.yaml")
