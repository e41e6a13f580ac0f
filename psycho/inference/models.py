"""Where a model lies, and whether two models can take turns in one engine.

A model is a folder, a hub id, which may name its revision (`owner/name@revision`: a branch, a tag or a commit), or a
folder of a run on an object store. Whoever loads one asks `local_model` first, so that a revision holds for weights,
configuration and tokenizer alike, in vLLM as in transformers and DeepSpeed. Two folders with the same architecture and
the same tokenizer are interchangeable: an engine that holds one takes the other's weights in a moment, without a
restart.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from psycho import storage
from psycho.errors import BadInput
from psycho.storage import cache_root as cache_root  # who makes models looks for it here

_IGNORED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_DECISIVE = ("_token", "chat_template")  # of tokenizer_config.json: what changes a prompt or its end


_HUB_ID = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:@(?P<revision>.*))?", re.DOTALL)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py")  # what a revision is fetched for


def looks_like_path(model: str) -> bool:
    """True for anything that is not a hub id (`name`, `owner/name`, either with `@revision`)."""
    name = model.partition("@")[0]  # a revision may hold slashes: refs/pr/7
    return storage.is_remote(model) or name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(model).exists()


def hub_parts(model: str) -> tuple[str, str | None] | None:
    """The hub id and its revision (None: as the hub's main stands); None where `model` is no hub id."""
    found = None if looks_like_path(model) else _HUB_ID.fullmatch(model)
    return (found["name"], found["revision"]) if found else None


def local_model(model: str) -> str:
    """What a library can load: a local folder for one on an object store or a revision of a hub id, else as it is.

    Raises:
        BadInput: there is no such folder on the object store, or the revision cannot be had.
        WaitTimedOut: another worker of this node did not finish the copy.
    """
    if "://" in model:
        return storage.local_copy(model)
    name, revision = hub_parts(model) or (model, None)
    return model if revision is None else _snapshot(name, revision)


def _snapshot(name: str, revision: str) -> str:
    """The folder of one revision in the hub's cache on this node; fetched unless it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    from huggingface_hub.errors import RevisionNotFoundError as NoRevision

    try:
        return snapshot_download(name, revision=revision, allow_patterns=list(_LOADED))
    except NoRevision:
        raise BadInput(f"the model {name} has no revision {revision}; name a branch, a tag or a commit of it") from None
    except GatedRepoError:
        raise BadInput(f"the model {name} is gated; ask for access on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise BadInput(f"there is no model {name} on the hub that this account may read; check its name") from None
    except LocalEntryNotFoundError:
        raise BadInput(
            f"revision {revision} of {name} is not in the hub's cache on this machine, and the hub cannot be reached; "
            "fetch it where there is a network, or name a local folder"
        ) from None


def hub_commit(model: str) -> str | None:
    """The commit that a hub id stands for in the cache of this machine; None for other models and where none is."""
    parts = hub_parts(model)
    if parts is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    name, revision = parts
    try:
        file = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # no hub id after all
        return None
    if isinstance(file, str):
        return Path(file).parent.name  # snapshots/<commit>/config.json
    return revision if revision and _COMMIT.fullmatch(revision) else None


def check_model(model: str, needs_chat_template: bool = True) -> None:
    """Check a model folder; a hub id is left to the hub.

    Raises:
        BadInput: the folder is missing or lacks its configuration, weights, tokenizer or chat template, or a hub id
            ends in an empty revision.
    """
    if not looks_like_path(model):
        if model.endswith("@"):
            raise BadInput(f"model {model} names an empty revision; write owner/name@revision, or leave the @ out")
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
