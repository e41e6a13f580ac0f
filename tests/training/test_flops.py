"""Operations counted from the shape, against a counter of the matrix products that really ran."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from psycho.training.flops import count_flops
from psycho.training.groups import Encoded, Group
from psycho.training.packing import packed


def _model(tied: bool) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager",
        )
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_as_many_as_really_run(tied: bool) -> None:
    """Of a forward and backward pass over one text, where eager attention computes both halves of its square."""
    model, length = _model(tied), 24
    flops = count_flops(model, words=True, frozen=False)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(length)[None]).logits.sum().backward()
    square = 3 * flops.attention * (length * length - length * (length + 1) // 2)
    group = Group([], (Encoded(list(range(length)), [1.0] * length),))
    assert flops.of(group) + square == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_prompts_count_once_and_no_head_there() -> None:
    flops = count_flops(_model(False), words=True, frozen=False)
    rows = tuple(Encoded([1] * n, [1.0] * n) for n in (3, 5))
    group = Group([1] * 7, rows)
    layout = packed([group]).layout
    assert layout is not None
    number, segment, _ = layout.coordinates()
    place = torch.arange(layout.length)
    sees = (place[:, None] >= place) & (number[:, None] == number) & ((segment == 0) | (segment[:, None] == segment))
    expected = 6 * (flops.layers * 15 + flops.head * 8) + 3 * flops.attention * int(sees.sum())
    assert flops.of(group) == expected


def test_frozen_weights_and_a_reward_model_need_less() -> None:
    model = _model(False)
    full, frozen, reward = (count_flops(model, *how) for how in ((True, False), (True, True), (False, False)))
    assert full.head == 300 * 64
    assert reward.head == 0
    group = Group([], (Encoded([1, 2], [1.0, 1.0]),))
    assert frozen.of(group) < full.of(group)
