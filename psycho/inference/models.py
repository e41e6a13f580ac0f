"""Where a model lies, and whether two models can take turns in one engine.

A model is a folder, a hub id, or a folder of a run on an object store. Two folders with the same architecture and the
same tokenizer are interchangeable: an engine that holds one takes the other's weights in a moment, without a restart.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from psycho import storage
from psycho.errors import BadInput
from psycho.storage import cache_root as cache_root  # who makes models looks for it here

_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_DECISIVE = ("_token", "chat_template")  # of tokenizer_config.json: what changes a prompt or its end


def looks_like_path(model: str) -> bool:
    """True for anything that is not a hub id (`name` or `owner/name`)."""
    return storage.is_remote(model) or model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def local_model(model: str) -> str:
    """What a library can load: a folder on an object store as a copy on this node, anything else as it is.

    Raises:
        BadInput: there is no such folder on the object store.
        WaitTimedOut: another worker of this node did not finish the copy.
    """
    return storage.local_copy(model) if "://" in model else model


def check_model(model: str, needs_chat_template: bool = True) -> None:
    """Check a model folder; a hub id is left to the hub.

    Raises:
        BadInput: the folder is missing or lacks its configuration, weights, tokenizer or chat template.
    """
    if not looks_like_path(model):
        return
    files = _files(model)
    if not files:
        raise BadInput(f"model {model} does not exist; give a folder or a hub id (owner/name)")
    if "config.json" not in files:
        raise BadInput(f"model folder {model} has no config.json; give a Hugging Face model folder")
    _settings(model, "config.json")
    if not any(name.endswith(".safetensors") for name in files):
        raise BadInput(f"model folder {model} has no .safetensors weights; convert them first")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(files):
        raise BadInput(f"model folder {model} has no tokenizer; save the tokenizer beside the weights")
    has_template = {"chat_template.jinja", "chat_template.json"} & set(files)
    if needs_chat_template and not has_template and not _settings(model, "tokenizer_config.json").get("chat_template"):
        raise BadInput(f"model folder {model} has no chat template; add chat_template.jinja to it")


def _files(model: str) -> dict[str, tuple[int, int]]:
    """(bytes, time in ns) of the files directly in a model's folder, by name."""
    return {name: (size, time) for name, size, time in storage.listing(model) if "/" not in name}


def _settings(model: str, name: str) -> dict[str, Any]:
    """A JSON file of a model's folder; empty where there is none.

    Raises:
        BadInput: the file is not a JSON object.
    """
    file = storage.join(model, name)
    content = storage.read_bytes(file)
    try:
        return dict(json.loads(content)) if content is not None else {}
    except (ValueError, TypeError):
        raise BadInput(f"{file} is not a JSON object; download or save the model again") from None


def fingerprint(model: str) -> str:
    """What a stage's key says of a model: names, sizes and times of a folder's files; a hub id as it is."""
    if not looks_like_path(model):
        return model
    facts = [(name, *found) for name, found in sorted(_files(model).items())]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def engine_signature(model: str) -> str:
    """Equal for models that can take turns in one engine; a hub id is only equal to itself."""
    files = _files(model) if looks_like_path(model) else {}
    if "config.json" not in files:
        return model
    config = {k: v for k, v in _settings(model, "config.json").items() if k not in _IGNORED}
    tokenizer = {k: v for k, v in _settings(model, "tokenizer_config.json").items() if k.endswith(_DECISIVE)}
    stops = _settings(model, "generation_config.json").get("eos_token_id")
    digest = hashlib.sha256(json.dumps([config, tokenizer, stops], sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"):
        digest.update(storage.read_bytes(storage.join(model, name)) or b"")
    return digest.hexdigest()[:16]
