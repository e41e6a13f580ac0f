"""What of a configuration must not be written down: values of environments, keys, passwords in addresses.

A run folder is read by many, and what a stage depends on is hashed into it; so a secret comes from the environment of
the command (or from a file that a variable names), and of `inference.env` and `training.env` only names are written.
A name without a value means: as the command's environment has it. So a run's `config.yaml` can be given again as it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from psycho.errors import BadInput

HIDDEN = "(hidden)"
_SHORTEST = 6  # characters of a value that is looked for in texts; shorter ones stand in words of all kinds
_SECRET = re.compile(r"token(?!iz)|secret|passw|passphrase|credential|(^|_)(key|auth)($|_)", re.IGNORECASE)
_SETTING = re.compile(r"(^|_)(token|secret|password|credentials?|(api|access|secret|private)_?key)$", re.IGNORECASE)
_PLACE = re.compile(r"(^|_)(PATH|FILE|DIR|HOME)$")  # where something lies, and not what it is
_TUNING = re.compile(
    "(VLLM|OMP|KMP|GOMP|MKL|ONEDNN|ATEN|NCCL|GLOO|UCX|CUDA|NVIDIA|TORCH|PYTORCH|TRITON|DS|RAY|HF_HUB|TOKENIZERS"
    "|TRANSFORMERS|LD|MALLOC|GLIBC)_|PYTHON"
)
_PASSWORD = re.compile(r"^\w[\w+.-]*://[^/@\s]*:[^/@\s]+@")
Env = Mapping[str, str | None]
ConfigT = TypeVar("ConfigT", bound=Any)


def is_secret(variable: str) -> bool:
    """True for an environment variable that by its name holds a secret."""
    return bool(_SECRET.search(variable)) and not _PLACE.search(variable)


def names_a_secret(setting: str) -> bool:
    """True for a library's argument that by its name is a key or a token (`hf_token`, and not `max_tokens`)."""
    return bool(_SETTING.search(setting))


def may_be_written(variable: str) -> bool:
    """True for a variable that by its name says where something lies, or tunes a library; any other may be private."""
    return not is_secret(variable) and bool(_PLACE.search(variable) or _TUNING.match(variable))


def hide(tree: Any, key: str = "") -> Any:
    """Settings as they may be written: values of private environment variables are left out, their names stay."""
    if isinstance(tree, Mapping):
        inside = key == "env"
        return {k: None if inside and not may_be_written(k) else hide(v, k) for k, v in tree.items()}
    return [hide(item) for item in tree] if isinstance(tree, list | tuple) else tree


def given(env: Env) -> dict[str, str]:
    """The variables that have a value."""
    return {name: value for name, value in env.items() if value is not None}


def at_start(env: Env) -> dict[str, str]:
    """Those that Ray may set before a process starts; it writes them into its logs and shows them, so none is private.

    The others a worker sets itself, as the first thing it does.
    """
    return {name: value for name, value in given(env).items() if may_be_written(name)}


def filled(config: ConfigT) -> ConfigT:
    """The configuration with the values that its environments leave to the command's.

    Raises:
        BadInput: the command's environment has no such variable.
    """
    update = {}
    for section in ("inference", "training"):
        part = getattr(config, section)
        if None in part.env.values():
            own = {name: _from_here(section, name) if value is None else value for name, value in part.env.items()}
            update[section] = part.model_copy(update={"env": own})
    return config.model_copy(update=update) if update else config


def _from_here(section: str, name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise BadInput(
            f"{section}.env.{name} has no value, so the environment of this command should have it, and has not; "
            f"export {name}, give it to a submitted job with --runtime-env-json, or take it out of {section}.env"
        )
    return value


def refuse(tree: Any, key: str = "") -> None:
    """Look for secrets where they would be written down, and be part of what a stage depends on.

    Raises:
        BadInput: an address with a password in it, or a library's argument that is a key or a token.
    """
    for path, value in _texts(tree, key):
        leaf = path.rpartition(".")[2]
        if _PASSWORD.match(value):
            raise BadInput(
                f"{path} holds a password in its address, which a run would write down; take it out and give it in the "
                "environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3://, api_key_env for an endpoint)"
            )
        if names_a_secret(leaf) and ".env." not in path:
            raise BadInput(
                f"{path} holds a secret, which a run would write down; give it in the environment, or in "
                "inference.env, of which only names are written (HF_TOKEN for the hub)"
            )


def _texts(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for place, value in enumerate(tree):
            yield from _texts(value, f"{path}.{place}")
    elif isinstance(tree, str) and tree:
        yield path, tree


def values(*environments: Env) -> list[str]:
    """What must not stand in a text: values of these environments and of this process's secret variables."""
    private = [value for env in environments for name, value in given(env).items() if not may_be_written(name)]
    own = [value for name, value in os.environ.items() if is_secret(name)]
    return sorted({value for value in [*private, *own] if len(value) >= _SHORTEST}, key=len, reverse=True)


def scrub(text: str, secret: Iterable[str]) -> str:
    """The text without those values."""
    for value in secret:
        text = text.replace(value, HIDDEN)
    return text
