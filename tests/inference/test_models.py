"""Model folders: what is missing is said before anything starts, and which ones may take turns in one engine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from psycho.errors import BadInput
from psycho.inference.models import cache_root, check_model, engine_signature, fingerprint, looks_like_path

FILES = {
    "config.json": json.dumps({"model_type": "llama", "hidden_size": 64, "transformers_version": "5.0"}),
    "model.safetensors": "weights",
    "tokenizer.json": '{"model": 1}',
    "tokenizer_config.json": json.dumps({"eos_token": "</s>", "model_max_length": 512}),
    "chat_template.jinja": "{{ messages }}",
    "generation_config.json": json.dumps({"eos_token_id": 2}),
}


def model(folder: Path, **changes: str | None) -> str:
    """A model folder with some files changed, or left out (None)."""
    folder.mkdir(parents=True)
    for name, text in (FILES | {name.replace("__", "."): text for name, text in changes.items()}).items():
        if text is not None:
            (folder / name).write_text(text)
    return str(folder)


def settings(**values: Any) -> str:
    return json.dumps(values)


def test_a_whole_model_and_a_hub_id_pass(tmp_path):
    check_model(model(tmp_path / "model"))
    check_model("owner/name")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"config__json": None}, "has no config.json; give a Hugging Face model folder"),
        ({"model__safetensors": None}, "has no .safetensors weights; convert them first"),
        ({"tokenizer__json": None}, "has no tokenizer; save the tokenizer beside the weights"),
        ({"chat_template__jinja": None}, "has no chat template; add chat_template.jinja to it"),
        ({"chat_template__jinja": None, "tokenizer_config__json": None}, "has no chat template"),
        ({"config__json": "{"}, "config.json is not a JSON object"),
        ({"config__json": "[1]"}, "config.json is not a JSON object"),
        ({"chat_template__jinja": None, "tokenizer_config__json": "<html>"}, "tokenizer_config.json is not a JSON"),
    ],
)
def test_what_a_folder_lacks_is_one_sentence(tmp_path, changes, part):
    folder = model(tmp_path / "model", **changes)
    with pytest.raises(BadInput) as caught:
        check_model(folder)
    assert part in str(caught.value) and folder in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer__json": None, "tokenizer__model": "sp"},
        {"tokenizer__json": None, "vocab__json": "{}"},
        {"chat_template__jinja": None, "tokenizer_config__json": settings(chat_template="{{ messages }}")},
        {"chat_template__jinja": None, "chat_template__json": "{}"},
        {"model__safetensors": None, "model-00001-of-00002__safetensors": "weights"},
    ],
)
def test_other_layouts_pass(tmp_path, changes):
    check_model(model(tmp_path / "model", **changes))


def test_a_model_that_is_only_scored_needs_no_chat_template(tmp_path):
    check_model(model(tmp_path / "model", chat_template__jinja=None), needs_chat_template=False)


@pytest.mark.parametrize("name", ["/no/such/model", "./no-such-model", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    with pytest.raises(BadInput, match=f"model {name} does not exist"):
        check_model(name)


def test_paths_and_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert all(map(looks_like_path, ["/a", "./a", "~/a", "a/b/c", "s3://b/a"]))
    assert not looks_like_path("owner/name") and not looks_like_path("name")
    Path("owner/name").mkdir(parents=True)
    assert looks_like_path("owner/name")


SAME = [
    {"model__safetensors": "other weights"},
    {"config__json": FILES["config.json"].replace("5.0", "5.1")},
    {"config__json": settings(hidden_size=64, model_type="llama", _name_or_path="/x", dtype="float32")},
    {"tokenizer_config__json": settings(eos_token="</s>", model_max_length=1024, name_or_path="/x")},
    {"generation_config__json": settings(eos_token_id=2, transformers_version="5.1")},
    {"training__jsonl": "{}"},
]
DIFFERENT = [
    {"config__json": settings(model_type="llama", hidden_size=128)},
    {"tokenizer__json": '{"model": 2}'},
    {"chat_template__jinja": "{{ messages[0] }}"},
    {"chat_template__jinja": None, "tokenizer_config__json": settings(chat_template="x", eos_token="</s>")},
    {"tokenizer_config__json": settings(eos_token="<eot>")},
    {"generation_config__json": settings(eos_token_id=3)},
]


@pytest.mark.parametrize("changes", SAME)
def test_models_that_can_take_turns_in_one_engine(tmp_path, changes):
    assert engine_signature(model(tmp_path / "one")) == engine_signature(model(tmp_path / "other", **changes))


@pytest.mark.parametrize("changes", DIFFERENT)
def test_models_that_need_an_engine_each(tmp_path, changes):
    assert engine_signature(model(tmp_path / "one")) != engine_signature(model(tmp_path / "other", **changes))


def test_a_hub_id_takes_turns_with_itself_alone():
    assert engine_signature("owner/name") == "owner/name"


def test_a_fingerprint_changes_with_the_weights_and_with_nothing_else(tmp_path):
    folder = model(tmp_path / "model")
    before = fingerprint(folder)
    assert fingerprint(folder) == before and fingerprint("owner/name") == "owner/name"
    weights = tmp_path / "model" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    touched = fingerprint(folder)
    weights.write_text("longer weights")
    os.utime(weights, ns=(1, 1))
    assert len({before, touched, fingerprint(folder)}) == 3


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.setenv("PSYCHO_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "psycho"
