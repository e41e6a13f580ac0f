"""The nano models that ship, and the recipe, tokenizer, corpora and speeches they come from."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from psycho.config import NanoConfig
from psycho.errors import BadInput
from psycho.judging.rubric import answer, dump, parse_single
from psycho.nano import corpora, gold, recipe, world
from psycho.nano.grammar import STAGES, held_out, sample_response, sample_speech, vocabulary
from psycho.nano.recipe import recipe_hash
from psycho.nano.tokenizer import build_tokenizer
from psycho.nano.world import speeches
from psycho.principles import STEMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([*vocabulary(), *STAGES], 512)


def test_recipe_and_shipped_models_belong_together():
    """Whoever changes the grammar, the recipe or the judge's format makes the models anew: psycho nano --rebuild."""
    facts = world.facts(NanoConfig())
    assert facts["recipe"] == recipe_hash()
    assert facts["scale"] == 1.0
    assert set(facts["models"]) == set(world.MODELS)
    for name, known in facts["models"].items():
        assert known["sha256"] == world.checksum(world.PACKAGED / name), name


def test_shipped_models_passed_every_gate_and_are_small():
    gates = world.facts(NanoConfig())["gates"]
    assert gates and all(gate["passed"] and gate["value"] >= gate["target"] for gate in gates)
    for stem in STEMS:
        assert sum(stem in gate["name"] for gate in gates) == 2, "on grammar text and on the policies' samples"
    files = [file for file in world.PACKAGED.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    assert {load_file(file)["model.embed_tokens.weight"].dtype for file in files if file.name == world.WEIGHTS} == {
        torch.bfloat16
    }


def test_recipe_hash_hears_of_values_and_rows_and_of_nothing_else(monkeypatch):
    before = recipe_hash()
    monkeypatch.setattr(recipe, "JUDGE", replace(recipe.JUDGE, steps=recipe.JUDGE.steps + 1))
    assert recipe_hash() != before
    monkeypatch.undo()
    monkeypatch.setattr(corpora, "_MISHEARD", 0.9)
    assert recipe_hash() != before
    monkeypatch.undo()
    assert recipe_hash() == before


def test_looking_a_model_up_imports_nothing_that_trains():
    asked = "import sys, psycho.models, psycho.nano.world; print(any('psycho.training' in name or name in ('torch', "
    asked += "'deepspeed', 'psycho.nano.build') for name in sys.modules))"
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_folder_without_nano_models_is_said_in_a_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / world.FACTS).write_text(content)
    with pytest.raises(BadInput, match=r"holds no nano models .* set nano.models"):
        world.identity(NanoConfig(models=str(tmp_path)), "judge")


def test_an_unknown_nano_model_is_said_with_those_there_are():
    with pytest.raises(BadInput, match="there is no model nano:nurse; the nano models are judge, base"):
        world.model_folder(NanoConfig(), "nurse")


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
    rows = speeches(30, 20, seed=0)
    assert [row["split"] for row in rows].count("evaluation") == 20 and len(rows) == 50
    assert len({row["speech_id"] for row in rows}) == 50
    for row in rows:
        speech = gold.parse_speech(row["question"])
        assert speech is not None
        assert held_out(speech.key, speech.feeling) == (row["split"] == "evaluation")
    assert rows == speeches(30, 20, seed=0) != speeches(30, 20, seed=1)
