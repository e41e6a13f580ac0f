"""Is the judge fit for its work? What the run knows of it, and the first line of everything that shows figures.

A judge is checked against known ratings where there are such; the manifest of the stage judge then holds `fitness`:
`{"fit": bool, "why": str, "gates": [{"name", "value", "target", "n", "passed"}]}`. Where it was not checked, that is
said, for a figure by an unchecked judge is no figure by a good one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fitness = dict[str, Any]
_GATE_KEYS = ("name", "value", "target", "n", "passed")


def read_fitness(manifests: Mapping[str, Mapping[str, Any]]) -> Fitness:
    """What the stages' manifests say of the label judge, as {fit, why, gates}; `fit` is None where nobody checked."""
    found = manifests.get("judge", {}).get("fitness")
    if found:
        gates = [{key: gate.get(key) for key in _GATE_KEYS} for gate in found.get("gates") or []]
        return {"fit": found.get("fit"), "why": found.get("why") or "not checked", "gates": gates}
    if "judge" in manifests or "evaluate" in manifests:
        return {"fit": None, "why": "not checked", "gates": []}
    return {"fit": None, "why": "no judge has rated anything yet", "gates": []}


def headline(fitness: Mapping[str, Any]) -> str:
    """The first line of summary, report and terminal."""
    if fitness["fit"] is False:
        return f"The judge is unfit ({fitness['why']}): figures below show the machinery only."
    if fitness["fit"]:
        gates = fitness["gates"]
        passed = f"it passed {sum(bool(gate['passed']) for gate in gates)} of {len(gates)} gates" if gates else ""
        return f"The judge is fit: {passed or fitness['why']}."
    if fitness["why"] == "not checked":
        return "The judge was not checked against known ratings: whether its ratings can be trusted is not known."
    return f"Whether the judge is fit is not known: {fitness['why']}."
