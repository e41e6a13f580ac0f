"""Text that is rated is material: it must not pass for the rubric, for the other party, or for an answer.

Two things make a prompt: chat tokens, which a tokenizer finds in plain text too, and the delimiters of the template.
In the rubric format the text stands between tags and every `<`, `>` and `&` in it becomes an entity, so that no text
can close its tag or hold a chat token in angle brackets. The compact format has no room for entities (judges are
trained on its very bytes), so only what would be read as a chat token, as another reply or as a key of an answer is
broken up; ordinary text stays as it is, byte for byte.
"""

from __future__ import annotations

import re
from typing import Literal

from psycho.principles import STEMS

Template = Literal["rubric", "compact"]

_ENTITIES = (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"))
_SQUARE_TOKEN = re.compile(r"\[(?=/?[A-Z_]{2,30}\])")  # [INST], [/INST], [AVAILABLE_TOOLS]
_ANGLE_TOKEN = re.compile(
    r"<(?=[|\uff5c])"  # <|user|>, and its full-width cousin
    r"|<(?=/?[A-Za-z_][\w ]{0,30}>)"  # </s>, <pad>, <start_of_turn>
    r"|<(?=<SYS>>|</SYS>>)"
    r"|<(?=0x[0-9A-Fa-f]{2}>)"  # a byte of a tokenizer that falls back to bytes
)
_BREAK = r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
_NEXT_REPLY = re.compile(rf"\s*{_BREAK}\s*(?=reply\s*[:\uff1a])", re.IGNORECASE)
_KEY = re.compile(rf'"(?=\s*(?:{"|".join(STEMS)}|evidence|rating)\s*"\s*:)')  # of a judge's answer


def shown(text: str, template: Template) -> str:
    """The text as it stands in a judge's prompt."""
    if template == "rubric":
        for character, entity in _ENTITIES:
            text = text.replace(character, entity)
        return _SQUARE_TOKEN.sub("[ ", text)
    for pattern, instead in ((_SQUARE_TOKEN, "[ "), (_ANGLE_TOKEN, "< "), (_NEXT_REPLY, " "), (_KEY, "' ")):
        text = pattern.sub(instead, text)
    return text


def as_written(quote: str, template: Template) -> str:
    """A quotation with the entities of the rubric format turned back."""
    if template == "rubric":
        for character, entity in reversed(_ENTITIES):
            quote = quote.replace(entity, character)
    return quote
