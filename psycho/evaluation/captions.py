"""Captions of the training curves: each says what is true of the loss that was configured, and no more.

Where a loss starts, and what an implicit reward is measured against, depends on the objective; a sentence that fits
the default alone would be wrong under another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from psycho.config import Config, PreferenceConfig

_HALVES = ("dpo", "robust", "dpo_norm")  # their loss is ln 2 where policy and reference are the same


def loss_caption(config: Config, names: Iterable[str]) -> str:
    """Of the loss curves of the trainings `names`."""
    names = tuple(names)
    parts = ["Loss at each optimizer step (faint) and its running mean."]
    if "online" in names:
        parts.append("Dotted: a new online round.")
    if len(names) > 1:
        parts.append("Losses of different trainings do not compare.")
    parts += [text for name in names if (text := _start(config, name))]
    return " ".join(parts)


def _start(config: Config, name: str) -> str:
    """What the loss is where the model cannot tell chosen from rejected yet; empty where that is no fixed number."""
    if name == "reward":
        reward = config.training.reward
        plain = reward.loss == "bradley_terry" and not (
            reward.margin_per_gap or reward.centring or reward.principle_heads
        )
        return f"reward: {math.log(2):.2f} (ln 2) is a model that cannot tell chosen from rejected." if plain else ""
    if name not in ("dpo", "online"):
        return ""
    settings = preference_settings(config, name)
    known = "the policy is still its reference and tells nothing apart"
    starts = {
        **dict.fromkeys(_HALVES, f"{math.log(2):.2f} (ln 2)"),
        "hinge": "1",
        "ipo": f"{1 / (2 * settings.beta) ** 2:.3g}, which is (1 / 2β)²",
        "plackett_luce": "the log of the number of responses in a list",
    }
    start = starts.get(settings.loss)
    if start is None:
        return f"{name}: the loss {settings.loss} has no reference, and no fixed value to start from."
    if settings.nll_weight:
        return (
            f"{name}: where {known}, the preference part is {start}; {settings.nll_weight:g} times the negative "
            "log-likelihood of the chosen response comes on top, so the curve starts above that."
        )
    where = " at the start of each round" if name == "online" and reference_renews(config) else ""
    return f"{name}: {start} where {known}{where}."


def reward_caption(config: Config, names: Iterable[str]) -> str:
    """Of the curves of implicit rewards of the trainings `names`."""
    names = tuple(names)
    compared = [name for name in names if preference_settings(config, name).needs_reference]
    parts = []
    if compared:
        online = " (online: than when the round began)" if "online" in compared and reference_renews(config) else ""
        parts.append(
            f"Implicit reward{'' if len(compared) == len(names) else ' of ' + ' and '.join(compared)}: how much more "
            f"likely (above 0) or less likely (below 0) than at the start{online} the model finds the chosen and the "
            "rejected responses, as β times the log-ratio. The gap should grow. A falling chosen line is a known "
            "failure: the model then unlearns good responses too."
        )
    for name in names:
        if name not in compared:
            parts.append(
                f"{name}: its loss has no reference, so what is shown is β times the log-probability itself, which is "
                "always below 0. The gap should grow."
            )
    return " ".join(parts)


def preference_settings(config: Config, name: str) -> PreferenceConfig:
    """The settings of the training `name`, dpo or online."""
    return config.online if name == "online" else config.training.dpo


def reference_renews(config: Config) -> bool:
    """True where each online round starts from a reference of its own."""
    return config.online.reference == "each_round"
