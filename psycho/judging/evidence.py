"""Whether a judge's quotations stand in what they quote.

A judge can invent its evidence. Each quotation is looked up, word by word, in the text that it is said to be from: the
response, or what the client said. Case, white space, punctuation and the kind of quotation marks do not count, an
ellipsis joins two places, and a last word may be cut where the evidence filled its room. In the compact format evidence
is `reply: <words>; client: <word>`, in the rubric format a few words of either side, labelled and quoted as the judge
likes. "none" claims nothing.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from psycho.judging.escape import Template
from psycho.principles import STEMS

Side = Literal["response", "client", "either"]

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_ELLIPSIS = re.compile(r"[\[(]?(?:\.\s?\.\s?\.+|\u2026)[\])]?")
_JOINED = re.compile(r"[;|\n]|\s/\s")  # between quotations without quotation marks
_COMPACT = re.compile(r"\s*reply:(.*?)(?:;\s*client:(.*))?", re.DOTALL | re.IGNORECASE)
_QUOTED = re.compile(
    r'["\u201c\u201d\u201e\u00ab\u300c]([^"\u201c\u201d\u201e\u00ab\u00bb\u300d]+)(?:["\u201c\u201d\u00bb\u300d]|$)'
    r"|(?<!\w)['\u2018\u201a]((?:[^'\u2018\u2019]|['\u2019](?=\w))+)['\u2019\u2018](?!\w)"
)
_LABELS: dict[str, Side] = {
    **dict.fromkeys(("client", "user", "speech"), "client"),
    **dict.fromkeys(("response", "reply", "counsellor", "counselor", "therapist"), "response"),
}
_LABEL = re.compile(rf"\b({'|'.join(_LABELS)})\b(?:['\u2019]s words)?", re.IGNORECASE)
_LABELLED = re.compile(rf"(?:^|(?<=[\s;,/|(.])){_LABEL.pattern}\s*:", re.IGNORECASE)
_NOTHING = frozenset({"", "none", "n a", "na", "nothing", "not applicable"})
_NAMED = ("staging",)  # evidence of the compact format that is a name, here of a stage of change, and no quotation
_LISTED = ("clarity",)  # evidence of the compact format that lists words of several sentences


@dataclass(frozen=True)
class Quotation:
    """Words that are said to stand on one side."""

    text: str
    side: Side


def quotations(stem: str, evidence: str, template: Template) -> list[Quotation]:
    """What the evidence for one principle claims to quote."""
    found = _compact(stem, evidence) if template == "compact" else _free(evidence)
    return [quote for quote in found if " ".join(_words(quote.text)) not in _NOTHING]


def unfaithful(
    evidence: Mapping[str, str],
    template: Template,
    speech: str,
    response: str,
    history: str | None = None,
    max_chars: int | None = None,
) -> tuple[str, ...]:
    """The principles whose evidence holds a quotation that does not stand in its text.

    Args:
        history: earlier turns (JSON of `schema.CLIENT_SPEECH`), which count as the client's side.
        max_chars: room that evidence had; where it was filled, the last word may be cut.
    """
    turns = [turn["content"] for turn in json.loads(history or "[]")]
    said = {"response": [_line(response)], "client": [_line(text) for text in (speech, *turns)]}
    texts = {**said, "either": [*said["response"], *said["client"]]}
    return tuple(
        stem
        for stem in STEMS
        if not all(
            _stands(quote.text, texts[quote.side], max_chars is not None and len(evidence[stem]) >= max_chars)
            for quote in quotations(stem, evidence[stem], template)
        )
    )


def _compact(stem: str, evidence: str) -> list[Quotation]:
    parts = _COMPACT.fullmatch(evidence)
    if parts is None:
        return [Quotation(evidence, "either")]
    if stem in _NAMED:
        return []
    replies = _words(parts[1]) if stem in _LISTED else [parts[1]]
    return [*(Quotation(reply, "response") for reply in replies), Quotation(parts[2] or "", "client")]


def _free(evidence: str) -> list[Quotation]:
    quoted = [(match, match[1] or match[2]) for match in _QUOTED.finditer(evidence)]
    if quoted:
        before = [0, *(match.end() for match, _ in quoted)]
        labels = [
            _LABEL.findall(evidence[start : match.start()]) for start, (match, _) in zip(before, quoted, strict=False)
        ]
        sides: list[Side] = [_LABELS[found[-1].lower()] if found else "either" for found in labels]
        return [Quotation(text, side) for (_, text), side in zip(quoted, sides, strict=True)]
    labelled = list(_LABELLED.finditer(evidence))
    ends = [*(match.start() for match in labelled[1:]), len(evidence)]
    parts = (
        [
            Quotation(evidence[label.end() : end], _LABELS[label[1].lower()])
            for label, end in zip(labelled, ends, strict=True)
        ]
        if labelled
        else []
    )
    return [Quotation(evidence[: labelled[0].start()] if labelled else evidence, "either"), *parts]


def _stands(quote: str, lines: list[str], cut: bool) -> bool:
    """Whether the quotation stands in one of the texts, or each of several that are joined in one of them."""
    if any(_is_in(quote, line, cut) for line in lines):
        return True
    parts = [part for part in _JOINED.split(quote) if " ".join(_words(part)) not in _NOTHING]
    return len(parts) > 1 and all(any(_is_in(part, line, cut) for line in lines) for part in parts)


def _is_in(quote: str, line: str, cut: bool) -> bool:
    """Whether all places that an ellipsis joins are in the text, in their order."""
    start = 0
    for part in filter(None, map(_words, _ELLIPSIS.split(quote))):
        wanted = " ".join(part)
        bounded = not _UNSPACED.search(wanted)
        place = line.find(f" {wanted}{'' if cut else ' '}" if bounded else wanted, start)
        if place < 0:
            return False
        start = place + len(wanted)
    return True


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("\u02bc", "'")
    return _WORD.findall(plain)


def _line(text: str) -> str:
    return f" {' '.join(_words(text))} "
