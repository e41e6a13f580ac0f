"""Floating-point operations that training on a group needs, counted from the model's shape: what MFU divides by.

As Chowdhery et al. (2022, PaLM, appendix B): two a parameter and token in the forward pass, twice that in the backward
pass, with the attention's matrix products; what is recomputed counts nothing. The prompt counts once, and the output
head only where a token is trained on, for that is all that a step has to do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from psycho.training.groups import Group


@dataclass(frozen=True)
class ModelFlops:
    """A model's share of the count."""

    layers: int
    """Parameters that each token passes: all but embeddings and output head."""
    head: int
    """Parameters of the output head of a language model; 0 where no logits of words are made."""
    attention: int
    """Operations of one query with one key over all layers and heads, forward."""
    frozen: bool = False
    """The weights get no gradient (LoRA), which saves a third of what parameters cost."""

    def of(self, group: Group) -> float:
        """Operations of one training step on a group."""
        trained = sum(sum(map(bool, row.weights)) for row in group.responses)
        parameters = self.layers * group.tokens + self.head * trained
        return (4 if self.frozen else 6) * float(parameters) + 3 * float(self.attention) * _looks(group)


def _looks(group: Group) -> int:
    """Query-key pairs: each token at those before it in its prompt and response, and at itself."""
    prompt = len(group.prompt)
    own = sum(len(row) * (len(row) + 1) // 2 + len(row) * prompt for row in group.responses)
    return prompt * (prompt + 1) // 2 + own


def count_flops(model: Any, words: bool, frozen: bool) -> ModelFlops:
    """Of a loaded `transformers` model; `words`: it is trained through logits of its vocabulary.

    Experts of a mixture count as if each token passed all of them.
    """
    text = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight.numel()
    head = model.get_output_embeddings().weight if words else None
    own_head = 0 if head is None or head is model.get_input_embeddings().weight else head.numel()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelFlops(
        layers=model.num_parameters() - embedding - own_head,  # counts weights in 4 bit as what they stand for
        head=0 if head is None else head.numel(),
        attention=4 * text.num_attention_heads * width * text.num_hidden_layers,
        frozen=frozen,
    )
