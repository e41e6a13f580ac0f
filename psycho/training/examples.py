"""From rows to token ids: one encoding, used by all objectives.

The prompt is rendered by the model's own chat template and tokenized once as a whole with the response behind it, with
no special tokens added on top (a second BOS is a classic bug). What is trained on is marked by weights per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Token ids and the weight of each token in the loss (0 for what is only read)."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Pair:
    """Chosen and rejected response to one prompt, each whole; reference log-probabilities once known."""

    chosen: Encoded
    rejected: Encoded
    reference: tuple[float, float] | None = None


def encode(tokenizer: Any, prompt: Messages, response: str, prompt_weight: float = 0.0) -> Encoded:
    """A prompt and its response as one sequence; response tokens (with the end of turn) weigh 1."""
    return encode_conversation(
        tokenizer, [*prompt, {"role": "assistant", "content": response}], prompt_weight, last=True
    )


def encode_conversation(tokenizer: Any, messages: Messages, other_weight: float = 0.0, last: bool = False) -> Encoded:
    """A conversation; assistant turns (or only the `last`) weigh 1, all other tokens `other_weight`.

    Raises:
        ValueError: the chat template rewrites earlier turns, so that turns cannot be told apart.
    """
    ids: list[int] = []
    weights: list[float] = []
    done = ""

    def take(text: str, weight: float) -> None:
        nonlocal done
        if not text.startswith(done):
            raise ValueError("the chat template rewrites earlier turns; use the last turn alone")
        new = tokenizer(text[len(done) :], add_special_tokens=False).input_ids
        ids.extend(new)
        weights.extend([weight] * len(new))
        done = text

    turns = [len(messages) - 1] if last else [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for turn in turns:
        take(
            tokenizer.apply_chat_template(list(messages[:turn]), tokenize=False, add_generation_prompt=True),
            other_weight,
        )
        take(tokenizer.apply_chat_template(list(messages[: turn + 1]), tokenize=False), 1.0)
    return Encoded(ids, weights)


def length(example: Encoded | Pair) -> int:
    """Tokens of an example; of a pair, of its longer side."""
    if isinstance(example, Pair):
        return max(len(example.chosen.ids), len(example.rejected.ids))
    return len(example.ids)


def tokens(example: Encoded | Pair) -> int:
    """Tokens that training an example reads."""
    if isinstance(example, Pair):
        return len(example.chosen.ids) + len(example.rejected.ids)
    return len(example.ids)
