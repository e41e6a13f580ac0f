"""The HTTP face without engines: validation, error bodies, the key, admission, deadlines, retries."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from psycho import storage
from psycho.config import Config, SamplingConfig, ServingConfig
from psycho.errors import BadInput
from psycho.serving.app import base_url, build_app, check_port, from_args
from psycho.serving.calls import Admission
from psycho.serving.engine import ChatCall
from psycho.serving.gateway import Settings, build_api
from psycho.serving.guard import digest
from psycho.serving.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    Delta,
    Refused,
    ScoreRequest,
    Scores,
)
from ray_jobs.serve import served_policy

SECRET = "my sister said something unrepeatable"
HELLO = [{"role": "user", "content": "hello"}]
SETTINGS = Settings(
    policy_name="online",
    reward_name="reward",
    sampling=SamplingConfig(temperature=0.5, top_p=0.9, top_k=20, repetition_penalty=1.1, stop=("###",)),
    max_tokens=64,
    policy_slots=2,
    reward_slots=2,
    max_queued_requests=1,
    request_timeout_s=30,
)


class FakeResponse:
    """Stands in for Serve's DeploymentResponse and its generator twin."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self._parts = outcome() if callable(outcome) else None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def __await__(self) -> Any:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        outcome = self._outcome
        if isinstance(outcome, asyncio.Event):
            await outcome.wait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def __anext__(self) -> Any:
        if self._parts is None:
            return await self._wait()
        return await anext(self._parts)


