"""Duplicates and the split, on keys alone: against slow and obvious versions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.schema import stable_id
from psycho.speeches.select import EXACT, KEPT, OVER_LIMIT, SAME_ID, exact_duplicates, hold_out, over_limit

KEYS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=30)


def column(values: list[int]) -> np.ndarray:
    return np.array(values, np.uint64)


@settings(deadline=None)
@given(KEYS)
def test_the_first_of_equal_rows_stays(rows):
    state = exact_duplicates(column([text for text, _ in rows]), column([i for _, i in rows]))
    texts, ids, expected = set(), set(), []
    for text, i in rows:
        expected.append(EXACT if text in texts else SAME_ID if i in ids else KEPT)
        if expected[-1] == KEPT:
            texts.add(text)
            ids.add(i)
    assert state.tolist() == expected


def test_the_limit_counts_kept_rows_only():
    state = np.array([KEPT, EXACT, KEPT, SAME_ID, KEPT], np.uint8)
    assert over_limit(state, 2).tolist() == [KEPT, EXACT, KEPT, SAME_ID, OVER_LIMIT]
    assert over_limit(state, None).tolist() == state.tolist()


def order(ids: list[str], seed: int = 0) -> np.ndarray:
    return column([int(stable_id("split", seed, i), 16) for i in ids])


def held(ids: list[str], count: int, cluster: list[int] | None = None, seed: int = 0) -> set[str]:
    chosen = hold_out(order(ids, seed), np.array(cluster if cluster else range(len(ids))), count)
    return {i for i, yes in zip(ids, chosen, strict=True) if yes}


IDS = [f"s{n}" for n in range(60)]


@settings(deadline=None)
@given(st.permutations(range(40)), st.integers(0, 5), st.integers(1, 39))
def test_the_split_does_not_depend_on_the_order_of_the_rows(places, seed, count):
    assert held([IDS[i] for i in places], count, seed=seed) == held(IDS[:40], count, seed=seed)
    assert len(held(IDS[:40], count, seed=seed)) == count


@settings(deadline=None)
@given(st.integers(3, 40), st.integers(1, 20), st.integers(0, 5), st.integers(1, 10))
def test_more_speeches_move_no_more_than_they_must(size, more, seed, count):
    before, after = held(IDS[:size], count, seed=seed), held(IDS[: size + more], count, seed=seed)
    assert after & set(IDS[:size]) <= before  # what was there moves only to make room


def test_another_seed_is_another_split():
    assert held(IDS, 20) != held(IDS, 20, seed=1)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 40))
def test_a_cluster_is_never_parted_and_no_more_than_the_count_is_held_out(names, count):
    cluster = [names.index(name) for name in names]
    chosen = hold_out(order(IDS[: len(names)]), np.array(cluster), count)
    assert chosen.sum() <= count
    for name in set(names):
        assert len({bool(yes) for yes, other in zip(chosen, names, strict=True) if other == name}) == 1
    left_over = count - chosen.sum()
    assert all(names.count(n) > left_over for n, yes in zip(names, chosen, strict=True) if not yes)


@pytest.mark.parametrize("count", [0, 5])
def test_nothing_to_split(count):
    assert hold_out(column([]), np.array([], np.int64), count).tolist() == []
