"""A caption fits its curve: what it says of a loss is what that loss computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from psycho.config import Config, load_config
from psycho.evaluation.captions import loss_caption, reward_caption
from psycho.training import losses

CONFIG = Path(__file__).parents[2] / "configs" / "nano.yaml"


def config(**dpo: Any) -> Config:
    return load_config(CONFIG, [f"training.dpo.{name}={value}" for name, value in {"nll_weight": 0, **dpo}.items()])


def first_loss(settings: Any) -> float:
    """Of a policy that is its reference still, on a pair of responses of 10 and 20 tokens."""
    chosen, rejected = torch.tensor([-20.0]).double(), torch.tensor([-44.0]).double()
    tokens = torch.tensor([10]), torch.tensor([20])
    pairs = losses.PairLogprobs(chosen, rejected, chosen, rejected, *tokens)
    return float(losses.preference(pairs, settings))


@pytest.mark.parametrize("loss", ["dpo", "robust", "dpo_norm", "hinge", "ipo"])
def test_a_loss_starts_where_its_caption_says(loss: str) -> None:
    settings = config(loss=loss, beta=0.2)
    start = first_loss(settings.training.dpo)
    text = loss_caption(settings, ["dpo"])
    said = text.split("dpo: ")[1].split(" ")[0].rstrip(",")
    assert float(said) == pytest.approx(start, abs=0.005)


@pytest.mark.parametrize("loss", ["dpo", "hinge"])
def test_a_likelihood_term_is_on_top(loss: str) -> None:
    """The default of the nano world: its curve starts far above .69."""
    settings = config(loss=loss, nll_weight=0.5)
    plain = math.log(2) if loss == "dpo" else 1
    assert first_loss(settings.training.dpo) > plain + 0.5
    text = loss_caption(settings, ["dpo"])
    assert "0.5 times the negative log-likelihood of the chosen response comes on top" in text
    assert "starts above that" in text and "dpo: 0.69" not in text


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_without_a_reference_neither_curve_is_measured_from_one(loss: str) -> None:
    settings = config(loss=loss)
    assert "no fixed value to start from" in loss_caption(settings, ["dpo"]) and "ln 2" not in loss_caption(
        settings, ["dpo"]
    )
    text = reward_caption(settings, ["dpo"])
    assert "always below 0" in text and "known failure" not in text
    both = reward_caption(settings, ["dpo", "online"])
    assert "Implicit reward of online" in both and "dpo: its loss has no reference" in both


def test_a_ranking_starts_at_the_log_of_its_list() -> None:
    assert "the log of the number of responses" in loss_caption(config(loss="plackett_luce"), ["dpo"])


def test_only_trainings_that_were_done_are_spoken_of() -> None:
    assert loss_caption(config(), ["sft"]) == "Loss at each optimizer step (faint) and its running mean."
    assert "online round" not in loss_caption(config(), ["sft", "dpo"])


@pytest.mark.parametrize("setting", ["margin_per_gap=1", "centring=0.01", "principle_heads=0.1", "loss=plackett_luce"])
def test_a_reward_model_with_more_in_its_loss_has_no_start_at_ln_2(setting: str) -> None:
    plain = load_config(CONFIG, ["training.reward.principle_heads=0", "training.reward.loss=bradley_terry"])
    assert "reward: 0.69" in loss_caption(plain, ["reward"])
    assert "0.69" not in loss_caption(load_config(CONFIG, [f"training.reward.{setting}"]), ["reward"])


def test_a_fixed_reference_is_that_of_the_first_round() -> None:
    renewed, fixed = (
        load_config(CONFIG, [f"online.reference={reference}", "online.nll_weight=0"])
        for reference in ("each_round", "fixed")
    )
    assert "at the start of each round" in loss_caption(renewed, ["online"])
    assert "than when the round began" in reward_caption(renewed, ["online"])
    assert "each round" not in loss_caption(fixed, ["online"]) and "round began" not in reward_caption(
        fixed, ["online"]
    )
