"""What each kind of training reads, and the loss of one micro-batch.

An objective knows its model class, how a row becomes an example, and the sums of a micro-batch: the loss, and the
statistics to report. The loop (`loop.py`) knows nothing else of it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import LoopConfig, PreferenceConfig, SFTConfig
from psycho.training import losses
from psycho.training.examples import Encoded, Pair, encode, encode_conversation

Row = Mapping[str, Any]
Sums = dict[str, Tensor]


class Objective(ABC):
    """One kind of training."""

    needs_reference = False

    def __init__(self, settings: LoopConfig, tokenizer: Any, device: torch.device) -> None:
        self.settings, self.tokenizer, self.device = settings, tokenizer, device

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        """The model to train."""
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

    @abstractmethod
    def example(self, row: Row) -> Encoded | Pair:
        """One row as token ids."""

    @abstractmethod
    def weight(self, example: Any) -> float:
        """What the example counts in the mean loss."""

    @abstractmethod
    def sums(self, model: nn.Module, examples: Sequence[Any]) -> tuple[Tensor, Sums]:
        """The summed loss of a micro-batch and summed statistics."""

    def _ids(self, rows: Sequence[Encoded]) -> Tensor:
        return losses.pad([row.ids for row in rows], self.tokenizer.pad_token_id, self.device)

    def _weights(self, rows: Sequence[Encoded]) -> Tensor:
        return losses.pad_floats([row.weights for row in rows], self.device)


class SFT(Objective):
    """Rows: `messages`; every assistant turn is learned."""

    settings: SFTConfig

    def example(self, row: Row) -> Encoded:
        return encode_conversation(self.tokenizer, json.loads(row["messages"]), self.settings.prompt_loss_weight)

    def weight(self, example: Encoded) -> float:
        return sum(example.weights[1:])

    def sums(self, model: nn.Module, examples: Sequence[Encoded]) -> tuple[Tensor, Sums]:
        ids, weights = self._ids(examples), self._weights(examples)
        loss = losses.supervised(model(input_ids=ids, use_cache=False).logits, ids, weights)
        return loss, {"loss": loss.detach(), "loss_weight": weights[:, 1:].sum()}


class _Pairs(Objective):
    """Rows: `question`, `chosen`, `rejected`."""

    settings: LoopConfig

    def example(self, row: Row) -> Pair:
        prompt = json.loads(row["messages"]) if row.get("messages") else [{"role": "user", "content": row["question"]}]
        chosen = encode(self.tokenizer, prompt, row["chosen"])
        rejected = encode(self.tokenizer, prompt, row["rejected"])
        return Pair(chosen, rejected)

    def weight(self, example: Pair) -> float:
        return 1.0

    def _both(self, examples: Sequence[Pair]) -> list[Encoded]:
        return [pair.chosen for pair in examples] + [pair.rejected for pair in examples]


class Reward(_Pairs):
    """Bradley-Terry reward model: one logit at the last token of the conversation."""

    def load(self, path: str, dtype: torch.dtype) -> nn.Module:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype)
        model.config.pad_token_id = self._padding()
        return model

    def _padding(self) -> int:
        """A pad token that no conversation ends with: the model reads its logit at the last token that is not padding,
        and where padding is the end-of-turn token, that would be the token before it."""
        end = encode(self.tokenizer, [{"role": "user", "content": "a"}], "b").ids[-1]
        if self.tokenizer.pad_token_id == end:
            others = (self.tokenizer.bos_token, self.tokenizer.unk_token, *self.tokenizer.all_special_tokens)
            ends = self.tokenizer.convert_ids_to_tokens(end)
            self.tokenizer.pad_token = next(token for token in others if token and token != ends)
        return self.tokenizer.pad_token_id

    def sums(self, model: nn.Module, examples: Sequence[Pair]) -> tuple[Tensor, Sums]:
        ids = self._ids(self._both(examples))
        chosen, rejected = model(input_ids=ids, use_cache=False).logits.squeeze(-1).float().chunk(2)
        loss = losses.bradley_terry(chosen, rejected)
        correct = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
        return loss, {
            "loss": loss.detach(),
            "accuracy": correct.sum().detach(),
            "margin": (chosen - rejected).sum().detach(),
        }


class DPO(_Pairs):
    """Direct preference optimisation against the log-probabilities of the model that training starts from."""

    needs_reference = True
    settings: PreferenceConfig

    def sums(self, model: nn.Module, examples: Sequence[Pair]) -> tuple[Tensor, Sums]:
        chosen, rejected = self.logprobs(model, examples)
        reference = torch.tensor([pair.reference for pair in examples], device=self.device)
        loss, reward_chosen, reward_rejected = losses.dpo(
            chosen, rejected, reference[:, 0], reference[:, 1], self.settings.beta
        )
        if self.settings.nll_weight:
            lengths = torch.tensor([sum(pair.chosen.weights) for pair in examples], device=self.device)
            loss = loss - self.settings.nll_weight * (chosen / lengths).sum()
        return loss, {
            "loss": loss.detach(),
            "accuracy": (reward_chosen > reward_rejected).float().sum(),
            "margin": (reward_chosen - reward_rejected).sum(),
            "reward_chosen": reward_chosen.sum(),
            "reward_rejected": reward_rejected.sum(),
        }

    def logprobs(self, model: nn.Module, examples: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Summed response log-probabilities of chosen and rejected, [P] each."""
        rows = self._both(examples)
        ids = self._ids(rows)
        logits = model(input_ids=ids, use_cache=False).logits
        chosen, rejected = losses.sequence_logprobs(logits, ids, self._weights(rows)).chunk(2)
        return chosen, rejected


OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT, "reward": Reward, "dpo": DPO}
