"""Log-probabilities without tokens x vocabulary: no such tensor is made, in the backward pass neither."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from psycho.training.groups import Encoded, Group
from psycho.training.modules import PolicyModel, _TokenLogprobs, use_packing
from psycho.training.packing import packed


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


def _run(tokens: int, vocabulary: int, logits: int | None = None) -> None:
    """One bin of as many tokens through a tiny model, forward and backward."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=tokens,
        )
    )  # fmt: skip
    assert use_packing(model) is None
    row = list(range(1, 512))
    group = Group([5], tuple(Encoded(row, [1.0] * len(row)) for _ in range(tokens // 512)))
    PolicyModel(model, logits)(packed([group])).sum().backward()


def test_no_tensor_of_tokens_by_vocabulary() -> None:
    with Largest() as seen:
        _run(2048, 5000, logits=300 * 5000)
    assert seen.elements <= 300 * 5000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logprobs_are_cross_entropy(dtype: torch.dtype) -> None:
    """Values and gradients, where a few rows are worked on at a time, and logits far from zero."""
    torch.manual_seed(0)
    start = (torch.randn(300, 4096) * 4 + 30).to(dtype)
    targets, gradient = torch.randint(0, 4096, (300,)), torch.randn(300)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    found = _TokenLogprobs.apply(ours * 1, targets)
    expected = -F.cross_entropy(theirs.float(), targets, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    found.backward(gradient)
    expected.backward(gradient)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_second_backward_is_an_error() -> None:
    """The logits are their own gradient by then; silently wrong numbers would be worse."""
    logits = torch.randn(4, 8, requires_grad=True)
    found = _TokenLogprobs.apply(logits * 1, torch.zeros(4, dtype=torch.long)).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        found.backward()


@pytest.mark.slow
def test_16k_tokens_by_128k_words_fit() -> None:
    """Full logits of such a bin are 8 GiB in fp32, 24 with log-softmax and gradient; ours grow by less than 1 GiB."""
    script = (
        "import resource; import tests.training.test_modules as t\n"
        "t._run(512, 512)\n"  # what the libraries load at first use
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "t._run(16384, 131072)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=900, check=True)
    grown_gib = float(done.stdout.splitlines()[-1])
    print(f"a bin of 16,384 tokens x 131,072 words: grown by {grown_gib:.2f} GiB")
    assert grown_gib < 1.0