class FakeMethod:
    """Gives its outcomes in order, the last one for ever; remembers what it was asked."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.asked: list[Any] = []
        self.responses: list[FakeResponse] = []

    def remote(self, *arguments: Any) -> FakeResponse:
        self.asked.append(arguments)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        self.responses.append(FakeResponse(outcome))
        return self.responses[-1]


class FakeHandle:
    def __init__(self, **methods: Any) -> None:
        self.health = FakeMethod({"ongoing": 0, "aborted": 0})
        for name, method in methods.items():
            setattr(self, name, method if isinstance(method, FakeMethod) else FakeMethod(method))

    def options(self, **_: Any) -> FakeHandle:
        return self


class FakeRun:
    """A run folder that only knows where its models would be, and which policy won which share of 200 speeches."""

    def __init__(self, root: Path, *trained: str, **won: float) -> None:
        self.root, self.evaluated = str(root), bool(won)
        rows = [
            {"policy": name, "speech_id": f"s{n}", "outcome": float(n < 200 * share)}
            for name, share in won.items()
            for n in range(200)
        ]
        if rows:
            storage.write_table(pa.Table.from_pylist(rows), self.path("evaluation", "comparisons"))
        for name in trained:
            (root / "models" / name).mkdir(parents=True)
            (root / "models" / name / "config.json").write_text("{}")

    def path(self, *parts: str) -> str:
        return "/".join([self.root, *parts])

    def is_done(self, stage: str) -> bool:
        return stage == "evaluate" and self.evaluated


def parts(*items: Any) -> Callable[[], AsyncIterator[Any]]:
    async def generate() -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    return generate


ANSWER = Delta("Hi there.", 5, 3, "stop")


@contextmanager
def serving(
    settings: Settings = SETTINGS, scores: Any = None, health: Any = None, **policy: Any
) -> Iterator[tuple[TestClient, FakeHandle, FakeHandle]]:
    policies = FakeHandle(**{"chat": ANSWER, "stream": parts(ANSWER), **policy})
    rewards = FakeHandle(score=scores or Scores([0.25], 4), **({"health": health} if health else {}))
    with TestClient(build_api(settings, policies, rewards)) as client:  # type: ignore[arg-type]
        yield client, policies, rewards


def chat(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HELLO, **fields})


def sse(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_chat_answers_in_openai_shape_and_says_drafts_are_for_review() -> None:
    with serving() as (client, policies, _):
        reply = chat(client, model="online", max_tokens=500, stop="END", seed=-3, tools=[], user="x", logit_bias={})
        assert reply.status_code == 200
        body = reply.json()
        assert body["object"] == "chat.completion"
        assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hi there."}
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        assert "therapist" in reply.headers["x-psycho-notice"]
        (asked,) = policies.chat.asked[0]
        # As the answers that were evaluated, but for what the request says.
        assert asked == ChatCall(
            HELLO, temperature=0.5, top_p=0.9, max_tokens=64, seed=-3, stop=("###", "END"), top_k=20,
            repetition_penalty=1.1,
        )  # fmt: skip


def test_stream_ends_with_usage_and_done() -> None:
    stream = parts(Delta("Hi", 5, 1), Delta(" there.", 5, 3, "length"))
    with serving(stream=stream) as (client, _, _):
        reply = chat(client, stream=True, stream_options={"include_usage": True})
        assert reply.headers["content-type"].startswith("text/event-stream")
        first, second, usage, done = sse(reply.text)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": "Hi"}
        assert first["choices"][0]["finish_reason"] is None
        assert second["choices"][0]["delta"] == {"content": " there."}
        assert second["choices"][0]["finish_reason"] == "length"
        assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 8
        assert done == "[DONE]"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "robot", "content": SECRET}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": {"text": SECRET}}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [SECRET]}]}, "messages.0.content"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": SECRET}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_"),
        ({"seed": 2**70}, "seed"),
        ({"n": 2}, "n"),
        ({"stop": ["", "x"]}, "stop"),
    ],
)
def test_bad_requests_name_the_field_and_never_repeat_what_was_sent(fields: dict[str, Any], param: str) -> None:
    with serving() as (client, policies, _):
        reply = chat(client, **fields)
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["param"].startswith(param)
        assert SECRET not in reply.text
        assert not policies.chat.asked


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff\xfe"]
)
def test_bodies_that_are_not_requests_are_400(body: bytes) -> None:
    with serving() as (client, _, _):
        reply = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert reply.json()["error"]["message"]


def test_not_a_number_is_400() -> None:
    with serving() as (client, _, _):
        body = b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'
        headers = {"content-type": "application/json"}
        assert client.post("/v1/chat/completions", content=body, headers=headers).status_code == 400


def test_content_may_be_a_list_of_text_parts() -> None:
    content = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request = ChatRequest.model_validate({"messages": [{"role": "developer", "content": content}]})
    assert request.messages[0].plain() == {"role": "system", "content": "one two"}


def test_unknown_model_path_and_method() -> None:
    with serving() as (client, _, _):
        assert chat(client, model="gpt-4o").json()["error"]["code"] == "model_not_found"
        assert chat(client, model="gpt-4o").status_code == 404
        assert chat(client, model="reward").status_code == 404
        assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
        assert client.get("/v1/chat/completions").status_code == 405
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["online", "reward"]


def test_a_key_is_asked_for_everywhere_but_at_health() -> None:
    with serving(replace(SETTINGS, key_digest=digest("right"))) as (client, policies, _):
        for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic right"}):
            reply = client.get("/v1/models", headers=header)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
            assert "x-psycho-notice" in reply.headers
        assert client.get("/openapi.json").status_code == 401
        assert chat(client).status_code == 401
        assert not policies.chat.asked
        assert client.get("/health").status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer right"}).status_code == 200


def test_a_body_that_is_too_large_is_413() -> None:
    with serving() as (client, _, _):
        reply = client.post("/v1/score", content=b" " * (MAX_BODY_BYTES + 1))
        assert reply.status_code == 413
        reply = client.post("/v1/score", content=iter([b" " * MAX_BODY_BYTES, b" "]))  # no content-length
        assert reply.status_code in (400, 413)


def test_health_is_good_only_with_both_engines() -> None:
    with serving() as (client, _, _):
        assert client.get("/health").json()["status"] == "ready"
    with serving(health=RayActorError()) as (client, _, _):
        reply = client.get("/health")
        assert reply.status_code == 503
        assert reply.json()["engines"]["policy"]["ready"] is True
        assert reply.json()["engines"]["reward"] == {"ready": False}


def test_refusals_of_the_engine_keep_their_status_streamed_or_not() -> None:
    refused = Refused(400, "the prompt has 600 tokens", "context_length_exceeded", "messages")
    with serving(chat=refused, stream=parts(refused)) as (client, _, _):
        for fields in ({}, {"stream": True}):
            reply = chat(client, **fields)
            assert reply.status_code == 400
            assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_an_error_within_a_stream_is_its_last_event() -> None:
    with serving(stream=parts(Delta("Hi", 5, 1), RayActorError())) as (client, policies, _):
        reply = chat(client, stream=True)
        assert reply.status_code == 200
        assert sse(reply.text)[-1]["error"]["type"] == "server_error"
        assert len(policies.stream.asked) == 1  # what was begun is not begun again


def test_a_replica_that_dies_before_its_first_word_is_asked_again() -> None:
    dead = RayActorError()
    with serving(chat=FakeMethod(dead, ANSWER), stream=FakeMethod(dead, parts(ANSWER))) as (
        client,
        policies,
        _,
    ):
        assert chat(client).status_code == 200
        assert chat(client, stream=True).status_code == 200
        assert len(policies.chat.asked) == len(policies.stream.asked) == 2
    with serving(chat=dead) as (client, policies, _):
        assert chat(client).status_code == 503
        assert len(policies.chat.asked) == 3


def test_serve_backpressure_is_429() -> None:
    with serving(chat=BackPressureError(1, 1)) as (client, _, _):
        reply = chat(client)
        assert reply.status_code == 429
        assert reply.json()["error"]["type"] == "rate_limit_error"
        assert reply.headers["retry-after"]


def test_a_full_queue_is_429_and_empties_again() -> None:
    async def scenario() -> None:
        admission = Admission(slots=2, queued=1)
        until = asyncio.get_running_loop().time() + 60
        leave = asyncio.Event()
        inside: list[int] = []

        async def visit(number: int) -> None:
            async with admission.slot(until):
                inside.append(number)
                await leave.wait()

        visits = [asyncio.create_task(visit(number)) for number in range(3)]
        while len(inside) < 2:
            await asyncio.sleep(0)
        assert inside == [0, 1]  # the third waits
        with pytest.raises(ApiError) as refused:
            await visit(3)
        assert refused.value.status == 429
        leave.set()
        await asyncio.gather(*visits)
        await visit(4)
        assert inside == [0, 1, 2, 4]

    asyncio.run(scenario())


def test_waiting_for_a_place_ends_at_the_deadline() -> None:
    async def scenario() -> None:
        admission = Admission(slots=1, queued=1)
        now = asyncio.get_running_loop().time()
        async with admission.slot(now + 60):
            with pytest.raises(ApiError) as late:
                async with admission.slot(now):
                    pass
            assert late.value.status == 504
        async with admission.slot(now + 60):
            pass

    asyncio.run(scenario())


def test_too_slow_is_504_and_gives_the_request_up() -> None:
    never = asyncio.Event()
    settings = replace(SETTINGS, request_timeout_s=0.05)
    with serving(settings, chat=never, stream=never) as (client, policies, _):
        for fields in ({}, {"stream": True}):
            reply = chat(client, **fields)
            assert reply.status_code == 504
            assert reply.json()["error"]["code"] == "timeout"
        assert policies.chat.responses[0].cancelled and policies.stream.responses[0].cancelled


def test_errors_nobody_foresaw_say_nothing_of_the_request(caplog: pytest.LogCaptureFixture) -> None:
    with serving(chat=ValueError(SECRET)) as (client, _, _):
        reply = chat(client)
        assert reply.status_code == 500
        assert reply.json()["error"]["type"] == "server_error"
        assert SECRET not in reply.text and SECRET not in caplog.text


def test_score_takes_one_conversation_or_many() -> None:
    pair = {"question": "q", "response": "r"}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    settings = replace(SETTINGS, system_prompt="be kind")
    with serving(settings, scores=FakeMethod(Scores([0.5], 4), Scores([0.5, -1.0], 8))) as (
        client,
        _,
        rewards,
    ):
        body = client.post("/v1/score", json=pair).json()
        assert (body["reward"], body["rewards"]) == (0.5, [0.5])
        body = client.post("/v1/score", json={"inputs": [pair, {"messages": turns}], "model": "reward"}).json()
        assert body["rewards"] == [0.5, -1.0] and "reward" not in body
        assert body["usage"]["prompt_tokens"] == 8
        conversation = [{"role": "system", "content": "be kind"}, *turns]
        assert rewards.score.asked == [([conversation],), ([conversation, conversation],)]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"question": "q"},
        {"messages": HELLO},
        {"messages": []},
        {"inputs": []},
        {"inputs": [{"question": "q", "response": "r"}], "question": "q"},
        {"inputs": [{"question": "q", "response": "r"}] * 257},
    ],
)
def test_score_refuses_what_is_not_a_scored_conversation(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScoreRequest.model_validate(body)
    with serving() as (client, _, _):
        assert client.post("/v1/score", json=body).status_code == 400


def test_without_an_evaluation_the_furthest_trained_policy_is_served(tmp_path: Path) -> None:
    run = FakeRun(tmp_path / "a", "sft", "dpo", "reward")
    assert served_policy(run) == ("dpo", "no evaluation says whether it is the best policy")  # type: ignore[arg-type]
    for name, trained, missing in (("b", ["sft"], "reward model"), ("c", ["reward"], "policy"), ("d", [], "models")):
        with pytest.raises(BadInput, match=f"no trained {missing}; run the pipeline first"):
            served_policy(FakeRun(tmp_path / name, *trained))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"serving.policy is online, which the run in .* has not trained"):
        served_policy(run, "online")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("won", "wanted", "served", "said"),
    [
        ({"base": 0.1, "sft": 0.9, "dpo": 0.6, "online": 0.7}, "best", "sft", "the best policy of this run"),
        ({"base": 0.1, "sft": 0.9, "dpo": 0.6, "online": 0.7}, "online", "online", "not the best policy .*: Best by"),
        ({"base": 0.1, "sft": 0.4, "dpo": 0.8, "online": 0.8}, "best", "online", "cannot tell it apart from DPO"),
        ({"base": 0.9, "sft": 0.4, "dpo": 0.5, "online": 0.3}, "best", "online", "not the best .*the model before"),
    ],
)
def test_the_best_policy_is_served_and_what_is_served_is_said(
    tmp_path: Path, won: dict[str, float], wanted: str, served: str, said: str
) -> None:
    run = FakeRun(tmp_path / "run", "sft", "dpo", "online", "reward", **won)
    name, why = served_policy(run, wanted)  # type: ignore[arg-type]
    assert name == served and re.search(said, why)


def model_folder(folder: Path, **config: Any) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / name).touch()
    return str(folder)


def test_what_cannot_be_served_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = model_folder(tmp_path / "policy", architectures=["LlamaForCausalLM"])
    two = model_folder(tmp_path / "two", architectures=["LlamaForSequenceClassification"])
    reward = model_folder(
        tmp_path / "reward", architectures=["LlamaForSequenceClassification"], id2label={"0": "LABEL_0"}
    )
    for wrong in (policy, two):
        with pytest.raises(BadInput, match="is not a reward model"):
            build_app(Config(), policy, wrong)
    with pytest.raises(BadInput, match="does not exist"):
        build_app(Config(), str(tmp_path / "nothing"), reward)
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(BadInput, match="NO_SUCH_KEY named by"):
        build_app(Config(serving=ServingConfig(api_key_env="NO_SUCH_KEY")), policy, reward)
    with pytest.raises(BadInput, match="lack policy, reward"):
        from_args({"config": "configs/nano.yaml"})
    build_app(Config(), policy, reward)


def test_a_port_that_cannot_be_had_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} of 127.0.0.1 is in use"):
            check_port("127.0.0.1", port)
    with pytest.raises(BadInput, match="cannot listen on port"):
        check_port("203.0.113.1", 8000)
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"
