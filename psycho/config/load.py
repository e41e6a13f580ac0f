"""From a file and `--set key=value` to a configuration; a mistake is a sentence that names the key.

The configurations of `configs/` travel with the package (`psycho/configs` is a link to them in a checkout), so that a
job finds its default, and those named `nano` or `configs/nano.yaml`, from any folder.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from psycho import secrets
from psycho.config.whole import Config
from psycho.errors import BadInput

SHIPPED = Path(__file__).parents[1] / "configs"
DEFAULT_CONFIG = SHIPPED / "nano.yaml"


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping: a second one would take the first one's place in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                raise _Twice(key.value, first[key.value], key.start_mark.line + 1)
            first[key.value] = key.start_mark.line + 1
        return node


class _Twice(Exception):
    """A key that stands twice in one mapping, and the lines (from 1) of both."""

    def __init__(self, key: str, first: int, second: int) -> None:
        where = f"in line {second}" if first == second else f"in lines {first} and {second}"
        super().__init__(f"{key} twice, {where}")


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def load_config(path: str | Path, overrides: Sequence[str] = (), run_dir: str | None = None) -> Config:
    """Read a YAML configuration and apply `key.path=value` overrides (values are YAML).

    A `path` that names no file but a configuration that psycho ships, as `nano` or `configs/nano.yaml`, is that one.

    Raises:
        BadInput: the file, a key or a value is wrong; the sentence names it and says what to do.
    """
    file = _find(Path(path))
    try:
        tree = _parse(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        shipped = ", ".join(sorted(found.stem for found in SHIPPED.glob("*.yaml")))
        raise BadInput(f"configuration {file} does not exist; psycho brings {shipped}: say --config nano") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"configuration {file} cannot be read: {type(error).__name__}; check it is UTF-8 text") from None
    except _Twice as error:
        raise BadInput(f"configuration {file} has the key {error}; keep one of them") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise BadInput(f"configuration {file} is not valid YAML{line}; put that line right") from None
    except ValueError as error:  # what looks like a date and is none
        raise BadInput(f"configuration {file} is not valid YAML ({error}); quote that value") from None
    if not isinstance(tree, dict):
        raise BadInput(f"configuration {file} holds no settings; write `key: value` lines")
    given = copy.deepcopy(tree)
    for override in overrides:
        _apply_override(tree, override)
    if run_dir is not None:
        tree["run_dir"] = run_dir
    if not str(tree.get("run_dir", "runs")).strip():
        raise BadInput("--run-dir or run_dir is empty; name a folder, or leave it out for the default")
    mistake = _mistake(tree)
    if mistake:
        raise BadInput(f"{_origin(mistake, given, overrides, str(file))}: {mistake}")
    return build_config(tree, str(file))


def _find(path: Path) -> Path:
    """The file that a path names, the person's own before the one that psycho ships under this name."""
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    short = path.parent in (Path(), Path("configs"))
    return shipped if short and not path.is_file() and shipped.is_file() else path


def build_config(tree: dict[str, Any], origin: str) -> Config:
    """Validate a tree of settings; `origin` names where they came from in error messages."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise BadInput(f"{origin}: {_explain(error)}") from None
    secrets.refuse(config.model_dump(mode="json"))
    return config


def _mistake(tree: dict[str, Any]) -> str | None:
    """What is wrong with a tree of settings, in a sentence; None where nothing is."""
    try:
        Config.model_validate(tree)
    except ValidationError as error:
        return _explain(error)
    return None


def _origin(mistake: str, tree: dict[str, Any], overrides: Sequence[str], file: str) -> str:
    """The file, or the `--set` since which the mistake is there."""
    since = file if _mistake(tree) == mistake else ""
    for override in overrides:
        _apply_override(tree, override)
        found = _mistake(tree) == mistake
        since = "" if not found else since or f"--set {override.partition('=')[0].strip()}"
    return since or file


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        shown = secrets.HIDDEN if ".env" in override else override
        raise BadInput(f"--set {shown} is not key=value; write for example --set training.dpo.beta=0.2")
    try:
        value = _parse(text)
    except _Twice as error:
        raise BadInput(f"--set {key}: the value has the key {error}; keep one of them") from None
    except (yaml.YAMLError, ValueError):
        raise BadInput(f"--set {key}: the value is not valid YAML; quote it") from None
    *parents, leaf = key.split(".")
    node: Any = tree
    above = ""
    for parent in parents:
        node = _below(node, parent, key, above)
        above = f"{above}.{parent}" if above else parent
    if isinstance(node, list):
        node[_place(node, leaf, key, above)] = value
    else:
        node[leaf] = value


def _below(node: Any, name: str, key: str, above: str) -> Any:
    """The section, or the entry of a list, that `name` stands for; a section that is not there is made."""
    if isinstance(node, list):
        place = _place(node, name, key, above)
        child = node[place] = {} if node[place] is None else node[place]
    else:
        child = node[name] = {} if node.get(name) is None else node[name]
    if not isinstance(child, dict | list):
        raise BadInput(f"--set {key}: {name} is a value, not a section")
    return child


def _place(entries: list[Any], name: str, key: str, above: str) -> int:
    if name.isdigit() and int(name) < len(entries):
        return int(name)
    there = f"its entries are 0 to {len(entries) - 1}" if entries else "it has no entries"
    raise BadInput(f"--set {key}: {above} is a list and has no entry {name}; {there}")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key}; {nearest(key)}"
    if first["type"] == "missing":
        return f"{key} is missing; set it"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    private = "env" in parts or secrets.names_a_secret(parts[-1] if parts else "")
    told = not private and not isinstance(given, dict | list | tuple | BaseModel)
    return f"{key or 'configuration'}: {message[0].lower()}{message[1:]}{f' (given: {given!r})' if told else ''}"


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
    """The resolved configuration as YAML, keys in the order of this file; private environments by name alone."""
    return yaml.safe_dump(secrets.hide(config.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
