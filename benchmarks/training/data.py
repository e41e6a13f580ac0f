"""What both sides train on: pairs of the domain's lengths as ids and as text, and a random Llama with a tokenizer of
one token a word; or words of a real model's vocabulary."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

BATCH = 8
_DRAWN = 500  # for each one taken
_WORDS = 4000
Speech = tuple[list[int], list[list[int]], list[tuple[int, int]]]


@dataclass(frozen=True)
class Size:
    """Of the model, and of the data: mean and deviation of the lengths in tokens."""

    vocabulary: int = 4096
    width: int = 256
    layers: int = 4
    speeches: int = 12
    responses: int = 4
    prompt: tuple[int, int] = (230, 40)
    response: tuple[int, int] = (240, 90)
    words: tuple[tuple[int, str], ...] = ()
    """Ids and texts of a real tokenizer's words, which the texts are made of; none: the random model's."""
    end: int = 2

    def drawn(self, rng: random.Random) -> int:
        """A token of a text."""
        return rng.choice(self.words)[0] if self.words else rng.randrange(8, self.vocabulary)

    def text(self, ids: list[int]) -> str:
        """What is tokenized to these ids."""
        texts = dict(self.words)
        return "".join(texts[i] for i in ids) if texts else "".join(f" w{i}" for i in ids)


SIZES = {
    "full": Size(),
    "real": Size(speeches=3, prompt=(140, 40), response=(80, 20)),  # as configs/smollm2.yaml has them
    "tiny": Size(vocabulary=512, width=64, layers=2, speeches=4, prompt=(60, 10), response=(40, 9)),
}


def speeches(size: Size, seed: int = 0) -> list[Speech]:
    """Prompt, responses and pairs of gap >= 1 as token ids, of speeches that have such a pair.

    A speech has 2.8 of them, which is what 500 real speeches through the default pipeline gave (2.83; the nano world's
    give 2.45). A dozen drawn at random may have 2 or 4, so these are the middles of as many equal parts of a long list,
    ordered by the number of pairs.
    """
    rng = random.Random(seed)
    drawn = [pairs for _ in range(_DRAWN * size.speeches) if (pairs := _pairs(rng, size.responses))]
    drawn.sort(key=len)
    chosen = [drawn[(2 * part + 1) * len(drawn) // (2 * size.speeches)] for part in range(size.speeches)]
    rng.shuffle(chosen)

    def text(length: tuple[int, int]) -> list[int]:
        return [size.drawn(rng) for _ in range(max(20, round(rng.gauss(*length))))]

    return [
        (text(size.prompt), [[*text(size.response), size.end] for _ in range(size.responses)], pairs)
        for pairs in chosen
    ]


def _pairs(rng: random.Random, responses: int) -> list[tuple[int, int]]:
    """Those of gap >= 1, of overall ratings in sevenths."""
    ratings = [round(7 * min(5.0, max(1.0, rng.gauss(3, 0.75)))) / 7 for _ in range(responses)]
    return [(i, j) for i, a in enumerate(ratings) for j, b in enumerate(ratings) if a - b >= 1]


def groups(size: Size, single: bool = False) -> list[Any]:
    """As speech groups; `single`: one pair a speech."""
    from psycho.training.groups import Encoded, Group, only

    found = [
        Group(prompt, tuple(Encoded(row, [1.0] * len(row)) for row in rows), tuple(pairs))
        for prompt, rows, pairs in speeches(size)
    ]
    return [only(group, [0]) for group in found] if single else found


def text_rows(size: Size, single: bool = False) -> list[dict[str, str]]:
    """The same pairs as text, a word a token; TRL adds the end token itself."""
    rows = []
    for prompt, responses, pairs in speeches(size):
        for chosen, rejected in pairs[:1] if single else pairs:
            sides = (prompt, responses[chosen][:-1], responses[rejected][:-1])
            names = ("prompt", "chosen", "rejected")
            rows.append({name: size.text(ids) for name, ids in zip(names, sides, strict=True)})
    return rows


def with_words(size: Size, folder: str) -> Size:
    """The size, its texts made of short words that are one token each in the vocabulary of a real model."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for piece, number in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        word = piece[1:]
        if piece[:1] in "Ġ▁" and word.isascii() and word.isalpha() and word.islower() and len(found) < _WORDS:
            found.append((number, f" {word}"))
    made = replace(size, words=tuple(found), end=tokenizer.eos_token_id)
    ids = [number for number, _ in found]
    assert tokenizer(made.text(ids), add_special_tokens=False).input_ids == ids, "a word is not a token"
    return made


def model_folder(size: Size, root: Path) -> Path:
    """The random Llama with its tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=size.width * 8 // 3,
            num_hidden_layers=size.layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(root)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size.vocabulary)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(root)
    return root
