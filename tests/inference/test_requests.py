"""Which model answers which speech: by distribution, by seed, and steady under more speeches."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from psycho.config import build_config, load_config
from psycho.inference.requests import draw_models, prompt, request_row, shares
from psycho.job import DEFAULT_CONFIG
from psycho.schema import REQUEST, stable_id
from ray_jobs.generate import build_requests

SPEECHES = [f"s{number}" for number in range(2000)]
POOL = ["a", "b", "c", "d", "e"]


def speech(number: int) -> dict[str, str]:
    return {"speech_id": f"s{number}", "split": "train", "question": f"question {number}"}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_model_and_every_set_of_models_is_equally_likely(k, seed):
    drawn = [draw_models(s, POOL, k, seed) for s in SPEECHES]
    models = Counter(model for models in drawn for model in models)
    sets = Counter(tuple(sorted(models)) for models in drawn)
    assert stats.chisquare([models[m] for m in POOL]).pvalue > 1e-3
    assert stats.chisquare([sets[s] for s in combinations(POOL, k)]).pvalue > 1e-3
    first = Counter(models[0] for models in drawn)
    assert stats.chisquare([first[m] for m in POOL]).pvalue > 1e-3


@settings(deadline=None)
@given(st.text(), st.sets(st.text(min_size=1), min_size=1, max_size=8), st.integers(0, 99), st.data())
def test_k_different_models_of_the_pool_whatever_its_order(speech_id, pool, seed, data):
    k = data.draw(st.integers(1, len(pool)))
    drawn = draw_models(speech_id, sorted(pool), k, seed)
    assert len(set(drawn)) == len(drawn) == k and set(drawn) <= pool
    assert drawn == draw_models(speech_id, sorted(pool, reverse=True), k, seed)


def test_another_seed_draws_other_models():
    drawn = [[draw_models(s, POOL, 2, seed) for s in SPEECHES[:50]] for seed in (0, 1)]
    assert drawn[0] != drawn[1]


def requests(count: int, *overrides: str) -> pa.Table:
    return build_requests(load_config(DEFAULT_CONFIG, overrides), [speech(n) for n in range(count)])


def test_more_speeches_leave_the_earlier_requests_as_they_were():
    few, many = requests(20), requests(60)
    assert few.num_rows == 80 and many.num_rows == 240
    assert many.slice(0, 80) == few == requests(20)


def test_ids_are_unique_and_seeds_fit_an_engine():
    table = requests(500)
    ids, seeds = table["request_id"].to_pylist(), table["seed"].to_pylist()
    assert len(set(ids)) == len(ids) == 2000 and len(set(seeds)) > 1990
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert set(requests(500, "seed=1")["request_id"].to_pylist()).isdisjoint(ids)


def test_samples_of_one_speech_and_model_differ_in_id_and_seed():
    rows = [request_row(speech(0), "a", sample, 0, None) for sample in range(8)]
    assert len({row["request_id"] for row in rows}) == len({row["seed"] for row in rows}) == 8


def test_a_request_row_is_of_the_schema_and_holds_the_prompt():
    row = request_row(speech(3) | {"question": "Grüße"}, "a", 0, 0, "Listen.")
    assert set(row) == set(REQUEST.names) and "Grüße" in row["messages"]
    assert json.loads(row["messages"]) == [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": "Grüße"},
    ]


def test_no_system_prompt_is_no_system_message():
    speech = {"question": "How?", "history": None}
    assert prompt(speech, None) == prompt(speech, "") == [{"role": "user", "content": "How?"}]


def test_earlier_turns_come_between_the_system_prompt_and_the_speech():
    history = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Welcome."}]
    speech = {"question": "How?", "history": json.dumps(history)}
    assert [m["role"] for m in prompt(speech, "Listen.")] == ["system", "user", "assistant", "user"]
    assert prompt(speech, None) == [*history, {"role": "user", "content": "How?"}]


HASHES = [stable_id("speech", number) for number in range(10_000)]
NUMBERED = [f"row-{number:05d}" for number in range(10_000)]
TWENTY = [f"m{number}" for number in range(20)]


@pytest.mark.parametrize(("pool", "k"), [(TWENTY, 4), (POOL, 4), (POOL, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_numbered_speeches_are_dealt_evenly(pool, k, seed):
    """Ids that end in a number: every model within 2 % of its share over 10,000 speeches (here: exactly its share)."""
    counts = Counter(model for s in NUMBERED for model in draw_models(s, pool, k, seed))
    assert all(counts[model] == len(NUMBERED) * k / len(pool) for model in pool)
    some = Counter(model for s in NUMBERED[3:9_000:2] for model in draw_models(s, pool, k, seed))
    assert sum(some.values()) == k * len(NUMBERED[3:9_000:2])


@pytest.mark.parametrize(("pool", "k"), [(TWENTY, 4), (POOL, 4)])
def test_ids_without_order_are_drawn_independently(pool, k):
    """A draw by the id alone cannot do better than chance here: 2 % is one sigma at 4 of 20, and four at 4 of 5."""
    share = k / len(pool)
    sigma = (len(HASHES) * share * (1 - share)) ** 0.5
    for seed in range(3):
        counts = Counter(model for s in HASHES for model in draw_models(s, pool, k, seed))
        assert all(abs(counts[model] - len(HASHES) * share) < 3.9 * sigma for model in pool)


WEIGHTS = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 30.0}


@pytest.mark.parametrize("ids", [NUMBERED, HASHES])
def test_weights_are_chances(ids):
    expected = shares(WEIGHTS, 2)
    assert expected == pytest.approx({"a": 1 / 6, "b": 1 / 3, "c": 1 / 2, "d": 1.0})
    counts = Counter(model for s in ids for model in draw_models(s, WEIGHTS, 2, 0))
    for model, share in expected.items():
        sigma = (len(ids) * share * (1 - share)) ** 0.5
        assert abs(counts[model] - len(ids) * share) <= 4 * sigma


@given(st.dictionaries(st.text(min_size=1), st.floats(1e-3, 1e3), min_size=1, max_size=9), st.data())
def test_shares_add_up_and_none_is_over_one(weights, data):
    k = data.draw(st.integers(1, len(weights)))
    found = shares(weights, k)
    assert sum(found.values()) == pytest.approx(k)
    assert all(0 < share <= 1 + 1e-9 for share in found.values())
    assert sorted(draw_models("s1", weights, k, 0)) == sorted(set(draw_models("s1", weights, k, 0)))


def test_the_draw_is_the_same_on_any_number_of_shards():
    whole = {s: draw_models(s, TWENTY, 4, 0) for s in NUMBERED[:500]}
    for shards in (2, 7):
        for shard in range(shards):
            assert all(draw_models(s, TWENTY, 4, 0) == whole[s] for s in NUMBERED[:500][shard::shards][::-1])


def test_a_model_has_its_own_system_prompt_or_none_of_its_own():
    pool = [{"name": "a", "model": "m"}, {"name": "b", "model": "m", "system_prompt": ""}]
    pool.append({"name": "c", "model": "m", "system_prompt": "Be brief."})
    tree = {"generation": {"pool": pool, "models_per_speech": 3, "system_prompt": "Listen."}}
    rows = build_requests(build_config(tree, "test"), [speech(0)]).to_pylist()
    heads = {row["model"]: json.loads(row["messages"])[0]["content"] for row in rows}
    assert heads == {"a": "Listen.", "b": "question 0", "c": "Be brief."}
