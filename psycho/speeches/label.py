"""Topics by constrained choice: a model of the pool may answer with a fine topic's name and nothing else."""

from __future__ import annotations

import json

import pyarrow as pa

from psycho.config import SamplingConfig
from psycho.inference.worker import EngineSpec, Messages, VLLMWorker
from psycho.progress import Reporter
from psycho.schema import stable_seed
from psycho.speeches.topics import taxonomy

_ASK = "Which of these topics is what the client says mostly about? Answer with its name, in quotation marks."
_SAMPLING = SamplingConfig(temperature=0.0, max_tokens=48)


def topic_prompt(speech: str) -> Messages:
    """The messages that ask for a speech's topic; the shared part first, so that prefix caching pays."""
    topics = "\n".join(f"{name}: {about}" for fine in taxonomy().values() for name, about in fine.items())
    return [
        {"role": "system", "content": f"{_ASK}\n{topics}"},
        {"role": "user", "content": f"Client:\n{speech}\n\n{_ASK}"},
    ]


def topic_schema() -> str:
    """The JSON schema of an answer: one of the 42 names."""
    return json.dumps({"type": "string", "enum": [name for fine in taxonomy().values() for name in fine]})


def parse_topic(answer: str) -> str:
    """The topic named, or "" where the answer was cut short."""
    try:
        name = json.loads(answer)
    except ValueError:
        return ""
    return name if any(name in fine for fine in taxonomy().values()) else ""


class TopicBatch:
    """Rows with `request_id` and `question` to rows with `request_id`, `topic` and `output_tokens` (Ray Data stage)."""

    def __init__(self, spec: EngineSpec, model: str, reporter: Reporter | None) -> None:
        self._worker = VLLMWorker(spec)
        self._worker.use(model)
        self._reporter = reporter

    def __call__(self, batch: pa.Table) -> pa.Table:
        ids = batch["request_id"].to_pylist()
        prompts = [topic_prompt(question) for question in batch["question"].to_pylist()]
        seeds = [stable_seed("topic", i) for i in ids]
        answers = self._worker.generate(prompts, seeds, _SAMPLING, topic_schema())
        tokens = [answer.output_tokens for answer in answers]
        if self._reporter:
            self._reporter.add(len(ids), sum(tokens))
        topics = [parse_topic(answer.text) if answer.error is None else "" for answer in answers]
        columns = {"topic": pa.array(topics, pa.string()), "output_tokens": pa.array(tokens, pa.int32())}
        return pa.table({"request_id": ids, **columns})
