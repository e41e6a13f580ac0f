"""Rating responses with a judge LLM on a vLLM worker.

Answers follow a JSON grammar, or are digits alone in the mode `direct`; an answer that still does not parse (it was cut
short, the judge refused) is asked for again with another seed, and if that fails too the response is left out and
counted. No rating is ever made up, and evidence that does not stand in its text is dropped and marked (`evidence.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from psycho.config import JudgeConfig, SamplingConfig
from psycho.inference.worker import Completion, Messages, VLLMWorker
from psycho.judging.digits import expected_ratings
from psycho.judging.escape import as_written, shown
from psycho.judging.evidence import unfaithful
from psycho.judging.foreign import pieces, without_foreign
from psycho.judging.rubric import (
    Mode,
    Rating,
    answer,
    dump,
    pair_prompt,
    pair_schema,
    parse_digits,
    parse_pair,
    parse_pair_digits,
    parse_single,
    refuses,
    second_turn,
    single_prompt,
    single_schema,
)
from psycho.principles import MIN_RATING, STEMS

T = TypeVar("T")
Item = tuple[str, str] | tuple[str, str, str | None]
"""(speech, response), and the earlier turns where there are any (JSON of `schema.CLIENT_SPEECH`)."""
PairItem = tuple[str, str, str] | tuple[str, str, str, str | None]

_RETRY_TEMPERATURE = 0.7  # a fresh try at temperature 0 would fail the same way


@dataclass(frozen=True)
class _Form(Generic[T]):
    """How an answer is written and read."""

    schema: str | None
    parse: Callable[[str], T | None]
    max_tokens: int
    digits: Literal["read", "only"] | None


def rate_single(
    worker: VLLMWorker,
    judge: JudgeConfig,
    items: Sequence[Item],
    seeds: Sequence[int],
    expected: bool = False,
    kept: bool = False,
) -> list[tuple[Rating | None, bool, int, Completion]]:
    """Rate each response: rating or None, whether the floor was met, attempts, last completion.

    The completion's token counts are of all that was asked for this response: retries, and the second rating where
    something in it is foreign.

    Args:
        expected: also read the expected ratings from the judge's log-probabilities.
        kept: the evidence is kept, and looked up as `judge.evidence_check` says.
    """
    mode = asked_mode(judge)

    def invented(index: int, rating: Rating) -> tuple[str, ...]:
        evidence = {stem: as_written(quote, judge.template) for stem, quote in rating.evidence.items()}
        speech, response, *history = items[index]
        earlier = history[0] if history else None
        return unfaithful(evidence, judge.template, speech, response, earlier, judge.max_evidence_chars)

    checks = kept and judge.evidence_check != "off"
    doubts = (
        (lambda index, rating: len(invented(index, rating))) if checks and judge.evidence_check == "retry" else None
    )
    prompts = [
        single_prompt(speech, response, judge.template, history[0] if history else None, mode)
        for speech, response, *history in items
    ]
    form, texts = _single_form(judge, mode, expected), [[item[1]] for item in items]
    results: list[tuple[Rating | None, bool, int, Completion]] = []
    for rating, completion, attempts in _ask(worker, judge, prompts, seeds, form, texts, _sources(items), doubts):
        floored = rating is not None and _under_floor(judge, completion, texts[len(results)], 0)
        if rating is not None:
            dropped = invented(len(results), rating) if checks else ()
            rating = _finished(rating, completion, judge, floored).without_evidence(dropped)
        results.append((rating, floored, attempts, completion))
    cut = {i: found for i, (*_, done) in enumerate(results) if (found := _cut(judge, texts[i], done))}
    rest = [(items[i][0], cut[i][0], *items[i][2:]) for i in cut]
    again = rate_single(worker, _unfloored(judge), rest, [seeds[i] for i in cut], expected, kept) if cut else []
    for index, (rating, _, _, second) in zip(cut, again, strict=True):
        before, floored, attempts, completion = results[index]
        lower = _lower(before, rating) if before and rating else None
        results[index] = (lower, floored, attempts, _with_tokens_of(completion, second))
    return results


def _with_tokens_of(completion: Completion, other: Completion) -> Completion:
    """The completion, its token counts with the other's."""
    return replace(
        completion,
        prompt_tokens=completion.prompt_tokens + other.prompt_tokens,
        output_tokens=completion.output_tokens + other.output_tokens,
    )


def _sources(items: Sequence[Sequence[str | None]]) -> list[str]:
    """All text that a judge may quote, per item."""
    return ["\n".join(filter(None, item)) for item in items]


