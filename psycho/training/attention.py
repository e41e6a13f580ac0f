"""Attention for packed speech groups: each response sees its prompt and itself, and nothing else.

Registered with `transformers`' own attention interface under the name `speech_groups`, so that every model which goes
through that interface (Llama, Qwen, Mistral, Gemma, ...) works unchanged; the layout of the bin travels as the keyword
`layout` from the model's call to each layer. On a CPU calls per prompt and response are fastest (`shared_prompt`, or
one causal call for both): an explicit T x T mask costs a third of the speed at 2,048 tokens and half at 4,096. On a GPU
it is FlexAttention with a block mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from psycho.training.sequence import SequenceGroup
from psycho.training.shared_prompt import fits, shared_prompt

NAME = "speech_groups"
Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    """Where the groups of a bin lie: per group the span of its prompt and the spans of its responses.

    With a `sequence` group its ranks share the bin's tokens, and each holds a slice of them.
    """

    groups: tuple[tuple[Span, tuple[Span, ...]], ...]
    length: int
    sequence: SequenceGroup | None = None
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)

    def block_mask(self, window: int | None, device: torch.device) -> Any:
        """FlexAttention's mask for this bin, made once per window size and device."""
        key = (window, device)
        if key not in self.masks:
            self.masks[key] = self._block_mask(window, device)
        return self.masks[key]

    def _block_mask(self, window: int | None, device: torch.device) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        group, segment, position = (t.to(device) for t in self.coordinates())

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (group[query] == group[key])
            seen = seen & ((segment[key] == 0) | (segment[key] == segment[query]))
            return seen if window is None else seen & (position[query] - position[key] < window)

        return create_block_mask(visible, None, None, self.length, self.length, device=device)

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Group, segment within it (0 is the prompt) and position of every token, [T] each; padding is group -1."""
        group = torch.full((self.length,), -1)
        segment, position = torch.zeros(2, self.length, dtype=torch.long)
        for number, ((begin, end), responses) in enumerate(self.groups):
            group[begin:end] = number
            position[begin:end] = torch.arange(end - begin)
            for index, (first, last) in enumerate(responses, start=1):
                group[first:last] = number
                segment[first:last] = index
                position[first:last] = torch.arange(last - first) + (end - begin)
        return group, segment, position


def speech_groups(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer.

    Args:
        query: [B, H, T, D]; key, value: [B, H_kv, T, D].
        layout: of a packed bin (then B is 1); none: rows padded on the right, causal.

    Returns:
        [B, T, H, D], and no weights.
    """
    if layout is not None and layout.sequence is not None:
        whole = layout.sequence.to_heads(query, key, value, layout.length)
        alone = replace(layout, sequence=None)  # it shares the masks
        found, _ = speech_groups(module, *whole, None, dropout, scaling, alone, sliding_window, softcap)
        return layout.sequence.to_tokens(found), None
    window = sliding_window if sliding_window is None or sliding_window < query.shape[2] else None
    if query.is_cuda and layout is not None:
        mask = layout.block_mask(window, query.device)
        return _flex(query, key, value, mask, scaling, softcap).transpose(1, 2), None
    if softcap is not None:
        raise ValueError("this model caps its attention scores, which only the GPU path does")
    repeats = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeats, dim=1) if repeats > 1 else t for t in (key, value))
    if layout is None:
        return _causal(query, key, value, dropout, scaling, window).transpose(1, 2), None
    # Cut with `split`: its backward puts the pieces together once, where that of a slice fills a tensor of the whole
    # bin with zeros for every piece.
    sizes = [[end - begin for begin, end in (prompt, *responses)] for prompt, responses in layout.groups]
    cut = (t.split([sum(size) for size in sizes], dim=2) for t in (query, key, value))
    parts = [_group(q, k, v, size, dropout, scaling, window) for q, k, v, size in zip(*cut, sizes, strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def _group(
    query: Tensor, key: Tensor, value: Tensor, sizes: list[int], dropout: float, scaling: float | None,
    window: int | None,
) -> Tensor:  # fmt: skip
    """One group; `sizes`: tokens of its prompt and of each of its responses."""
    prompt, first, *others = sizes
    longest = prompt + max(first, *others, 0)
    if prompt and others and fits(query, key, value, dropout, window, longest):
        return shared_prompt(query, key, value, prompt, (first, *others), scaling)
    # The prompt's own rows come with the first response; with another they are made anew and left out.
    heads = [t[:, :, :prompt] for t in (query, key, value)]
    found: list[Tensor] = []
    for parts in zip(*(t.split([prompt + first, *others], dim=2) for t in (query, key, value)), strict=True):
        q, k, v = (torch.cat(part, dim=2) for part in zip(heads, parts, strict=True)) if found else parts
        rows = _causal(q, k, v, dropout, scaling, window)
        found.append(rows[:, :, prompt:] if found else rows)
    return torch.cat(found, dim=2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    length = query.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    mask = _band(length, window, query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling)


@lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """[T, T] True where a query may look: at itself and the `window` - 1 tokens before it."""
    here = torch.arange(length, device=device)
    distance = here[:, None] - here[None, :]
    return (distance >= 0) & (distance < window)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def _cap(limit: float) -> Any:
    def cap(score: Tensor, *_: Tensor) -> Tensor:
        return limit * torch.tanh(score / limit)

    return cap


def _flex(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None, softcap: float | None) -> Tensor:
    return _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


AttentionInterface.register(NAME, speech_groups)
