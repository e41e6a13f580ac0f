"""The worker on a real vLLM engine, against transformers on the same tiny random models."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho.config import EngineConfig, JudgeConfig, SamplingConfig
from psycho.inference.worker import Completion, EngineSpec, VLLMWorker
from psycho.judging.judge import rate_single
from psycho.judging.rubric import parse_single, single_schema

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}
LIMIT = 512
ENGINE = EngineConfig(dtype="float32", max_model_len=LIMIT, max_num_seqs=64, enforce_eager=True)
GREEDY = SamplingConfig(temperature=0.0, max_tokens=24)
WARM = SamplingConfig(temperature=1.0, max_tokens=24)
SPEECHES = (
    "My partner left and I feel lost.",
    "I cannot sleep. Work is too much.",
    "I drink again.",
    "Nobody calls me.",
)
TALKS = [[{"role": "user", "content": speech}] for speech in SPEECHES]
SEEDS = list(range(len(TALKS)))
WHOLE = [[*talk, {"role": "assistant", "content": "What do you miss most?"}] for talk in TALKS]


class Engine:
    """One actor with one engine, called as if it were here."""

    def __init__(self) -> None:
        self._actor = (
            ray.remote(VLLMWorker)
            .options(num_cpus=1, runtime_env={"env_vars": ENV})
            .remote(EngineSpec(ENGINE, seed=0, env=ENV))
        )

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: ray.get(getattr(self._actor, name).remote(*args, **kwargs), timeout=300)

    def close(self) -> None:
        ray.kill(self._actor)


@pytest.fixture(scope="module")
def started(local_ray: None) -> Iterator[Engine]:
    engine = Engine()
    yield engine
    engine.close()


@pytest.fixture
def engine(started: Engine, tiny_llama: Callable[..., str]) -> Engine:
    """Holding the first model; new weights take a moment, only a change of runner takes a new engine."""
    started.use(tiny_llama(0))
    return started


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., str]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama(0)).eval()


def _prompt(tokenizer: Any, talk: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)


def _texts(answers: list[Completion]) -> list[str]:
    return [answer.text for answer in answers]


def test_greedy_answers_are_those_of_transformers(engine: Engine, model: Any, nano_tokenizer: Any) -> None:
    answers = engine.generate(TALKS, SEEDS, GREEDY)
    for talk, answer in zip(TALKS, answers, strict=True):
        ids = nano_tokenizer(_prompt(nano_tokenizer, talk), add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, max_new_tokens=24)[0, ids.shape[1] :]
        assert answer.text == nano_tokenizer.decode(out, skip_special_tokens=True)
        assert answer.error is None
        assert answer.prompt_tokens == ids.shape[1]
        assert answer.output_tokens == len(out)
        assert answer.finish_reason == ("stop" if out[-1] == nano_tokenizer.eos_token_id else "length")


def test_the_seed_makes_the_answer(engine: Engine) -> None:
    """Whatever else is in the batch, and in whatever order."""
    first = _texts(engine.generate(TALKS, SEEDS, WARM))
    backwards = _texts(engine.generate(TALKS[::-1], SEEDS[::-1], WARM))[::-1]
    alone = _texts(engine.generate(TALKS[2:3], SEEDS[2:3], WARM))
    others = _texts(engine.generate(TALKS, [seed + 100 for seed in SEEDS], WARM))
    assert first == backwards
    assert alone == first[2:3]
    assert all(one != other for one, other in zip(first, others, strict=True))
    same_talk = _texts(engine.generate(TALKS[:1] * 4, SEEDS, WARM))
    assert len(set(same_talk)) == 4


def test_a_prompt_that_is_too_long_fails_alone(engine: Engine) -> None:
    long = [{"role": "user", "content": "I feel lost. " * 400}]
    answers = engine.generate([TALKS[0], long, TALKS[1]], [0, 1, 2], GREEDY)
    assert answers[1].text == ""
    assert answers[1].error is not None and f"limit of {LIMIT}" in answers[1].error
    assert [answers[0], answers[2]] == engine.generate(TALKS[:2], [0, 2], GREEDY)
    assert all(answer.error is None and answer.text for answer in (answers[0], answers[2]))


def test_an_answer_never_outgrows_the_model(engine: Engine, nano_tokenizer: Any) -> None:
    """A prompt just under the limit gets what room is left, not a refusal."""
    content = "I feel lost." * 200
    while len(nano_tokenizer(_prompt(nano_tokenizer, [{"role": "user", "content": content}])).input_ids) >= LIMIT:
        content = content[12:]
    (answer,) = engine.generate([[{"role": "user", "content": content}]], [0], GREEDY)
    assert answer.error is None
    assert LIMIT - 30 < answer.prompt_tokens < LIMIT
    assert 1 <= answer.output_tokens <= LIMIT - answer.prompt_tokens


def test_nothing_asked_is_nothing_answered(engine: Engine) -> None:
    assert engine.generate([], [], GREEDY) == []


def test_answers_under_the_judges_grammar_parse(engine: Engine) -> None:
    """Even a random model answers with seven ratings from 1 to 5, each after its evidence."""
    schema = json.dumps(single_schema(8))
    answers = engine.generate(TALKS, SEEDS, SamplingConfig(temperature=1.0, max_tokens=400), schema)
    ratings = [parse_single(answer.text) for answer in answers]
    assert all(rating is not None for rating in ratings)
    assert all(answer.finish_reason == "stop" for answer in answers)
    assert len({tuple(rating.ratings.values()) for rating in ratings if rating}) > 1


def test_a_cut_answer_is_no_rating(engine: Engine) -> None:
    """It is asked for again, and then left out: never a default."""
    (answer,) = engine.generate(TALKS[:1], [0], SamplingConfig(max_tokens=20), json.dumps(single_schema(8)))
    assert answer.finish_reason == "length"
    assert parse_single(answer.text) is None
    judge = JudgeConfig(template="compact", max_evidence_chars=8, max_tokens=20, retries=2)
    ((rating, floored, attempts, _),) = rate_single(engine, judge, [(SPEECHES[0], "Oh.")], [0])  # type: ignore[arg-type]
    assert (rating, floored, attempts) == (None, False, 3)


def test_span_floors_are_the_lowest_log_probabilities(engine: Engine, model: Any, nano_tokenizer: Any) -> None:
    """Of the tokens of each span of the prompt, as transformers sees them; also when the prompt was seen before."""
    spans = [
        ["My partner left", "feel lost."],
        ["Work is too much."],
        ["I drink again."],
        ["not in the prompt", "calls"],
    ]
    for _ in range(2):
        answers = engine.generate(TALKS, SEEDS, GREEDY, None, spans)
        for talk, wanted, answer in zip(TALKS, spans, answers, strict=True):
            assert answer.span_floors == pytest.approx(_floors(model, nano_tokenizer, talk, wanted), abs=1e-3)
    assert engine.generate(TALKS[:1], [0], GREEDY)[0].span_floors == ()


def _floors(model: Any, tokenizer: Any, talk: list[dict[str, str]], spans: list[str]) -> list[float]:
    text = _prompt(tokenizer, talk)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt")
    with torch.no_grad():
        logprobs = model(input_ids=encoded.input_ids).logits[0].log_softmax(-1)
    floors = []
    for span in spans:
        begin = text.find(span)
        inside = [
            logprobs[place - 1, encoded.input_ids[0, place]].item()
            for place, (low, high) in enumerate(encoded.offset_mapping[0].tolist())
            if begin >= 0 and begin <= low < high <= begin + len(span)
        ]
        floors.append(min(inside, default=0.0))
    return floors


def test_more_seeded_prompts_than_the_token_budget_holds(engine: Engine, nano_tokenizer: Any) -> None:
    """A prompt prefilled in parts would rewind its generator, which a CPU generator cannot do (the engine died)."""
    words = [word for word in nano_tokenizer.get_vocab() if word.startswith("\u2581") and word[1:].isalpha()]
    chunks = iter(sorted(words) * 40)
    talks = [[{"role": "user", "content": " ".join(w[1:] for w in islice(chunks, 200))}] for _ in range(64)]
    answers = engine.generate(talks, list(range(64)), SamplingConfig(max_tokens=4))
    assert all(answer.error is None and answer.output_tokens >= 1 for answer in answers)
    assert sum(answer.prompt_tokens for answer in answers) > 64 * 180
    assert _texts(answers[:3]) == _texts(engine.generate(talks[:3], [0, 1, 2], SamplingConfig(max_tokens=4)))


@pytest.fixture(scope="module")
def turns(started: Engine, tiny_llama: Callable[..., str]) -> dict[str, Any]:
    """One engine through its turns: new weights, a reward model (a new engine), and those weights in a fresh one."""
    found: dict[str, Any] = {}
    started.use(tiny_llama(0))
    found["first"] = _texts(started.generate(TALKS, SEEDS, WARM))
    started.use(tiny_llama(1))
    found["reloaded"] = _texts(started.generate(TALKS, SEEDS, WARM))
    started.use(tiny_llama(0))
    found["back"] = _texts(started.generate(TALKS, SEEDS, WARM))
    started.use(tiny_llama(3, reward=True), runner="pooling")
    long = [{"role": "user", "content": "I feel lost. " * 400}]
    found["scores"] = [row and row[0] for row in started.labels([*WHOLE[:2], long, *WHOLE[2:]])]
    started.use(tiny_llama(4, reward=True), runner="pooling")
    found["scores of another"] = [row and row[0] for row in started.labels(WHOLE)]
    started.use(tiny_llama(1))
    found["fresh"] = _texts(started.generate(TALKS, SEEDS, WARM))
    return found


def test_new_weights_are_as_good_as_a_new_engine(turns: dict[str, Any]) -> None:
    assert turns["reloaded"] == turns["fresh"]
    assert turns["back"] == turns["first"]
    assert all(one != other for one, other in zip(turns["first"], turns["reloaded"], strict=True))


def test_scores_are_the_logits_of_transformers(
    turns: dict[str, Any], tiny_llama: Callable[..., str], nano_tokenizer: Any
) -> None:
    """Bare logits, in order, None for a conversation that is too long, and those of new weights after a reload."""
    scores = copy.copy(turns["scores"])
    assert scores.pop(2) is None
    for seed, found in ((3, scores), (4, turns["scores of another"])):
        reward = AutoModelForSequenceClassification.from_pretrained(tiny_llama(seed, reward=True)).eval()
        for talk, score in zip(WHOLE, found, strict=True):
            text = nano_tokenizer.apply_chat_template(talk, tokenize=False)
            ids = nano_tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            with torch.no_grad():
                assert score == pytest.approx(reward(input_ids=ids).logits.item(), abs=1e-4)
        assert any(not 0 <= score <= 1 for score in found)
