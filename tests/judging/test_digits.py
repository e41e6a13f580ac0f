"""Expected ratings are read at the rating's own place, however the digit is tokenised."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.judging.digits import (
    digit_parameters,
    digit_tokens,
    expected_rating,
    expected_ratings,
    rating_places,
    read_digits,
)
from psycho.judging.rubric import answer, dump
from psycho.principles import STEMS

RATINGS = st.fixed_dictionaries({stem: st.integers(1, 5) for stem in STEMS})
PIECES = ['"', "\\", "5", " ", ":", "rating", ", ", "{", "}", "é", '"rating": 5', '", "rating": 5}']
TRICKY = st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
EVIDENCE = st.fixed_dictionaries({stem: TRICKY for stem in STEMS})


class Letters:
    """A tokenizer of single characters, and of digits after a space (`Ġ3`), as byte-level vocabularies have them."""

    def __init__(self, spaced: bool = True) -> None:
        pieces = [chr(code) for code in range(32, 127)] + ([f"Ġ{digit}" for digit in range(10)] if spaced else [])
        self._vocabulary = {piece: index for index, piece in enumerate(pieces)}
        self._pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self._vocabulary[character] for character in text]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self._pieces[index].replace("Ġ", " ") for index in ids)


def written(tokenizer: Letters, pieces: list[str], logprobs: dict[int, list[float]]) -> Any:
    """An answer of these pieces; `logprobs`: by place, of the five digits in the way the piece writes them."""
    ids = [tokenizer.get_vocab()[piece] for piece in pieces]
    entries = []
    for place, piece in enumerate(pieces):
        given = logprobs.get(place, [-9.0] * 5)
        own = (
            {tokenizer.get_vocab()[piece[:-1] + str(r)]: given[r - 1] for r in range(1, 6)} if place in logprobs else {}
        )
        other = {index: -0.1 for lead, group in digit_tokens(tokenizer) for index in group}
        entries.append({index: SimpleNamespace(logprob=value) for index, value in (other | own).items()})
    return SimpleNamespace(token_ids=ids, logprobs=entries)


def test_a_vocabulary_may_write_digits_in_two_ways():
    assert [lead for lead, _ in digit_tokens(Letters())] == ["", " "]
    assert [lead for lead, _ in digit_tokens(Letters(spaced=False))] == [""]


def test_the_nano_vocabulary_has_one_token_a_digit(nano_tokenizer):
    [(lead, ids)] = digit_tokens(nano_tokenizer)
    assert lead == "" and nano_tokenizer.convert_ids_to_tokens(list(ids)) == list("12345")


def test_digits_only_allows_the_bare_digits_and_nothing_else():
    tokenizer = Letters()
    bare = list(dict(digit_tokens(tokenizer))[""])
    assert digit_parameters(tokenizer, only=True)["allowed_token_ids"] == bare
    found = digit_parameters(tokenizer, only=False)
    assert "allowed_token_ids" not in found and found["logprobs"] == len(found["logprob_token_ids"]) == 10


def test_a_digit_after_a_space_is_compared_with_digits_after_a_space():
    tokenizer, wanted = Letters(), [-4.0, -3.0, -2.0, -0.5, -1.0]
    text, digits = read_digits(tokenizer, written(tokenizer, ["5", ":", "Ġ4"], {2: wanted}))
    assert text == "5: 4"
    assert digits == ((0, (-0.1,) * 5), (3, tuple(wanted)))


@settings(deadline=None)
@given(RATINGS, EVIDENCE)
def test_places_are_those_of_the_ratings_and_never_in_a_quotation(ratings, evidence):
    text = dump(answer(ratings, evidence))
    places = rating_places(text)
    assert {stem: int(text[place]) for stem, place in places.items()} == ratings
    without = json.loads("".join("0" if place in places.values() else c for place, c in enumerate(text)))
    assert all(entry["rating"] == 0 and entry["evidence"] == evidence[stem] for stem, entry in without.items())


def test_places_of_seven_digits():
    assert rating_places("1234512") == {stem: index for index, stem in enumerate(STEMS)}
    assert rating_places(" 1234512\n") == {stem: index + 1 for index, stem in enumerate(STEMS)}
    assert rating_places("123451") == rating_places("6234512") == rating_places("12345123") == {}


def test_the_expected_rating_is_the_mean_by_probability():
    assert expected_rating([math.log(p) for p in (0.1, 0.1, 0.2, 0.2, 0.4)]) == pytest.approx(3.7)
    assert expected_rating([math.log(p / 100) for p in (0.1, 0.1, 0.2, 0.2, 0.4)]) == pytest.approx(3.7)
    assert expected_rating([-1e9, -1e9, -1e9, 0.0, -1e9]) == pytest.approx(4)


def test_expected_ratings_come_from_their_own_places():
    text = dump(answer(dict.fromkeys(STEMS, 4), dict.fromkeys(STEMS, "a 2 in the text")))
    sure = {place: (-50.0, -50.0, -50.0, 0.0, -50.0) for place in rating_places(text).values()}
    decoys = {index: (0.0, -50.0, -50.0, -50.0, -50.0) for index, c in enumerate(text) if c == "2"}
    torn = dict(sure)
    torn.pop(rating_places(text)["staging"])
    assert expected_ratings(text, tuple((sure | decoys).items())) == pytest.approx(dict.fromkeys(STEMS, 4.0))
    assert expected_ratings(text, tuple((torn | decoys).items())) is None
