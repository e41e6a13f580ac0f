"""What can be set: every key of the configuration with its kind, default and description (`psycho settings`).

All of it is read from the configuration's classes, so that nothing here can be out of date. A section without a
description of its own goes by what its class says.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from psycho import secrets
from psycho.config import Config
from psycho.config.load import nearest
from psycho.errors import BadInput

_PLAIN = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


@dataclass(frozen=True)
class Setting:
    """One key; of a section, `kind` says so and `default` is only there where it may be left out."""

    key: str
    kind: str
    default: str
    doc: str


def find(asked: str | None = None) -> list[Setting]:
    """The settings below a key and itself, in the order of the configuration; all without one.

    What is no key is taken for a word: the settings with it in their names, then those with it in their descriptions.

    Raises:
        BadInput: there is no such key or word; the sentence names the nearest key.
    """
    found = list(_walk(Config, Config(), ""))
    if asked is None:
        return found
    within = [setting for setting in found if f"{setting.key}.".startswith(f"{asked}.")]
    if within:
        return within
    word = _singular(asked)
    named = [setting for setting in found if word in _words_of(setting.key.rpartition(".")[2])]
    told = [setting for setting in found if word in _words_of(setting.doc) and setting not in named]
    if not named + told:
        raise BadInput(f"there is no setting {asked}; {nearest(asked)}")
    return named + told


def overview() -> list[Setting]:
    """The sections and settings of the first level, each with the first sentence of what is said of it."""
    first = [setting for setting in find() if "." not in setting.key]
    return [replace(setting, doc=setting.doc.partition(". ")[0].removesuffix(".")) for setting in first]


def print_overview(settings: Sequence[Setting], console: Console) -> None:
    """A line each, and how to see more."""
    width = max(len(setting.key) for setting in settings)
    for setting in settings:
        console.print(Text(f"{setting.key:<{width}}  ", "bold").append(setting.doc, "not bold"), soft_wrap=True)
    console.print(
        "\nMore of one: psycho settings training.dpo. By a word: psycho settings beta. All: psycho settings --all.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _words_of(text: str) -> set[str]:
    """Its words in small letters, the parts of names among them, without the s of a plural."""
    whole = re.findall(r"[a-z0-9_]+", text.lower())
    return {_singular(word) for name in whole for word in (name, *name.split("_"))}


def _singular(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def changed(config: Config) -> dict[str, str]:
    """What a configuration sets otherwise than the default, by key; of a list of sections, how many there are."""
    return dict(_changes(config, Config(), ""))


def print_settings(settings: Sequence[Setting], here: Mapping[str, str], console: Console) -> None:
    """A line each, with the value of a configuration where it has another, and the description below."""
    for setting in settings:
        line = Text(setting.key, "bold")
        line.append(f": {setting.kind}", "not bold")
        if setting.default:
            line.append(f"; default {setting.default}", "not bold")
        if setting.key in here:
            line.append(f"; here {here[setting.key]}", "not bold green")
        console.print(line, soft_wrap=True, highlight=False)
        if setting.doc:
            console.print(Padding(Text(setting.doc), (0, 0, 0, 4), expand=False), highlight=False)


def _walk(model: type[BaseModel], defaults: BaseModel | None, prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        default = getattr(defaults, name) if defaults else field.get_default(call_default_factory=True)
        sections = _sections(field.annotation)
        own = isinstance(default, BaseModel)
        shown = "" if own or default is PydanticUndefined else _value(default)
        doc = field.description or " ".join(inspect.cleandoc(part.__doc__ or "") for part in sections)
        yield Setting(f"{prefix}{name}", _kind(field), shown, " ".join(doc.split()))
        for part in sections:
            yield from _walk(part, default if own else None, f"{prefix}{name}.")


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The section that a setting is, may be, or is a list of."""
    kinds = (annotation, *get_args(annotation))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _kind(field: FieldInfo) -> str:
    """The type in plain words, with its bounds, and that it must be given where it has no default."""
    words = [_words(field.annotation), *_bounds(field.metadata)]
    kind = ", ".join(words)
    if NoneType in get_args(field.annotation):
        kind += ", or none" if len(words) > 1 else " or none"
    return f"{kind}; must be set" if field.is_required() else kind


def _words(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return _either([str(part) for part in parts])
    if origin is Annotated:
        bounds = [bound for part in parts[1:] for bound in _bounds(getattr(part, "metadata", [part]))]
        return ", ".join([_words(parts[0]), *bounds])
    if origin is tuple:
        return "list of sections" if _sections(kind) else f"list of {_words(parts[0])}"
    if origin is dict:
        return f"by name: {_words(parts[1])}"
    return _PLAIN.get(kind) or "section"


def _either(words: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _bounds(metadata: Sequence[Any]) -> list[str]:
    """`at least 1` and the like; what else a field checks says so when it fails."""
    return [f"{word} {getattr(m, name):g}" for m in metadata for name, word in _BOUNDS.items() if hasattr(m, name)]


def _changes(config: BaseModel, defaults: BaseModel, prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in type(config).model_fields.items():
        value, default, key = getattr(config, name), getattr(defaults, name, PydanticUndefined), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            if not isinstance(default, BaseModel):  # a section that may be left out
                yield key, "set"
                default = type(value).model_construct()
            yield from _changes(value, default, f"{key}.")
        elif value != default:
            many = _sections(field.annotation) and value is not None
            yield key, f"a list of {len(value)}" if many else _value(secrets.hide(value, name))


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    return (value or "''") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