def _cut(judge: JudgeConfig, texts: Sequence[str], completion: Completion) -> list[str] | None:
    """The responses without what is foreign to the judge (`foreign.py`); None where nothing is."""
    if judge.fluency_floor is None or not completion.span_means:
        return None
    found, means = [], list(completion.span_means)
    for text in texts:
        parts = pieces(shown(text, judge.template))
        found.append(without_foreign(parts, means[: len(parts)], judge.fluency_floor))
        means = means[len(parts) :]
    if all(rest is None for rest in found):
        return None
    return [text if rest is None else as_written(rest, judge.template) for text, rest in zip(texts, found, strict=True)]


def _unfloored(judge: JudgeConfig) -> JudgeConfig:
    return judge.model_copy(update={"fluency_floor": None})


def _lower(one: Rating, other: Rating) -> Rating:
    """The lower rating on each principle, with its evidence."""
    chosen = {stem: min((one, other), key=lambda rating: rating.ratings[stem]) for stem in STEMS}
    expected = None
    if one.expected and other.expected:
        expected = {stem: min(one.expected[stem], other.expected[stem]) for stem in STEMS}
    return Rating(
        {stem: rating.ratings[stem] for stem, rating in chosen.items()},
        {stem: rating.evidence[stem] for stem, rating in chosen.items()},
        expected,
        tuple(stem for stem, rating in chosen.items() if stem in rating.unfaithful),
    )


def asked_mode(judge: JudgeConfig) -> Mode:
    """How one judge is asked; a panel's judges are asked each in its own mode, and what stands for it quotes."""
    return "direct" if judge.mode == "direct" else "evidence"


def _single_form(judge: JudgeConfig, mode: Mode, expected: bool) -> _Form[Rating]:
    if (judge.template, mode) == ("rubric", "direct"):
        return _Form(None, parse_digits, len(STEMS), "only")
    schema = json.dumps(single_schema(judge.max_evidence_chars, quoted=mode == "evidence"))
    return _Form(schema, parse_single, judge.max_tokens, "read" if expected else None)


def _pair_form(judge: JudgeConfig, mode: Mode) -> _Form[tuple[Rating, Rating]]:
    if mode == "direct":
        return _Form(None, parse_pair_digits, 2 * len(STEMS), "only")
    return _Form(json.dumps(pair_schema(judge.max_evidence_chars)), parse_pair, judge.max_tokens, None)


def _finished(rating: Rating, completion: Completion, judge: JudgeConfig, floored: bool) -> Rating:
    """The rating with its quotations as they were written, its expected ratings, and the floor."""
    evidence = {stem: as_written(quote, judge.template) for stem, quote in rating.evidence.items()}
    expected = expected_ratings(completion.text, completion.digits) if completion.digits else None
    whole = replace(rating, evidence=evidence, expected=expected)
    return _floor(whole) if floored else whole


def rate_pairs(
    worker: VLLMWorker, judge: JudgeConfig, items: Sequence[PairItem], seeds: Sequence[int]
) -> list[tuple[Rating, Rating] | None]:
    """Rate (speech, first, second) items, both responses in one conversation; None where an answer failed.

    A judge of the rubric format sees both side by side. A judge of the compact format rates the first, and then the
    second with the first and its ratings before it, and always quotes, whatever its mode.
    """
    rate = _rate_in_turn if judge.template == "compact" else _rate_side_by_side
    asked = rate(worker, judge, items, seeds)
    results = [ratings for ratings, _ in asked]
    cut = {i: found for i, (_, done) in enumerate(asked) if done and (found := _cut(judge, items[i][1:3], done))}
    kept = [(items[i][0], cut[i][0], cut[i][1], *items[i][3:]) for i in cut]
    again = rate_pairs(worker, _unfloored(judge), kept, [seeds[i] for i in cut]) if cut else []
    for index, ratings in zip(cut, again, strict=True):
        before = results[index]
        lower = (_lower(before[0], ratings[0]), _lower(before[1], ratings[1])) if before and ratings else None
        results[index] = lower
    return results


_Compared = list[tuple[tuple[Rating, Rating] | None, Completion | None]]


def _rate_side_by_side(
    worker: VLLMWorker, judge: JudgeConfig, items: Sequence[PairItem], seeds: Sequence[int]
) -> _Compared:
    mode = asked_mode(judge)
    prompts = [pair_prompt(speech, first, second, *history, mode=mode) for speech, first, second, *history in items]
    form = _pair_form(judge, mode)
    texts = [item[1:3] for item in items]
    results: _Compared = []
    for ratings, completion, _ in _ask(worker, judge, prompts, seeds, form, texts, _sources(items)):
        if ratings is None:
            results.append((None, None))
            continue
        first, second = (
            _finished(rating, completion, judge, _under_floor(judge, completion, texts[len(results)], side))
            for side, rating in enumerate(ratings)
        )
        results.append(((first, second), completion))
    return results


