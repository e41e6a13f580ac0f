"""The shared prompt's attention is that of an explicit mask, forward and backward."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from psycho.training.attention import Layout
from psycho.training.shared_prompt import fits, shared_prompt


def _masked(query: Tensor, key: Tensor, value: Tensor, sizes: list[int], scaling: float) -> Tensor:
    """Softmax over all that the layout lets be seen, in the inputs' precision."""
    ends = torch.tensor(sizes).cumsum(0).tolist()
    responses = tuple(pairwise(ends))
    _, segment, _ = Layout((((0, sizes[0]), responses),), ends[-1]).coordinates()
    place = torch.arange(ends[-1])
    seen = (place[:, None] >= place) & ((segment == 0) | (segment == segment[:, None]))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("sizes", [[5, 1, 1], [70, 33, 64, 1], [1, 90, 40], [600, 20, 30]])
def test_as_with_a_mask(sizes: list[int]) -> None:
    torch.manual_seed(0)
    shape = (2, sum(sizes), 3, 16)
    inputs = [torch.randn(shape, dtype=torch.float64).transpose(1, 2).requires_grad_() for _ in range(3)]
    weights = torch.randn(2, 3, sum(sizes), 16, dtype=torch.float64)
    wanted = _masked(*inputs, sizes, 0.3)
    gradients = torch.autograd.grad((wanted * weights).sum(), inputs)
    singles = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = shared_prompt(*singles, sizes[0], sizes[1:], 0.3)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)
    for got, right in zip(torch.autograd.grad((found * weights.float()).sum(), singles), gradients, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=5e-6)


def test_in_bf16() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 120, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    found = shared_prompt(*inputs, 50, [30, 40], None)
    assert found.dtype == torch.bfloat16
    wanted = _masked(*(t.float() for t in inputs), [50, 30, 40], 32**-0.5)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    found.sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in inputs)


def test_what_the_kernel_cannot_do() -> None:
    q, wide = torch.zeros(1, 4, 8, 16), torch.zeros(1, 4, 8, 32)
    assert fits(q, q, q, 0.0, None, 8) and fits(q, q, q, 0.0, 8, 8)
    assert not fits(q, q, q, 0.0, 7, 8)
    assert not fits(q, q, q, 0.1, None, 8)
    assert not fits(q, q, wide, 0.0, None, 8)
    assert not fits(q, q[:, :2], q[:, :2], 0.0, None, 8)
