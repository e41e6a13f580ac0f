"""Planted pairs that any fit judge puts in the right order, rated beside the responses of the run.

Where nobody knows the truth of the real responses, a judge can still be asked about pairs whose order is beyond doubt
(`probes.yaml`). A judge that guesses gets half of them right; its labels would be noise, whatever is trained on them.
Expected ratings are compared where the judge gives them, else the digits; equal ratings count half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import yaml

from psycho.judging.fitness import Gate
from psycho.principles import STEMS
from psycho.schema import stable_seed

PROBE = "probe-"
SHARE_GATE = 0.80  # of the pairs in the right order; guessing has .5
HOW = "planted pairs whose order is beyond doubt"
_SIDES = ("better", "worse")


@dataclass(frozen=True)
class Probe:
    """A client speech and two responses; `principle` is a stem, or `overall`."""

    principle: str
    speech: str
    better: str
    worse: str


@lru_cache
def probes() -> tuple[Probe, ...]:
    """All planted pairs, in the order of the file."""
    source = resources.files("psycho.judging").joinpath("probes.yaml")
    return tuple(Probe(**entry) for entry in yaml.safe_load(source.read_text(encoding="utf-8")))


def probe_rows(seed: int) -> list[dict[str, Any]]:
    """The responses of all pairs as rows that a judge is asked for (`request_id`, `question`, `response`, `seed` …)."""
    return [
        {
            "request_id": f"{PROBE}{number:02d}-{side}",
            "speech_id": f"{PROBE}{number:02d}",
            "split": "probe",
            "model": side,
            "question": probe.speech,
            "response": getattr(probe, side),
            "seed": stable_seed("probe", seed, number, side),
        }
        for number, probe in enumerate(probes())
        for side in _SIDES
    ]


def is_probe(row: Mapping[str, Any]) -> bool:
    """True for a row of `probe_rows`, or a judge's answer to one."""
    return str(row["request_id"]).startswith(PROBE)


def probe_gates(ratings: Sequence[Mapping[str, Any]]) -> list[Gate]:
    """How many pairs the judge puts in the right order: those of the seven principles, and all of each kind.

    Args:
        ratings: rating rows (`schema.RATING`) of probes; a pair that lacks a rating counts as not told apart.
    """
    by_id = {row["request_id"]: row for row in ratings}
    points: dict[str, list[float]] = {}
    for number, probe in enumerate(probes()):
        better, worse = (by_id.get(f"{PROBE}{number:02d}-{side}") for side in _SIDES)
        gap = 0.0 if better is None or worse is None else _rated(better, probe) - _rated(worse, probe)
        points.setdefault(probe.principle, []).append(0.5 if abs(gap) < 1e-9 else float(gap > 0))
    principled = [point for stem in STEMS for point in points[stem]]
    return [
        Gate("planted pairs told apart on their principle", _mean(principled), SHARE_GATE, len(principled)),
        Gate("answers told from text that says nothing", _mean(points["overall"]), SHARE_GATE, len(points["overall"])),
    ]


def _rated(row: Mapping[str, Any], probe: Probe) -> float:
    expected = "expected_overall" if probe.principle == "overall" else f"{probe.principle}_expected"
    written = "overall" if probe.principle == "overall" else f"{probe.principle}_rating"
    value = row.get(expected)
    return float(row[written] if value is None else value)


def _mean(points: Sequence[float]) -> float:
    return sum(points) / len(points)
