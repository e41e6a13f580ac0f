"""The whole application on a real Ray Serve with real vLLM engines around a tiny random Llama."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest
import ray
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from psycho.config import Config, EngineConfig, InferenceConfig, ServingConfig
from psycho.errors import BadInput
from psycho.nano.grammar import vocabulary
from psycho.nano.tokenizer import build_tokenizer
from psycho.serving.app import start, stop

LIMIT = 2048
KEY = "a key for this test"
KEY_VARIABLE = "PSYCHO_TEST_API_KEY"
QUESTION = "I feel alone and I cannot sleep."
MESSAGES = [{"role": "user", "content": QUESTION}]
WAIT_S = 300


@dataclass
class Served:
    url: str
    config: Config
    policy: Path
    reward: Path

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=WAIT_S)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=WAIT_S)


def tiny_models(folder: Path) -> tuple[Path, Path]:
    """A policy and a reward model with random weights, large enough that rewards differ."""
    tokenizer = build_tokenizer(vocabulary(), LIMIT)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LIMIT,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
        dtype="float32",
    )
    torch.manual_seed(0)
    for name, kind in (("policy", LlamaForCausalLM), ("reward", LlamaForSequenceClassification)):
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "policy", folder / "reward"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    policy, reward = tiny_models(tmp_path_factory.mktemp("models"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = Config(
        inference=InferenceConfig(
            gpus_per_worker=0,
            engine=EngineConfig(dtype="float32", enforce_eager=True, max_model_len=LIMIT),
            env={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "OMP_NUM_THREADS": "1",
            },
        ),
        serving=ServingConfig(port=port, max_tokens=LIMIT, api_key_env=KEY_VARIABLE, start_timeout_s=WAIT_S),
    )
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    os.environ[KEY_VARIABLE] = KEY
    try:
        yield Served(start(config, str(policy), str(reward)), config, policy, reward)
        stop()
    finally:
        del os.environ[KEY_VARIABLE]
        ray.shutdown()


def test_chat_with_the_openai_client(served: Served) -> None:
    answers = [
        served.client().chat.completions.create(
            model="policy", messages=MESSAGES, max_tokens=12, temperature=1.0, seed=7
        )
        for _ in range(2)
    ]
    usage = answers[0].usage
    assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens <= 12
    assert answers[0].choices[0].finish_reason in ("stop", "length")
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_greedy_answer_is_that_of_transformers(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.policy)
    model = LlamaForCausalLM.from_pretrained(served.policy)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    answer = served.client().chat.completions.create(model="policy", messages=MESSAGES, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage.prompt_tokens == ids.shape[1]


def test_stream_is_the_whole_answer_in_parts(served: Served) -> None:
    asked = {"model": "policy", "messages": MESSAGES, "max_tokens": 40, "temperature": 0}
    whole = served.client().chat.completions.create(**asked)
    chunks = list(served.client().chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(part.delta.content or "" for part in parts) == whole.choices[0].message.content
    assert parts[-1].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage


def test_score_is_that_of_transformers(served: Served) -> None:
    tokenizer = AutoTokenizer.from_pretrained(served.reward)
    model = LlamaForSequenceClassification.from_pretrained(served.reward)
    responses = ["That sounds exhausting.", "What keeps you awake at night?", "Just relax."]
    expected = []
    for response in responses:
        turns = [*MESSAGES, {"role": "assistant", "content": response}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        with torch.no_grad():
            expected.append(float(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits))
    with served.http() as http:
        inputs = [{"question": QUESTION, "response": response} for response in responses]
        body = http.post("/v1/score", json={"inputs": inputs}).raise_for_status().json()
        assert body["rewards"] == pytest.approx(expected, abs=1e-4)
        assert len({round(reward, 3) for reward in expected}) == len(responses)
        one = http.post("/v1/score", json=inputs[0]).raise_for_status().json()
        assert one["reward"] == pytest.approx(expected[0], abs=1e-4)


def test_too_long_a_prompt_is_400_streamed_or_not(served: Served) -> None:
    long = [{"role": "user", "content": QUESTION * LIMIT}]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            served.client().chat.completions.create(model="policy", messages=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"
    with served.http() as http:
        reply = http.post("/v1/score", json={"question": QUESTION * LIMIT, "response": "Yes."})
        assert reply.status_code == 400
        assert QUESTION not in reply.text


def test_the_key_and_the_model_are_checked(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("wrong").chat.completions.create(model="policy", messages=MESSAGES)
    with pytest.raises(openai.NotFoundError):
        served.client().chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert [model.id for model in served.client().models.list()] == ["policy", "reward"]
    reply = httpx.get(f"{served.url}/health", timeout=WAIT_S)
    assert reply.json()["status"] == "ready"
    assert "therapist" in reply.headers["x-psycho-notice"]


def test_a_client_that_goes_away_ends_its_generation(served: Served) -> None:
    with served.http() as http:
        before = http.get("/health").json()["engines"]["policy"]["aborted"]
        body = {"messages": MESSAGES, "temperature": 0, "stream": True, "logit_bias": {}}
        with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            first = next(line for line in reply.iter_lines() if line)
            assert json.loads(first.removeprefix("data: "))["choices"][0]["finish_reason"] is None
        while (policy := http.get("/health").json()["engines"]["policy"])["ongoing"]:
            pass  # ends: an aborted request leaves at once, a forgotten one when its tokens are done
        assert policy["aborted"] == before + 1


def test_a_used_port_is_one_sentence(served: Served) -> None:
    with pytest.raises(BadInput, match=rf"port {served.config.serving.port} .* is in use"):
        start(served.config, str(served.policy), str(served.reward))
