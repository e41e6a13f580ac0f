"""When a stage has left out too much for its result to be used, and the sentence that says so.

A stage goes on past a bad row, so that one row never ends a job. Where most rows are bad, going on makes a data set of
what is left, and that looks like any other. The limits are the section `quality`; no stage's result depends on them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_TOLD = 3
_MOST_KINDS = 20
_NUMBER = re.compile(r"\d[\d.,]*")


def reasons(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Quarantine rows by reason, the most first. Where nearly every row has its own, numbers in it become `#`."""
    found = Counter(str(row.get("reason", "no reason given")) for row in rows)
    if len(found) > _MOST_KINDS:
        merged: Counter[str] = Counter()
        for reason, count in found.items():
            merged[_NUMBER.sub("#", reason)] += count
        found = merged
    return dict(found.most_common())


def told(found: Mapping[str, int]) -> str:
    """The most frequent reasons with their counts, for a line."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    shown = [f"{count:,} {reason}" for reason, count in ordered[:_TOLD]]
    rest = sum(count for _, count in ordered[_TOLD:])
    return "; ".join([*shown, *([f"{rest:,} for other reasons"] if rest else [])])


def over(count: int, of: int, limit: float) -> bool:
    """Whether that many of so many rows are more than the limit's share."""
    return count > limit * of


def too_many_left_out(stage: str, count: int, of: int, what: str, limit: float, found: Mapping[str, int]) -> str | None:
    """The sentence for a stage that left out more than it may; None where it did not.

    Args:
        count: rows left out for a defect, out of `of`.
        what: the rows, in the plural.
        found: the same by reason.
    """
    if not over(count, of, limit):
        return None
    return (
        f"{count:,} of {of:,} {what} were left out ({count / of:.1%}; quarantine/{stage}.jsonl lists them): "
        f"{told(found)}; {_allowed('quality.max_left_out_share', limit)}"
    )


def too_many_floored(count: int, of: int, limit: float) -> str | None:
    """The same for ratings whose response the judge's own language model finds impossible."""
    if not over(count, of, limit):
        return None
    return (
        f"{count:,} of {of:,} rated responses ({count / of:.1%}) hold text under judge.fluency_floor, which is no "
        f"language to the judge; {_allowed('quality.max_floored_share', limit)}"
    )


def quality_facts(manifests: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the manifests of `generate`, `judge` and `pair` say of how good the data are; what they do not say is left
    out.

    Returns:
        `left_out` by stage ({rows, of, what, reasons}), `floored` ({rows, of}), `evidence` (by principle) and `fitness`
        of the judge.
    """
    generate, judge, pair = (manifests.get(name) or {} for name in ("generate", "judge", "pair"))
    found: dict[str, Any] = {"left_out": {}}
    for name, manifest, what in (("generate", generate, "responses"), ("judge", judge, "ratings")):
        if manifest.get("rows_in"):
            counts = {"rows": manifest["quarantined"], "of": manifest["rows_in"], "what": what}
            found["left_out"][name] = counts | {"reasons": manifest.get("left_out", {})}
    if pair.get("defects", {}).get("of"):
        found["left_out"]["pair"] = {**pair["defects"], "reasons": {}}
    if "floored" in judge and judge.get("rows_out"):
        found["floored"] = {"rows": judge["floored"], "of": judge["rows_out"]}
    return found | {name: judge[name] for name in ("evidence", "fitness") if judge.get(name)}


def concerns(facts: Mapping[str, Any], max_left_out_share: float, max_floored_share: float) -> list[str]:
    """Why data of such a quality should not be passed on as if they were good, a phrase each."""
    found = []
    if (facts.get("fitness") or {}).get("fit") is False:
        found.append(f"the judge is unfit ({facts['fitness'].get('why', 'it missed a gate')})")
    for counts in facts["left_out"].values():
        if over(counts["rows"], counts["of"], max_left_out_share):
            share = counts["rows"] / counts["of"]
            found.append(f"{counts['rows']:,} of {counts['of']:,} {counts['what']} were left out ({share:.1%})")
    floored = facts.get("floored")
    if floored and over(floored["rows"], floored["of"], max_floored_share):
        share = floored["rows"] / floored["of"]
        found.append(
            f"{floored['rows']:,} of {floored['of']:,} rated responses are no language to the judge ({share:.1%})"
        )
    return found


def _allowed(setting: str, limit: float) -> str:
    return (
        f"{setting} allows {limit:.1%}. What is done is kept: put the cause right, or raise {setting}, and give the "
        "same command again"
    )
