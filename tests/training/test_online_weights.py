"""The stream of weights in training: every parameter once, under the checkpoint's name, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from psycho.config import DPOConfig, LoRAConfig, TrainingConfig
from psycho.errors import BadInput
from psycho.training.loop import Trainer
from psycho.training.online.weights import WeightStream, check_names, layers

TRAINING = TrainingConfig(
    workers=1, device="cpu", precision="fp32", zero_stage=0, threads_per_worker=1, max_length=256, bin_tokens=1024
)
ROWS = [{"question": f"Why {n}?", "chosen": "What helps you?", "rejected": f"Cheer up. {'No. ' * n}"} for n in range(3)]


def test_a_layer_is_what_comes_before_the_first_number() -> None:
    names = [
        "model.model.embed_tokens.weight",
        "model.model.layers.0.mlp.experts.0.w",
        "model.model.layers.0.mlp.experts.1.w",
        "model.model.layers.10.mlp.w",
        "model.model.norm.weight",
        "model.lm_head.base_layer.weight",
        "model.lm_head.lora_A.default.weight",
    ]
    assert layers(names) == [[names[0]], names[1:3], [names[3]], [names[4]], names[5:]]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, alpha=8)])
def test_the_stream_is_what_the_trainer_saves(
    tiny_llama: Callable[..., str], tmp_path: Path, lora: LoRAConfig | None
) -> None:
    """Merged where there are adapters, without the head that is the embedding, and not the weights it started from."""
    model = tiny_llama(0)
    trainer = Trainer("dpo", model, DPOConfig(lr=1e-2, batch_size=2), TRAINING.model_copy(update={"lora": lora}), 0)
    trainer.fit(trainer.groups(ROWS)[0], 0)
    trainer.save(str(tmp_path / "saved"))
    stream = WeightStream(trainer)
    found = dict(stream)
    saved, first = (load_file(Path(folder, "model.safetensors")) for folder in (tmp_path / "saved", model))
    assert found.keys() == saved.keys() == first.keys()
    assert all(torch.equal(value, saved[name]) for name, value in found.items())
    changed = [name for name, value in found.items() if not torch.equal(value, first[name])]
    assert len(changed) >= 14
    assert stream.shapes() == [(name, value.dtype, tuple(value.shape)) for name, value in found.items()]
    check_names(stream, model)
    kept = found["model.norm.weight"].clone()
    trainer.fit(trainer.groups(ROWS)[0], 1)
    assert torch.equal(found["model.norm.weight"], kept)  # it is the receiver's
    trainer.close()


@pytest.mark.usefixtures("one_rank")
def test_weights_of_another_form_are_refused(tiny_llama: Callable[..., str]) -> None:
    trainer: Any = Trainer("dpo", tiny_llama(0), DPOConfig(), TRAINING, 0)
    stream = WeightStream(trainer)
    with pytest.raises(BadInput, match=r"the first that differs: score.weight\).*set online.transport=disk"):
        check_names(stream, tiny_llama(1, reward=True))
    trainer.close()


@pytest.fixture(scope="module")
def sharded(
    tiny_llama: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    run_ranks: Callable[[Sequence[Sequence[str]]], None],
) -> Path:
    """What two ranks under ZeRO-3 streamed and saved (`online_ranks.py`)."""
    folder, script = tmp_path_factory.mktemp("sharded"), str(Path(__file__).with_name("online_ranks.py"))
    run_ranks([[script, str(rank), "2", str(folder / "store"), tiny_llama(0), str(folder)] for rank in range(2)])
    return folder


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_shards_are_gathered_a_layer_at_a_time(tiny_llama: Callable[..., str], sharded: Path, trained: str) -> None:
    """Every weight in one bucket, buckets bounded, never more whole than a layer, and that let go of before it goes."""
    folder = sharded / trained
    seen = json.loads((folder / "seen.json").read_text())
    first = load_file(Path(tiny_llama(0), "model.safetensors"))
    assert sorted(seen["names"]) == sorted(first) and len(set(seen["names"])) == len(seen["names"])
    largest = max(value.numel() * 4 for value in first.values())
    assert len(seen["buckets"]) > 3 and max(seen["buckets"]) <= 40_000 + largest
    assert sum(seen["buckets"]) == sum(value.numel() * 4 for value in first.values())
    assert seen["whole_between"] == 0
    assert max(seen["gathered"]) < seen["parameters"] / 2
    assert seen["shapes"] == seen["weights"]
    saved = load_file(folder / "saved" / "model.safetensors")
    for rank in range(2):
        found = load_file(folder / f"stream-{rank}.safetensors")
        assert found.keys() == saved.keys()
        assert all(torch.equal(value, saved[name]) for name, value in found.items())
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(saved[name], first[name])
