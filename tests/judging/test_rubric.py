"""What a judge is asked and what counts as an answer: seven ratings or none, never a default."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.judging.rubric import (
    answer,
    dump,
    pair_prompt,
    pair_schema,
    parse_pair,
    parse_single,
    single_prompt,
    single_schema,
)
from psycho.principles import PRINCIPLES, STEMS, overall, rubric

RATINGS = st.fixed_dictionaries({stem: st.integers(1, 5) for stem in STEMS})
EVIDENCE = st.fixed_dictionaries(
    {stem: st.text(st.characters(exclude_categories=["Cs"]), max_size=30) for stem in STEMS}
)


def good(rating: int = 3) -> dict[str, Any]:
    return answer(dict.fromkeys(STEMS, rating), dict.fromkeys(STEMS, "none"))


def with_rating(rating: Any) -> dict[str, Any]:
    return good() | {"clarity": {"evidence": "none", "rating": rating}}


BAD: dict[str, Any] = {
    "a principle is missing": {stem: entry for stem, entry in good().items() if stem != "staging"},
    "a rating is missing": good() | {"clarity": {"evidence": "none"}},
    "a bare number": good() | {"clarity": 3},
    "null": with_rating(None),
    "0": with_rating(0),
    "6": with_rating(6),
    "-1": with_rating(-1),
    "true": with_rating(True),
    "3.5": with_rating(3.5),
    "3.0": with_rating(3.0),
    "text": with_rating("3"),
    "a list": [good()],
    "empty": {},
}
NOT_JSON = ["", "  ", "null", "3", '"empathy"', "I would say 3.", dump(good())[:-1], dump(good())[:40], "[" * 100_000]


@pytest.mark.parametrize(
    "text", [*map(json.dumps, BAD.values()), *NOT_JSON], ids=[*BAD, *map(repr, range(len(NOT_JSON)))]
)
def test_an_answer_without_seven_ratings_is_no_rating(text):
    assert parse_single(text) is None
    assert parse_pair(text) is None


@pytest.mark.parametrize("bad", BAD.values(), ids=list(BAD))
def test_one_bad_side_makes_no_pair(bad):
    assert parse_pair(json.dumps({"first": good(), "second": bad})) is None
    assert parse_pair(json.dumps({"first": bad, "second": good()})) is None
    assert parse_pair(json.dumps({"first": good()})) is None


@settings(deadline=None)
@given(RATINGS, EVIDENCE, RATINGS)
def test_what_is_dumped_is_parsed_and_follows_the_schema(ratings, evidence, others):
    written = answer(ratings, evidence)
    rating = parse_single(dump(written))
    assert rating is not None and (rating.ratings, rating.evidence) == (ratings, evidence)
    assert rating.overall == pytest.approx(sum(ratings.values()) / 7) == overall(ratings)
    jsonschema.validate(written, single_schema(30))
    both = {"first": written, "second": answer(others, evidence)}
    jsonschema.validate(both, pair_schema(30))
    first, second = parse_pair(dump(both))
    assert (first.ratings, second.ratings) == (ratings, others)


@settings(deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers(0, 6), lambda c: st.dictionaries(st.sampled_from(STEMS), c))
)
def test_anything_else_never_becomes_a_rating(value):
    assert parse_single(json.dumps(value)) is None and parse_pair(json.dumps(value)) is None


@pytest.mark.parametrize("schema", [single_schema(5), pair_schema(5)])
def test_the_schemas_are_schemas(schema):
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", [name for name in BAD if name != "3.0"])  # to JSON schema 3.0 is an integer
def test_the_grammar_refuses_what_the_parser_refuses(name):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(BAD[name], single_schema(5))


@pytest.mark.parametrize(
    "bad",
    [
        good() | {"warmth": {"evidence": "none", "rating": 3}},
        good() | {"clarity": {"evidence": "too long", "rating": 3}},
        good() | {"clarity": {"evidence": "none", "rating": 3, "why": "x"}},
        good() | {"clarity": {"rating": 3}},
    ],
)
def test_the_grammar_bounds_the_answer(bad):
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, single_schema(5))


def test_the_grammar_asks_for_evidence_before_each_rating_in_the_order_of_the_principles():
    schema = single_schema(5)
    assert list(schema["properties"]) == [p.stem for p in PRINCIPLES]
    assert all(list(entry["properties"]) == ["evidence", "rating"] for entry in schema["properties"].values())
    assert list(pair_schema(5)["properties"]) == ["first", "second"]


def in_order(messages: list[dict[str, str]], *parts: str) -> bool:
    text = "\n".join(message["content"] for message in messages)
    places = [text.find(part) for part in parts]
    return -1 not in places and places == sorted(places)


def test_prompts_put_what_is_shared_first():
    assert in_order(single_prompt("SPEECH", "REPLY", "rubric"), rubric(), "SPEECH", "REPLY")
    assert in_order(pair_prompt("SPEECH", "ONE", "OTHER"), rubric(), "SPEECH", "ONE", "OTHER")
    assert in_order(single_prompt("SPEECH", "REPLY", "compact"), "SPEECH", "REPLY")


def test_prompts_of_one_speech_share_all_up_to_the_response():
    one, other = (single_prompt("SPEECH", reply, "rubric") for reply in ("REPLY A", "REPLY B"))
    assert one[0] == other[0] and one[1]["content"].split("REPLY A")[0] == other[1]["content"].split("REPLY B")[0]


@pytest.mark.parametrize("mode", ["evidence", "direct"])
def test_little_follows_a_response(mode):
    """What follows it is read anew for every response, so how to answer stands before, with what is shared."""
    prompt = single_prompt("SPEECH", "REPLY", "rubric", mode=mode)
    assert prompt[1]["content"].endswith("REPLY\n</response>\n\nRate the response.")
    assert ("JSON" if mode == "evidence" else "7 digits") in prompt[0]["content"]
    pair = pair_prompt("SPEECH", "ONE", "OTHER")
    assert pair[1]["content"].endswith("OTHER\n</second_response>\n\nRate both responses.")
    assert "first and second" in pair[0]["content"]


def test_the_rubric_names_every_principle_and_the_scale():
    text = single_prompt("s", "r", "rubric")[0]["content"]
    assert all(p.name in text and f"({p.stem})" in text for p in PRINCIPLES) and "from 1 to 5" in text
