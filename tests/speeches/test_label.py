"""Topics by a model: what it is asked, what it may answer, and what becomes of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from psycho import storage
from psycho.config import EngineConfig, SamplingConfig
from psycho.inference import batch
from psycho.inference.worker import Completion, EngineSpec
from psycho.job import Job, Options, execute
from psycho.progress import Progress
from psycho.speeches import label
from psycho.speeches.label import TopicBatch
from psycho.speeches.topics import taxonomy
from ray_jobs.prepare import prepare

NAMES = [name for fine in taxonomy().values() for name in fine]


class FakeWorker:
    """Answers `sleep` to whom cannot sleep, is cut short for others, and fails for the third kind."""

    def __init__(self, spec: Any) -> None: ...

    def use(self, model: str) -> None:
        assert model == "model"

    def generate(self, prompts: Any, seeds: Any, sampling: SamplingConfig, schema: str) -> list[Completion]:
        assert set(json.loads(schema)["enum"]) == set(NAMES) and len(set(seeds)) == len(seeds)
        said = [prompt[-1]["content"] for prompt in prompts]
        return [
            Completion(
                text='"sleep"' if "awake" in text else '"sl',
                error="too long" if "endless" in text else None,
                output_tokens=3,
            )
            for text in said
        ]


def test_each_answer_becomes_a_topic_or_none(monkeypatch):
    monkeypatch.setattr(label, "VLLMWorker", FakeWorker)
    rows = pa.table({"request_id": ["a", "b", "c"], "question": ["I lie awake.", "I am sad.", "endless, awake"]})
    answers = TopicBatch(EngineSpec(EngineConfig()), "model", None)(rows)
    assert answers.to_pylist() == [
        {"request_id": "a", "topic": "sleep", "output_tokens": 3},
        {"request_id": "b", "topic": "", "output_tokens": 3},
        {"request_id": "c", "topic": "", "output_tokens": 3},
    ]


def source(folder: Path) -> Path:
    path = folder / "in.csv"
    texts = [f"I lie awake for the {n}th night, and do not know what I should do about it." for n in range(6)]
    path.write_text("question\n" + "".join(f'"{text}"\n' for text in texts))
    return path


def settings(folder: Path, model: str) -> Options:
    mine = (f"speeches.source={source(folder)}", f"speeches.topic_model={model}", "speeches.min_chars=10")
    more = ("speeches.near_duplicates=ignore", "speeches.languages=[]", "speeches.evaluation=2")
    return Options(overrides=(*mine, *more), run_dir=str(folder / "run"))


def test_an_unknown_model_is_a_sentence(tmp_path, capsys):
    assert execute("prepare", prepare, settings(tmp_path, "gpt")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "speeches.topic_model gpt is no model of generation.pool; its models are base, brisk" in said


def test_topics_reach_the_speeches_and_the_manifest(tmp_path, monkeypatch):
    asked: list[pa.Table] = []

    def answer(
        requests: pa.Table, folder: str, stage: type, arguments: dict[str, Any], *_: Any, at_once: int
    ) -> list[pa.Table]:
        asked.append(requests)
        assert at_once > 128 and stage is TopicBatch and arguments["model"].endswith("coach")
        topics = ["sleep"] * (requests.num_rows - 1) + [""]
        columns = {"request_id": requests["request_id"], "topic": topics, "output_tokens": [3] * requests.num_rows}
        return [pa.table(columns).slice(i, 1) for i in range(6)]

    @contextmanager
    def quiet(*_: Any) -> Iterator[None]:
        yield None

    monkeypatch.setattr(batch, "run_batches", answer)
    monkeypatch.setattr(Job, "need_ray", lambda self: None)
    monkeypatch.setattr(Progress, "stage", quiet)
    assert execute("prepare", prepare, settings(tmp_path, "coach")) == 0
    speeches = storage.read_table(str(tmp_path / "run" / "speeches"))
    assert speeches["topic"].to_pylist() == ["sleep"] * 5 + [""]
    assert asked[0]["question"].to_pylist() == speeches["question"].to_pylist()
    manifest = json.loads((tmp_path / "run" / "manifests" / "prepare.json").read_text())
    assert manifest["topics"] == {"body": 5, "unlabelled": 1} and manifest["tokens"] == 18


@pytest.mark.slow
def test_any_model_can_only_name_a_topic(tiny_llama, monkeypatch):
    """A random model under the real engine; the whole prompt is longer than it can read."""
    monkeypatch.setattr(label, "topic_prompt", lambda speech: [{"role": "user", "content": speech}])
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    engine = EngineConfig(dtype="float32", max_model_len=512, max_num_seqs=8, enforce_eager=True)
    stage = TopicBatch(EngineSpec(engine, env=env), tiny_llama(), None)
    rows = pa.table({"request_id": [str(n) for n in range(8)], "question": [f"I feel {n}." for n in range(8)]})
    topics = stage(rows)["topic"].to_pylist()
    assert all(topic in NAMES for topic in topics)
