"""How the nano models are made: sizes, steps, and a hash of all that decides what they learn.

The hash covers values, word banks and sample rows as they are rendered, never source text: a file that moves or a
function that is renamed makes no other models. `nano.json` beside the models keeps it, and a test compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice

from psycho.judging import rubric
from psycho.nano import corpora, gold
from psycho.nano.grammar import STAGES, bank_digest, vocabulary
from psycho.nano.tokenizer import CHAT_TEMPLATE, SPECIAL
from psycho.nano.world import POLICIES
from psycho.principles import STEMS
from psycho.run import content_key

MAX_LENGTH = 2048
SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 320}
_SAMPLE_ROWS = 8


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: steps of `batch` rows at a peak learning rate; `more` steps where a gate is missed."""

    steps: int
    more: int
    batch: int
    lr: float
    prompt_loss_weight: float


BACKBONE = Recipe(steps=1500, more=700, batch=12, lr=3e-3, prompt_loss_weight=0.3)
JUDGE = Recipe(steps=700, more=350, batch=24, lr=2e-3, prompt_loss_weight=0.05)
POLICY = Recipe(steps=48, more=24, batch=32, lr=1e-3, prompt_loss_weight=0.0)


def rows(name: str, seed: int, steps: int) -> Iterator[corpora.Row]:
    """Training rows of one model, in the order in which they are learned."""
    if name == "backbone":
        return corpora.backbone_rows(seed, steps, BACKBONE.batch)
    if name == "judge":
        return corpora.judge_rows(seed, steps, JUDGE.batch)
    return corpora.style_rows(seed, name, steps, POLICY.batch)


def recipe_of(name: str) -> Recipe:
    """The recipe of a model."""
    return {"backbone": BACKBONE, "judge": JUDGE}.get(name, POLICY)


def recipe_hash() -> str:
    """16 hexadecimal digits of everything that the models depend on but the seed and the machine."""
    answer = rubric.answer(dict.fromkeys(STEMS, 3), dict.fromkeys(STEMS, "some words"))
    form = rubric.single_prompt("speech", "reply", "compact"), rubric.second_turn("reply"), rubric.dump(answer)
    return content_key(
        {name: asdict(recipe_of(name)) for name in ("backbone", "judge", "base")},
        [SHAPE, MAX_LENGTH, CHAT_TEMPLATE, SPECIAL, vocabulary(), STAGES],
        [gold.FIT_RATINGS, gold.LEVEL_RATINGS, bank_digest(), form],
        {name: list(islice(rows(name, 1, 4), _SAMPLE_ROWS)) for name in ("backbone", "judge", *POLICIES)},
    )
