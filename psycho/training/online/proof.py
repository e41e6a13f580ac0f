"""Proof that the engines hold the trainer's weights: both say the same of fixed texts, token by token.

A reload that goes wrong (a tensor that is not taken over, a head that stays behind) raises no error; the policy that is
sampled from is then another than the one that is trained, and all one sees is that it learns badly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from psycho.errors import StageFailed
from psycho.inference.requests import prompt
from psycho.training.groups import Encoded, Group, encode_conversation

_ANSWERS = (
    "That sounds hard to carry on your own. What has helped you before?",
    "I hear how tired you are. Would you tell me more about that evening?",
)


def probes(
    speeches: Sequence[Mapping[str, str]], system: str | None, tokenizer: Any, count: int, max_length: int
) -> list[Encoded]:
    """Fixed texts: a speech and an answer each, every token of which counts."""
    found = []
    for place, speech in enumerate(sorted(speeches, key=lambda row: row["speech_id"])):
        answer = {"role": "assistant", "content": _ANSWERS[place % len(_ANSWERS)]}
        row = encode_conversation(tokenizer, [*prompt(speech, system), answer], other_weight=1.0, last=True)
        if len(row) < max_length:
            found.append(row)
        if len(found) == count:
            break
    return found


def trainer_logprobs(trainer: Any, texts: Sequence[Encoded]) -> list[list[float]]:
    """Log-probability of each text's tokens after its first; every rank must call, each gets all."""
    trainer.engine.eval()
    found = []
    with torch.no_grad():
        for row in texts:
            found.append(trainer.engine(trainer.collate([Group([], (row,))])).float().tolist())
    return found


def check(
    expected: Sequence[Sequence[float]], found: Sequence[Sequence[list[float] | None]], tolerance: float
) -> float:
    """Compare the trainer's log-probabilities with those of each engine; the largest difference of a token.

    Raises:
        StageFailed: it is over the tolerance.
    """
    largest = 0.0
    for worker, rows in enumerate(found):
        for text, (one, other) in enumerate(zip(expected, rows, strict=True)):
            if other is None or len(one) != len(other):
                raise StageFailed(f"engine {worker} reads probe {text} in another number of tokens than the trainer")
            differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
            difference = math.nan if any(map(math.isnan, differences)) else max(differences)
            if not difference <= tolerance:  # also where it is no number
                raise StageFailed(
                    f"engine {worker} does not hold the trainer's weights: a token of probe {text} differs by "
                    f"{difference:.2g} in log-probability, over online.sync_tolerance {tolerance:g}"
                )
            largest = max(largest, difference)
    return largest
