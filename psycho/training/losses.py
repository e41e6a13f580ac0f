"""The objectives as pure functions of log-probabilities, rewards and lengths.

Each returns one value a pair, or one a choice out of a list; sums and counts travel from there, so that micro-batches
and ranks add up to exactly the loss of the whole batch: the division happens once. Summed log-probabilities come in
fp64 (`sequence_sums`): in fp32 even the plain computation is 2e-5 off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from psycho.config import PreferenceConfig

_TIE = 1e-6  # of what a margin was computed from; packed and padded rows of one model lie 3e-8 apart


@dataclass(frozen=True)
class Choices:
    """Which pairs are one choice, of a response out of a list with all those that it is preferred to.

    `of`: [P], the choice of each pair, in [0, `count`).
    """

    of: Tensor
    count: int

    def means(self, values: Tensor) -> Tensor:
        """Of values of pairs, [P], those of each choice, [C]."""
        sums = values.new_zeros(self.count).index_add(0, self.of, values)
        return sums / values.new_zeros(self.count).index_add(0, self.of, torch.ones_like(values))


@dataclass(frozen=True)
class PairLogprobs:
    """Chosen and rejected of P pairs: summed log-probabilities of policy and reference and trained tokens, [P] each.

    Reference values are None for objectives that need no reference. `choices` are those of the pairs where the
    objective is about lists; None: each pair by itself.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    choices: Choices | None = None

    def ratios(self) -> tuple[Tensor, Tensor]:
        """log(policy / reference) of chosen and rejected."""
        if self.reference_chosen is None or self.reference_rejected is None:
            raise ValueError("this objective needs reference log-probabilities")
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected


def sequence_sums(values: Tensor, response: Tensor, count: int) -> Tensor:
    """Sum per-token values [N] into their responses [R], in fp64; `response` [N] says whose each is."""
    return torch.zeros(count, dtype=torch.float64, device=values.device).index_add(0, response, values.double())


def in_order(chosen: Tensor, rejected: Tensor, size: Tensor) -> Tensor:
    """1 where the chosen score is the higher, one half at a tie, else 0, [P].

    A margin that single precision leaves of nothing is a tie: else rounding decides, as for a policy that still is its
    own reference.

    Args:
        size: of the numbers that the scores were computed from, [P]; the tie is relative to it.
    """
    margins = (chosen - rejected).double()
    return (torch.where(margins.abs() <= _TIE * size.double(), 0.0, margins).sign() + 1) / 2


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """-log sigmoid(r_c - r_r - margin), [P] (paper, section 4.1; Bradley and Terry 1952; margin: Llama 2, eq. 2)."""
    return -F.logsigmoid(chosen - rejected - margin)


def plackett_luce(advantages: Tensor, choices: Choices) -> Tensor:
    """-log P(a response is chosen out of its list), [C] (Luce 1959; Plackett 1975).

    Where every response is preferred to all that are ranked below it, the sum over the choices of a speech is the
    negative log-likelihood of its whole ranking. Nothing is asked of responses that tie, or that no pair orders:
    neither stands in the other's list, which Luce's axiom allows. A list of two is Bradley-Terry.

    Args:
        advantages: score of the chosen response less that of the rejected one (less a margin), [P].
    """
    against = -advantages
    zeros = against.new_zeros(choices.count)
    top = zeros.scatter_reduce(0, choices.of, against.detach(), "amax")  # at least 0, the chosen one's own term
    sums = torch.exp(-top).index_add(0, choices.of, torch.exp(against - top[choices.of]))
    return top + torch.log(sums)


def centring(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_c + r_r)^2, [P]: keeps rewards around zero (Eisenstein et al. 2023)."""
    return (chosen + rejected) ** 2


def rating_error(found: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared error of the seven heads, [R], on ratings (1 to 5) less 3; what is unknown (NaN) counts nothing."""
    known = ~torch.isnan(ratings)
    errors = torch.where(known, found - (torch.nan_to_num(ratings) - 3), 0.0) ** 2
    return errors.sum(1) / known.sum(1).clamp(min=1)


