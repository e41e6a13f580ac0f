"""The taxonomy of `topics.yaml`: 8 coarse and 42 fine topics, and labels of other data sets mapped to it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources

import yaml

UNLABELLED = "unlabelled"


@cache
def taxonomy() -> dict[str, dict[str, str]]:
    """Coarse topic -> fine topic -> what it is about."""
    return {coarse: {name: entry["is"] for name, entry in fine.items()} for coarse, fine in _file().items()}


def topic(label: str | None) -> str:
    """The fine topic (or the coarse one, where the label says no more) that a label names; "" for one unknown."""
    return _labels().get(_plain(label or ""), "")


def coarse(name: str) -> str:
    """The coarse topic of a fine one (a coarse one is its own); `unlabelled` for anything else."""
    if name in taxonomy():
        return name
    return next((group for group, fine in taxonomy().items() if name in fine), UNLABELLED)


def coarse_counts(names: Iterable[str]) -> dict[str, int]:
    """How many of the topics fall under each coarse one, most first."""
    counts: dict[str, int] = {}
    for name in names:
        group = coarse(name)
        counts[group] = counts.get(group, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@cache
def _labels() -> dict[str, str]:
    labels = {_plain(coarse): coarse for coarse in _file()}
    for fine in _file().values():
        for name, entry in fine.items():
            labels |= {_plain(label): name for label in [name, *entry["also"]]}
    return labels


@cache
def _file() -> dict[str, dict[str, dict[str, str]]]:
    text = resources.files("psycho.speeches").joinpath("topics.yaml").read_text(encoding="utf-8")
    tree: dict[str, dict[str, dict[str, str]]] = yaml.safe_load(text)
    return tree


def _plain(label: str) -> str:
    return " ".join(re.sub(r"[^\w]|_", " ", label.casefold()).split())
