"""A sheet that a clinician can read: pairs, or responses, with their ratings and evidence, as one HTML page or a CSV.

It is for looking at a sample with one's own eyes before anything is learned from it. The page is self-contained and
prints; a row of the CSV is a pair (or a response). Either holds client speech, and says so.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from psycho.preferences.forms import turns
from psycho.principles import PRINCIPLES, STEMS, overall

Row = Mapping[str, Any]
By = Literal["random", "gap", "principle"]
WARNING = "This sheet holds what clients said. It is health data: keep it where only those who may read it can."
_SIDES = ("chosen", "rejected")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def pick(entries: Sequence[dict[str, Any]], count: int, by: By, seed: int) -> list[dict[str, Any]]:
    """At most so many entries, in the order in which they are shown.

    Args:
        entries: of `pair_entries` or `response_entries`.
        by: random: drawn; gap: spread evenly over the gaps (of responses: over the overall ratings), the widest first;
            principle: for one principle after the other the entry that is furthest apart (or off the middle) on it.
    """
    shuffled = random.Random(seed).sample(list(entries), len(entries))
    if by == "random" or not shuffled:
        return shuffled[:count]
    if by == "gap":
        ordered = sorted(shuffled, key=lambda entry: -entry["gap"])
        count = min(count, len(ordered))
        places = [round(index * (len(ordered) - 1) / max(1, count - 1)) for index in range(count)]
        return [ordered[place] for place in places]
    queues = [_furthest_apart(shuffled, stem) for stem in STEMS]
    taken: dict[int, dict[str, Any]] = {}
    while len(taken) < min(count, len(shuffled)):
        for queue in queues:
            entry = next((entry for entry in queue if id(entry) not in taken), None)
            if entry is not None and len(taken) < count:
                taken[id(entry)] = entry
    return list(taken.values())


def _furthest_apart(entries: Sequence[dict[str, Any]], stem: str) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: -entry["spread"][stem])


def pair_entries(pairs: Iterable[Row], rated: Iterable[Row]) -> list[dict[str, Any]]:
    """Pairs as the sheet shows them, with the evidence of their responses where the run has it."""
    known = {(row["speech_id"], row["model"], row["response"]): row for row in rated}
    entries = []
    for pair in pairs:
        sides = []
        for side in _SIDES:
            row = known.get((pair["speech_id"], pair[f"{side}_model"], pair[side]), {})
            ratings = {stem: pair[f"{side}_{stem}_rating"] for stem in STEMS}
            sides.append(_side(side, pair[side], pair[f"{side}_model"], ratings, row))
        spread = {stem: abs(sides[0]["ratings"][stem] - sides[1]["ratings"][stem]) for stem in STEMS}
        name = f"{pair['ID']}/{pair['prefID']}"
        entries.append({"id": name, "turns": turns(pair), "sides": sides, "gap": pair["gap"], "spread": spread})
    return entries


def response_entries(rated: Iterable[Row]) -> list[dict[str, Any]]:
    """Responses as the sheet shows them."""
    entries = []
    for row in rated:
        ratings = {stem: row[f"{stem}_rating"] for stem in STEMS}
        side = _side("response", row["response"], row["model"], ratings, row)
        spread = {stem: abs(ratings[stem] - 3) for stem in STEMS}
        name = row.get("request_id") or f"{row['speech_id']}/{row['model']}"
        entries.append({"id": name, "turns": turns(row), "sides": [side], "gap": row["overall"], "spread": spread})
    return entries


def _side(name: str, text: str, model: str, ratings: Mapping[str, int], row: Row) -> dict[str, Any]:
    invented = row.get("unfaithful_evidence") or ()
    evidence = {stem: row.get(f"{stem}_evidence") or "" for stem in STEMS}
    return {
        "name": name,
        "text": text,
        "model": model,
        "ratings": dict(ratings),
        "overall": overall(ratings),
        "evidence": {stem: "(invented, dropped)" if stem in invented else evidence[stem] for stem in STEMS},
        "floored": bool(row.get("floored")),
    }


def html(entries: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """The page.

    Args:
        facts: `name` of the run, `judge`, `what` is shown, how it was picked (`by`), of how many (`of`), `concerns`.
    """
    return _template().render(
        entries=entries, warning=WARNING, principles=PRINCIPLES, said_by={"user": "Client", "assistant": "Counsellor"},
        **facts,
    )  # fmt: skip


@lru_cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("psycho.preferences"),
        autoescape=True,  # always: the page holds text that people and models wrote
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sheet.html.jinja")


def table(entries: Sequence[Row]) -> str:
    """The CSV, for a spreadsheet: UTF-8 with its mark, a text that begins like a formula behind an apostrophe."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\r\n")
    names = [side["name"] for side in entries[0]["sides"]] if entries else []
    writer.writerow([WARNING])
    head = ["id", "conversation", *(["gap"] if len(names) > 1 else [])]
    for name in names:
        prefix = "" if name == "response" else f"{name} "
        head += [name, f"{prefix}model", f"{prefix}overall"]
        head += [f"{prefix}{stem} {part}" for stem in STEMS for part in ("rating", "evidence")]
    writer.writerow([*head, "your opinion"])
    for entry in entries:
        said = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in entry["turns"])
        cells: list[Any] = [entry["id"], said, *([f"{entry['gap']:.2f}"] if len(names) > 1 else [])]
        for side in entry["sides"]:
            cells += [side["text"], side["model"], f"{side['overall']:.2f}"]
            cells += [part for stem in STEMS for part in (side["ratings"][stem], side["evidence"][stem])]
        writer.writerow([_plain(cell) for cell in cells] + [""])
    return "\ufeff" + stream.getvalue()


def _plain(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell
