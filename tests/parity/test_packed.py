"""Packed groups, padded rows and one row at a time are the same mathematics, for every family and path.

One row at a time through plain `transformers` is the truth: it has no layout, no shared prompt, and no position of
ours in it. Each property is also broken on purpose, and must be seen to break.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from psycho.config import DPOConfig
from psycho.training import attention, losses, modules
from psycho.training.groups import Encoded, Group, only, split
from psycho.training.modules import PolicyModel, RewardModel, use_packing
from psycho.training.packing import Batch, packed, padded

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": 0, "attn_implementation": "eager",
    "initializer_range": 0.2,  # near zero, as models start, nothing that attention sees would show
}  # fmt: skip
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen2": lambda: Qwen2Config(**SHAPE),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=16),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=24),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE, head_dim=16, sliding_window=24, layer_types=["sliding_attention", "full_attention"]
    ),
}


def _group(prompt: int, k: int, seed: int = 0) -> Group:
    rng = random.Random(f"{prompt}-{k}-{seed}")

    def ids(count: int) -> list[int]:
        return [rng.randrange(1, 97) for _ in range(count)]

    rows = tuple(Encoded(ids(n), [1.0] * n) for n in (rng.randint(2, 40) for _ in range(k)))
    return Group(ids(prompt), rows, tuple((i, j) for i in range(k) for j in range(i + 1, k)))


GROUPS = [_group(7, 3), _group(1, 2), _group(60, 4), _group(0, 2), _group(31, 1), _group(12, 8)]


def _model(family: str, kind: str = "policy") -> Any:
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if kind == "policy" else AutoModelForSequenceClassification
    config = FAMILIES[family]()
    if kind == "reward":
        config.num_labels = 1
    return auto.from_config(config).eval()


def _packing(model: Any) -> Any:
    assert use_packing(model) is None
    return model


def _one_by_one(model: Any, groups: Sequence[Group]) -> list[Tensor]:
    """Summed log-probabilities, a response at a time, [R] in order; the model keeps its own attention."""
    sums = []
    for group in groups:
        for row in group.responses:
            ids = torch.tensor([group.prompt + row.ids])
            logprobs = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            each = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(each[max(0, len(group.prompt) - 1) :].sum())
    return sums


def _sums(model: Any, batch: Batch) -> Tensor:
    return losses.sequence_sums(PolicyModel(model)(batch), batch.response, len(batch.lengths))


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_packed_padded_and_alone(family: str) -> None:
    model = _model(family)
    with torch.no_grad():
        alone = torch.stack(_one_by_one(model, GROUPS))
        rows = _sums(model, padded(GROUPS, 0))
        together = _sums(_packing(model), packed(GROUPS))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    torch.testing.assert_close(rows, alone, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("family", "objective"), [*((f, "dpo") for f in FAMILIES), *(("llama", o) for o in losses.LOSSES if o != "dpo")]
)
def test_losses_and_gradients_packed_and_alone(family: str, objective: str) -> None:
    """Of all pairs of a group from one encoding, against a model that reads each response by itself."""
    settings = DPOConfig(beta=0.1, loss=objective, nll_weight=0.1)  # type: ignore[arg-type]
    groups = [_group(9, 3), _group(40, 2)]
    batch = packed(groups)
    with torch.no_grad():
        references = torch.stack(_one_by_one(_model(family), groups)) * 1.01

    def loss(sums: Tensor) -> Tensor:
        one, other = batch.pairs.unbind(1)
        pairs = losses.PairLogprobs(
            sums[one], sums[other], references[one], references[other], batch.lengths[one], batch.lengths[other]
        )
        return losses.preference(pairs, settings).sum()

    plain, ours = _model(family), _packing(_model(family))
    expected, found = loss(torch.stack(_one_by_one(plain, groups))), loss(_sums(ours, batch))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    found.backward()
    _assert_gradients(ours, plain)


def _assert_gradients(ours: Any, theirs: Any) -> None:
    scale = max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("prompt", [0, 1, 17, 200, 500])
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_any_prompt_and_any_number_of_responses(prompt: int, k: int) -> None:
    group = _group(prompt, k)
    model = _model("llama")
    with torch.no_grad():
        alone = torch.stack(_one_by_one(model, [group]))
        together = _sums(_packing(model), packed([group]))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_sharing_less_changes_nothing() -> None:
    """A prompt for all responses, for each pair, for each response."""
    model = _packing(_model("llama"))
    group = _group(30, 4)
    pairs = [only(group, [index]) for index in range(len(group.pairs))]
    parts = split(group, only(group, [0, 1, 2]).tokens)
    with torch.no_grad():
        shared = _sums(model, packed([group]))[packed([group]).pairs]
        for other in (pairs, parts):
            batch = packed(other)
            torch.testing.assert_close(_sums(model, batch)[batch.pairs], shared, rtol=1e-5, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_rewards_packed_and_alone(family: str) -> None:
    model = _model(family, "reward")
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([g.prompt + r.ids])).logits.item() for g in GROUPS for r in g.responses]
        together = RewardModel(_packing(model))(packed(GROUPS))
    assert together.tolist() == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_logits_in_chunks_are_logits_at_once() -> None:
    """In the backward pass too, where each chunk is computed again."""
    whole, parts = _packing(_model("llama")), _packing(_model("llama"))
    groups = [_group(5, 8), _group(3, 8, 1)]
    batch = packed(groups)
    one, other = PolicyModel(whole)(batch), PolicyModel(parts, logits=97 * 128)(batch)
    assert len(batch.targets) > 128  # more than one chunk
    torch.testing.assert_close(other, one)
    one.sum().backward()
    other.sum().backward()
    _assert_gradients(parts, whole)


def test_the_gpus_mask_is_the_cpus_layout() -> None:
    """FlexAttention's block mask, seen on the CPU, where its forward pass runs: the same outputs as segment by
    segment, with and without a window."""
    from torch.nn.attention.flex_attention import flex_attention

    batch = packed(GROUPS)
    assert batch.layout is not None
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 2, batch.layout.length, 16)
    for window in (None, 24):
        mask = batch.layout.block_mask(window, torch.device("cpu"))
        theirs = flex_attention(query, key, value, block_mask=mask)
        ours, _ = attention.speech_groups(
            torch.nn.Module(), query, key, value, None, layout=batch.layout, sliding_window=window
        )
        torch.testing.assert_close(ours.transpose(1, 2), theirs, atol=1e-5, rtol=1e-5)


def test_a_model_that_cannot_is_named() -> None:
    model = _model("llama")
    model._supports_attention_backend = False
    assert "does not go through" in str(use_packing(model))
    model.config.logit_scale = 0.5
    with pytest.raises(ValueError, match="logit_scale"):
        modules.check_head(model)


# Broken on purpose: the parity above must notice each of these.


def _differs(batch: Batch, model: Any) -> bool:
    with torch.no_grad():
        alone = torch.stack(_one_by_one(_model("llama"), GROUPS))
        return not torch.allclose(_sums(model, batch), alone, rtol=1e-5, atol=0)


def test_positions_off_by_one_are_seen() -> None:
    batch = packed(GROUPS)
    assert batch.position_ids is not None and batch.layout is not None
    moved = batch.position_ids.clone()
    _, responses = batch.layout.groups[0]
    moved[0, slice(*responses[1])] += 1
    assert not _differs(batch, _packing(_model("llama")))
    assert _differs(replace(batch, position_ids=moved), _packing(_model("llama")))


def test_a_leaking_mask_is_seen() -> None:
    """The second response sees the first: as one response behind the other."""
    batch = packed(GROUPS)
    assert batch.layout is not None
    (prompt, (first, second, *rest)), *others = batch.layout.groups
    leaking = attention.Layout(((prompt, ((first[0], second[1]), *rest)), *others), batch.layout.length)
    assert _differs(replace(batch, layout=leaking), _packing(_model("llama")))


def test_a_mean_of_means_is_seen() -> None:
    """Bins of unequal counts: the mean over all pairs is not the mean of the bins' means."""
    model = _packing(_model("llama"))
    with torch.no_grad():
        sums = [_sums(model, packed([group])) for group in (_group(9, 2), _group(9, 5))]
    whole = torch.cat(sums).mean()
    assert abs(torch.stack([part.mean() for part in sums]).mean() - whole) > 1e-3 * abs(whole)
