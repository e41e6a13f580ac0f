"""Where a model lies, and whether two models can take turns in one engine.

A model is a folder, a hub id, or a folder of a run on an object store. Two folders with the same architecture and the
same tokenizer are interchangeable: an engine that holds one takes the other's weights in a moment, without a restart.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from psycho import storage
from psycho.errors import BadInput

_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_DECISIVE = ("_token", "chat_template")  # of tokenizer_config.json: what changes a prompt or its end


def cache_root() -> Path:
    """Where models are kept between runs: PSYCHO_CACHE, else ~/.cache/psycho."""
    return Path(os.environ.get("PSYCHO_CACHE") or Path.home() / ".cache" / "psycho")


def looks_like_path(model: str) -> bool:
    """True for anything that is not a hub id (`name` or `owner/name`)."""
    return storage.is_remote(model) or model.startswith((".", "/", "~")) or model.count("/") > 1 or Path(model).exists()


def check_model(model: str, needs_chat_template: bool = True) -> None:
    """Check a model folder; a hub id is left to the hub.

    Raises:
        BadInput: the folder is missing or lacks its configuration, weights, tokenizer or chat template.
    """
    if not looks_like_path(model) or storage.is_remote(model):
        return
    folder = Path(model).expanduser()
    if not folder.is_dir():
        raise BadInput(f"model {model} does not exist; give a folder or a hub id (owner/name)")
    if not (folder / "config.json").is_file():
        raise BadInput(f"model folder {model} has no config.json; give a Hugging Face model folder")
    _settings(folder / "config.json")
    if not any(folder.glob("*.safetensors")):
        raise BadInput(f"model folder {model} has no .safetensors weights; convert them first")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise BadInput(f"model folder {model} has no tokenizer; save the tokenizer beside the weights")
    if needs_chat_template and not _has_chat_template(folder):
        raise BadInput(f"model folder {model} has no chat template; add chat_template.jinja to it")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return bool(_settings(folder / "tokenizer_config.json").get("chat_template"))


def _settings(file: Path) -> dict[str, Any]:
    """A JSON file of a model folder; empty where there is none.

    Raises:
        BadInput: the file is not a JSON object.
    """
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise BadInput(f"{file} is not a JSON object; download or save the model again") from None


def fingerprint(model: str) -> str:
    """What a stage's key says of a model: names, sizes and times of a folder's files; a hub id as it is."""
    if not looks_like_path(model) or storage.is_remote(model):
        return model
    files = sorted(path for path in Path(model).expanduser().glob("*") if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def engine_signature(model: str) -> str:
    """Equal for models that can take turns in one engine; a hub id is only equal to itself."""
    folder = Path(model)
    if not (folder / "config.json").is_file():
        return model
    config = {k: v for k, v in _settings(folder / "config.json").items() if k not in _IGNORED}
    tokenizer = {k: v for k, v in _settings(folder / "tokenizer_config.json").items() if k.endswith(_DECISIVE)}
    stops = _settings(folder / "generation_config.json").get("eos_token_id")
    digest = hashlib.sha256(json.dumps([config, tokenizer, stops], sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "chat_template.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
