"""The losses against their definitions, and term by term against TRL's trainers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import DPOConfig, RewardConfig, SFTConfig
from psycho.training import losses
from psycho.training.losses import PairLogprobs
from psycho.training.objectives import SFT, Preference, Reward
from psycho.training.packing import Batch, packed, padded

BETA = 0.3
SPEECHES = (
    "My partner left and I feel lost.",
    "I cannot sleep. Work is too much and my boss shouts.",
    "I drink again.",
)
CHOSEN = ("That sounds painful. What do you miss?", "You carry a lot.", "You noticed it. What would help you tonight?")
REJECTED = ("Cheer up.", "Just find another job and stop it, it is not that hard to do.", "Stop.")
PAIRS = [
    {"messages": json.dumps([{"role": "user", "content": speech}]), "chosen": chosen, "rejected": rejected}
    for speech, chosen, rejected in zip(SPEECHES, CHOSEN, REJECTED, strict=True)
]
# What ours is told, and what TRL is told. TRL 1.16 smooths no labels in its sigmoid loss: that one is by hand below.
WITH_TRL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dpo": ({}, {}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "dpo_norm": ({"loss": "dpo_norm"}, {"loss_type": ["sigmoid_norm"]}),
    "length-desensitised": ({"ld_alpha": 0.3}, {"ld_alpha": 0.3}),
    "forward KL": ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    "Jensen-Shannon": ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    "alpha": ({"f_divergence": "alpha", "f_alpha": 0.5}, {"f_divergence_type": "alpha_divergence"}),
    "with NLL": ({"nll_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
}


@pytest.fixture(scope="module")
def policy(tiny_llama: Callable[..., str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(0)).eval()


@pytest.fixture(scope="module")
def reference(tiny_llama: Callable[..., str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(1)).eval()


def _objective(tokenizer: Any, **settings: Any) -> Preference:
    return Preference(DPOConfig(beta=BETA, **settings), tokenizer)


def _batch(objective: Preference, reference: Any, rows: list[dict[str, str]] = PAIRS) -> Batch:
    """The rows padded, with the reference's log-probabilities."""
    groups, _ = objective.groups(rows, 10_000)
    batch = padded(groups, objective.tokenizer.pad_token_id)
    with torch.no_grad():
        return replace(batch, references=objective.logprobs(objective.wrap(reference)(batch), batch))


def _sums(objective: Preference, policy: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return objective.sums(objective.wrap(policy)(batch), batch)


def test_the_first_dpo_loss_is_ln_2(nano_tokenizer: Any, reference: Any) -> None:
    objective = _objective(nano_tokenizer)
    loss, parts = _sums(objective, reference, _batch(objective, reference))
    assert loss.item() / len(PAIRS) == pytest.approx(math.log(2), abs=1e-12)
    assert parts["margin"].item() == pytest.approx(0, abs=1e-12)


BY_HAND = PairLogprobs(*(torch.tensor(v, dtype=torch.float64) for v in ([-4.0], [-9.0], [-5.0], [-8.0], [4.0], [6.0])))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, math.log(1 + math.exp(-0.5 * 2))),
        ({"label_smoothing": 0.2}, 0.8 * math.log(1 + math.exp(-1)) + 0.2 * math.log(1 + math.exp(1))),
        ({"loss": "robust", "label_smoothing": 0.2},
         (0.8 * math.log(1 + math.exp(-1)) - 0.2 * math.log(1 + math.exp(1))) / 0.6),
        ({"loss": "hinge"}, 0.0),
        ({"loss": "ipo"}, (1 / 4 + 1 / 6 - 1) ** 2),
        ({"loss": "dpo_norm"}, math.log(1 + math.exp(-0.5 * (1 / 4 + 1 / 6)))),
        ({"loss": "simpo", "simpo_gamma": 0.1}, math.log(1 + math.exp(-(0.5 * (-1 + 1.5) - 0.1)))),
        ({"loss": "orpo"}, 1 + 0.5 * math.log(1 + math.exp(-(
            math.log(math.exp(-1) / (1 - math.exp(-1))) - math.log(math.exp(-1.5) / (1 - math.exp(-1.5))))))),
        ({"nll_weight": 0.5}, math.log(1 + math.exp(-1)) + 0.5 * 4 / 4),
    ],
)  # fmt: skip
def test_objectives_by_hand(settings: dict[str, Any], expected: float) -> None:
    found = losses.preference(BY_HAND, DPOConfig(beta=0.5, **settings))
    assert found.tolist() == pytest.approx([expected])


def test_objectives_without_a_reference_say_so(nano_tokenizer: Any) -> None:
    for name in losses.LOSSES:
        assert _objective(nano_tokenizer, loss=name).needs_reference == (name not in ("simpo", "orpo"))
    blind = replace(BY_HAND, reference_chosen=None)
    with pytest.raises(ValueError, match="needs reference"):
        losses.preference(blind, DPOConfig())


