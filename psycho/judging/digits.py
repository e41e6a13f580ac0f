"""Expected ratings: how sure a judge is of a digit, read where it wrote it.

A judge that writes 4 with 60 % and 5 with 40 % says more than the 4. vLLM returns the log-probabilities of chosen
tokens at every position of an answer, before any grammar masks them; here the digits' tokens are found in a
vocabulary, their log-probabilities are kept where one of them was written, and the ratings' own places are found in
the answer, so that a digit inside a quotation is never taken for a rating.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from psycho.principles import MAX_RATING, MIN_RATING, STEMS

RATINGS = tuple(range(MIN_RATING, MAX_RATING + 1))
DigitLogprobs = tuple[tuple[int, tuple[float, ...]], ...]
"""(place in the text, log-probabilities of 1..5) of each digit of an answer."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+', re.DOTALL)
_DIGITS_ONLY = re.compile(rf"\s*([{MIN_RATING}-{MAX_RATING}]{{{len(STEMS)}}})\s*")


@lru_cache(maxsize=8)
def digit_tokens(tokenizer: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(what stands before the digit in its token, ids of 1..5) of each way in which this vocabulary writes digits.

    Many vocabularies have two: the bare digit, and the digit after a space.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = len(tokenizer.decode(anchor))
    found: dict[str, dict[int, int]] = {}
    for piece, token in tokenizer.get_vocab().items():
        if not piece or len(piece) > 3 or piece[-1] not in map(str, RATINGS):
            continue
        text = tokenizer.decode([*anchor, token])[before:]  # what a token says at the start of a text may differ
        if text and text[-1] == piece[-1] and not text[:-1].strip():
            found.setdefault(text[:-1], {})[int(text[-1])] = token
    whole = {lead: ids for lead, ids in found.items() if len(ids) == len(RATINGS)}
    return tuple((lead, tuple(whole[lead][rating] for rating in RATINGS)) for lead in sorted(whole))


def digit_parameters(tokenizer: Any, only: bool) -> dict[str, Any]:
    """Arguments of vLLM's `SamplingParams` that ask for the digits' log-probabilities.

    Args:
        only: the answer may hold nothing but bare digits, one token each.
    """
    tokens = digit_tokens(tokenizer)
    ids = [token for _, group in tokens for token in group]
    if not ids:
        return {}
    allowed = {"allowed_token_ids": list(dict(tokens).get("", tokens[0][1]))} if only else {}
    # Left to itself vLLM turns every one of these tokens into text, which costs more than the answer itself.
    quiet = {"flat_logprobs": True, "detokenize": False}
    return {"logprobs": len(ids), "logprob_token_ids": ids, **quiet, **allowed}


def read_digits(tokenizer: Any, answer: Any) -> tuple[str, DigitLogprobs]:
    """The text of an answer (vLLM's `CompletionOutput`), and the log-probabilities at each of its digits.

    A digit is compared with the tokens that write another digit in the same way: after `"rating":` a space may be
    due, and then the tokens without one were no choice.
    """
    ids = list(answer.token_ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if answer.logprobs is None:
        return text, ()
    groups = {token: (lead, group) for lead, group in digit_tokens(tokenizer) for token in group}
    found = []
    for place, token in enumerate(ids):
        if token not in groups:
            continue
        lead, group = groups[token]
        start = len(tokenizer.decode(ids[:place], skip_special_tokens=True)) + len(lead)
        if text[start : start + 1] == str(RATINGS[group.index(token)]):
            entry = answer.logprobs[place]
            found.append((start, tuple(float(entry[other].logprob) for other in group)))
    return text, tuple(found)


def rating_places(text: str) -> dict[str, int]:
    """Where each principle's rating stands in a judge's answer: JSON with a key a principle, or seven digits.

    In the JSON of a pair the later side wins; ask for one side's text. Text inside a quotation is never a rating.
    """
    bare = _DIGITS_ONLY.fullmatch(text)
    if bare:
        return {stem: bare.start(1) + index for index, stem in enumerate(STEMS)}
    places: dict[str, int] = {}
    stem = ""
    for key, value, place in _entries(text):
        if key in STEMS:
            stem = key
        if key == "rating" and stem and re.fullmatch(rf"[{MIN_RATING}-{MAX_RATING}]", value):
            places[stem] = place
    return places


def _entries(text: str) -> Iterator[tuple[str, str, int]]:
    """(key, first token of its value, the value's place) of JSON text, cut short or not."""
    tokens = list(_TOKEN.finditer(text))
    for key, colon, value in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if key[0].startswith('"') and colon[0] == ":":
            yield key[0][1:-1], value[0], value.start()


def expected_rating(logprobs: Sequence[float]) -> float:
    """The mean of 1..5 under the five log-probabilities, taken relative to one another."""
    highest = max(logprobs)
    weights = [math.exp(value - highest) for value in logprobs]
    return sum(rating * weight for rating, weight in zip(RATINGS, weights, strict=True)) / sum(weights)


def expected_ratings(text: str, digits: DigitLogprobs) -> dict[str, float] | None:
    """The expected rating of each principle; None where one has no log-probabilities at its own place."""
    known: Mapping[int, tuple[float, ...]] = dict(digits)
    places = rating_places(text)
    if len(places) < len(STEMS) or not all(place in known for place in places.values()):
        return None
    return {stem: expected_rating(known[places[stem]]) for stem in STEMS}
