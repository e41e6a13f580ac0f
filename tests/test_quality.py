"""When a stage has left out too much: reasons with counts, limits, and what the manifests say of the data."""

from __future__ import annotations

import pytest

from psycho.quality import concerns, quality_facts, reasons, told, too_many_floored, too_many_left_out


def test_reasons_are_counted_and_numbers_that_part_them_are_left_out() -> None:
    few = [{"reason": "refused"}, {"reason": "refused"}, {"reason": "over 8192 tokens"}]
    assert reasons(few) == {"refused": 2, "over 8192 tokens": 1}
    assert list(reasons([*few, *({"reason": f"prompt of {n:,} tokens"} for n in range(9000, 9030))])) == [
        "prompt of # tokens", "refused", "over # tokens",
    ]  # fmt: skip
    assert told({"a": 1, "b": 1200, "c": 3, "d": 2, "e": 5}) == "1,200 b; 5 e; 3 c; 3 for other reasons"
    assert told({}) == ""


@pytest.mark.parametrize(
    ("count", "limit", "stops"), [(10, 0.1, False), (11, 0.1, True), (100, 1.0, False), (0, 0, False)]
)
def test_a_share_over_the_limit_is_a_sentence(count: int, limit: float, stops: bool) -> None:
    said = too_many_left_out("judge", count, 100, "ratings", limit, {"refused": count})
    assert bool(said) is stops is bool(too_many_floored(count, 100, limit))
    if said:
        for part in (
            "11 of 100 ratings",
            "11.0%",
            "11 refused",
            "quarantine/judge.jsonl",
            "quality.max_left_out_share",
        ):
            assert part in said, part


def test_a_run_of_an_older_psycho_has_no_figures_and_no_concerns() -> None:
    facts = quality_facts({"generate": {"rows_in": 4, "quarantined": 0}, "judge": {}, "pair": {"train": 3}})
    assert facts == {"left_out": {"generate": {"rows": 0, "of": 4, "what": "responses", "reasons": {}}}}
    assert concerns(facts, 0.1, 0.5) == []
    assert concerns({**facts, "fitness": {"fit": None, "why": "nobody could check"}}, 0.1, 0.5) == []
