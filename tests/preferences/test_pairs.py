"""Preference pairs against a slow and obvious version, and the published schema."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho import storage
from psycho.config import PairsConfig
from psycho.preferences.pairs import pair_row, test_pair, train_pairs
from psycho.principles import STEMS, overall
from psycho.schema import PREFERENCE_PAIR

PUBLISHED = [  # docs/PAPER.md
    "ID",
    "prefID",
    "question",
    "chosen",
    "rejected",
    "chosen_model",
    "rejected_model",
    *[
        f"{side}_{stem}_rating"
        for side in ("chosen", "rejected")
        for stem in ("empathy", "relevance", "clarity", "safety", "exploration", "autonomy", "staging")
    ],
]


def response(number: int, ratings: tuple[int, ...], text: str | None = None) -> dict[str, Any]:
    named = dict(zip(STEMS, ratings, strict=True))
    return {
        "request_id": f"r{number:02}",
        "response": f"response {number}" if text is None else text,
        "model": f"m{number}",
        "sevenths": sum(ratings),
        "overall": overall(named),
        **{f"{stem}_rating": rating for stem, rating in named.items()},
    }


def of_sum(number: int, sevenths: int, text: str | None = None) -> dict[str, Any]:
    """A response whose seven ratings add up to `sevenths`."""
    each, left = divmod(sevenths, 7)
    return response(number, tuple([each + 1] * left + [each] * (7 - left)), text)


@st.composite
def speech(draw: st.DrawFn) -> list[dict[str, Any]]:
    drawn = draw(st.lists(st.tuples(st.lists(st.integers(1, 5), min_size=7, max_size=7), st.sampled_from("abcdef"))))
    return [response(number, tuple(ratings), text) for number, (ratings, text) in enumerate(drawn[:8])]


CONFIG = st.builds(
    PairsConfig,
    min_gap=st.integers(0, 28).map(lambda n: n / 7) | st.sampled_from([0.0, 0.5, 1.0]),
    min_test_gap=st.integers(0, 14).map(lambda n: n / 7),
    max_pairs_per_speech=st.none() | st.integers(1, 4),
    max_safety_loss=st.none() | st.integers(1, 4),
)


def gap(chosen: dict[str, Any], rejected: dict[str, Any]) -> Fraction:
    return Fraction(chosen["sevenths"] - rejected["sevenths"], 7)


def safety_loss(chosen: dict[str, Any], rejected: dict[str, Any]) -> int:
    return rejected["safety_rating"] - chosen["safety_rating"]


def exact(number: float) -> Fraction:
    return Fraction(number).limit_denominator(1000)


@settings(deadline=None)
@given(speech(), CONFIG)
def test_train_pairs_are_those_of_a_slow_and_obvious_version(rows, config):
    expected = {
        (better["request_id"], worse["request_id"])
        for better in rows
        for worse in rows
        if gap(better, worse) > 0
        and gap(better, worse) >= exact(config.min_gap)
        and better["response"] != worse["response"]
        and (config.max_safety_loss is None or safety_loss(better, worse) < config.max_safety_loss)
    }
    kept, dropped = train_pairs(rows, config)
    found = [(c["request_id"], r["request_id"]) for c, r in kept]
    limit = config.max_pairs_per_speech
    assert len(found) == len(set(found)) == (len(expected) if limit is None else min(limit, len(expected)))
    assert set(found) <= expected
    # widest first, so that a limit leaves out the narrowest
    gaps = [gap(c, r) for c, r in kept]
    assert gaps == sorted(gaps, reverse=True)
    by_id = {row["request_id"]: row for row in rows}
    cut = expected - set(found)
    assert all(gap(by_id[c], by_id[r]) <= gaps[-1] for c, r in cut)
    # every candidate is accounted for, once
    assert len(kept) + len(dropped) == len(rows) * (len(rows) - 1) // 2
    assert len({row["pair"] for row in dropped}) == len(dropped)
    assert sum(row["reason"] == "over pairs.max_pairs_per_speech" for row in dropped) == len(cut)


@settings(deadline=None)
@given(speech(), CONFIG)
def test_a_test_pair_is_the_best_against_the_worst(rows, config):
    best, dropped = test_pair(rows, config)
    assert (best is not None) + len(dropped) == (len(rows) > 1)
    sums = [row["sevenths"] for row in rows]
    if best is not None:
        chosen, rejected = best
        assert (chosen["sevenths"], rejected["sevenths"]) == (max(sums), min(sums))
        assert gap(chosen, rejected) > 0 and gap(chosen, rejected) >= exact(config.min_test_gap)
        assert config.max_safety_loss is None or safety_loss(chosen, rejected) < config.max_safety_loss
    elif len(rows) > 1 and dropped[0]["reason"] in ("tie", "gap under pairs.min_test_gap"):
        widest = Fraction(max(sums) - min(sums), 7)
        assert widest == 0 or widest < exact(config.min_test_gap)


@settings(deadline=None)
@given(speech(), CONFIG, st.randoms())
def test_the_order_of_the_responses_does_not_matter(rows, config, random):
    shuffled = random.sample(rows, len(rows))
    assert train_pairs(shuffled, config)[0] == train_pairs(rows, config)[0]
    assert test_pair(shuffled, config)[0] == test_pair(rows, config)[0]


@pytest.mark.parametrize("low", range(7, 29))
def test_a_gap_of_exactly_one_is_kept_wherever_it_lies(low):
    """Means of sevens differ by 0.9999999999999996 where they should differ by 1."""
    kept, _ = train_pairs([of_sum(0, low), of_sum(1, low + 7)], PairsConfig(min_gap=1.0))
    assert [(c["request_id"], r["request_id"]) for c, r in kept] == [("r01", "r00")]
    kept, dropped = train_pairs([of_sum(0, low), of_sum(1, low + 6)], PairsConfig(min_gap=1.0))
    assert kept == [] and [row["reason"] for row in dropped] == ["gap under pairs.min_gap"]


def test_the_float_trap_is_a_real_one():
    assert any((low + 7) / 7 - low / 7 < 1.0 for low in range(7, 29))


def test_ties_never_pair_even_without_a_gap():
    same_mean = [response(0, (5, 3, 3, 3, 3, 3, 3)), response(1, (3, 3, 3, 3, 3, 3, 5))]
    kept, dropped = train_pairs(same_mean, PairsConfig(min_gap=0))
    assert kept == [] and [row["reason"] for row in dropped] == ["tie"]
    best, dropped = test_pair(same_mean, PairsConfig())
    assert best is None and [row["reason"] for row in dropped] == ["tie"]


def test_the_same_text_rated_twice_is_no_pair():
    rows = [of_sum(0, 10, "same"), of_sum(1, 30, "same")]
    assert train_pairs(rows, PairsConfig())[1][0]["reason"] == "same text"
    assert test_pair(rows, PairsConfig())[1][0]["reason"] == "same text"


def test_left_out_rows_hold_no_text():
    _, dropped = train_pairs([of_sum(0, 10, "Tobias"), of_sum(1, 10, "sleep")], PairsConfig())
    assert [set(row) for row in dropped] == [{"pair", "reason"}] and "Tobias" not in str(dropped)


@pytest.mark.parametrize("rows", [[], [of_sum(0, 20)]])
def test_fewer_than_two_responses_are_no_candidate(rows):
    assert train_pairs(rows, PairsConfig()) == ([], []) and test_pair(rows, PairsConfig()) == (None, [])


def test_no_pair_prefers_the_less_safe_response_and_it_is_counted():
    unsafe = response(0, (5, 5, 5, 2, 5, 5, 5))  # better by 1.1 on average, and less safe by 1
    safe = response(1, (4, 3, 4, 3, 4, 3, 3))
    for maker in (train_pairs, test_pair):
        kept, dropped = maker([unsafe, safe], PairsConfig())
        assert not kept and [row["reason"] for row in dropped] == ["less safe by 1"]
    assert len(train_pairs([unsafe, safe], PairsConfig(max_safety_loss=2))[0]) == 1
    assert len(train_pairs([unsafe, safe], PairsConfig(max_safety_loss=None))[0]) == 1


STRATEGIES = ("all", "best_worst", "best_random", "top_margin")


@settings(deadline=None)
@given(speech(), CONFIG, st.sampled_from(STRATEGIES), st.integers(0, 3))
def test_every_strategy_takes_from_the_same_pairs_and_accounts_for_the_rest(rows, config, strategy, seed):
    everything = config.model_copy(update={"max_pairs_per_speech": None})
    eligible = {(c["request_id"], r["request_id"]) for c, r in train_pairs(rows, everything, seed)[0]}
    kept, dropped = train_pairs(rows, config.model_copy(update={"strategy": strategy}), seed)
    found = [(c["request_id"], r["request_id"]) for c, r in kept]
    assert len(found) == len(set(found)) and set(found) <= eligible
    assert len(kept) + len(dropped) == len(rows) * (len(rows) - 1) // 2
    assert len({row["pair"] for row in dropped}) == len(dropped) and all(row["reason"] for row in dropped)
    ranking = sorted(rows, key=lambda row: (-row["sevenths"], row["request_id"]))
    for chosen, rejected in kept:
        if strategy in ("best_worst", "best_random"):
            assert chosen["request_id"] == ranking[0]["request_id"] and len(kept) == 1
        if strategy == "best_worst":
            assert rejected["request_id"] == ranking[-1]["request_id"]
    if strategy == "top_margin":
        assert len(kept) == min(config.max_pairs_per_speech or 1, len(eligible))
    if strategy == "best_random" and any(c == ranking[0]["request_id"] for c, _ in eligible):
        assert len(kept) == 1


def test_best_against_a_random_one_is_random():
    """PEERS.md, bug 3: each worse response is taken as often as any other, and a seed always takes the same."""
    config = PairsConfig(strategy="best_random", min_gap=0.1)
    counts = dict.fromkeys(("a", "b", "c"), 0)
    for number in range(3000):
        rows = [of_sum(place, 30 - 5 * place, text) for place, text in enumerate(("best", "a", "b", "c"))]
        rows = [row | {"request_id": f"{number}-{row['request_id']}"} for row in rows]
        (pair,), _ = train_pairs(rows, config, seed=1)
        counts[pair[1]["response"]] += 1
        assert pair[0]["response"] == "best" and train_pairs(rows, config, seed=1)[0] == [pair]
    # chi-square with 2 degrees of freedom: above 13.8 once in a thousand draws; these are fixed by their ids
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 13.8
    other = [train_pairs(rows, config, seed=seed)[0][0][1]["response"] for seed in range(40)]
    assert set(other) == {"a", "b", "c"}


def test_ties_of_a_whole_speech_give_no_pair_by_any_strategy():
    """PEERS.md, bug 2: all ratings tie, and chosen and rejected are the same."""
    rows = [of_sum(number, 21) for number in range(4)]
    for strategy in STRATEGIES:
        kept, dropped = train_pairs(rows, PairsConfig(min_gap=0, strategy=strategy))
        assert kept == [] and [row["reason"] for row in dropped] == ["tie"] * 6


def a_row() -> dict[str, Any]:
    chosen, rejected = response(0, (5, 4, 3, 5, 4, 3, 5), "warm"), response(1, (1, 2, 3, 1, 2, 3, 1), "cold")
    return pair_row({"speech_id": "s1", "question": "How?", "history": None}, 3, chosen, rejected)


def test_a_pair_row_says_whose_rating_is_whose():
    row = a_row()
    assert (row["ID"], row["speech_id"], row["prefID"], row["question"]) == ("s1", "s1", 3, "How?")
    assert (row["chosen"], row["rejected"], row["chosen_model"], row["rejected_model"]) == ("warm", "cold", "m0", "m1")
    assert (row["chosen_relevance_rating"], row["rejected_relevance_rating"]) == (4, 2)
    assert row["gap"] == pytest.approx(16 / 7)


def test_the_schema_carries_the_published_columns_in_order():
    assert PREFERENCE_PAIR.names[: len(PUBLISHED)] == PUBLISHED
    assert set(a_row()) == set(PREFERENCE_PAIR.names)
    kinds = {name: PREFERENCE_PAIR.field(name).type for name in PUBLISHED}
    assert all(pa.types.is_integer(kinds[n]) for n in PUBLISHED if n.endswith("_rating") or n == "prefID")
    assert all(pa.types.is_string(kinds[n]) for n in PUBLISHED if not n.endswith("_rating") and n != "prefID")


def test_pairs_load_into_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    storage.write_table(pa.Table.from_pylist([a_row()], schema=PREFERENCE_PAIR), str(tmp_path / "train"))
    file = str(tmp_path / "train" / "part-0.parquet")
    loaded = datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == PREFERENCE_PAIR.names and loaded[0] == a_row()
