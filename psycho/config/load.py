"""From a file and `--set key=value` to a configuration; a mistake is a sentence that names the key.

The configurations of `configs/` travel with the package (`psycho/configs` is a link to them in a checkout), so that a
job finds its default, and those named `nano` or `configs/nano.yaml`, from any folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from psycho.config.whole import Config
from psycho.errors import BadInput

SHIPPED = Path(__file__).parents[1] / "configs"
DEFAULT_CONFIG = SHIPPED / "nano.yaml"


def load_config(path: str | Path, overrides: Sequence[str] = (), run_dir: str | None = None) -> Config:
    """Read a YAML configuration and apply `key.path=value` overrides (values are YAML).

    A `path` that names no file but a configuration that psycho ships, as `nano` or `configs/nano.yaml`, is that one.

    Raises:
        BadInput: the file, a key or a value is wrong; the sentence names it and says what to do.
    """
    file = _find(Path(path))
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.yaml")))
        raise BadInput(f"configuration {file} does not exist; psycho brings {shipped}: say --config nano") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"configuration {file} cannot be read: {type(error).__name__}; check it is UTF-8 text") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise BadInput(f"configuration {file} is not valid YAML{line}; put that line right") from None
    except ValueError as error:  # what looks like a date and is none
        raise BadInput(f"configuration {file} is not valid YAML ({error}); quote that value") from None
    if not isinstance(tree, dict):
        raise BadInput(f"configuration {file} holds no settings; write `key: value` lines")
    for override in overrides:
        _apply_override(tree, override)
    if run_dir:
        tree["run_dir"] = run_dir
    return build_config(tree, str(file))


def _find(path: Path) -> Path:
    """The file that a path names, the person's own before the one that psycho ships under this name."""
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    short = path.parent in (Path(), Path("configs"))
    return shipped if short and not path.is_file() and shipped.is_file() else path


def build_config(tree: dict[str, Any], origin: str) -> Config:
    """Validate a tree of settings; `origin` names where they came from in error messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise BadInput(_explain(error, origin)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set {override} is not key=value; write for example --set training.dpo.beta=0.2")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise BadInput(f"--set {key}: the value is not valid YAML; quote it") from None
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise BadInput(f"--set {key}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {nearest(key)}"
    if first["type"] == "missing":
        return f"{origin}: {key} is missing; set it"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict | list | tuple | BaseModel) else f" (given: {given!r})"
    return f"{origin}: {key or 'configuration'}: {message[0].lower()}{message[1:]}{shown}"


def nearest(key: str) -> str:
    """Which known key an unknown one may stand for, as the end of a sentence."""
    known = list(known_keys())
    key = ".".join(part for part in key.split(".") if not part.isdigit())  # places in a list
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    by_leaf = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if by_leaf:
        return f"did you mean {f'{parent}.' if parent else ''}{by_leaf[0]}?"
    # The sections above are right already, and the siblings were compared by what differs.
    others = [k for k in known if k not in siblings and not key.startswith(f"{k}.")]
    anywhere = difflib.get_close_matches(key, others, n=1, cutoff=0.5)
    if anywhere:
        return f"did you mean {anywhere[0]}?"
    return f"known here: {', '.join(k.rpartition('.')[2] for k in siblings) or 'nothing'}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterable[str]:
    """Every dotted key that a configuration may hold."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, an optional one, a list of them
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, keys in the order of this file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
