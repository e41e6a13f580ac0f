"""Weights in 4 bit: what is refused and, on a GPU, what is trained and saved."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from psycho.config import Config, DPOConfig, LoRAConfig, TrainingConfig, build_config
from psycho.errors import BadInput
from psycho.training import lora
from psycho.training.loop import Trainer

QUANTIZED = LoRAConfig(r=4, quantize="nf4")


@pytest.mark.parametrize(
    ("training", "sentence"),
    [
        ({"device": "cpu"}, r"lora\.quantize needs a GPU, and device is cpu"),
        ({"zero_stage": 3}, r"lora\.quantize does not go with zero_stage 3.*set zero_stage to 2"),
    ],
)
def test_what_does_not_go_together_is_said(training: dict[str, Any], sentence: str) -> None:
    tree = {"training": {"lora": {"quantize": "nf4"}, **training}}
    with pytest.raises(BadInput, match=sentence):
        build_config(tree, "run.yaml")


def test_a_fixed_reference_is_refused() -> None:
    with pytest.raises(BadInput, match=r"training\.lora\.quantize is not made for"):
        build_config({"training": {"lora": {"quantize": "nf4"}}, "online": {"reference": "fixed"}}, "run.yaml")


def test_without_a_gpu_or_the_package_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="needs a CUDA device, and this worker trains on cpu"):
        lora.load_options(QUANTIZED, torch.device("cpu"), torch.bfloat16)
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(BadInput, match="needs the package bitsandbytes, which is not installed"):
        lora.load_options(QUANTIZED, torch.device("cuda:0"), torch.bfloat16)


def test_without_quantizing_nothing_is_asked() -> None:
    assert Config().training.lora is None
    for settings in (None, LoRAConfig()):
        assert lora.load_options(settings, torch.device("cpu"), torch.bfloat16) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not find_spec("bitsandbytes"), reason="needs CUDA, bitsandbytes")
def test_what_is_saved_is_what_was_trained_in_4_bit(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """A plain model that says what the quantized one with its adapters said; the first loss is ln 2, for its base is
    the reference."""
    training = TrainingConfig(
        workers=1, device="cuda", precision="bf16", zero_stage=2, max_length=64, bin_tokens=256, lora=QUANTIZED
    )
    rows = [{"id": "1", "question": "I feel lost.", "chosen": "What do you miss?", "rejected": "Cheer up."}]
    trainer = Trainer("dpo", tiny_llama(0), DPOConfig(lr=1e-2, batch_size=1, epochs=6), training, seed=0)
    groups, _ = trainer.groups(rows)
    history = trainer.fit(groups, seed=0)
    batch = trainer.collate(groups)
    trainer.engine.eval()
    with torch.no_grad():
        expected = trainer.engine(batch)
    trainer.save(str(tmp_path / "out"))
    trainer.close()
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-3)
    assert history[-1]["loss"] < 0.6
    model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
    assert not hasattr(model.config, "quantization_config")
    module = trainer.objective.wrap(model.to(batch.input_ids.device, torch.bfloat16)).eval()
    with torch.no_grad():
        found = module(batch)
    torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)