def _scores(pairs: PairLogprobs, settings: PreferenceConfig) -> tuple[Tensor, Tensor]:
    """f'(ratio) of each side under the chosen f-divergence (Wang et al. 2023, table 1)."""
    ratios = pairs.ratios()
    if settings.f_divergence == "forward_kl":
        one, other = (1 - torch.exp(-ratio) for ratio in ratios)
    elif settings.f_divergence == "js":
        one, other = (math.log(2) + F.logsigmoid(ratio) for ratio in ratios)
    elif settings.f_divergence == "alpha":
        alpha = settings.f_alpha - 1.0
        one, other = (torch.expm1(torch.clamp(alpha * ratio, max=80.0)) / alpha for ratio in ratios)
    else:
        one, other = ratios
    return one, other


def _dpo(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Rafailov et al. 2023, equation 7; with label smoothing, Mitchell 2023 (conservative DPO)."""
    chosen, rejected = _scores(pairs, settings)
    logits = settings.beta * (chosen - rejected)
    smooth = settings.label_smoothing
    return -(1 - smooth) * F.logsigmoid(logits) - smooth * F.logsigmoid(-logits)


def _robust(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Chowdhury et al. 2024: unbiased where a share `label_smoothing` of the labels is flipped."""
    chosen, rejected = _scores(pairs, settings)
    logits = settings.beta * (chosen - rejected)
    noise = settings.label_smoothing
    return (-(1 - noise) * F.logsigmoid(logits) + noise * F.logsigmoid(-logits)) / (1 - 2 * noise)


def _ipo(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Azar et al. 2023, equation 17, on log-probabilities per token, as its authors mean it."""
    chosen, rejected = _scores(pairs, settings)
    delta = chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)
    return (delta - 1 / (2 * settings.beta)) ** 2


def _plackett_luce(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Rafailov et al. 2023, appendix A.3: DPO on rankings."""
    chosen, rejected = _scores(pairs, settings)
    advantages = settings.beta * (chosen - rejected)
    return -F.logsigmoid(advantages) if pairs.choices is None else plackett_luce(advantages, pairs.choices)


def _hinge(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Zhao et al. 2023 (SLiC), on log ratios."""
    chosen, rejected = _scores(pairs, settings)
    return torch.relu(1 - settings.beta * (chosen - rejected))


def _dpo_norm(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Length-normalised DPO: log ratios per token (Meng et al. 2024, section 4.2; Lambert et al. 2024)."""
    chosen, rejected = _scores(pairs, settings)
    delta = chosen / pairs.chosen_tokens.clamp(min=1) - rejected / pairs.rejected_tokens.clamp(min=1)
    return -F.logsigmoid(settings.beta * delta)


def _simpo(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Meng et al. 2024, equation 6: no reference, log-probabilities per token, a target margin gamma."""
    chosen = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
    rejected = pairs.rejected / pairs.rejected_tokens.clamp(min=1)
    logits = settings.beta * (chosen - rejected) - settings.simpo_gamma
    smooth = settings.label_smoothing
    return -(1 - smooth) * F.logsigmoid(logits) - smooth * F.logsigmoid(-logits)


def _orpo(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """Hong et al. 2024, equation 6: the chosen text's likelihood and beta times the odds ratio; no reference."""
    chosen = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
    rejected = pairs.rejected / pairs.rejected_tokens.clamp(min=1)
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -chosen - settings.beta * F.logsigmoid(odds)


def _log1mexp(value: Tensor) -> Tensor:
    """log(1 - exp(value)) for value < 0."""
    return torch.log1p(-torch.exp(value.clamp(max=-1e-7)))


LOSSES: dict[str, Callable[[PairLogprobs, PreferenceConfig], Tensor]] = {
    "dpo": _dpo,
    "plackett_luce": _plackett_luce,
    "robust": _robust,
    "ipo": _ipo,
    "hinge": _hinge,
    "dpo_norm": _dpo_norm,
    "simpo": _simpo,
    "orpo": _orpo,
}


def preference(pairs: PairLogprobs, settings: PreferenceConfig) -> Tensor:
    """The configured objective, [P], with `nll_weight` times the chosen text's mean negative log-likelihood.

    Where the pairs come with `choices`: [C].
    """
    loss = LOSSES[settings.loss](pairs, settings)
    if settings.nll_weight:
        likelihood = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
        loss = loss - settings.nll_weight * (pairs.choices.means(likelihood) if pairs.choices else likelihood)
    return loss
