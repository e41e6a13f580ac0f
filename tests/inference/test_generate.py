"""Rows of responses: what a policy makes of a mark, what an answer costs, and what the manifest says of them all."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from psycho.config import MarksConfig, PriceConfig, SamplingConfig
from psycho.inference.generate import ANSWER, GenerateBatch, Served, Try, settle, tally
from psycho.inference.requests import request_row
from psycho.inference.worker import Completion
from psycho.schema import REQUEST

GOOD, REFUSAL = "What would help you most?", "I'm sorry, but I can't help with that."
PRICE = PriceConfig(input=1.0, output=2.0)


def request(number: int = 0, model: str = "m") -> dict[str, Any]:
    return request_row({"speech_id": f"s{number}", "split": "train", "question": "Why?"}, model, 0, 0, None)


def answer(text: str, finish: str = "stop", **more: Any) -> Completion:
    return Completion(text, finish, 100, 50, **more)


@pytest.mark.parametrize(
    ("text", "policy", "status", "error"),
    [
        (GOOD, {}, "ok", None),
        (REFUSAL, {}, "refused", None),
        (REFUSAL, {"refused": "quarantine"}, "refused", "refused response"),
        ("", {}, "empty", "empty response"),
        ("", {"empty": "keep"}, "empty", "empty response"),
        ("<think>Hm", {}, "empty", "empty response"),
    ],
)
def test_the_policy_decides_what_becomes_of_a_mark(text, policy, status, error):
    row, again = settle(Try(request()), answer(text), PRICE, MarksConfig(**policy))
    assert (row["status"], row["error"], again) == (status, error, None)
    assert row["cost"] == pytest.approx((100 * 1 + 50 * 2) / 1e6) and row["attempts"] == 1


def test_a_retry_asks_new_seeds_and_then_keeps_what_it_has():
    policy = MarksConfig(truncated="retry", retries=2)
    asked, seeds = Try(request()), []
    while True:
        seeds.append(asked.seed)
        row, again = settle(asked, answer(GOOD, "length"), PRICE, policy)
        if again is None:
            break
        asked = again
    assert seeds[0] == request()["seed"] and len(set(seeds)) == 3
    assert (row["status"], row["attempts"], row["seed"], row["error"]) == ("truncated", 3, seeds[-1], None)
    assert row["cost"] == pytest.approx(3 * 200 / 1e6)
    assert (row["output_tokens"], row["spent_tokens"]) == (50, 150)


def test_an_engines_error_is_no_mark():
    row, again = settle(Try(request()), Completion(error="prompt too long"), PRICE, MarksConfig(empty="retry"))
    assert (row["status"], row["error"], again) == (None, "prompt too long", None)


def test_reasoning_of_the_endpoint_and_of_the_text_is_kept_together():
    row, _ = settle(Try(request()), answer(f"<think>b</think>{GOOD}", reasoning="a"), PRICE, MarksConfig())
    assert (row["response"], row["reasoning"]) == (GOOD, "a\nb")


class Worker:
    """Refuses with a request's own seed, answers with any other; the last asked is the first answered."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def stream(
        self, model: str, talks: list[Any], seeds: list[int], sampling: SamplingConfig, variables: Any
    ) -> Iterator[tuple[int, Completion]]:
        own = {request(n, m)["seed"] for n in range(9) for m in ("m", "n")}
        for index in reversed(range(len(talks))):
            self.asked.append((model, seeds[index]))
            yield index, answer(REFUSAL if seeds[index] in own else GOOD)


def test_a_batch_comes_row_by_row_and_every_request_once(monkeypatch):
    monkeypatch.setattr("psycho.inference.generate.VLLMWorker", lambda spec: Worker())
    served = {name: Served(f"folder/{name}", SamplingConfig(), PRICE, {}) for name in ("m", "n")}
    told: list[tuple[int, int]] = []
    reporter: Any = SimpleNamespace(add=lambda rows, tokens: told.append((rows, tokens)))
    stage = GenerateBatch(None, served, MarksConfig(refused="retry"), reporter)  # type: ignore[arg-type]
    batch = pa.Table.from_pylist([request(n, m) for n in range(5) for m in ("n", "m")], schema=REQUEST)
    rows = list(stage(batch))
    assert [sum(numbers) for numbers in zip(*told, strict=True)] == [10, 1000]
    assert set(rows[0]) == set(stage.SCHEMA.names) == set(ANSWER.names)
    assert sorted(row["request_id"] for row in rows) == sorted(batch["request_id"].to_pylist())
    assert {(row["status"], row["attempts"]) for row in rows} == {("ok", 2)}
    assert {model for model, _ in stage._worker.asked} == {"folder/m", "folder/n"}  # type: ignore[attr-defined]


def test_the_manifest_counts_every_answer():
    policy = MarksConfig(refused="quarantine")
    answers = [answer(GOOD), answer(REFUSAL), answer(GOOD, "length"), answer(""), Completion(error="too long")]
    answers.append(answer("You matter. " * 9))
    rows = [settle(Try(request(n)), a, PRICE, policy)[0] for n, a in enumerate(answers)]
    rows.append(settle(Try(request(0, "n")), answer(GOOD), PriceConfig(), policy)[0])
    found = tally(pa.Table.from_pylist(rows, schema=ANSWER))
    assert found["status"] == {"ok": 2, "empty": 1, "truncated": 1, "refused": 1, "looping": 1, "failed": 1}
    assert found["by_model"]["m"] == {
        "responses": 6, "tokens": 250, "cost": 0.001,
        "empty": 1, "truncated": 1, "refused": 1, "looping": 1, "failed": 1,
    }  # fmt: skip
    assert found["by_model"]["n"]["cost"] == 0 and found["cost"] == 0.001


def test_the_manifest_counts_the_tokens_of_every_try():
    _, again = settle(Try(request()), answer(REFUSAL), PRICE, MarksConfig(refused="retry"))
    assert again is not None
    row, _ = settle(again, answer(GOOD), PRICE, MarksConfig(refused="retry"))
    assert tally(pa.Table.from_pylist([row], schema=ANSWER))["by_model"]["m"]["tokens"] == 100
