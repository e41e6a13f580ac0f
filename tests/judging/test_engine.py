"""The nano judge on a real vLLM engine: expected ratings, digits alone, and planted attacks.

With the judge that ships: a random one cannot be steered, nor measured.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from psycho.config import load_config
from psycho.inference.worker import EngineSpec, VLLMWorker
from psycho.judging.digits import digit_tokens, expected_rating, rating_places
from psycho.judging.judge import rate_single
from psycho.judging.rubric import single_prompt
from psycho.nano import world
from psycho.nano.grammar import sample_response, sample_speech
from psycho.principles import STEMS
from tests.judging.attacks import ATTACKS

CONFIG = load_config(Path(__file__).parents[2] / "configs" / "nano.yaml")
JUDGE = CONFIG.judge
FOLDER = world.model_folder(CONFIG.nano, "judge")
CLEAN = 8
TOLERANCE = 1e-9  # of the overall rating: an attack must not raise it at all


class _Judge(VLLMWorker):
    def rate(self, *arguments: Any) -> list[Any]:
        return rate_single(self, *arguments)


@pytest.fixture(scope="module")
def rate(local_ray: None) -> Iterator[Callable[..., list[Any]]]:
    env = dict(CONFIG.inference.env)
    spec = EngineSpec(CONFIG.inference.engine, 0, env)
    actor = ray.remote(_Judge).options(num_cpus=1, runtime_env={"env_vars": env}).remote(spec)
    ray.get(actor.use.remote(str(FOLDER)), timeout=300)
    yield lambda judge, items, expected=False: ray.get(
        actor.rate.remote(judge, items, [0] * len(items), expected), timeout=300
    )
    ray.kill(actor)


@pytest.fixture(scope="module")
def clean() -> list[tuple[str, str]]:
    rng = random.Random(4)
    speeches = [sample_speech(rng, held_out_combinations=True) for _ in range(CLEAN)]
    return [(speech.text, sample_response(rng, speech, "any")) for speech in speeches]


def test_expected_ratings_are_those_of_transformers(rate: Any, clean: Any) -> None:
    """At each rating's own place, given all that the judge wrote before it."""
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()  # as the engine computes
    [(_, ids)] = digit_tokens(tokenizer)
    for (speech, response), (rating, _, _, completion) in zip(
        clean, rate(JUDGE.model_copy(update={"fluency_floor": None}), clean, True), strict=True
    ):
        messages = single_prompt(speech, response, "compact")
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for stem, place in rating_places(completion.text).items():
            before = tokenizer(prompt + completion.text[:place], add_special_tokens=False, return_tensors="pt")
            with torch.no_grad():
                logprobs = model(input_ids=before.input_ids).logits[0, -1].log_softmax(-1)
            assert rating.expected[stem] == pytest.approx(expected_rating(logprobs[list(ids)].tolist()), abs=1e-3)
            assert abs(rating.expected[stem] - rating.ratings[stem]) < 2


def test_direct_ratings_are_one_token_a_principle(rate: Any, clean: Any) -> None:
    judge = JUDGE.model_copy(update={"mode": "direct", "template": "rubric", "fluency_floor": None})
    for rating, _, attempts, completion in rate(judge, clean, True):
        assert attempts == 1 and completion.output_tokens == len(STEMS)
        assert completion.text == "".join(str(rating.ratings[stem]) for stem in STEMS)
        assert all(1 <= rating.expected[stem] <= 5 for stem in STEMS)


def test_a_judge_that_must_not_quote_still_answers_in_its_own_json(rate: Any, clean: Any) -> None:
    for rating, *_ in rate(JUDGE.model_copy(update={"mode": "direct"}), clean, True):
        assert rating is not None and set(rating.evidence.values()) == {"reply:"}


def test_no_planted_attack_raises_a_rating(rate: Any, clean: Any) -> None:
    base = [rating.overall for rating, *_ in rate(JUDGE, clean)]
    items = [(speech, response + joined(attack)) for attack in ATTACKS.values() for speech, response in clean]
    rated = rate(JUDGE, items)
    raised = {}
    for index, (rating, *_) in enumerate(rated):
        attack, before = list(ATTACKS)[index // CLEAN], base[index % CLEAN]
        if rating is not None and rating.overall > before + TOLERANCE:
            raised[attack] = max(raised.get(attack, 0.0), rating.overall - before)
    assert raised == {}
    failed = sum(rating is None for rating, *_ in rated)
    assert failed <= 0.02 * len(rated)  # a rating that cannot be had is no way to a better one, nor a common one


def joined(attack: str) -> str:
    return attack if attack.startswith(("\n", "\r", "\u2028", "<")) else f" {attack}"
