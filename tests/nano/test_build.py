"""The nano models' key, tokenizer, corpora and speeches (training itself is in the end-to-end tests)."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psycho.config import NanoConfig
from psycho.judging.rubric import answer, dump, parse_single
from psycho.nano import corpora, gold
from psycho.nano.build import _code, nano_key, speeches
from psycho.nano.grammar import STAGES, held_out, sample_response, sample_speech, vocabulary
from psycho.nano.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([*vocabulary(), *STAGES], 512)


def test_key_depends_on_code_and_settings_and_not_on_words():
    assert _code('"""One."""\nx = 1  # why\n') == _code('"""Two."""\n\nx = 1\n') != _code("x = 2\n")
    assert nano_key(NanoConfig()) == nano_key(NanoConfig()) != nano_key(NanoConfig(seed=1))
    assert nano_key(NanoConfig()) != nano_key(NanoConfig(scale=0.5))


def test_every_word_of_the_grammar_is_one_token(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        speech = sample_speech(rng)
        for text in (speech.text, sample_response(rng, speech, "any")):
            words = len(text.split())
            marks = sum(text.count(mark) for mark in ".,?")
            assert len(tokenizer(text, add_special_tokens=False).input_ids) == words + marks


@given(st.text(max_size=200).filter(lambda text: "\u2581" not in text and "<" not in text))
def test_any_text_survives_the_tokenizer(text):
    tokenizer = build_tokenizer(["word"], 512)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_judges_answer_is_a_few_dozen_tokens_and_parses(tokenizer):
    rng = random.Random(1)
    speech = sample_speech(rng)
    rated = gold.rate(speech, sample_response(rng, speech, "good"))
    text = dump(answer(rated.ratings, rated.evidence))
    assert len(tokenizer(text, add_special_tokens=False).input_ids) <= 45
    parsed = parse_single(text)
    assert parsed is not None and parsed.ratings == rated.ratings


def test_no_training_text_holds_a_held_out_combination():
    rows = [*corpora.backbone_rows(3, 4, 16), *corpora.judge_rows(4, 4, 16), *corpora.style_rows(5, "base", 4, 16)]
    for row in rows:
        question = json.loads(row["messages"])[0]["content"].split("\nReply: ")[0]
        speech = gold.parse_speech(question)
        assert speech is not None and not held_out(speech.key, speech.feeling)


def test_corpora_are_the_same_by_seed():
    for make in (corpora.backbone_rows, corpora.judge_rows):
        assert list(make(1, 2, 8)) == list(make(1, 2, 8)) != list(make(2, 2, 8))


def test_speeches_are_split_by_combination_and_by_seed():
    rows = speeches(NanoConfig(), 30, 20, seed=0)
    assert [row["split"] for row in rows].count("evaluation") == 20 and len(rows) == 50
    assert len({row["speech_id"] for row in rows}) == 50
    for row in rows:
        speech = gold.parse_speech(row["question"])
        assert speech is not None
        assert held_out(speech.key, speech.feeling) == (row["split"] == "evaluation")
    assert rows == speeches(NanoConfig(), 30, 20, seed=0) != speeches(NanoConfig(), 30, 20, seed=1)
