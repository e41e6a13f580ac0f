"""Is the judge fit for its work? What the run knows of it, and the first line of everything that shows figures.

A judge is checked against known ratings where there are such; the manifest of the stage judge then holds `fitness`:
`{"fit": bool, "why": str, "gates": [{"name", "value", "target", "n", "passed"}]}`. Where it was not checked, that is
said, for a figure by an unchecked judge is no figure by a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fitness = dict[str, Any]
_UNCHECKED = "not checked"
_GATE_KEYS = ("name", "value", "target", "n", "passed")


def read_fitness(manifests: Mapping[str, Mapping[str, Any]]) -> Fitness:
    """What the stages' manifests say of the label judge, as {fit, why, gates}; `fit` is None where nobody checked."""
    found = manifests.get("judge", {}).get("fitness")
    if found:
        gates = [{key: gate.get(key) for key in _GATE_KEYS} for gate in found.get("gates") or []]
        return {"fit": found.get("fit"), "why": found.get("why") or _UNCHECKED, "gates": gates}
    if "judge" in manifests or "evaluate" in manifests:
        return {"fit": None, "why": _UNCHECKED, "gates": []}
    return {"fit": None, "why": "no judge has rated anything yet", "gates": []}


def headline(fitness: Mapping[str, Any]) -> str:
    """The first line of summary, report and terminal."""
    why = fitness["why"]
    if fitness["fit"] is False:
        return f"The judge is unfit ({why}): figures below show the machinery only."
    if fitness["fit"]:
        return f"The judge is fit: {why}."
    if why.startswith(_UNCHECKED):
        reason = why.removeprefix(_UNCHECKED).removeprefix(": ")
        said = f" ({reason})" if reason else ""
        return f"The judge was not checked against known ratings{said}; whether to trust its ratings is not known."
    return f"Whether the judge is fit is not known: {why}."
