"""Which model answers which speech: one request row per (speech, model, sample), each with an id and a seed.

The draw depends on the run's seed and the speech alone, so the same run twice asks for the same rows, and a longer
list of speeches leaves the earlier draws as they were.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from psycho.schema import stable_id, stable_seed


def draw_models(speech_id: str, pool: Sequence[str], k: int, seed: int) -> list[str]:
    """k different models of the pool for one speech, each equally likely (paper, section 3.2)."""
    return random.Random(stable_seed("models", seed, speech_id)).sample(sorted(pool), k)


def request_row(
    speech: Mapping[str, Any], model: str, sample: int, seed: int, system_prompt: str | None
) -> dict[str, Any]:
    """One request of `schema.REQUEST`."""
    return {
        "request_id": stable_id("request", seed, speech["speech_id"], model, sample),
        "speech_id": speech["speech_id"],
        "split": speech["split"],
        "model": model,
        "sample": sample,
        "seed": stable_seed("sample", seed, speech["speech_id"], model, sample),
        "messages": json.dumps(prompt(speech, system_prompt), ensure_ascii=False),
    }


def prompt(speech: Mapping[str, Any], system_prompt: str | None) -> list[dict[str, str]]:
    """The messages a policy answers: `question`, after the earlier turns (`history`, JSON) where there are any."""
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    history = json.loads(speech.get("history") or "[]")
    return [*system, *history, {"role": "user", "content": speech["question"]}]
