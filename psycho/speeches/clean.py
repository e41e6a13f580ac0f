"""Cleaning a batch of rows (paper, section 3.1: 100 to 1,000 characters): the part that any worker can do.

A batch goes in as it was read and comes out as a table of clean rows, each with its text or the reason why it is left
out, and a few numbers a row for what only the whole can tell: duplicates and the split. Personal data is masked here,
before anything is stored.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from psycho.config import SpeechesConfig
from psycho.schema import stable_id
from psycho.speeches.read import RawSpeech
from psycho.speeches.topics import topic
from psycho.speeches.transcript import Turn, read_turns

CLEANED = pa.schema(
    [
        ("row", pa.int64()),
        ("reason", pa.string()),  # why the row is left out; null where it is not
        ("speech_id", pa.string()),
        ("question", pa.string()),
        ("history", pa.string()),
        ("topic", pa.string()),
    ]
)
HUGE = 50  # times speeches.max_chars: not worth cleaning
_PLAIN_ID = re.compile(
    r"(?:(?:[a-z]|row|id|item|case|post|thread|speech|question|query|sample|session|conversation|conv|dialog|dialogue|"
    r"text|record|example|entry|train|dev|test|eval)[-_ .:/#]?)?\d{1,6}"
    r"|(?=\d*[a-f])[0-9a-f]{16,128}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    re.ASCII | re.IGNORECASE,
)
_MARKS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033", '"'),
        **dict.fromkeys("\ufeff\u200b\u2060\u00ad", ""),  # seen by nobody
        "\u00a0": " ",
    }
)


@dataclass
class Cleaned:
    """A batch after cleaning.

    `keys` is [fitting rows, 3]: hashes of the text and of the id, and the place in the order of the split;
    `signature` is their MinHash, [fitting rows, 128], or empty where near-duplicates are not looked for.
    """

    table: pa.Table
    keys: npt.NDArray[np.uint64]
    signature: npt.NDArray[np.uint32]
    counts: dict[str, Counter[str]] = field(default_factory=dict)  # personal_data, languages, ids


def plain_text(text: str) -> str:
    """Entities decoded, typographic quotes made plain, Unicode composed (NFC); lines stay lines, blank ones go."""
    for _ in range(2):  # some exports encode twice
        text = html.unescape(text) if "&" in text else text
    text = unicodedata.normalize("NFC", text.translate(_MARKS))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if not all(line.isprintable() for line in lines):
        lines = [" ".join("".join(c if c.isprintable() else " " for c in line).split()) for line in lines]
    return "\n".join(line for line in lines if line)


def one_line(text: str) -> str:
    """White space collapsed."""
    return " ".join(text.split())


def clean_batch(rows: Sequence[RawSpeech], config: SpeechesConfig, seed: int) -> Cleaned:
    """Clean each row; none is lost: it has a text that fits, or a reason."""
    counts: dict[str, Counter[str]] = {"personal_data": Counter(), "languages": Counter(), "ids": Counter()}
    cleaned = [_clean(row, config, counts) for row in rows]
    fitting = [row for row in cleaned if row["reason"] is None]
    keys = [
        [
            int(stable_id("text", row["question"], row["history"]), 16),
            int(stable_id("id", row["speech_id"]), 16),
            int(stable_id("split", seed, row["speech_id"]), 16),
        ]
        for row in fitting
    ]
    signature = np.empty((len(fitting), 0), np.uint32)
    if config.near_duplicates != "ignore":
        from psycho.speeches.near import signatures

        signature = signatures(f"{row['history'] or ''} {row['question']}" for row in fitting)
    table = pa.Table.from_pylist(cleaned, schema=CLEANED)
    return Cleaned(table, np.array(keys, np.uint64).reshape(-1, 3), signature, counts)


def _clean(row: RawSpeech, config: SpeechesConfig, counts: dict[str, Counter[str]]) -> dict[str, Any]:
    if row.reason is not None:
        return _left_out(row, row.reason)
    turns, reason = read_turns(row.text)
    if reason is None:
        reason = _length(len(turns[-1]["content"]), config, HUGE)
    if reason is not None:
        return _left_out(row, reason)
    turns = turns[-1 - config.history_turns :]
    texts = [plain_text(turn["content"]) for turn in turns]
    reason = _length(len(one_line(texts[-1])), config)
    if reason is None and config.languages:
        reason = _language(texts[-1], config, counts["languages"])
    if reason is not None:
        return _left_out(row, reason)
    found: Counter[str] = Counter()
    if config.mask_personal_data:
        from psycho.speeches.personal import mask

        masked = [mask(text) for text in texts]
        texts = [text for text, _ in masked]
        found = sum((one for _, one in masked), Counter())
    texts = [one_line(text) for text in texts]
    reason = _length(len(texts[-1]), config)
    if reason is not None:
        return _left_out(row, reason)
    counts["personal_data"] += found
    given = row.id
    if given is not None and config.mask_personal_data and not is_plain_id(given):
        given = stable_id("given id", given)
        counts["ids"]["replaced"] += 1
    return _kept(row._replace(id=given), texts, turns)


def is_plain_id(given: str) -> bool:
    """True for an id that is of a row and of nobody: a short number, also behind a word like row, or a long hash.

    An e-mail, a name, a handle or a number as long as a telephone's is none of these, and so is anything unknown.
    """
    return bool(_PLAIN_ID.fullmatch(given))


def _kept(row: RawSpeech, texts: list[str], turns: list[Turn]) -> dict[str, Any]:
    question = texts[-1]
    earlier = [
        {"role": turn["role"], "content": text} for turn, text in zip(turns[:-1], texts[:-1], strict=True) if text
    ]
    history = json.dumps(earlier, ensure_ascii=False) if earlier else None
    derived = stable_id("speech", question, history) if history else stable_id("speech", question)
    return {
        "row": row.number,
        "reason": None,
        "speech_id": row.id or derived,
        "question": question,
        "history": history,
        "topic": topic(row.topic),
    }


def _left_out(row: RawSpeech, reason: str) -> dict[str, Any]:
    return {"row": row.number, "reason": reason}


def _length(chars: int, config: SpeechesConfig, times: int = 1) -> str | None:
    if times == 1 and chars < config.min_chars:
        return f"{chars} characters, under speeches.min_chars {config.min_chars}"
    if chars > config.max_chars * times:
        return f"{chars} characters, over speeches.max_chars {config.max_chars}"
    return None


def _language(text: str, config: SpeechesConfig, counts: Counter[str]) -> str | None:
    from psycho.speeches.language import language

    code, confidence = language(one_line(text), config.languages)
    counts[code or "unknown"] += 1
    if code not in config.languages:
        return f"language {code or 'unknown'}, not in speeches.languages"
    if confidence < config.min_language_confidence:
        return f"language uncertain ({code} {confidence:.2f}), under speeches.min_language_confidence"
    return None
