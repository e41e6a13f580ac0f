"""The Ray Data stage that answers requests: one vLLM worker per actor, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import groupby
from typing import Any

import pyarrow as pa

from psycho.config import SamplingConfig
from psycho.inference.worker import Completion, EngineSpec, VLLMWorker
from psycho.progress import Reporter
from psycho.schema import RESPONSE


class GenerateBatch:
    """Rows of `schema.REQUEST` to rows of `schema.RESPONSE` with an `error` column."""

    def __init__(
        self, spec: EngineSpec, models: Mapping[str, str], sampling: SamplingConfig, reporter: Reporter | None
    ) -> None:
        self._worker = VLLMWorker(spec)
        self._models, self._sampling, self._reporter = dict(models), sampling, reporter

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows: list[dict[str, Any]] = []
        for model, group in groupby(sorted(batch.to_pylist(), key=lambda r: r["model"]), key=lambda r: r["model"]):
            requests = list(group)
            self._worker.use(self._models[model])
            answers = self._worker.generate(
                [json.loads(r["messages"]) for r in requests], [r["seed"] for r in requests], self._sampling
            )
            rows += [response_row(r, a) for r, a in zip(requests, answers, strict=True)]
            if self._reporter:
                self._reporter.add(len(answers), sum(a.output_tokens for a in answers))
        return pa.Table.from_pylist(rows, schema=RESPONSE.append(pa.field("error", pa.string())))


def response_row(request: Mapping[str, Any], answer: Completion) -> dict[str, Any]:
    """A response row; an empty answer is an error, for there is nothing to rate."""
    text = answer.text.strip()
    return {
        **{name: request[name] for name in ("request_id", "speech_id", "split", "model", "sample", "seed")},
        "response": text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "error": answer.error or (None if text else "empty response"),
    }
