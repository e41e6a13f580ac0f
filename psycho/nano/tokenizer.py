"""The nano world's tokenizer: every word of the grammar is one token, and any other text falls back to bytes.

A Unigram model in which all pieces cost the same cuts a text into as few pieces as it can, so words win over
letters. The judge's JSON scaffolding is a handful of pieces too: an answer of seven ratings with evidence is about 35
tokens. Merged vocabularies (BPE) would need thousands of intermediate pieces for the same words.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from psycho.principles import STEMS

PAD, END, UNKNOWN, SYSTEM, USER, ASSISTANT = (
    "<pad>",
    "<|end|>",
    "<unk>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)
SPECIAL = (PAD, END, UNKNOWN, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|system|>{% elif message['role'] == 'user' %}<|user|>"
    "{% else %}<|assistant|>{% endif %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPACE = "\u2581"


def build_tokenizer(words: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer over `words` (as they appear in text) and the judge's scaffolding."""
    pieces: list[str] = list(SPECIAL)
    pieces += [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += [_SPACE, *map(chr, range(33, 127)), "\n"]
    pieces += _scaffolding()
    for word in sorted(set(words)):
        pieces.append(_SPACE + word)
        if word[0].isupper():
            pieces.append(word)
    pieces = list(dict.fromkeys(pieces))
    known = {piece: index for index, piece in enumerate(pieces)}
    scored = [(piece, -100.0 if piece.startswith("<0x") else -10.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=known[UNKNOWN], byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(Regex(" "), _SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"(?<=[.?!])(?={_SPACE})"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _scaffolding() -> list[str]:
    """The fixed parts of a judge's prompt and answer as single pieces."""
    pieces = ["\nReply: ", "; client:", '", "rating": ', "}}"]
    for number, stem in enumerate(STEMS):
        key = f'"{stem}": {{"evidence": "reply:'
        if number == 0:
            pieces.append("{" + key)
        else:
            pieces.append("}, " + key)
        pieces.append(key)  # a drill rates one principle alone
    return [piece.replace(" ", _SPACE) for piece in pieces]
