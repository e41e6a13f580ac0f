"""What each kind of training reads, and the loss of one micro-step.

An objective knows its model class, how rows become speech groups, and the sums of a batch: the loss, and the
statistics to report. The loop (`loop.py`) knows nothing else of it.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import LoopConfig, PreferenceConfig, RewardConfig, SFTConfig
from psycho.principles import STEMS
from psycho.training import losses
from psycho.training.groups import Group, desensitise, encode, encode_conversation, encode_group, only
from psycho.training.modules import PolicyModel, RewardModel, check_head
from psycho.training.packing import Batch

Row = Mapping[str, Any]
Sums = dict[str, Tensor]
Groups = list[Group]


def _prompt(row: Row) -> str:
    return row.get("messages") or json.dumps([{"role": "user", "content": row["question"]}])


class Objective(ABC):
    """One kind of training."""

    needs_reference = False
    listwise = False

    def __init__(self, settings: LoopConfig, tokenizer: Any) -> None:
        self.settings, self.tokenizer = settings, tokenizer

    def load(self, path: str, dtype: torch.dtype, **options: Any) -> Any:
        """The `transformers` model to train; `options` are those of `from_pretrained`."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
        check_head(model)
        return model

    def wrap(self, model: Any) -> nn.Module:
        """The module that takes a `Batch`."""
        return PolicyModel(model)

    def groups(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        """Rows as speech groups, and the positions of rows with a text of more than `max_length` tokens."""
        found: Groups = []
        too_long: list[int] = []
        for members in self.members(rows):
            groups, over = self.encode([rows[index] for index in members], max_length)
            found += groups
            too_long += [members[place] for place in over]
        return found, sorted(too_long)

    def members(self, rows: Sequence[Row]) -> list[list[int]]:
        """The positions of the rows that are encoded together; each row alone unless an objective says otherwise."""
        return [[index] for index in range(len(rows))]

    @abstractmethod
    def encode(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        """Rows of one `members` as speech groups, and the places among them of rows that are too long."""

    @abstractmethod
    def weight(self, group: Group) -> float:
        """What the group counts in the mean loss."""

    @abstractmethod
    def sums(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        """The summed loss of a micro-step and summed statistics; `outputs` is what the module returned."""


class SFT(Objective):
    """Rows: `messages`; every assistant turn is learned."""

    settings: SFTConfig

    def encode(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        weight = self.settings.prompt_loss_weight
        whole = [encode_conversation(self.tokenizer, json.loads(row["messages"]), weight) for row in rows]
        too_long = [place for place, row in enumerate(whole) if len(row) > max_length]
        return [Group([], (row,)) for row in whole if len(row) <= max_length], too_long

    def weight(self, group: Group) -> float:
        return sum(group.responses[0].weights[1:])

    def sums(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        loss = -(outputs.double() * batch.weights).sum()
        return loss, {"loss": loss.detach(), "loss_weight": batch.weights.sum()}


class _Pairs(Objective):
    """Rows: `messages` (JSON) or `question`, `chosen`, `rejected`, optionally `gap`. Rows of one prompt are a group.

    With loss plackett_luce its pairs are read as the ranking that they make up (`losses.plackett_luce`): a response
    against all those it is preferred to. So ties, pairs under the gap and less safe responses stay out of it, too.
    """

    settings: RewardConfig | PreferenceConfig

    def __init__(self, settings: LoopConfig, tokenizer: Any) -> None:
        super().__init__(settings, tokenizer)
        self.listwise = self.settings.loss == "plackett_luce"

    def choices(self, batch: Batch) -> losses.Choices | None:
        """Those of the batch where the objective is about lists."""
        return losses.Choices(batch.choice, batch.choices) if self.listwise else None

    def members(self, rows: Sequence[Row]) -> list[list[int]]:
        speeches: dict[str, list[int]] = {}
        for index, row in enumerate(rows):
            speeches.setdefault(_prompt(row), []).append(index)
        return list(speeches.values())

    def encode(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        group = self._group(json.loads(_prompt(rows[0])), rows)
        fits = [
            all(len(group.prompt) + len(group.responses[side]) <= max_length for side in pair) for pair in group.pairs
        ]
        kept = [place for place, good in enumerate(fits) if good]
        too_long = [place for place, good in enumerate(fits) if not good]
        if self.listwise:  # in a list a response stands once
            kept = [place for place in kept if group.pairs.index(group.pairs[place]) == place]
        return ([only(group, kept)] if kept and len(kept) < len(rows) else [group] if kept else []), too_long

    def _group(self, prompt: list[dict[str, str]], rows: Sequence[Row]) -> Group:
        place: dict[str, int] = {}
        for row in rows:
            for side in ("chosen", "rejected"):
                place.setdefault(row[side], len(place))
        pairs = [(place[row["chosen"]], place[row["rejected"]]) for row in rows]
        return encode_group(self.tokenizer, prompt, list(place), pairs, [row.get("gap") or 0.0 for row in rows])

    def weight(self, group: Group) -> float:
        return group.scale * (group.choices if self.listwise else len(group.pairs))

    def summed(self, loss: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        """The sum of a loss of one value a pair (or a choice), with what its mean is over."""
        choices = self.choices(batch)
        weights = choices.means(batch.scales) if choices else batch.scales
        total = (loss * weights).sum()
        return total, {"loss": total.detach(), "loss_weight": weights.sum()}


class Reward(_Pairs):
    """Bradley-Terry or Plackett-Luce reward model: one logit at the last token of the conversation."""

    settings: RewardConfig

    def load(self, path: str, dtype: torch.dtype, **options: Any) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype, **options)
        model.config.pad_token_id = self._padding()
        return model

    def encode(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        kept, too_long = super().encode(rows, max_length)
        if self.settings.average == "speeches":  # before a group is cut to fit its bin
            kept = [replace(group, scale=1 / self.weight(group)) for group in kept]
        return kept, too_long

    def wrap(self, model: Any) -> nn.Module:
        return RewardModel(model, len(STEMS) if self.settings.principle_heads else 0)

    def _group(self, prompt: list[dict[str, str]], rows: Sequence[Row]) -> Group:
        group = super()._group(prompt, rows)
        if not self.settings.principle_heads:
            return group
        rated = {row[side]: row.get(f"{side}_ratings") for row in rows for side in ("chosen", "rejected")}
        unknown = (math.nan,) * len(STEMS)
        return replace(group, ratings=tuple(tuple(own) if own else unknown for own in rated.values()))

    def _padding(self) -> int:
        """A pad token that no conversation ends with: others read the logit at the last token that is not padding,
        and where padding is the end-of-turn token, that would be the token before it."""
        end = encode(self.tokenizer, [{"role": "user", "content": "a"}], "b").ids[-1]
        if self.tokenizer.pad_token_id == end:
            others = (self.tokenizer.bos_token, self.tokenizer.unk_token, *self.tokenizer.all_special_tokens)
            ends = self.tokenizer.convert_ids_to_tokens(end)
            self.tokenizer.pad_token = next(token for token in others if token and token != ends)
        return self.tokenizer.pad_token_id

    def sums(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        rewards = outputs[:, 0] if outputs.dim() == 2 else outputs
        chosen, rejected = rewards[batch.pairs[:, 0]], rewards[batch.pairs[:, 1]]
        margins, choices = self.settings.margin_per_gap * batch.gaps, self.choices(batch)
        if choices is None:
            loss = losses.bradley_terry(chosen, rejected, margins)
        else:
            loss = losses.plackett_luce(chosen - rejected - margins, choices)
        if self.settings.centring:
            centring = losses.centring(chosen, rejected)
            loss = loss + self.settings.centring * (choices.means(centring) if choices else centring)
        found: Sums = {}
        if batch.ratings is not None:
            error = losses.rating_error(outputs[:, 1:], batch.ratings)[batch.pairs].mean(1)  # [P], of both sides
            loss = loss + self.settings.principle_heads * (choices.means(error) if choices else error)
            found["rating_error"] = error.sum().detach()
        correct = losses.in_order(chosen, rejected, chosen.abs() + rejected.abs())
        total, parts = self.summed(loss, batch)
        return total, found | parts | {
            "accuracy": correct.sum().detach(),
            "margin": (chosen - rejected).sum().detach(),
        }


class Preference(_Pairs):
    """DPO and its relatives, against the log-probabilities of the model that training starts from."""

    settings: PreferenceConfig

    def __init__(self, settings: LoopConfig, tokenizer: Any) -> None:
        super().__init__(settings, tokenizer)
        self.needs_reference = self.settings.needs_reference

    def encode(self, rows: Sequence[Row], max_length: int) -> tuple[Groups, list[int]]:
        kept, too_long = super().encode(rows, max_length)
        if self.settings.ld_alpha < 1:
            kept = [part for group in kept for part in desensitise(group, self.settings.ld_alpha)]
        return kept, too_long

    def logprobs(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Summed log-probabilities of each response, [R], fp64."""
        return losses.sequence_sums(outputs * batch.weights, batch.response, len(batch.lengths))

    def sums(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Sums]:
        policy = self.logprobs(outputs, batch)
        one, other = batch.pairs.unbind(1)
        reference = batch.references if self.needs_reference else None
        pairs = losses.PairLogprobs(
            policy[one],
            policy[other],
            None if reference is None else reference[one],
            None if reference is None else reference[other],
            batch.lengths[one],
            batch.lengths[other],
            self.choices(batch),
        )
        loss, parts = self.summed(losses.preference(pairs, self.settings), batch)
        return loss, {name: value.detach() for name, value in (self._statistics(pairs) | parts).items()}

    def _statistics(self, pairs: losses.PairLogprobs) -> Sums:
        """Sums over pairs; the chosen text's log-probability falling is a failure that the margin does not show."""
        chosen, rejected = (pairs.chosen, pairs.rejected) if pairs.reference_chosen is None else pairs.ratios()
        beta = self.settings.beta
        return {
            "accuracy": losses.in_order(chosen, rejected, pairs.chosen.abs() + pairs.rejected.abs()).sum(),
            "margin": beta * (chosen - rejected).sum(),
            "reward_chosen": beta * chosen.sum(),
            "reward_rejected": beta * rejected.sum(),
            "logp_chosen": pairs.chosen.sum(),
            "logp_rejected": pairs.rejected.sum(),
            "tokens_chosen": pairs.chosen_tokens.sum(),
            "tokens_rejected": pairs.rejected_tokens.sum(),
        }


OBJECTIVES: dict[str, type[Objective]] = {"sft": SFT, "reward": Reward, "dpo": Preference}
