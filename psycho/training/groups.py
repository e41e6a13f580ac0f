"""From rows to token ids: one encoding, used by all objectives, and the unit of training, the speech group.

A speech group is one prompt, K responses to it, and the pairs among them. The prompt is rendered by the model's own
chat template and stands before the response byte for byte, with no special tokens added on top (a second BOS is a
classic bug). What is trained on is marked by weights per token.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycho.errors import BadInput
from psycho.inference.template import conversation

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Encoded:
    """Token ids and the weight of each token in the loss (0 for what is only read)."""

    ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Group:
    """One prompt, its responses, and (chosen, rejected) positions among them; no pair: supervised text.

    `references` are the reference policy's summed log-probabilities, one a response, once they are known. `ratings` are
    the seven principles' ratings of each response, NaN where unknown, or empty. `scale` is what each of the group's
    values counts in the mean loss.
    """

    prompt: list[int]
    responses: tuple[Encoded, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    gaps: tuple[float, ...] = ()
    references: tuple[float, ...] | None = None
    ratings: tuple[tuple[float, ...], ...] = ()
    scale: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens that an encoding of the group reads: the prompt once."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def count(self) -> int:
        """What the group counts in a batch: its pairs, or its responses where there are none."""
        return len(self.pairs) or len(self.responses)

    @property
    def choices(self) -> int:
        """Responses that are preferred to others: each is one choice out of a list."""
        return len({chosen for chosen, _ in self.pairs})

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest response."""
        return len(self.prompt) + max(map(len, self.responses))


def encode_conversation(tokenizer: Any, messages: Messages, other_weight: float = 0.0, last: bool = False) -> Encoded:
    """A conversation; assistant turns (or only the `last`) weigh 1, all other tokens `other_weight`.

    Raises:
        ValueError: the chat template refuses the messages, or rewrites earlier turns, so that turns cannot be told
            apart.
    """
    pieces: list[tuple[str, float]] = []
    done = ""
    turns = [len(messages) - 1] if last else [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    for turn in turns:
        asked = conversation(tokenizer, messages[:turn], answer=True)
        answered = conversation(tokenizer, messages[: turn + 1])
        for text, weight in ((asked, other_weight), (answered, 1.0)):
            if not text.startswith(done):
                raise ValueError("the chat template rewrites earlier turns; use the last turn alone")
            pieces.append((text[len(done) :], weight))
            done = text
    ids: list[int] = []
    weights: list[float] = []
    if pieces:
        encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False).input_ids
        for new, (_, weight) in zip(encoded, pieces, strict=True):
            ids += new
            weights += [weight] * len(new)
    return Encoded(ids, weights)


def encode(tokenizer: Any, prompt: Messages, response: str) -> Encoded:
    """A prompt and its response as one sequence; response tokens (with the end of turn) weigh 1."""
    return encode_conversation(tokenizer, [*prompt, {"role": "assistant", "content": response}], last=True)


def encode_group(
    tokenizer: Any,
    prompt: Messages,
    responses: Sequence[str],
    pairs: Iterable[tuple[int, int]],
    gaps: Iterable[float] = (),
) -> Group:
    """One prompt with all its responses."""
    whole = [encode(tokenizer, prompt, response) for response in responses]
    cut = next(index for index, weight in enumerate(whole[0].weights) if weight)
    parts = tuple(Encoded(row.ids[cut:], row.weights[cut:]) for row in whole)
    return Group(whole[0].ids[:cut], parts, tuple(pairs), tuple(gaps))


def only(group: Group, pairs: Sequence[int]) -> Group:
    """The group with just these of its pairs, and just the responses that they need."""
    kept = sorted({response for pair in pairs for response in group.pairs[pair]})
    place = {response: index for index, response in enumerate(kept)}
    return replace(
        group,
        responses=tuple(group.responses[response] for response in kept),
        pairs=tuple((place[group.pairs[pair][0]], place[group.pairs[pair][1]]) for pair in pairs),
        gaps=tuple(group.gaps[pair] for pair in pairs) if group.gaps else (),
        references=tuple(group.references[response] for response in kept) if group.references else None,
        ratings=tuple(group.ratings[response] for response in kept) if group.ratings else (),
    )


def split(group: Group, budget: int, listwise: bool = False) -> list[Group]:
    """Groups of at most `budget` tokens that hold the same pairs; the prompt is repeated in each.

    Args:
        listwise: the pairs of one chosen response stay together.

    Raises:
        ValueError: one pair (or one response without a pair) is over the budget by itself.
        BadInput: a list is.
    """
    if group.tokens <= budget:
        return [group]
    parts: list[Group] = []
    held: list[int] = []
    for unit in _lists(group) if listwise else [[pair] for pair in range(len(group.pairs))]:
        if held and only(group, [*held, *unit]).tokens > budget:
            parts.append(only(group, held))
            held = []
        held += unit
    if held:
        parts.append(only(group, held))
    most = max((part.tokens for part in parts), default=group.tokens)
    if most > budget and listwise:
        raise BadInput(
            f"a response and all those it is preferred to take {most:,} tokens, and loss plackett_luce reads them at "
            f"once; set training.bin_tokens (now {budget:,}) to that at least"
        )
    if most > budget:
        raise ValueError("a pair alone is over the budget")
    return parts


def _lists(group: Group) -> list[list[int]]:
    """The pairs of each chosen response."""
    found: dict[int, list[int]] = {}
    for pair, (chosen, _) in enumerate(group.pairs):
        found.setdefault(chosen, []).append(pair)
    return list(found.values())


def desensitise(group: Group, alpha: float) -> list[Group]:
    """Length-desensitised preference learning (Liu et al. 2024): tokens beyond the length that chosen and rejected
    share weigh `alpha`. Each pair becomes a group of its own, for a response may share another length elsewhere."""
    parts = []
    for pair in range(len(group.pairs)):
        part = only(group, [pair])
        shared = min(map(len, part.responses))
        weights = [[w if i < shared else w * alpha for i, w in enumerate(row.weights)] for row in part.responses]
        rows = tuple(Encoded(row.ids, own) for row, own in zip(part.responses, weights, strict=True))
        parts.append(replace(part, responses=rows))
    return parts


def response_key(group: Group, response: int) -> str:
    """The same for the same tokens and weights after the same prompt, whatever the run (16 hexadecimal digits)."""
    row = group.responses[response]
    digest = hashlib.sha256(array("I", [len(group.prompt), *group.prompt, *row.ids]).tobytes())
    digest.update(array("d", row.weights).tobytes())
    return digest.hexdigest()[:16]
