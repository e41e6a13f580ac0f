"""What DeepSpeed wraps: a `transformers` model whose call takes a `Batch` and returns just what a loss needs.

The policy returns log-probabilities of the trained tokens, and its output head sees nothing else: logits of prompt
tokens are never made, and those of responses a chunk at a time, in the backward pass too, so that peak memory does
not grow with tokens x vocabulary. The head is called as a module, because under ZeRO-3 its weight is only there then.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from psycho.training import attention
from psycho.training.packing import Batch

LOGITS = {"cpu": 2**24, "cuda": 2**27}  # elements of a chunk: 64 MiB in fp32, 256 MiB in bf16; smaller starves a GPU
_PIECE = {"cpu": 2**18, "cuda": 2**24}  # elements that are worked on at a time: what a core's cache holds; 64 MiB
_UNSUPPORTED = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


class PolicyModel(nn.Module):
    """A causal language model that returns log-probabilities, [N] of a batch's trained tokens, fp32.

    Args:
        logits: elements of a chunk; none: what the device likes.

    `most`, where it is set, is how many trained tokens a bin may have at all. Then chunks are as many for every bin:
    under ZeRO-3 a call of the head may gather its weight, which all ranks have to do equally often.
    """

    def __init__(self, model: Any, logits: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.most: int | None = None
        self._logits = logits

    def forward(self, batch: Batch) -> Tensor:
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        hidden = _hidden(base.base_model, batch)[batch.source]
        head = base.get_output_embeddings()
        cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
        vocabulary = base.config.get_text_config().vocab_size
        size = (
            max(1, self._logits // vocabulary) if self._logits else max(128, LOGITS[hidden.device.type] // vocabulary)
        )
        chunks = -(-(self.most or hidden.shape[0]) // size)
        if chunks <= 1:
            found = _logprobs(head, hidden, batch.targets, cap)
        else:
            rows = zip(hidden.tensor_split(chunks), batch.targets.tensor_split(chunks), strict=True)
            found = torch.cat([checkpoint(_logprobs, head, h, t, cap, use_reentrant=False) for h, t in rows])
        return _whole(found, batch, batch.own_tokens, len(batch.weights))


class RewardModel(nn.Module):
    """A one-label sequence classifier that returns the reward of each response, [R], fp32.

    With `principles` > 0, as many linear heads beside it say the ratings of the principles: [R, 1 + principles].
    """

    def __init__(self, model: Any, principles: int = 0) -> None:
        super().__init__()
        self.model = model
        self.principles = None
        if principles:
            width = model.config.get_text_config().hidden_size
            self.principles = nn.Linear(width, principles, dtype=model.dtype)

    def forward(self, batch: Batch) -> Tensor:
        base = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        last = _hidden(base.base_model, batch)[batch.last]
        rewards: Tensor = base.score(last).float()
        if self.principles is None:
            rewards = rewards.squeeze(-1)
        else:
            rewards = torch.cat([rewards, self.principles(last).float()], dim=1)
        return _whole(rewards, batch, batch.own_responses, len(batch.lengths))


def _hidden(decoder: Any, batch: Batch) -> Tensor:
    """Last hidden states, [B * T, d]."""
    layout = {} if batch.layout is None else {"layout": batch.layout}
    out = decoder(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **layout)
    return out.last_hidden_state.flatten(0, 1)


def _whole(found: Tensor, batch: Batch, places: Tensor | None, count: int) -> Tensor:
    """What all ranks that share the bin say."""
    if places is None or batch.layout is None or batch.layout.sequence is None:
        return found
    return batch.layout.sequence.whole(found, places, count)


def _logprobs(head: nn.Module, hidden: Tensor, targets: Tensor, cap: float | None) -> Tensor:
    logits = head(hidden)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    found: Tensor = _TokenLogprobs.apply(logits, targets)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """log softmax(logits)[target], [N] fp32, of logits [N, V] that nobody else reads.

    The backward pass turns the logits into their own gradient where they lie: one tensor of tokens x vocabulary at the
    peak, where `cross_entropy` holds three (log-softmax, its gradient, that of the logits), in fp32 whatever the model.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        highest = logits.amax(-1).float()
        sums = torch.cat([(part.float() - top[:, None]).exp_().sum(-1) for part, top in _pieces(logits, highest)])
        logs = sums.log_()
        ctx.save_for_backward(logits, targets, highest + logs)
        return logits.gather(1, targets[:, None])[:, 0].float() - highest - logs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = ctx.saved_tensors
        for part, norm, target, each in _pieces(logits, norms, targets, gradient):
            soft = (part.float() - norm[:, None]).exp_().mul_(-each[:, None])
            part.copy_(soft.scatter_add_(1, target[:, None], each[:, None]))
        return logits, None


def _pieces(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, few at a time."""
    rows = max(1, _PIECE[logits.device.type] // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *others)), strict=True)


def use_packing(model: Any) -> str | None:
    """Switch a loaded model to the attention of packed groups; the reason where it cannot.

    Then the model keeps its own attention and its batches are padded.
    """
    text = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return f"{type(model).__name__} does not go through transformers' attention interface"
    if getattr(text, "attn_logit_softcapping", None) and not torch.cuda.is_available():
        return f"{type(model).__name__} caps its attention scores"
    if getattr(text, "attention_chunk_size", None):
        return f"{type(model).__name__} attends in chunks"
    model.set_attn_implementation(attention.NAME)
    return None


def check_head(model: Any) -> None:
    """Refuse a model whose logits are scaled in a way that `PolicyModel` does not do.

    Raises:
        ValueError: it names the setting of the model's configuration.
    """
    text = model.config.get_text_config()
    for name in _UNSUPPORTED:
        if getattr(text, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{type(model).__name__} scales its logits ({name}), which training does not do yet")
