"""Gates of the nano world on combinations that no model was trained on.

The overall figures of a judge can hide that it matches nothing (a judge that ignores the speech still gets the order
right most of the time), so each principle has a gate of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import JudgeConfig, SamplingConfig
from psycho.evaluation.comparison import outcome
from psycho.inference.pool import WorkerPool
from psycho.judging.fitness import KAPPA_GATE, PAIR_GATE, PRINCIPLE_GATE, Gate
from psycho.judging.rubric import Rating
from psycho.nano import gold
from psycho.nano.corpora import drill_row
from psycho.nano.grammar import NanoSpeech, corrupt, sample_response, sample_speech
from psycho.nano.tokenizer import ASSISTANT, END
from psycho.nano.truth import judge_against_gold
from psycho.principles import STEMS

GRAMMAR_GATE, COPY_GATE = 0.95, 0.90
CORRUPTED_SHARE = 0.1
_RESPONSES_PER_SPEECH = 4


def check(
    pool: WorkerPool,
    folders: Mapping[str, str],
    judge: JudgeConfig,
    sampling: SamplingConfig,
    policies: Sequence[str],
    n: int = 600,
    seed: int = 0,
) -> tuple[list[Gate], dict[str, Any]]:
    """Measure all gates; `folders` maps model names (with `judge`) to folders."""
    rng = random.Random(f"check-{seed}")
    speeches = [sample_speech(rng, held_out_combinations=True) for _ in range(n // _RESPONSES_PER_SPEECH)]
    gates: list[Gate] = []
    texts = []
    for speech in speeches:
        for _ in range(_RESPONSES_PER_SPEECH):
            text = sample_response(rng, speech, "any")
            texts.append((speech, corrupt(rng, text) if rng.random() < CORRUPTED_SHARE else text))
    result = _judge(pool, folders["judge"], judge, texts, seed)
    gates += [
        Gate(f"judge on grammar, 10 % corrupted: {stem}", value, PRINCIPLE_GATE, result["n"])
        for stem, value in result["correlation_gold"].items()
    ]
    gates.append(Gate("judge: pair agreement at gap >= 1", result["pair_agreement_gold"], PAIR_GATE, result["pairs"]))
    details: dict[str, Any] = {"grammar": result, "policies": {}}
    own: list[tuple[NanoSpeech, str]] = []
    for name in policies:
        answers = _sample(pool, folders[name], speeches, sampling, seed)
        rated = [gold.rate(speech, text) for speech, text in answers]
        share = sum(r.on_grammar for r in rated) / len(rated)
        gates.append(Gate(f"{name}: on grammar", share, GRAMMAR_GATE, len(rated)))
        mean = sum(r.overall for r in rated) / len(rated)
        details["policies"][name] = {"on_grammar": share, "mean_gold": mean}
        own += answers
    result = _judge(pool, folders["judge"], judge, own, seed)
    gates += [
        Gate(f"judge on the policies' samples, kappa: {stem}", value, KAPPA_GATE, result["n"])
        for stem, value in result["kappa_gold"].items()
    ]
    details["samples"] = result
    details["comparisons"] = _compare(pool, folders["judge"], judge, own, len(speeches), seed)
    return gates, details


def copies(folder: str, seed: int = 0, n: int = 96) -> Gate:
    """How much of a backbone's drills on feelings and key words comes out right, word for word, on held-out texts.

    Each answer is read along its own true beginning (no engine is started): after the key, which names the principle
    that the drill happens to ask about, the likeliest token must be the true one at every place. Of a backbone that
    cannot do this no judge is made.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assistant, end = (tokenizer.convert_tokens_to_ids(token) for token in (ASSISTANT, END))
    rng, right, total = random.Random(f"copies-{seed}"), 0, 0
    for _ in range(n):
        messages = json.loads(drill_row(rng, held_out=True)["messages"])
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        with torch.no_grad():
            likeliest = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
        starts = [place + 1 for place, token in enumerate(ids) if token == assistant]
        for start, message in zip(starts, messages[1::2], strict=True):
            if any(f'"{stem}"' in message["content"] for stem in ("empathy", "relevance")):
                stop = ids.index(end, start)
                right += likeliest[start : stop - 1] == ids[start + 1 : stop]
                total += 1
    return Gate("backbone: feelings and key words copied and compared", right / total, COPY_GATE, total)


def _sample(
    pool: WorkerPool, folder: str, speeches: Sequence[NanoSpeech], sampling: SamplingConfig, seed: int
) -> list[tuple[NanoSpeech, str]]:
    prompts = [[{"role": "user", "content": speech.text}] for speech in speeches]
    answers = pool.sample(folder, prompts, [seed + i for i in range(len(prompts))], sampling)
    return [(speech, answer.text.strip()) for speech, answer in zip(speeches, answers, strict=True)]


def _judge(
    pool: WorkerPool, folder: str, judge: JudgeConfig, items: Sequence[tuple[NanoSpeech, str]], seed: int
) -> dict[str, Any]:
    ratings = pool.rate(folder, judge, [(s.text, t) for s, t in items], [seed] * len(items))
    pairs = [(_row(s, r), gold.rate(s, t)) for (s, t), r in zip(items, ratings, strict=True) if r is not None]
    return {
        **judge_against_gold([row for row, _ in pairs], [g for _, g in pairs]),
        "failed": len(items) - len(pairs),
    }


def _row(speech: NanoSpeech, rating: Rating) -> dict[str, Any]:
    return {
        "speech_id": speech.text,
        "overall": rating.overall,
        **{f"{stem}_rating": rating.ratings[stem] for stem in STEMS},
    }


def _compare(
    pool: WorkerPool,
    folder: str,
    judge: JudgeConfig,
    answers: Sequence[tuple[NanoSpeech, str]],
    per_policy: int,
    seed: int,
) -> dict[str, float]:
    """Two policies' samples side by side: how often the verdict is gold's, and how often the first place wins."""
    pairs = [(answers[i], answers[i + per_policy]) for i in range(len(answers) - per_policy)]
    items = [(first[0].text, first[1], second[1]) for first, second in pairs]
    verdicts = pool.compare(folder, judge, items, [seed] * len(items))
    agreed, first_wins, known = 0.0, 0.0, 0
    for (first, second), verdict in zip(pairs, verdicts, strict=True):
        if verdict is None:
            continue
        known += 1
        truth = outcome(gold.rate(*first).overall, gold.rate(*second).overall)
        judged = outcome(verdict[0].overall, verdict[1].overall)
        agreed += 1 - abs(truth - judged)
        first_wins += judged - truth
    return {"n": known, "agreement": agreed / max(1, known), "first_place_bias": first_wins / max(1, known)}
