"""From messages to the prompt a model was trained on: its own chat template, one BOS, its own stop tokens.

Templates differ in what they take for granted. Some write the BOS and some leave it to the tokenizer; some refuse a
system message; some models name only the end of a document as EOS, not the token that closes a turn. What a client
wrote never becomes a control token, whatever it spells.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from psycho.inference.marks import REASONING_TAGS

Messages = list[dict[str, str]]

_TAGS = {tag for pair in REASONING_TAGS for tag in pair}
_ANSWER = "An answer that ends here"
_MARKUP = re.compile(r"<\S+>|\[[A-Z_/]+\]")


def render(tokenizer: Any, messages: Messages, variables: Mapping[str, Any] | None = None) -> tuple[str, list[int]]:
    """The prompt as text and as token ids, up to where the answer begins.

    Raises:
        ValueError: the model's template refuses these messages.
    """
    text = conversation(tokenizer, messages, answer=True, variables=variables)
    return text, tokenizer(text, add_special_tokens=False).input_ids


def conversation(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    answer: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The messages as the model reads them, to be tokenized as they are; training, scoring and serving read the same.

    Args:
        answer: up to where the model's next answer begins.

    Raises:
        ValueError: the model's template refuses these messages.
    """
    plain = [dict(message) | {"content": plain_text(tokenizer, message["content"])} for message in messages]
    return with_one_bos(tokenizer, _apply(tokenizer, plain, {"add_generation_prompt": answer} | dict(variables or {})))


def plain_text(tokenizer: Any, text: str) -> str:
    """The text with control tokens taken apart, so that they are read as what they look like."""
    for token in _traits(tokenizer).taken_apart:
        if len(token) > 1 and token in text:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


@dataclass(frozen=True)
class _Traits:
    """What is asked of a tokenizer for every prompt; asked anew each time it would cost more than tokenizing.

    `control` is every token marked special, not only those with a name (BOS, EOS): Llama 3 names none of the tokens
    around a turn. `taken_apart` adds what is not marked but looks like it, as Qwen's `<think>` and `<tool_call>`.
    """

    control: Mapping[str, int]
    taken_apart: tuple[str, ...]
    bos: str | None
    adds_bos: bool


@lru_cache(maxsize=8)
def _traits(tokenizer: Any) -> _Traits:
    bos = tokenizer.bos_token
    adds = bool(bos) and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    control = named | {text: number for text, (number, special) in added.items() if special}
    marks = [text for text in added if text not in control and _MARKUP.fullmatch(text)]
    return _Traits(control, (*control, *marks), bos, adds)


def with_one_bos(tokenizer: Any, text: str) -> str:
    """The text with one BOS where the model has one: by its template or, failing that, by its tokenizer."""
    traits = _traits(tokenizer)
    if not traits.bos:
        return text
    bare = text
    while bare.startswith(traits.bos):
        bare = bare[len(traits.bos) :]
    return traits.bos + bare if traits.adds_bos or bare != text else text


def stop_ids(tokenizer: Any) -> list[int]:
    """Tokens beside EOS that end an answer: the one with which the template closes an assistant's turn."""
    talk = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
    except Exception:  # a reward model's tokenizer may have no template; then EOS is all there is
        return []
    ids = tokenizer(text.rpartition(_ANSWER)[2].lstrip(), add_special_tokens=False).input_ids[:1]
    return [i for i in ids if i in _traits(tokenizer).control.values() and i != tokenizer.eos_token_id]


def reasoning_is_control(tokenizer: Any) -> bool:
    """True where the tags of reasoning are control tokens, which an engine would leave out of the text."""
    return bool(_TAGS & set(_traits(tokenizer).control))


def without_control(tokenizer: Any, text: str) -> str:
    """The text of an answer that was decoded with its control tokens, without them, tags of reasoning apart."""
    for token in set(_traits(tokenizer).control) - _TAGS:
        text = text.replace(token, "")
    return text


def _apply(tokenizer: Any, messages: Messages, variables: Mapping[str, Any]) -> str:
    tries: list[Sequence[dict[str, str]]] = [messages]
    if len(messages) > 1 and messages[0]["role"] == "system":  # Gemma and others know no system message
        first = {"role": messages[1]["role"], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        tries.append([first, *messages[2:]])
    reason = ""
    for given in tries:
        try:
            text: str = tokenizer.apply_chat_template(given, tokenize=False, **variables)
            return text
        except Exception as error:  # templates raise what they like
            reason = type(error).__name__
    raise ValueError(f"the model's chat template refuses these messages ({reason})")