@pytest.mark.parametrize("name", WITH_TRL)
def test_preference_equals_trl_term_by_term(
    name: str, policy: Any, reference: Any, nano_tokenizer: Any, tmp_path: Path
) -> None:
    """Loss, implicit rewards and the gradient, pair by pair."""
    import datasets
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    mine, told = WITH_TRL[name]
    rows = [
        {
            "prompt": json.loads(row["messages"]),
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in PAIRS
    ]
    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "max_length": None}
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=TRLConfig(str(tmp_path), beta=BETA, **common, **told),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=nano_tokenizer,
    )
    policy.eval()
    objective = _objective(nano_tokenizer, **mine)
    for index in range(len(PAIRS)):
        inputs = trainer.data_collator([trainer.train_dataset[index]])
        trainer._metrics["eval"].clear()
        policy.zero_grad()
        theirs = trainer.compute_loss(policy, inputs)
        theirs.backward()
        their_gradient = policy.model.layers[0].mlp.up_proj.weight.grad.clone()
        policy.zero_grad()
        batch = _batch(objective, reference, PAIRS[index : index + 1])
        ours, parts = _sums(objective, policy, batch)
        ours.backward()
        metrics = {key: values[0] for key, values in trainer._metrics["eval"].items()}

        # TRL sums in single precision, which the exponential of forward KL makes larger.
        assert ours.item() == pytest.approx(theirs.item(), rel=5e-5 if name == "forward KL" else 1e-5, abs=2e-6)
        if not mine.get("f_divergence"):
            assert parts["reward_chosen"].item() == pytest.approx(metrics["rewards/chosen"], abs=1e-5)
            assert parts["reward_rejected"].item() == pytest.approx(metrics["rewards/rejected"], abs=1e-5)
            assert parts["accuracy"].item() == metrics["rewards/accuracies"]
        ours_gradient = policy.model.layers[0].mlp.up_proj.weight.grad
        torch.testing.assert_close(ours_gradient, their_gradient, atol=1e-5, rtol=1e-4)
    policy.zero_grad()


def test_bradley_terry_equals_trl(tiny_llama: Callable[..., str], nano_tokenizer: Any, tmp_path: Path) -> None:
    import datasets
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    rows = [
        {
            "prompt": json.loads(row["messages"]),
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
            "margin": 0.5,
        }
        for row in PAIRS
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(2, reward=True)).eval()
    common: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_dropout": True}
    trainer = RewardTrainer(
        model=model,
        args=TRLConfig(str(tmp_path), center_rewards_coefficient=0.01, **common),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=nano_tokenizer,
    )
    model.eval()
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(len(PAIRS))])
    theirs = trainer.compute_loss(model, inputs)

    objective = Reward(RewardConfig(margin_per_gap=0.25, centring=0.01), nano_tokenizer)
    groups, _ = objective.groups([row | {"gap": 2.0} for row in PAIRS], 10_000)
    batch = padded(groups, nano_tokenizer.pad_token_id)
    ours, parts = objective.sums(objective.wrap(model)(batch), batch)
    assert ours.item() / len(PAIRS) == pytest.approx(theirs.item(), abs=1e-5)
    assert parts["accuracy"].item() / len(PAIRS) == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    assert parts["margin"].item() / len(PAIRS) == pytest.approx(trainer._metrics["eval"]["margin"][0], abs=1e-5)


def test_a_tied_reward_counts_half(nano_tokenizer: Any) -> None:
    objective = Reward(RewardConfig(), nano_tokenizer)
    batch = packed(objective.groups(PAIRS, 10_000)[0])
    _, parts = objective.sums(torch.tensor([1.0, 1.0, 2.0, 5.0, 3.0, 0.0]), batch)
    assert parts["accuracy"].item() == 1.5
    assert parts["margin"].item() == 0.0


def test_a_margin_of_nothing_counts_half(nano_tokenizer: Any) -> None:
    """A policy that still is its reference prefers nothing, whatever rounding leaves of its margins."""
    objective = _objective(nano_tokenizer)
    reference = torch.tensor([-90.0, -80.0, -70.0, -60.0], dtype=torch.float64)
    for noise, right in (
        ([0, 0, 0, 0], 1.0),
        ([3e-6, 0, 0, 4e-6], 1.0),
        ([0, 3e-6, 0, 4e-6], 1.0),
        ([1, 0, 0, 0], 1.5),
    ):
        policy = reference + torch.tensor(noise, dtype=torch.float64)
        count = torch.ones(2)
        pairs = PairLogprobs(policy[:2], policy[2:], reference[:2], reference[2:], count, count)
        assert objective._statistics(pairs)["accuracy"].item() == right
    rewards = Reward(RewardConfig(), nano_tokenizer)
    batch = packed(rewards.groups(PAIRS, 10_000)[0])
    _, parts = rewards.sums(torch.tensor([1.0, 1.0000001, 2.0, 5.0, 3.0, 0.0]), batch)
    assert parts["accuracy"].item() == 1.5


def test_weights_are_respected(policy: Any, nano_tokenizer: Any) -> None:
    """The supervised loss is the weighted sum of token losses, each weight on the token it stands on."""
    row = {"messages": json.dumps([{"role": "user", "content": SPEECHES[0]}, {"role": "assistant", "content": "Oh."}])}
    found = {}
    for weight in (0.0, 0.4, 1.0):
        objective = SFT(SFTConfig(prompt_loss_weight=weight), nano_tokenizer)
        groups, _ = objective.groups([row], 10_000)
        batch = packed(groups)
        loss, parts = objective.sums(objective.wrap(policy)(padded(groups, 0)), batch)
        found[weight] = loss.item()
        assert parts["loss_weight"].item() == pytest.approx(objective.weight(groups[0]))
    assert found[0.4] == pytest.approx(0.6 * found[0.0] + 0.4 * found[1.0], rel=1e-5)
    ids = torch.tensor([groups[0].responses[0].ids])
    assert found[1.0] == pytest.approx(policy(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-5)


def test_sums_travel_in_double_precision() -> None:
    """A small difference of large sums: in single precision it would be lost."""
    values = torch.full((30_000,), -4.1)
    whole = losses.sequence_sums(values, torch.zeros(30_000, dtype=torch.long), 1)
    assert whole.dtype == torch.float64
    assert whole.item() == pytest.approx(30_000 * values[0].double().item(), abs=1e-6)