def _rate_in_turn(worker: VLLMWorker, judge: JudgeConfig, items: Sequence[PairItem], seeds: Sequence[int]) -> _Compared:
    results: _Compared = [(None, None)] * len(items)
    judge = judge.model_copy(update={"mode": "evidence"})
    firsts = rate_single(worker, judge, [(item[0], item[1]) for item in items], seeds)
    places, prompts = [], []
    for index, ((speech, first, second, *_), (rating, *_)) in enumerate(zip(items, firsts, strict=True)):
        if rating is None:
            continue
        given = {"role": "assistant", "content": dump(answer(rating.ratings, rating.evidence))}
        prompts.append([*single_prompt(speech, first, judge.template), given, second_turn(second)])
        places.append(index)
    form, texts = _single_form(judge, "evidence", expected=False), [items[index][1:3] for index in places]
    sources = _sources([items[index] for index in places])
    asked = _ask(worker, judge, prompts, [seeds[index] for index in places], form, texts, sources)
    for index, (rating, completion, _) in zip(places, asked, strict=True):
        before = firsts[index][0]
        if rating is not None and before is not None:
            floored = _under_floor(judge, completion, items[index][1:3], 1)
            results[index] = ((before, _floor(rating) if floored else rating), completion)
    return results


def _ask(
    worker: VLLMWorker,
    judge: JudgeConfig,
    prompts: Sequence[Messages],
    seeds: Sequence[int],
    form: _Form[T],
    texts: Sequence[Sequence[str]],
    sources: Sequence[str],
    doubts: Callable[[int, T], int] | None = None,
) -> list[tuple[T | None, Completion, int]]:
    """Ask, parse, and ask again what failed; the floors are those of the first try (the prompt is the same).

    Args:
        texts: the responses in each prompt, in order.
        sources: all text in each prompt that the judge may quote.
        doubts: how many faults an answer has that do not make it fail. One with faults is asked again too, and
            replaced by what has fewer.
    """

    def faults(index: int, value: T | None) -> float:
        return float("inf") if value is None else doubts(index, value) if doubts else 0

    def read(index: int, completion: Completion) -> T | None:
        if completion.error is not None or refuses(completion.text, sources[index]):
            return None
        return form.parse(completion.text)

    wanted_spans = None
    if judge.fluency_floor is not None:
        wanted_spans = [[part for text in sides for part in pieces(shown(text, judge.template))] for sides in texts]
    sampling = SamplingConfig(temperature=judge.temperature, max_tokens=form.max_tokens)
    last = worker.generate(prompts, seeds, sampling, form.schema, wanted_spans, form.digits)
    found = [read(index, completion) for index, completion in enumerate(last)]
    attempts = [1] * len(prompts)
    sampling = SamplingConfig(temperature=max(judge.temperature, _RETRY_TEMPERATURE), max_tokens=form.max_tokens)
    for retry in range(1, judge.retries + 1):
        failed = [i for i, value in enumerate(found) if faults(i, value) and last[i].error is None]
        if not failed:
            break
        asked = [prompts[i] for i in failed]
        again = worker.generate(asked, [seeds[i] + retry for i in failed], sampling, form.schema, None, form.digits)
        for index, completion in zip(failed, again, strict=True):
            attempts[index] += 1
            fresh, before = read(index, completion), last[index]
            if found[index] is not None and faults(index, fresh) >= faults(index, found[index]):
                last[index] = _with_tokens_of(before, completion)
                continue
            found[index] = fresh
            counted = _with_tokens_of(completion, before)
            last[index] = replace(counted, span_floors=before.span_floors, span_means=before.span_means)
    return list(zip(found, last, attempts, strict=True))


def _under_floor(judge: JudgeConfig, completion: Completion, texts: Sequence[str], side: int) -> bool:
    """Whether a token of that response is under the floor."""
    if judge.fluency_floor is None:
        return False
    counts = [len(pieces(shown(text, judge.template))) for text in texts]
    start = sum(counts[:side])
    return any(floor < judge.fluency_floor for floor in completion.span_floors[start : start + counts[side]])


def _floor(rating: Rating) -> Rating:
    """Text that the judge itself finds impossible is not clear, whatever it rated."""
    expected = rating.expected | {"clarity": float(MIN_RATING)} if rating.expected else None
    return replace(rating, ratings=rating.ratings | {"clarity": MIN_RATING}, expected=expected)
