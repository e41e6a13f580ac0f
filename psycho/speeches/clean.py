"""Cleaning, exact duplicates, and the split by speech (paper, section 3.1: 100 to 1,000 characters)."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import Any

from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.schema import stable_id
from psycho.speeches.read import RawSpeech

_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a0": " ", "\ufeff": ""})


def clean_text(text: str) -> str:
    """Entities decoded, typographic quotes made plain, white space collapsed, Unicode composed (NFC)."""
    plain = unicodedata.normalize("NFC", html.unescape(text).translate(_QUOTES))
    return " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in plain).split())


def clean_speeches(
    raw: Iterable[RawSpeech], config: SpeechesConfig
) -> tuple[list[dict[str, str]], list[dict[str, Any]], int]:
    """Clean rows and drop what does not fit.

    Returns:
        Kept speeches (`speech_id`, `question`), quarantined rows with their reason, and the number of rows read.
    """
    kept: dict[str, dict[str, str]] = {}
    quarantine: list[dict[str, Any]] = []
    texts: set[str] = set()
    rows = 0
    for number, text, given_id in raw:
        rows += 1
        question = clean_text(text) if text is not None else ""
        speech_id = given_id or stable_id("speech", question)
        reason = _reason(text, question, config)
        if reason is None and (question in texts or speech_id in kept):
            reason = "exact duplicate" if question in texts else "id used twice"
        if reason is None and config.limit is not None and len(kept) >= config.limit:
            reason = f"over speeches.limit {config.limit}"
        if reason is not None:
            quarantine.append({"row": number, "reason": reason})
            continue
        texts.add(question)
        kept[speech_id] = {"speech_id": speech_id, "question": question}
    if not rows:
        raise BadInput(f"{config.source} holds no rows; give a file with client speeches")
    return list(kept.values()), quarantine, rows


def _reason(text: str | None, question: str, config: SpeechesConfig) -> str | None:
    if text is None:
        return "no text in this row"
    if len(question) < config.min_chars:
        return f"{len(question)} characters, under speeches.min_chars {config.min_chars}"
    if len(question) > config.max_chars:
        return f"{len(question)} characters, over speeches.max_chars {config.max_chars}"
    return None


def split_speeches(speeches: list[dict[str, str]], config: SpeechesConfig, seed: int) -> list[dict[str, str]]:
    """Add `split` to each speech: the first by a seeded hash are held out for evaluation.

    Raises:
        BadInput: too few speeches are left for a train and an evaluation split.
    """
    held_out = min(config.evaluation, int(len(speeches) * config.max_evaluation_share))
    if held_out < 1 or len(speeches) - held_out < 1:
        raise BadInput(
            f"only {len(speeches)} speeches of {config.source} are left after cleaning; give more, "
            "or widen speeches.min_chars and speeches.max_chars"
        )
    order = sorted(speeches, key=lambda speech: stable_id("split", seed, speech["speech_id"]))
    chosen = {speech["speech_id"] for speech in order[:held_out]}
    return [s | {"split": "evaluation" if s["speech_id"] in chosen else "train", "topic": ""} for s in speeches]
