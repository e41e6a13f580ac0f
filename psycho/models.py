"""Names of models in a configuration, resolved: `nano:<name>`, a folder, a hub id, with `@revision` or without."""

from __future__ import annotations

from pathlib import Path

from psycho.config import Config
from psycho.inference.models import fingerprint, hub_commit
from psycho.nano import world

NANO = "nano:"


def uses_nano(config: Config) -> bool:
    """True when the run needs the embedded models."""
    return any(name.startswith(NANO) for name in named_models(config).values())


def named_models(config: Config) -> dict[str, str]:
    """Every model that runs on this cluster, by the setting that names it."""
    named = {
        "policy": config.policy,
        "judge.model": config.judge.model,
        "evaluation.baseline": config.evaluation.baseline,
        **{f"generation.pool ({model.name})": model.model for model in config.generation.pool if not model.remote},
    }
    if config.judge.mode == "panel":
        named |= {f"judge.panel.{n}.model": member.model for n, member in enumerate(config.judge.panel)}
    if config.evaluation.judge:
        named["evaluation.judge.model"] = config.evaluation.judge.model
    if config.training.reward.init != "policy":
        named["training.reward.init"] = config.training.reward.init
    return named


def resolve(config: Config, model: str) -> str:
    """The folder or hub id that `model` stands for.

    Raises:
        BadInput: there is no nano model of that name.
    """
    if not model.startswith(NANO):
        return str(Path(model).expanduser()) if model.startswith("~") else model
    return world.model_folder(config.nano, model.removeprefix(NANO))


def identity(config: Config, model: str) -> str:
    """What a stage's key says of a model."""
    return world.identity(config.nano, model.removeprefix(NANO)) if model.startswith(NANO) else fingerprint(model)


def hub_commits(config: Config) -> dict[str, str]:
    """The commit of each hub model that the configuration names, as far as this machine's cache knows it."""
    found = {model: hub_commit(model) for model in sorted(set(named_models(config).values()))}
    return {model: commit for model, commit in found.items() if commit}
