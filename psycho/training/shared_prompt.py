"""Attention of one prompt and the responses to it on a CPU, each query computed once.

A causal call for each prompt with its response computes the prompt's queries anew for every response, and throws them
away. Here all responses look at the prompt in one dense call and each at itself in a causal one; the two parts are
merged by their log-sum-exps. The backward of a part is the flash kernel's own, given the merged output and log-sum-exp,
from which it makes the merged probabilities (as ring attention does over devices: Liu et al. 2023, arXiv 2310.01889).
For four responses a third less time, forward and backward (benchmarks/RESULTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def fits(query: Tensor, key: Tensor, value: Tensor, dropout: float, window: int | None, longest: int) -> bool:
    """Whether the kernel can do it: on a CPU, heads alike, no dropout, and no window that cuts the longest sequence."""
    alike = query.shape[1] == key.shape[1] and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and alike and not dropout and (window is None or longest <= window)


def shared_prompt(
    query: Tensor, key: Tensor, value: Tensor, prompt: int, responses: Sequence[int], scaling: float | None
) -> Tensor:
    """Causal attention within the prompt, and of each response within prompt and itself.

    Args:
        query, key, value: [B, H, T, D] of the prompt and the responses one behind the other.
        prompt: its tokens, at least 1; responses: tokens of each, together T - prompt.
        scaling: of the scores; none: 1 / sqrt(D).

    Returns:
        [B, H, T, D].
    """
    out: Tensor = _SharedPrompt.apply(query, key, value, (prompt, *responses), scaling)
    return out


class _SharedPrompt(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, ...], scaling: float | None
    ) -> Tensor:
        (asking, *own), (keys, *own_keys), (values, *own_values) = (t.split(sizes, 2) for t in (query, key, value))
        out, norm = _FORWARD(asking, keys, values, is_causal=True, scale=scaling)
        outs, norms = [out], [norm]
        to_prompt, to_prompt_norm = _FORWARD(query[:, :, sizes[0] :], keys, values, scale=scaling)
        parts = zip(to_prompt.split(sizes[1:], 2), to_prompt_norm.split(sizes[1:], 2), strict=True)
        for (there, there_norm), q, k, v in zip(parts, own, own_keys, own_values, strict=True):
            here, here_norm = _FORWARD(q, k, v, is_causal=True, scale=scaling)
            norm = torch.logaddexp(there_norm, here_norm)
            outs.append(torch.lerp(here, there, (there_norm - norm).exp_()[..., None].to(here.dtype)))
            norms.append(norm)
        merged, norm = torch.cat(outs, 2), torch.cat(norms, 2)
        ctx.save_for_backward(query, key, value, merged, norm)
        ctx.sizes, ctx.scaling = sizes, scaling
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, norm = ctx.saved_tensors
        sizes, length = ctx.sizes, query.shape[2]
        prompt, answers = slice(0, sizes[0]), slice(sizes[0], length)

        def part(asking: slice, seen: slice, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
            q, o, g, n = (t[:, :, asking] for t in (query, out, gradient, norm))
            k, v = key[:, :, seen], value[:, :, seen]
            found: tuple[Tensor, Tensor, Tensor] = _BACKWARD(g, q, k, v, o, n, 0.0, causal, scale=ctx.scaling)
            return found

        of_query, of_key, of_value = part(prompt, prompt, True)
        to_prompt, more_key, more_value = part(answers, prompt, False)
        queries, keys, values = [of_query], [of_key.add_(more_key)], [of_value.add_(more_value)]
        begin = sizes[0]
        for size, there in zip(sizes[1:], to_prompt.split(sizes[1:], 2), strict=True):
            itself = slice(begin, begin + size)
            of_query, of_key, of_value = part(itself, itself, True)
            queries.append(of_query.add_(there))
            keys.append(of_key)
            values.append(of_value)
            begin += size
        return torch.cat(queries, 2), torch.cat(keys, 2), torch.cat(values, 2), None, None
