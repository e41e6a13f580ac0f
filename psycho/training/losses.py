"""The objectives as pure functions of tensors: supervised, Bradley-Terry, DPO.

Each returns sums and counts rather than means, so that micro-batches and ranks add up to exactly the loss of the
whole batch: the division happens once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def token_logprobs(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Log-probability of each next token.

    Args:
        logits: [B, T, V].
        input_ids: [B, T].

    Returns:
        [B, T-1]; entry t is log p(input_ids[t+1] | input_ids[..t]).
    """
    batch, length, vocabulary = logits.shape
    flat = F.cross_entropy(
        logits[:, :-1].reshape(-1, vocabulary).float(), input_ids[:, 1:].reshape(-1), reduction="none"
    )
    return -flat.view(batch, length - 1)


def sequence_logprobs(logits: Tensor, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of token log-probabilities per sequence; weights [B, T] belong to the token they stand on. -> [B]"""
    return (token_logprobs(logits, input_ids) * weights[:, 1:]).sum(dim=1)


def supervised(logits: Tensor, input_ids: Tensor, weights: Tensor) -> Tensor:
    """Sum of weighted negative log-likelihoods (divide by the sum of `weights[:, 1:]`)."""
    return -sequence_logprobs(logits, input_ids, weights).sum()


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Sum over pairs of -log sigmoid(r_c - r_r) (paper, section 4.1; Bradley and Terry 1952). Inputs [P]."""
    return -F.logsigmoid(chosen - rejected).sum()


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct preference optimisation (Rafailov et al. 2023, equation 7).

    Args:
        policy_chosen, policy_rejected, reference_chosen, reference_rejected: summed log-probabilities, [P] each.
        beta: strength of the pull to the reference.

    Returns:
        Sum of losses, and the implicit rewards of chosen and rejected, [P] each, detached.
    """
    chosen = beta * (policy_chosen - reference_chosen)
    rejected = beta * (policy_rejected - reference_rejected)
    return -F.logsigmoid(chosen - rejected).sum(), chosen.detach(), rejected.detach()


def pad(sequences: list[list[int]], value: int, device: torch.device) -> Tensor:
    """Right-padded [B, T] tensor. Under a causal mask, right padding changes nothing before it."""
    length = max(len(row) for row in sequences)
    return torch.tensor([row + [value] * (length - len(row)) for row in sequences], device=device)


def pad_floats(sequences: list[list[float]], device: torch.device) -> Tensor:
    """Right-padded [B, T] tensor of weights, padding weighs nothing."""
    length = max(len(row) for row in sequences)
    return torch.tensor([row + [0.0] * (length - len(row)) for row in sequences], device=device)
