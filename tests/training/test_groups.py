"""Round trips through the chat templates of four families: what is trained on, and nothing twice."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from psycho.config import RewardConfig, SFTConfig
from psycho.errors import BadInput
from psycho.training.groups import (
    Encoded,
    Group,
    desensitise,
    encode,
    encode_conversation,
    encode_group,
    only,
    response_key,
    split,
)
from psycho.training.objectives import SFT, Reward
from psycho.training.packing import packed, padded

# Small, and faithful in what matters here: where BOS, turns and their ends stand, and what is trimmed.
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN_2_5 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


class Family:
    """A template, its special tokens, and the end of an assistant's turn."""

    def __init__(self, template: str, bos: str | None, eos: str, end: str, pad: str | None, special: str) -> None:
        self.template, self.bos, self.eos, self.end, self.pad = template, bos, eos, end, pad
        self.special = special.split()


FAMILIES = {
    "llama3": Family(
        LLAMA_3, "<|begin_of_text|>", "<|eot_id|>", "<|eot_id|>", None, "<|start_header_id|> <|end_header_id|>"
    ),
    "qwen2.5": Family(QWEN_2_5, None, "<|im_end|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>"),
    "mistral": Family(MISTRAL, "<s>", "</s>", "</s>", None, "[INST] [/INST]"),
    "gemma": Family(GEMMA, "<bos>", "<eos>", "<end_of_turn>", "<pad>", "<start_of_turn>"),
}
PROMPT = [{"role": "user", "content": "My partner left and I feel lost."}]
RESPONSE = "That sounds painful. What do you miss most?"
TALK = [
    *PROMPT,
    {"role": "assistant", "content": "What do you miss?"},
    {"role": "user", "content": "The evenings."},
    {"role": "assistant", "content": RESPONSE},
]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def tokenizer(family: Family, nano_tokenizer: Any) -> Any:
    """The nano tokenizer, dressed as one of the family; its BOS is added to a plain text, as the originals do."""
    from tokenizers.processors import TemplateProcessing

    dressed = copy.deepcopy(nano_tokenizer)
    named = {name: token for name, token in (("bos_token", family.bos), ("eos_token", family.eos)) if token}
    dressed.add_special_tokens(named | {"pad_token": family.pad or family.eos})
    dressed.add_tokens([family.end, *family.special], special_tokens=True)
    if family.bos:
        dressed.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, dressed.bos_token_id)]
        )
    dressed.chat_template = family.template
    return dressed


def _trained(tokenizer: Any, example: Encoded) -> str:
    return tokenizer.decode([i for i, weight in zip(example.ids, example.weights, strict=True) if weight == 1.0])


def _count(tokenizer: Any, example: Encoded, token: str) -> int:
    return example.ids.count(tokenizer.convert_tokens_to_ids(token))


def test_the_family_would_double_its_bos(tokenizer: Any, family: Family) -> None:
    """The trap is there: the text holds a BOS and the tokenizer adds one of its own."""
    text = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": RESPONSE}], tokenize=False)
    if family.bos:
        assert tokenizer(text).input_ids.count(tokenizer.bos_token_id) == 2


def test_bos_stands_once(tokenizer: Any, family: Family) -> None:
    for example in (encode(tokenizer, PROMPT, RESPONSE), encode_conversation(tokenizer, TALK)):
        if family.bos:
            assert _count(tokenizer, example, family.bos) == 1
            assert example.ids[0] == tokenizer.bos_token_id


def test_ids_are_those_of_the_whole_text(tokenizer: Any) -> None:
    whole = tokenizer.apply_chat_template([*PROMPT, {"role": "assistant", "content": RESPONSE}], tokenize=False)
    assert encode(tokenizer, PROMPT, RESPONSE).ids == tokenizer(whole, add_special_tokens=False).input_ids
    talk = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert encode_conversation(tokenizer, TALK).ids == tokenizer(talk, add_special_tokens=False).input_ids


