"""Remote models against a server that misbehaves: every request ends once, money is counted, limits hold."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from psycho import storage
from psycho.config import Config, GenerationConfig, build_config, load_config
from psycho.errors import BadInput, StageFailed
from psycho.inference.limits import BudgetSpent
from psycho.inference.remote import ask_remote, lost_cost
from psycho.inference.requests import request_row
from psycho.job import DEFAULT_CONFIG, Job
from psycho.run import Run
from psycho.schema import REQUEST
from psycho.stages import STAGES, check_config
from ray_jobs.generate import generate
from ray_jobs.prepare import prepare

FAULTS = (None, "429", "slow", None, "500", "cut", None, "garbage", "503", None, "empty", None)
PRICE = {"input": 100.0, "output": 1000.0}
EACH = (20 * 100 + 10 * 1000) / 1e6  # what an answer of the server costs


def entry(url: str, name: str = "far", **remote: Any) -> dict[str, Any]:
    quick = {"concurrency": 8, "timeout_s": 1.0, "backoff_s": 0.01, "max_backoff_s": 0.05, "tries": 8}
    return {"name": name, "model": f"{name}-large", "price": PRICE, "remote": {"url": url, **quick, **remote}}


def generation(*entries: dict[str, Any], **settings: Any) -> GenerationConfig:
    plain = {"models_per_speech": len(entries), "sampling": {"max_tokens": 16}, "pool": list(entries)}
    return build_config({"generation": plain | settings}, "test").generation


def requests(config: GenerationConfig, speeches: list[str]) -> pa.Table:
    rows = [
        request_row({"speech_id": f"s{i}", "split": "train", "question": text}, model.name, 0, 0, None)
        for i, text in enumerate(speeches)
        for model in config.pool
    ]
    return pa.Table.from_pylist(rows, schema=REQUEST)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for table in storage.read_finished(str(folder)) for row in table.to_pylist()]


def speeches(count: int) -> list[str]:
    return [f"speech {number}" for number in range(count)]


def test_every_request_ends_once_whatever_the_server_does(chat, tmp_path):
    server = chat(lambda n: FAULTS[n % len(FAULTS)], by_try=True)
    config = generation(entry(server.url))
    said = [*speeches(60), "a hopeless speech", "an unwelcome speech"]
    asked = requests(config, said)
    ask_remote(config, asked, str(tmp_path), 0.0)
    rows = rows_of(tmp_path)
    assert sorted(row["request_id"] for row in rows) == sorted(asked["request_id"].to_pylist())
    bad = {row["error"] for row in rows if row["error"]}
    assert bad == {"gave up after 8 tries: HTTP 500", "the endpoint refuses the request (HTTP 400)"}
    assert all(row["response"] == server.answer and row["status"] == "ok" for row in rows if not row["error"])
    assert {"429", "slow", "500", "cut", "garbage", "503", "empty", "400"} <= set(server.faults)
    assert server.seen["a hopeless speech"] == 8 and server.seen["an unwelcome speech"] == 1
    assert 2 <= server.most_at_once <= 8


def test_what_was_lost_under_way_is_booked_at_the_most_it_can_have_cost(chat, tmp_path):
    server = chat(lambda n: "cut" if n == 0 else "429" if n == 1 else None)
    config = generation(entry(server.url))
    ask_remote(config, requests(config, ["speech"]), str(tmp_path), 0.0)
    [row] = rows_of(tmp_path)
    most = ((len("speech") + 32) * 100 + 16 * 1000) / 1e6
    assert row["cost"] == pytest.approx(most + EACH) and row["attempts"] == 1
    assert (row["prompt_tokens"], row["output_tokens"]) == server.tokens


def test_the_budget_is_never_passed_and_the_run_goes_on_after_it_is_raised(chat, tmp_path):
    server = chat()
    limit = 10.5 * EACH
    config = generation(entry(server.url), budget=limit)
    asked = requests(config, speeches(30))
    with pytest.raises(BudgetSpent, match=r"generation\.budget of .* is spent.*raise generation\.budget") as caught:
        ask_remote(config, asked, str(tmp_path), 0.0)
    done = rows_of(tmp_path)
    assert 8 <= len(done) <= 10 and len(server.bodies) == len(done)
    assert caught.value.cost == pytest.approx(EACH * len(done)) and caught.value.cost <= limit
    left = asked.filter(pa.array([i not in {r["request_id"] for r in done} for i in asked["request_id"].to_pylist()]))
    ask_remote(config.model_copy(update={"budget": 40 * EACH}), left, str(tmp_path), caught.value.cost)
    assert sorted(r["request_id"] for r in rows_of(tmp_path)) == sorted(asked["request_id"].to_pylist())
    assert set(server.seen.values()) == {1}


def test_money_that_went_into_no_row_is_not_forgotten(chat, tmp_path):
    """Two tries were lost under way, and a third could pass the budget: no row yet, but the next run must know."""
    config = generation(entry(chat(lambda n: "cut").url))
    most = ((len("speech") + 32) * 100 + 16 * 1000) / 1e6
    with pytest.raises(BudgetSpent) as caught:
        ask_remote(config.model_copy(update={"budget": 2.5 * most}), requests(config, ["speech"]), str(tmp_path), 0.0)
    assert rows_of(tmp_path) == []
    assert lost_cost(str(tmp_path)) == pytest.approx(2 * most) == caught.value.cost


def test_a_marked_answer_is_asked_again_with_a_new_seed(chat, tmp_path):
    server = chat()
    server.answer = "I'm sorry, but I can't help with that."
    config = generation(entry(server.url), marks={"refused": "retry", "retries": 2})
    ask_remote(config, requests(config, ["speech"]), str(tmp_path), 0.0)
    [row] = rows_of(tmp_path)
    assert (row["status"], row["attempts"], row["error"]) == ("refused", 3, None)
    assert row["cost"] == pytest.approx(3 * EACH)
    assert len({body["seed"] for body in server.bodies}) == 3
    assert row["seed"] == server.bodies[-1]["seed"]


def test_a_quarantined_mark_and_reasoning(chat, tmp_path):
    server = chat()
    server.answer = "<think>They are sad.</think>" + "You matter. " * 8
    config = generation(entry(server.url), marks={"looping": "quarantine"})
    ask_remote(config, requests(config, ["speech"]), str(tmp_path), 0.0)
    [row] = rows_of(tmp_path)
    assert (row["status"], row["error"], row["reasoning"]) == ("looping", "looping response", "They are sad.")
    assert "think" not in row["response"]


def test_a_dead_endpoint_ends_the_run_and_quarantines_nobody(chat, tmp_path):
    server = chat(lambda n: "503" if n >= 3 else None)
    config = generation(entry(server.url, tries=2, concurrency=1))
    with pytest.raises(StageFailed, match=r"answers nothing \(gave up after 2 tries: HTTP 503\)"):
        ask_remote(config, requests(config, speeches(50)), str(tmp_path), 0.0)
    assert [row["error"] for row in rows_of(tmp_path)] == [None] * 3
    assert lost_cost(str(tmp_path)) == 0.0


@pytest.mark.parametrize(("status", "part"), [("401", "refuses the key"), ("404", "knows no such model")])
def test_what_no_request_can_mend_is_said_at_once(chat, tmp_path, status, part):
    server, other = chat(lambda n: status), chat()
    config = generation(entry(server.url, concurrency=1), entry(other.url, "other", concurrency=1))
    with pytest.raises(BadInput, match=rf"generation.pool \(far\): .* {part}.*HTTP {status}"):
        ask_remote(config, requests(config, speeches(400)), str(tmp_path), 0.0)
    assert len(server.bodies) == 1 and len(other.bodies) < 400


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(chat, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("FAR_KEY", "s3cret")
    server = chat(lambda n: "401" if n else None)
    config = generation(entry(server.url, api_key_env="FAR_KEY", concurrency=1))
    with caplog.at_level(0), pytest.raises(BadInput) as caught:
        ask_remote(config, requests(config, speeches(2)), str(tmp_path), 0.0)
    assert server.keys == {"Bearer s3cret"}
    assert "s3cret" not in str(caught.value) + caplog.text + str(rows_of(tmp_path))
    monkeypatch.delenv("FAR_KEY")
    plain = generation(entry(server.url, api_key_env="FAR_KEY")).model_dump()
    with pytest.raises(BadInput, match="environment variable FAR_KEY is empty"):
        check_config(load_config(DEFAULT_CONFIG).model_copy(update={"generation": GenerationConfig(**plain)}))


def test_the_body_says_what_the_pool_entry_says(chat, tmp_path):
    server = chat()
    own = entry(server.url, omit=["top_p"], token_limit_key="max_completion_tokens") | {
        "sampling": {"temperature": 0.3, "max_tokens": 7, "stop": ["END"]},
        "template_variables": {"enable_thinking": False},
    }
    config = generation(own)
    asked = requests(config, ["speech"])
    ask_remote(config, asked, str(tmp_path), 0.0)
    assert server.bodies == [
        {
            "model": "far-large",
            "messages": [{"role": "user", "content": "speech"}],
            "temperature": 0.3,
            "max_completion_tokens": 7,
            "seed": asked["seed"][0].as_py(),
            "stop": ["END"],
            "chat_template_kwargs": {"enable_thinking": False},
        }
    ]


# The whole job


@pytest.fixture
def job_of(local_ray: None, tmp_path: Path) -> Callable[[GenerationConfig], Job]:
    def build(settings: GenerationConfig) -> Job:
        nano = load_config(DEFAULT_CONFIG, ["speeches.nano_train=15", "speeches.evaluation=5"], str(tmp_path / "run"))
        config: Config = nano.model_copy(update={"generation": settings})
        run = Run(config, STAGES)
        run.open()
        return Job(config, run, ExitStack())

    return build


def test_the_job_stops_at_the_budget_and_ends_when_it_is_raised(chat, job_of):
    server = chat()
    pool = [entry(server.url), entry(server.url, "near")]
    job = job_of(generation(*pool, budget=12.5 * EACH))
    prepare(job)
    with pytest.raises(BudgetSpent):
        generate(job)
    paid = len(server.bodies)
    job = job_of(generation(*pool, budget=100 * EACH))
    generate(job)
    manifest = job.run.manifest("generate")
    assert manifest is not None and len(server.bodies) == 40 == manifest["rows_out"]
    assert manifest["cost"] == pytest.approx(40 * EACH)
    assert manifest["status"]["ok"] == 40
    assert manifest["by_model"]["near"] == {
        "responses": 20, "tokens": 200, "cost": pytest.approx(20 * EACH),
        "empty": 0, "truncated": 0, "refused": 0, "looping": 0, "failed": 0,
    }  # fmt: skip
    lines = [json.loads(line) for line in (storage.read_text(job.run.path("ledger.jsonl")) or "").splitlines()]
    assert [line["status"] for line in lines if line["stage"] == "generate"] == ["BudgetSpent", "done"]
    assert [line["cost"] for line in lines][1:] == pytest.approx([paid * EACH, (40 - paid) * EACH])
    assert lines[-1]["tokens"] == manifest["tokens"] == 40 * server.tokens[1]


def test_a_finished_file_that_is_gone_is_noticed_and_only_its_rows_are_asked_again(chat, job_of):
    server = chat()
    settings = generation(entry(server.url), entry(server.url, "near"))
    job = job_of(settings)
    prepare(job)
    generate(job)
    files = sorted(Path(job.run.path("responses")).glob("*.parquet"))
    lost = pq.read_table(files[3])["request_id"].to_pylist()
    files[3].unlink()
    again = job_of(settings)
    assert again.run.why_not_done("generate") == f"responses/{files[3].name} of its finished result is gone"
    said = io.StringIO()
    again.progress.console = Console(file=said, width=200)
    generate(again)
    assert f"generate: once more, responses/{files[3].name} of its finished result is gone" in said.getvalue()
    assert len(server.bodies) == 40 + len(lost) and 0 < len(lost) <= 2
    rows = storage.read_table(again.run.path("responses")).to_pylist()
    assert len({row["request_id"] for row in rows}) == len(rows) == 40
    lines = [json.loads(line) for line in (storage.read_text(again.run.path("ledger.jsonl")) or "").splitlines()]
    assert [line["cost"] for line in lines][1:] == pytest.approx([40 * EACH, len(lost) * EACH])
    generate(again)
    assert len(server.bodies) == 40 + len(lost)


# vLLM's own server


@pytest.fixture(scope="module")
def vllm_server(tiny_llama: Callable[..., str]) -> Iterator[str]:
    """vLLM's OpenAI-compatible server on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny_llama(0)]
    command += ["--port", str(port)]
    command += ["--served-model-name", "far-large", "--max-model-len", "512", "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--max-num-seqs", "16", "--no-enable-chunked-prefill"]
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    quiet |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    process = subprocess.Popen(
        command, env=os.environ | quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        for _ in range(600):
            if process.poll() is not None:
                pytest.fail("vLLM's server ended")
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        else:
            pytest.fail("vLLM's server did not start")
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def test_a_real_server_behind_a_bad_line(chat, vllm_server, tmp_path):
    """429, 500, slow bodies, cut bodies, garbage, and requests the server itself refuses."""
    proxy = chat(lambda n: FAULTS[n % len(FAULTS)], vllm_server, by_try=True)
    config = generation(entry(proxy.url, timeout_s=8.0))
    said = [*(f"I feel lost {number} times a day." for number in range(40)), "I feel lost. " * 400]
    asked = requests(config, said)
    ask_remote(config, asked, str(tmp_path), 0.0)
    rows = rows_of(tmp_path)
    assert sorted(row["request_id"] for row in rows) == sorted(asked["request_id"].to_pylist())
    bad = [row for row in rows if row["error"] and row["error"] != "empty response"]
    assert [row["error"] for row in bad] == ["the endpoint refuses the request (HTTP 400)"]
    assert {"429", "slow", "500", "cut", "garbage", "503", "empty"} <= set(proxy.faults)
    good = [row for row in rows if not row["error"]]
    assert len(good) >= 35 and all(0 < row["output_tokens"] <= 16 and row["prompt_tokens"] > 4 for row in good)
    assert {row["status"] for row in good} <= {"truncated", "ok", "looping"}
