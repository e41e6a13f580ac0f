"""The losses against their definitions, against transformers, and term by term against TRL's trainers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import DPOConfig, RewardConfig, SFTConfig
from psycho.training import losses
from psycho.training.objectives import DPO, SFT, Reward

BETA = 0.3
CPU = torch.device("cpu")
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


@pytest.fixture(scope="module")
def policy(tiny_llama: Callable[..., str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(0)).eval()


@pytest.fixture(scope="module")
def reference(tiny_llama: Callable[..., str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(1)).eval()


@pytest.fixture(scope="module")
def dpo(nano_tokenizer: Any, reference: Any) -> tuple[DPO, list[Any]]:
    """The objective, and its pairs with the reference's log-probabilities."""
    from dataclasses import replace

    objective = DPO(DPOConfig(beta=BETA), nano_tokenizer, CPU)
    pairs = [objective.example(row) for row in PAIRS]
    with torch.no_grad():
        chosen, rejected = objective.logprobs(reference, pairs)
    known = zip(chosen.tolist(), rejected.tolist(), strict=True)
    return objective, [replace(pair, reference=both) for pair, both in zip(pairs, known, strict=True)]


def test_the_first_dpo_loss_is_ln_2(dpo: tuple[DPO, list[Any]], reference: Any) -> None:
    objective, pairs = dpo
    loss, parts = objective.sums(reference, pairs)
    assert loss.item() / len(pairs) == pytest.approx(math.log(2), abs=1e-6)
    assert parts["margin"].item() == pytest.approx(0, abs=1e-4)


def test_dpo_by_hand() -> None:
    loss, chosen, rejected = losses.dpo(
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-3.0, -1.0]),
        torch.tensor([-2.0, -2.0]),
        torch.tensor([-2.0, -3.0]),
        0.5,
    )
    assert chosen.tolist() == [0.5, 0.0]
    assert rejected.tolist() == [-0.5, 1.0]
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1)))


def test_dpo_equals_trl_term_by_term(
    dpo: tuple[DPO, list[Any]], policy: Any, reference: Any, nano_tokenizer: Any, tmp_path: Path
) -> None:
    """Ids, reference log-probabilities, loss, implicit rewards and the gradient, pair by pair."""
    import datasets
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    rows = [
        {
            "prompt": json.loads(row["messages"]),
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in PAIRS
    ]
    settings = TRLConfig(str(tmp_path), use_cpu=True, bf16=False, beta=BETA, report_to="none", max_length=None)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=nano_tokenizer,
    )
    objective, pairs = dpo
    policy.eval()
    for index, pair in enumerate(pairs):
        inputs = trainer.data_collator([trainer.train_dataset[index]])
        ours_ids = losses.pad([pair.chosen.ids, pair.rejected.ids], nano_tokenizer.pad_token_id, CPU)
        assert torch.equal(inputs["input_ids"], ours_ids)

        trainer._metrics["eval"].clear()
        policy.zero_grad()
        theirs = trainer.compute_loss(policy, inputs)
        theirs.backward()
        their_gradient = policy.model.layers[0].mlp.up_proj.weight.grad.clone()
        policy.zero_grad()
        ours, parts = objective.sums(policy, [pair])
        ours.backward()
        metrics = {name: values[0] for name, values in trainer._metrics["eval"].items()}

        assert ours.item() == pytest.approx(theirs.item(), abs=1e-4)
        assert parts["reward_chosen"].item() == pytest.approx(metrics["rewards/chosen"], abs=1e-4)
        assert parts["reward_rejected"].item() == pytest.approx(metrics["rewards/rejected"], abs=1e-4)
        assert parts["accuracy"].item() == metrics["rewards/accuracies"]
        assert parts["margin"].item() == pytest.approx(metrics["rewards/margins"], abs=1e-4)
        torch.testing.assert_close(policy.model.layers[0].mlp.up_proj.weight.grad, their_gradient, atol=1e-4, rtol=1e-3)
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
        }
        for row in PAIRS
    ]
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(2, reward=True)).eval()
    trainer = RewardTrainer(
        model=model,
        args=TRLConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", disable_dropout=True),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=nano_tokenizer,
    )
    model.eval()
    inputs = trainer.data_collator([trainer.train_dataset[index] for index in range(len(PAIRS))])
    theirs = trainer.compute_loss(model, inputs)

    objective = Reward(RewardConfig(), nano_tokenizer, CPU)
    pairs = [objective.example(row) for row in PAIRS]
    ours, parts = objective.sums(model, pairs)
    assert ours.item() / len(pairs) == pytest.approx(theirs.item(), abs=1e-5)
    assert parts["accuracy"].item() / len(pairs) == pytest.approx(trainer._metrics["eval"]["accuracy"][0])
    assert parts["margin"].item() / len(pairs) == pytest.approx(trainer._metrics["eval"]["margin"][0], abs=1e-5)