def test_the_prompt_is_what_inference_sends(tokenizer: Any) -> None:
    """The tokens of weight 0 are those that a vLLM worker is given."""
    example = encode(tokenizer, PROMPT, RESPONSE)
    text = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    read = [i for i, weight in zip(example.ids, example.weights, strict=True) if weight == 0.0]
    assert read == tokenizer(text, add_special_tokens=False).input_ids
    assert example.weights == sorted(example.weights)


def test_the_response_and_its_end_are_trained_on(tokenizer: Any, family: Family) -> None:
    example = encode(tokenizer, PROMPT, RESPONSE)
    assert _trained(tokenizer, example).strip() == RESPONSE + family.end
    ends = [place for place, i in enumerate(example.ids) if i == tokenizer.convert_tokens_to_ids(family.end)]
    assert example.weights[ends[-1]] == 1.0


def test_the_prompt_weighs_what_is_asked(tokenizer: Any) -> None:
    talk = [*PROMPT, {"role": "assistant", "content": RESPONSE}]
    example = encode_conversation(tokenizer, talk, other_weight=0.25)
    assert set(example.weights) == {0.25, 1.0}
    assert example.weights == [w or 0.25 for w in encode(tokenizer, PROMPT, RESPONSE).weights]


def test_a_group_is_its_rows_with_the_prompt_once(tokenizer: Any) -> None:
    group = encode_group(tokenizer, PROMPT, [RESPONSE, "Stop."], [(0, 1)], [2.0])
    for row, text in zip(group.responses, (RESPONSE, "Stop."), strict=True):
        assert group.prompt + row.ids == encode(tokenizer, PROMPT, text).ids
        assert set(row.weights) == {1.0}


def test_all_assistant_turns_of_a_talk_are_trained_on(tokenizer: Any, family: Family) -> None:
    trained = _trained(tokenizer, encode_conversation(tokenizer, TALK))
    assert [turn.strip() for turn in trained.split(family.end)] == ["What do you miss?", RESPONSE, ""]


def test_only_the_last_turn_when_asked(tokenizer: Any, family: Family) -> None:
    example = encode_conversation(tokenizer, TALK, last=True)
    assert _trained(tokenizer, example).strip() == RESPONSE + family.end
    assert example.ids == encode_conversation(tokenizer, TALK).ids


def test_pad_equal_to_eos_does_not_hide_the_last_token(tokenizer: Any, family: Family) -> None:
    """Padding is known by place: the end of turn of every row in a padded batch is trained on."""
    objective = SFT(SFTConfig(), tokenizer)
    talks = [{"messages": json.dumps(talk)} for talk in (TALK, [*PROMPT, TALK[1]])]
    groups, _ = objective.groups(talks, 1000)
    end = tokenizer.convert_tokens_to_ids(family.end)
    for batch in (padded(groups, tokenizer.pad_token_id), packed(groups)):
        ends = [int(((batch.targets == end) & (batch.response == row)).sum()) for row in range(2)]
        assert ends == [2, 1]


