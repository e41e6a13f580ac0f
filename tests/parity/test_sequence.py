"""Ranks that share a bin's tokens train as one that has them all: step by step, and in the weights.

Real process groups on gloo, one process a rank. Heads that the ranks divide and key heads that they do not, a sliding
window, bins whose length they do not divide, and ranks that are left without a bin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

RunRanks = Callable[[Sequence[Sequence[str]]], None]
RANK = """
import json, os, sys
import torch.distributed as dist
from psycho.config import DPOConfig, RewardConfig, SFTConfig, TrainingConfig
from psycho.training import engine, loop
from psycho.training.loop import Trainer, setup_worker, write_history

rank, world, out, share, trainings = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
os.environ["LOCAL_RANK"] = str(rank)
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
plain = engine.deepspeed_config

def in_pieces(settings, training):  # even parameters as small as these
    config = plain(settings, training)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config

loop.deepspeed_config = in_pieces
speeches = ("I feel lost.", "I cannot sleep. Work is too much.", "I drink again.", "My mother calls me every day.")
texts = ("That sounds painful. What do you miss?", "You noticed it.", "Cheer up.", "Just find another job.")
def said(speech, text):  # of unequal length, so that bins are
    return " ".join([texts[text]] * (1 + speech % 2))

pairs = [
    {"id": f"{s}{i}{j}", "question": speeches[s], "chosen": said(s, i), "rejected": said(s, j), "gap": 1.0,
     "chosen_ratings": [5.0 - i] * 7, "rejected_ratings": [5.0 - j] * 7}
    for s in range(4) for i in range(4) for j in range(i + 1, 4)
]
turns = [[{"role": "user", "content": s}, {"role": "assistant", "content": t}] for s in speeches for t in texts]
talks = [{"id": str(number), "messages": json.dumps(turn)} for number, turn in enumerate(turns)]
common = {"lr": 5e-4, "batch_size": 9, "epochs": 2}
settings = {
    "dpo": DPOConfig(**common, nll_weight=0.1),
    "reward": RewardConfig(**common, loss="plackett_luce", principle_heads=0.1),
    "sft": SFTConfig(**common),
}
for number, (kind, model, changes) in enumerate(json.loads(trainings)):
    training = TrainingConfig(**{
        "workers": world, "gpus_per_worker": 0, "device": "cpu", "precision": "fp32", "zero_stage": 2,
        "threads_per_worker": 1, "max_length": 64, "bin_tokens": 150, "sequence_parallel": share, **changes,
    })
    setup_worker(training)
    trainer = Trainer(kind, model, settings[kind], training, seed=0)
    if kind == "dpo" and "zero_stage" in changes:
        trainer.engine.module._logits = 16 * len(trainer.tokenizer)  # the head is called many times for a bin
    rows = talks if kind == "sft" else pairs
    groups = trainer.groups(rows)[0]
    history = trainer.fit(groups, 0)
    dev = trainer._mean_loss(trainer._with_references(groups, None) if kind == "dpo" else groups)
    trainer.save(f"{out}/{number}")
    if rank == 0:
        write_history(f"{out}/{number}", [row | {"dev": dev} for row in history])
    trainer.close()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def mistral(nano_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four heads, one key head, a window shorter than the texts."""
    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(nano_tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, sliding_window=12, initializer_range=0.2,
        pad_token_id=nano_tokenizer.pad_token_id, max_position_embeddings=512,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    nano_tokenizer.save_pretrained(folder)
    return str(folder)


def _run(run_ranks: RunRanks, world: int, share: int, folder: Path, trainings: list[Any]) -> None:
    """Train one after the other on `world` ranks, of which `share` share each bin, into `folder/<number>`."""
    folder.mkdir()
    arguments = [str(world), str(folder), str(share), json.dumps(trainings)]
    run_ranks([["-c", RANK, str(rank), *arguments] for rank in range(world)])


def _assert_same(ours: Path, theirs: Path) -> None:
    histories = [
        [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()] for folder in (ours, theirs)
    ]
    assert len(histories[0]) == len(histories[1]) >= 3
    for mine, other in zip(*histories, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() - {"tokens_per_s", "memory_gib"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    weights, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    for name in expected:
        # Adam makes a whole step of a gradient that is all rounding; a step is 5e-4.
        torch.testing.assert_close(weights[name], expected[name], atol=5e-5, rtol=1e-5, msg=lambda m, n=name: n + m)


def test_two_ranks_share_the_tokens(
    mistral: str, tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks
) -> None:
    trainings = [
        ["dpo", mistral, {}],
        ["dpo", tiny_llama(0), {"zero_stage": 3, "gradient_checkpointing": True}],
        ["reward", tiny_llama(0), {}],
        ["sft", mistral, {"zero_stage": 0}],
    ]
    _run(run_ranks, 1, 1, tmp_path / "one", trainings)
    _run(run_ranks, 2, 2, tmp_path / "two", trainings)
    for number in range(len(trainings)):
        _assert_same(tmp_path / "two" / str(number), tmp_path / "one" / str(number))


@pytest.mark.slow
def test_two_pairs_of_ranks(mistral: str, tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks) -> None:
    """Bins are dealt to pairs of ranks; and four ranks that share, where not all have a token to say something of."""
    trainings = [
        ["dpo", mistral, {}],
        ["dpo", mistral, {"zero_stage": 3}],
        ["reward", mistral, {}],
        ["sft", mistral, {}],
    ]
    _run(run_ranks, 1, 1, tmp_path / "one", trainings)
    for world, share in ((4, 2), (4, 4)):
        _run(run_ranks, world, share, tmp_path / f"{world}-{share}", trainings)
        for number in range(len(trainings)):
            _assert_same(tmp_path / f"{world}-{share}" / str(number), tmp_path / "one" / str(number))


@pytest.mark.slow
def test_ranks_with_unequal_bins_do_not_wait_for_ever(
    tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks
) -> None:
    """ZeRO-3 with the head in many calls, as a large vocabulary has it: each call is a collective."""
    trainings = [["dpo", tiny_llama(0), {"zero_stage": 3}]]
    _run(run_ranks, 1, 1, tmp_path / "one", trainings)
    _run(run_ranks, 2, 1, tmp_path / "two", trainings)
    _assert_same(tmp_path / "two" / "0", tmp_path / "one" / "0")
