"""Rating responses with a judge LLM on a vLLM worker.

Answers follow a JSON grammar; an answer that still does not parse (it was cut short) is asked for again with another
seed, and if that fails too the response is left out and counted. No rating is ever made up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa

from psycho.config import JudgeConfig, SamplingConfig
from psycho.inference.worker import Completion, EngineSpec, Messages, VLLMWorker
from psycho.judging.rubric import (
    Rating,
    answer,
    dump,
    pair_prompt,
    pair_schema,
    parse_pair,
    parse_single,
    second_turn,
    single_prompt,
    single_schema,
)
from psycho.principles import MIN_RATING, STEMS
from psycho.progress import Reporter
from psycho.schema import RATING

T = TypeVar("T")
FAILED = "rating failed: the answer did not hold seven ratings"
_RETRY_TEMPERATURE = 0.7  # a fresh try at temperature 0 would fail the same way


def rate_single(
    worker: VLLMWorker, judge: JudgeConfig, items: Sequence[tuple[str, str]], seeds: Sequence[int]
) -> list[tuple[Rating | None, bool, int, Completion]]:
    """Rate (speech, response) items: rating or None, whether the floor was met, attempts, last completion."""
    prompts = [single_prompt(speech, response, judge.template) for speech, response in items]
    schema = json.dumps(single_schema(judge.max_evidence_chars))
    spans = [[response] for _, response in items]
    rated = _ask(worker, judge, prompts, seeds, schema, spans, parse_single)
    results = []
    for rating, completion, attempts in rated:
        floored = rating is not None and _under_floor(judge, completion, 0)
        results.append((_floor(rating) if rating and floored else rating, floored, attempts, completion))
    return results


def rate_pairs(
    worker: VLLMWorker, judge: JudgeConfig, items: Sequence[tuple[str, str, str]], seeds: Sequence[int]
) -> list[tuple[Rating, Rating] | None]:
    """Rate (speech, first, second) items, both responses in one conversation; None where an answer failed.

    A judge of the rubric format sees both side by side. A judge of the compact format rates the first, and then the
    second with the first and its ratings before it.
    """
    if judge.template == "compact":
        return _rate_in_turn(worker, judge, items, seeds)
    prompts = [pair_prompt(speech, first, second) for speech, first, second in items]
    schema = json.dumps(pair_schema(judge.max_evidence_chars))
    spans = [[first, second] for _, first, second in items]
    results: list[tuple[Rating, Rating] | None] = []
    for ratings, completion, _ in _ask(worker, judge, prompts, seeds, schema, spans, parse_pair):
        if ratings is None:
            results.append(None)
            continue
        first, second = (_floor(r) if _under_floor(judge, completion, side) else r for side, r in enumerate(ratings))
        results.append((first, second))
    return results


def _rate_in_turn(
    worker: VLLMWorker, judge: JudgeConfig, items: Sequence[tuple[str, str, str]], seeds: Sequence[int]
) -> list[tuple[Rating, Rating] | None]:
    results: list[tuple[Rating, Rating] | None] = [None] * len(items)
    firsts = rate_single(worker, judge, [(speech, first) for speech, first, _ in items], seeds)
    places, prompts = [], []
    for index, ((speech, first, second), (rating, *_)) in enumerate(zip(items, firsts, strict=True)):
        if rating is None:
            continue
        given = {"role": "assistant", "content": dump(answer(rating.ratings, rating.evidence))}
        prompts.append([*single_prompt(speech, first, judge.template), given, second_turn(second)])
        places.append(index)
    schema = json.dumps(single_schema(judge.max_evidence_chars))
    spans = [[items[index][1], items[index][2]] for index in places]
    asked = _ask(worker, judge, prompts, [seeds[index] for index in places], schema, spans, parse_single)
    for index, (rating, completion, _) in zip(places, asked, strict=True):
        before = firsts[index][0]
        if rating is not None and before is not None:
            results[index] = (before, _floor(rating) if _under_floor(judge, completion, 1) else rating)
    return results


def _ask(
    worker: VLLMWorker,
    judge: JudgeConfig,
    prompts: Sequence[Messages],
    seeds: Sequence[int],
    schema: str,
    spans: Sequence[Sequence[str]],
    parse: Callable[[str], T | None],
) -> list[tuple[T | None, Completion, int]]:
    """Ask, parse, and ask again what failed; the floors are those of the first try (the prompt is the same)."""
    wanted_spans = spans if judge.fluency_floor is not None else None
    sampling = SamplingConfig(temperature=judge.temperature, max_tokens=judge.max_tokens)
    first = worker.generate(prompts, seeds, sampling, schema, wanted_spans)
    found: list[T | None] = [parse(c.text) if c.error is None else None for c in first]
    attempts = [1] * len(prompts)
    sampling = SamplingConfig(temperature=max(judge.temperature, _RETRY_TEMPERATURE), max_tokens=judge.max_tokens)
    for retry in range(1, judge.retries + 1):
        failed = [i for i, value in enumerate(found) if value is None and first[i].error is None]
        if not failed:
            break
        again = worker.generate([prompts[i] for i in failed], [seeds[i] + retry for i in failed], sampling, schema)
        for index, completion in zip(failed, again, strict=True):
            attempts[index] += 1
            found[index] = parse(completion.text)
    return list(zip(found, first, attempts, strict=True))


def _under_floor(judge: JudgeConfig, completion: Completion, side: int) -> bool:
    floors = completion.span_floors
    return judge.fluency_floor is not None and side < len(floors) and floors[side] < judge.fluency_floor


def _floor(rating: Rating) -> Rating:
    """Text that the judge itself finds impossible is not clear, whatever it rated."""
    return Rating(rating.ratings | {"clarity": MIN_RATING}, rating.evidence)


class JudgeBatch:
    """Rows with `question` and `response` to rows of `schema.RATING` with an `error` column (Ray Data stage)."""

    def __init__(self, spec: EngineSpec, model: str, judge: JudgeConfig, reporter: Reporter | None) -> None:
        self._worker = VLLMWorker(spec)
        self._worker.use(model)
        self._judge, self._reporter = judge, reporter

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        items = [(row["question"], row["response"]) for row in rows]
        rated = rate_single(self._worker, self._judge, items, [row["seed"] for row in rows])
        if self._reporter:
            self._reporter.add(len(rows), sum(completion.output_tokens for *_, completion in rated))
        out = [rating_row(row, *result) for row, result in zip(rows, rated, strict=True)]
        return pa.Table.from_pylist(out, schema=RATING.append(pa.field("error", pa.string())))


def rating_row(
    row: Mapping[str, Any], rating: Rating | None, floored: bool, attempts: int, completion: Completion
) -> dict[str, Any]:
    """A rating row of `schema.RATING`."""
    return {
        **{name: row[name] for name in ("request_id", "speech_id", "split", "model")},
        **{f"{stem}_rating": rating.ratings[stem] if rating else None for stem in STEMS},
        **{f"{stem}_evidence": rating.evidence[stem] if rating else None for stem in STEMS},
        "overall": rating.overall if rating else None,
        "floored": floored,
        "attempts": attempts,
        "prompt_tokens": completion.prompt_tokens,
        "output_tokens": completion.output_tokens,
        "error": completion.error or (None if rating else FAILED),
    }
