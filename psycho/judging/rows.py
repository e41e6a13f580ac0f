"""Ratings as rows: the Ray Data stage around a judge, and why a row has no rating."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from psycho.config import JudgeConfig
from psycho.inference.worker import Completion, EngineSpec, VLLMWorker
from psycho.judging.judge import asked_mode, rate_single
from psycho.judging.rubric import Rating, prompt_version, refuses
from psycho.principles import STEMS
from psycho.progress import Reporter
from psycho.schema import RATING

FAILED = "rating failed: the answer did not hold seven ratings"
FAILURES = {
    "unparsed": FAILED,
    "truncated": "rating failed: the answer was cut short; raise judge.max_tokens",
    "refused": "rating failed: the judge refused",
    "unserved": "rating failed: the request could not be served",
}


class JudgeBatch:
    """Rows with `question` and `response` to rows of `schema.RATING` with an `error` column (Ray Data stage)."""

    def __init__(self, spec: EngineSpec, model: str, judge: JudgeConfig, reporter: Reporter | None) -> None:
        self._worker = VLLMWorker(spec)
        self._worker.use(model)
        self._judge, self._reporter = judge, reporter

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        items = [(row["question"], row["response"], row.get("history")) for row in rows]
        rated = rate_single(self._worker, self._judge, items, [row["seed"] for row in rows], expected=True, kept=True)
        if self._reporter:
            self._reporter.add(len(rows), sum(completion.output_tokens for *_, completion in rated))
        out = [rating_row(row, self._judge, *result) for row, result in zip(rows, rated, strict=True)]
        return pa.Table.from_pylist(out, schema=RATING.append(pa.field("error", pa.string())))


def status(rating: Rating | None, completion: Completion) -> str:
    """`ok`, or a key of `FAILURES`: why there is no rating."""
    if rating is not None:
        return "ok"
    if completion.error is not None:
        return "unserved"
    if completion.finish_reason == "length":
        return "truncated"
    return "refused" if refuses(completion.text, "") else "unparsed"


def rating_row(
    row: Mapping[str, Any],
    judge: JudgeConfig,
    rating: Rating | None,
    floored: bool,
    attempts: int,
    completion: Completion,
) -> dict[str, Any]:
    """A rating row of `schema.RATING`, with the reason in `error` where there is no rating."""
    kind = status(rating, completion)
    expected = rating.expected if rating else None
    return {
        **{name: row[name] for name in ("request_id", "speech_id", "split", "model")},
        **{f"{stem}_rating": rating.ratings[stem] if rating else None for stem in STEMS},
        **{f"{stem}_evidence": _evidence(rating, stem) for stem in STEMS},
        "overall": rating.overall if rating else None,
        "floored": floored,
        "attempts": attempts,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": completion.output_tokens,
        **{f"{stem}_expected": expected[stem] if expected else None for stem in STEMS},
        "expected_overall": rating.expected_overall if rating else None,
        "status": kind,
        "judge": judge.model,
        "prompt_version": prompt_version(judge.template, asked_mode(judge)),
        "disagreement": 0.0,
        "unfaithful_evidence": list(rating.unfaithful) if rating else [],
        "error": completion.error or FAILURES.get(kind),
    }


def _evidence(rating: Rating | None, stem: str) -> str | None:
    return None if rating is None or stem in rating.unfaithful else rating.evidence[stem]
