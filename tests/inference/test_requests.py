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

from psycho.config import load_config
from psycho.inference.requests import draw_models, prompt, request_row
from psycho.job import DEFAULT_CONFIG
from psycho.schema import REQUEST
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
