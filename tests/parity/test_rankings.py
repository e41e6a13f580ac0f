"""A speech's ranked responses as one Plackett-Luce term: against the ranking's likelihood, a response at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import DPOConfig, RewardConfig
from psycho.training import losses
from psycho.training.groups import Encoded, Group, split
from psycho.training.modules import use_packing
from psycho.training.objectives import Preference, Reward
from psycho.training.packing import packed

Rows = Callable[[int], list[dict[str, Any]]]

LEVELS = ((4, 3, 2, 1), (3, 3, 2, 1, 1), (2, 1), (5, 4, 4))  # overall ratings of each speech's responses, with ties
BETA = 0.3


def _groups(seed: int = 0) -> list[Group]:
    rng = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [rng.randrange(10, 250) for _ in range(rng.randint(least, most))]

    found = []
    for levels in LEVELS:
        rows = tuple(Encoded(own, [1.0] * len(own)) for own in (ids(2, 30) for _ in levels))
        pairs = tuple((i, j) for i, one in enumerate(levels) for j, other in enumerate(levels) if one > other)
        found.append(Group(ids(1, 40), rows, pairs, tuple(float(levels[i] - levels[j]) for i, j in pairs)))
    return found


def _ranking(scores: Tensor) -> Tensor:
    """-log P of every speech's ranking, summed; scores of its responses in a row. A tie says nothing."""
    total, first = scores.new_zeros(()), 0
    for levels in LEVELS:
        own = scores[first : first + len(levels)]
        first += len(levels)
        for place, level in enumerate(levels):
            worse = [other for other, its in enumerate(levels) if its < level]
            if worse:
                total = total - own[[place, *worse]].log_softmax(0)[0]
    return total


def _alone(model: Any, kind: str, groups: list[Group]) -> Tensor:
    """Rewards or summed log-probabilities, [R], through plain `transformers`, a response at a time."""
    found = []
    for group in groups:
        for row in group.responses:
            ids = torch.tensor([group.prompt + row.ids])
            out = model(input_ids=ids).logits
            if kind == "dpo":
                each = out[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
                out = each[len(group.prompt) - 1 :].sum()
            found.append(out.reshape(()))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["reward", "dpo"])
def test_a_packed_ranking_is_its_likelihood(kind: str, tiny_llama: Callable[..., str], nano_tokenizer: Any) -> None:
    """Loss and gradient of all speeches of a bin, relative 1e-5 in fp32."""
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    theirs, ours = (auto.from_pretrained(tiny_llama(0, kind == "reward")).eval() for _ in range(2))
    theirs.config.pad_token_id = ours.config.pad_token_id = 0
    groups = _groups()
    objective: Any
    if kind == "reward":
        objective = Reward(RewardConfig(loss="plackett_luce"), nano_tokenizer)
        expected = _ranking(_alone(theirs, kind, groups))
    else:
        objective = Preference(DPOConfig(loss="plackett_luce", beta=BETA), nano_tokenizer)
        with torch.no_grad():
            references = _alone(AutoModelForCausalLM.from_pretrained(tiny_llama(1)).eval(), kind, groups)
        expected = _ranking(BETA * (_alone(theirs, kind, groups) - references))
        rest = references.tolist()
        groups = [
            Group(g.prompt, g.responses, g.pairs, g.gaps, tuple(rest.pop(0) for _ in g.responses)) for g in groups
        ]
    assert use_packing(ours) is None
    batch = packed(groups)
    loss, parts = objective.sums(objective.wrap(ours)(batch), batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert parts["loss_weight"].item() == sum(map(objective.weight, groups)) == 3 + 3 + 1 + 1
    expected.backward()
    loss.backward()
    scale = max(p.grad.abs().max().item() for p in theirs.parameters() if p.grad is not None)
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(
                one.grad, other.grad, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_list_of_two_is_a_pair() -> None:
    """Loss and gradient, far out too, where exp would overflow."""
    advantages = torch.tensor([0.0, 1.5, -700.0, 800.0, 1e4, -1e4], dtype=torch.float64, requires_grad=True)
    ours = losses.plackett_luce(advantages, losses.Choices(torch.arange(6), 6))
    (own,) = torch.autograd.grad(ours.sum(), advantages)
    theirs = losses.bradley_terry(advantages, torch.zeros(6))
    (other,) = torch.autograd.grad(theirs.sum(), advantages)
    torch.testing.assert_close(ours, theirs, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(own, other, rtol=1e-15, atol=1e-15)


def test_each_speech_counts_one(tiny_llama: Callable[..., str], nano_tokenizer: Any, ranking_rows: Rows) -> None:
    """Ouyang et al. 2022: all pairs of a speech, averaged; whatever the number, and however it is cut into bins."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(0, True)).eval()
    model.config.pad_token_id = 0
    objective = Reward(RewardConfig(average="speeches"), nano_tokenizer)
    rows = [*ranking_rows(4), {"question": "Again?", "chosen": "You carry a lot.", "rejected": "Cheer up."}]
    groups, _ = objective.groups(rows, 1000)
    with torch.no_grad():
        scores = _alone(model, "reward", groups)
    expected, first = torch.zeros(()), 0
    for group in groups:
        own = scores[first : first + len(group.responses)]
        first += len(group.responses)
        expected += torch.stack([-(own[i] - own[j]).sigmoid().log() for i, j in group.pairs]).mean() / len(groups)
    module = objective.wrap(model)
    assert use_packing(model) is None
    with torch.no_grad():
        for budget in (1000, 45):
            parts = [part for group in groups for part in split(group, budget)]
            batch = packed(parts)
            loss, sums = objective.sums(module(batch), batch)
            assert loss.item() / sum(map(objective.weight, parts)) == pytest.approx(expected.item(), rel=1e-5)
            assert sums["loss_weight"].item() == pytest.approx(len(groups))
        assert len(parts) > len(groups)