def test_a_tied_reward_counts_half(nano_tokenizer: Any) -> None:
    objective = Reward(RewardConfig(), nano_tokenizer, CPU)
    logits = torch.tensor([[1.0], [2.0], [3.0], [1.0], [5.0], [0.0]])  # three chosen, then three rejected

    def model(**_: Any) -> Any:
        return SimpleNamespace(logits=logits)

    _, parts = objective.sums(model, [objective.example(row) for row in PAIRS])
    assert parts["accuracy"].item() == 1.5
    assert parts["margin"].item() == 0.0


def test_token_logprobs_equal_transformers_loss(policy: Any, nano_tokenizer: Any) -> None:
    ids = torch.tensor([nano_tokenizer(SPEECHES[1]).input_ids])
    output = policy(input_ids=ids, labels=ids)
    ours = losses.token_logprobs(output.logits, ids)
    assert ours.shape == (1, ids.shape[1] - 1)
    assert -ours.mean().item() == pytest.approx(output.loss.item(), abs=1e-6)


def test_token_logprobs_are_of_the_next_token() -> None:
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    ours = losses.token_logprobs(logits, ids)
    for row in range(2):
        for place in range(3):
            expected = logits[row, place].log_softmax(0)[ids[row, place + 1]]
            assert ours[row, place].item() == pytest.approx(expected.item(), abs=1e-6)


def test_right_padding_changes_nothing(dpo: tuple[DPO, list[Any]], policy: Any) -> None:
    """All pairs in one padded batch, and each row alone without any padding."""
    objective, pairs = dpo
    with torch.no_grad():
        together = torch.cat(objective.logprobs(policy, pairs))
        alone = []
        for row in [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]:
            ids, weights = torch.tensor([row.ids]), torch.tensor([row.weights])
            alone.append(losses.sequence_logprobs(policy(input_ids=ids).logits, ids, weights))
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_right_padding_does_not_move_the_reward(nano_tokenizer: Any, tiny_llama: Callable[..., str]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama(2, reward=True)).eval()
    objective = Reward(RewardConfig(), nano_tokenizer, CPU)
    pairs = [objective.example(row) for row in PAIRS]
    with torch.no_grad():
        together = objective.sums(model, pairs)[1]["margin"]
        alone = sum(objective.sums(model, [pair])[1]["margin"] for pair in pairs)
        one = [model(input_ids=torch.tensor([side.ids])).logits.item() for side in (pairs[0].chosen, pairs[0].rejected)]
    assert together.item() == pytest.approx(alone.item(), abs=1e-5)
    assert objective.sums(model, pairs[:1])[1]["margin"].item() == pytest.approx(one[0] - one[1], abs=1e-5)


def test_weights_are_respected(policy: Any, nano_tokenizer: Any) -> None:
    """The supervised loss is the weighted sum of token losses, each weight on the token it stands on."""
    ids = torch.tensor([nano_tokenizer(SPEECHES[0]).input_ids])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits
    each = losses.token_logprobs(logits, ids)[0]
    weights = torch.zeros(1, ids.shape[1])
    weights[0, 0], weights[0, 3], weights[0, 5] = 7.0, 1.0, 0.25  # nothing predicts the first token
    assert losses.supervised(logits, ids, weights).item() == pytest.approx(-(each[2] + 0.25 * each[4]).item(), abs=1e-5)


def test_the_prompt_weighs_what_the_settings_say(policy: Any, nano_tokenizer: Any) -> None:
    row = {"messages": json.dumps([{"role": "user", "content": SPEECHES[0]}, {"role": "assistant", "content": "Oh."}])}
    found = {}
    for weight in (0.0, 0.4, 1.0):
        objective = SFT(SFTConfig(prompt_loss_weight=weight), nano_tokenizer, CPU)
        example = objective.example(row)
        loss, parts = objective.sums(policy, [example])
        found[weight] = loss.item()
        assert parts["loss_weight"].item() == pytest.approx(objective.weight(example))
    assert found[0.4] == pytest.approx(0.6 * found[0.0] + 0.4 * found[1.0], rel=1e-5)
    assert found[1.0] > found[0.0]


def test_nll_weight_adds_the_chosen_responses_mean_nll(
    dpo: tuple[DPO, list[Any]], policy: Any, nano_tokenizer: Any
) -> None:
    objective, pairs = dpo
    with_nll = DPO(DPOConfig(beta=BETA, nll_weight=0.5), nano_tokenizer, CPU)
    with torch.no_grad():
        plain, more = objective.sums(policy, pairs)[0], with_nll.sums(policy, pairs)[0]
        chosen, _ = objective.logprobs(policy, pairs)
    means = [-value / sum(pair.chosen.weights) for value, pair in zip(chosen.tolist(), pairs, strict=True)]
    assert (more - plain).item() == pytest.approx(0.5 * sum(means), rel=1e-4)
