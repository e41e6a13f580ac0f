"""Whether a judge is fit to label: gates, and what is said where one is missed.

An instrument that is not checked is not an instrument. In the nano world each principle is held against the truth;
elsewhere planted pairs show whether a judge tells plain differences apart (`probes.py`). A judge under a gate is said
first, everywhere, and `judge.unfit` says whether the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from psycho.principles import STEMS

KAPPA_GATE, PRINCIPLE_GATE, PAIR_GATE = 0.80, 0.90, 0.95  # above .8 is "almost perfect" to Landis and Koch (1977)


@dataclass(frozen=True)
class Gate:
    """One measured figure and what it must reach."""

    name: str
    value: float | None
    target: float
    n: int

    @property
    def passed(self) -> bool:
        """True when the figure reaches its target."""
        return self.value is not None and self.value >= self.target

    @property
    def said(self) -> str:
        """The figure beside its target, in a few words."""
        value = "no figure" if self.value is None else f"{self.value:.2f}"
        return f"{self.name} {value} (must be {self.target:.2f})"

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        return {"name": self.name, "value": self.value, "target": self.target, "n": self.n, "passed": self.passed}


def truth_gates(audit: Mapping[str, Any]) -> list[Gate]:
    """The gates of a judge whose ratings were held against the truth (`psycho.nano.truth.judge_against_gold`)."""
    found = [Gate(f"{stem}: kappa with the truth", audit["kappa_gold"][stem], KAPPA_GATE, audit["n"]) for stem in STEMS]
    return [*found, Gate("pairs in the order of the truth", audit["pair_agreement_gold"], PAIR_GATE, audit["pairs"])]


def verdict(gates: Sequence[Gate], how: str) -> dict[str, Any]:
    """What the manifest of `judge` says under `fitness`: fit (None: nobody could check), why, and the gates.

    Args:
        how: what the gates were measured on.
    """
    missed = [gate for gate in gates if not gate.passed]
    if not gates:
        fit, why = None, f"not checked: {how}"
    elif missed:
        fit, why = False, f"{'; '.join(gate.said for gate in missed)}, measured on {how}"
    else:
        fit, why = True, f"all {len(gates)} gates passed, measured on {how}"
    return {"fit": fit, "why": why, "gates": [gate.record() for gate in gates]}