def test_pad_equal_to_eos_does_not_move_the_reward(
    tokenizer: Any, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """A reward is read at the last token of the conversation in training, in transformers, and in vLLM alike."""
    tokenizer.save_pretrained(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_llama(3, reward=True))
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.save_pretrained(tmp_path)
    objective = Reward(RewardConfig(), tokenizer)
    model = objective.load(str(tmp_path), torch.float32).eval()
    rows = [{"question": PROMPT[0]["content"], "chosen": RESPONSE, "rejected": "Stop."}]
    groups, _ = objective.groups(rows, 1000)
    with torch.no_grad():
        rewards = objective.wrap(model)(padded(groups, model.config.pad_token_id))
        for row, reward in zip(groups[0].responses, rewards.tolist(), strict=True):
            states = model.model(input_ids=torch.tensor([groups[0].prompt + row.ids])).last_hidden_state
            assert model.score(states)[0, -1].item() == pytest.approx(reward, abs=1e-5)
    assert model.config.pad_token_id == tokenizer.pad_token_id != groups[0].responses[0].ids[-1]


def test_a_template_that_rewrites_earlier_turns_is_refused(nano_tokenizer: Any) -> None:
    """Some templates drop what was said before the last turn; training on that would teach something else."""
    rewriting = copy.deepcopy(nano_tokenizer)
    rewriting.chat_template = (
        "{% for message in messages %}{% if loop.last or message['role'] == 'user' %}"
        "<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_conversation(rewriting, TALK)
    assert encode_conversation(rewriting, TALK, last=True).ids


PART = Group([1, 2], tuple(Encoded([i] * i, [1.0] * i) for i in (3, 4, 5)), ((2, 0), (1, 0), (2, 1)), (2.0, 1.0, 1.0))


def test_counts_of_a_group() -> None:
    assert (PART.tokens, PART.count, PART.longest) == (14, 3, 7)
    assert Group([], (Encoded([1], [1.0]),)).count == 1


def test_only_keeps_what_its_pairs_need() -> None:
    part = only(PART, [0, 2])
    assert [len(row) for row in part.responses] == [3, 4, 5] and part.pairs == ((2, 0), (2, 1))
    part = only(PART, [1])
    assert [len(row) for row in part.responses] == [3, 4] and part.pairs == ((1, 0),) and part.gaps == (1.0,)


@given(st.integers(1, 6), st.integers(2, 7), st.integers(0, 2**31), st.integers(20, 80))
def test_a_split_group_holds_the_same_pairs_within_the_budget(size: int, k: int, seed: int, budget: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 7) for _ in range(k)]
    rows = tuple(Encoded([i] * n, [1.0] * n) for i, n in enumerate(sizes))
    group = Group([9] * size, rows, tuple((i, j) for i in range(k) for j in range(i + 1, k)))
    parts = split(group, budget)
    assert all(part.tokens <= budget for part in parts)
    pairs = [(part.responses[a], part.responses[b]) for part in parts for a, b in part.pairs]
    assert pairs == [(rows[a], rows[b]) for a, b in group.pairs]


def test_a_pair_over_the_budget_is_an_error() -> None:
    with pytest.raises(ValueError, match="over the budget"):
        split(PART, 8)


def test_the_pairs_of_one_choice_stay_together() -> None:
    """Six responses ranked, in bins of three: of the lists of 6, 5, 4, 3 and 2 the last two fit."""
    rows = tuple(Encoded([i] * 3, [1.0] * 3) for i in range(4))
    pairs = ((0, 1), (1, 2), (0, 2), (1, 3), (0, 3), (2, 3))
    group = Group([9], rows, pairs, (1.0, 1.0, 2.0, 2.0, 3.0, 1.0))
    parts = split(replace(group, pairs=pairs[1:]), 10, listwise=True)
    assert all(part.tokens <= 10 for part in parts)
    lists = [{part.responses[a].ids[0]: None for a, _ in part.pairs} for part in parts]
    assert sum(map(len, lists)) == sum(part.choices for part in parts) == 3
    with pytest.raises(BadInput, match=r"take 13 tokens.* set training\.bin_tokens \(now 10\)"):
        split(group, 10, listwise=True)


def test_desensitised_tokens_beyond_the_shared_length_weigh_alpha() -> None:
    first, *_ = desensitise(PART, 0.25)
    assert [row.weights for row in first.responses] == [[1.0] * 3, [1.0] * 3 + [0.25] * 2]


def test_keys_tell_tokens_prompts_and_weights_apart() -> None:
    keys = {response_key(PART, i) for i in range(3)} | {response_key(replace(PART, prompt=[1, 3]), 0)}
    keys.add(response_key(desensitise(PART, 0.5)[0], 1))
    assert len(keys) == 5 and response_key(PART, 0) == response_key(only(PART, [0]), 0)
