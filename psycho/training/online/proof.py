"""Proof that the engines hold the trainer's weights: both say the same of fixed texts, token by token.

A reload that goes wrong (a tensor that is not taken over, a head that stays behind) raises no error; the policy that is
sampled from is then another than the one that is trained, and all one sees is that it learns badly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from psycho.errors import BadInput, StageFailed
from psycho.inference.requests import prompt
from psycho.training.groups import Encoded, Group, encode_conversation

_ANSWERS = (
    "That sounds hard to carry on your own. What has helped you before?",
    "I hear how tired you are. Would you tell me more about that evening?",
)
_OTHER_WAY, _REPORT = "set online.transport=disk", "report it"
_STILL = 0.25  # of the trainer's change, below which an engine has stood still


class Read(NamedTuple):
    """Log-probabilities of the probes' tokens: the trainer's, and each engine's."""

    trainer: Sequence[Sequence[float]]
    engines: Sequence[Sequence[list[float] | None]]


def probes(
    speeches: Sequence[Mapping[str, str]], system: str | None, tokenizer: Any, count: int, max_length: int
) -> list[Encoded]:
    """Fixed texts: a speech and an answer each, every token of which counts.

    Raises:
        BadInput: none is short enough.
    """
    found: list[Encoded] = []
    shortest = 0
    for place, speech in enumerate(sorted(speeches, key=lambda row: row["speech_id"])):
        answer = {"role": "assistant", "content": _ANSWERS[place % len(_ANSWERS)]}
        row = encode_conversation(tokenizer, [*prompt(speech, system), answer], other_weight=1.0, last=True)
        shortest = min(shortest or len(row), len(row))
        if len(row) < max_length:
            found.append(row)
        if len(found) == count:
            break
    if count and not found:
        raise BadInput(
            f"no speech with an answer fits into {max_length} tokens, so that the weights of the engines cannot be "
            "proven; raise training.max_length and inference.engine.max_model_len over the "
            f"{shortest} that the shortest takes"
        )
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
    expected: Sequence[Sequence[float]],
    found: Sequence[Sequence[list[float] | None]],
    tolerance: float,
    sent: bool = False,
) -> float:
    """Compare the trainer's log-probabilities with those of each engine; the largest difference of a token.

    Args:
        sent: the weights came from GPU to GPU, and there is another way: by the folder.

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
                    f"{difference:.2g} in log-probability, over online.sync_tolerance {tolerance:g}; give the same "
                    f"command again, so that it starts anew, and if it stays so {_OTHER_WAY if sent else _REPORT}"
                )
            largest = max(largest, difference)
    return largest


def check_moved(before: Read, now: Read) -> None:
    """No engine stood still while the policy in training moved; both readings have passed `check`.

    In 16 bits the tolerance for the rounding of one token is wider than what a round changes, so that an engine which
    kept its old weights would pass. But what it says of the same texts is then what it said before.

    Raises:
        StageFailed: over all tokens, one moved by less than a quarter of what the trainer's did.
    """
    moved = _size(before.trainer, now.trainer)
    for worker, (old, new) in enumerate(zip(before.engines, now.engines, strict=True)):
        followed = _size(old, new)
        if followed < _STILL * moved:
            raise StageFailed(
                f"engine {worker} did not take the new weights: what it says of the probes moved by {followed:.2g} and "
                f"what the policy in training says by {moved:.2g}; give the same command again, so that it starts anew"
            )


def _size(one: Sequence[Sequence[float] | None], other: Sequence[Sequence[float] | None]) -> float:
    """The length of the change over the tokens of all texts."""
    pairs = [(first or (), second or ()) for first, second in zip(one, other, strict=True)]
    return math.sqrt(sum((b - a) ** 2 for first, second in pairs for a, b in zip(first, second, strict=True)))
