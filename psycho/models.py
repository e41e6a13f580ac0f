"""Names of models in a configuration, resolved: `nano:<name>`, `fetched:<name>`, a GGUF file, a folder, a hub id with
`@revision` or without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from psycho.config import Config
from psycho.inference import gguf
from psycho.inference.fetch import FETCHED, ensure_fetched, packaged
from psycho.inference.models import fingerprint, hub_commit
from psycho.nano import world

NANO = "nano:"


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
        BadInput: there is no nano or fetched model of that name, or no such GGUF file.
    """
    if made := made_folder(model):
        return str(made)
    if not model.startswith(NANO):
        return str(Path(model).expanduser()) if model.startswith("~") else model
    return world.model_folder(config.nano, model.removeprefix(NANO))


def identity(config: Config, model: str) -> str:
    """What a stage's key says of a model."""
    if made := made_folder(model):
        return made.name  # by the file that it is made from, so that fetching it again changes nothing
    return world.identity(config.nano, model.removeprefix(NANO)) if model.startswith(NANO) else fingerprint(model)


def hub_commits(config: Config) -> dict[str, str]:
    """The commit of each hub model that the configuration names, as far as this machine's cache knows it."""
    named = {model for model in named_models(config).values() if not made_folder(model)}
    found = {model: hub_commit(model) for model in sorted(named)}
    return {model: commit for model, commit in found.items() if commit}


def made_folder(model: str) -> Path | None:
    """Where a model lies that is made from a GGUF file, of a package or one's own; None for any other model.

    Raises:
        BadInput: there is no such model to fetch, or no such file.
    """
    if model.startswith(FETCHED):
        return packaged(model).folder
    return gguf.folder_of(model) if model.endswith(gguf.SUFFIX) else None


def provide(model: str, say: Callable[[str], None]) -> Path | None:
    """As `made_folder`, and the model is there.

    Raises:
        BadInput: it cannot be fetched or converted; the sentence says what to do.
        WaitTimedOut: that took too long.
    """
    if model.startswith(FETCHED):
        return ensure_fetched(model, say)
    return gguf.ensure_converted(model, say) if model.endswith(gguf.SUFFIX) else None
