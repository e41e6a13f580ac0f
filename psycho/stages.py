"""The stages of the loop: what each depends on, in the configuration and among the other stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from psycho import secrets, storage
from psycho.checks import check_together
from psycho.config import ENGINE_ROUNDING, TRAINING_ROUNDING, Config, JudgeConfig
from psycho.errors import BadInput
from psycho.inference.endpoint import api_key
from psycho.inference.models import check_model
from psycho.judging.rubric import prompt_version
from psycho.models import NANO, identity, named_models, provide, resolve
from psycho.nano.grammar import bank_digest
from psycho.preferences.source import source_facts
from psycho.run import Stage
from psycho.speeches.source import fingerprint
from psycho.training.online.placement import check_placement

Settings = Mapping[str, Any]
CALIBRATION = ("evaluation", "calibration.json")  # written by `judge --calibrate`, in the run folder
POLICIES = ("base", "sft", "dpo", "online")
_ESTIMATES = {"parameters_b", "gpus_per_worker"}
_ASIDE: dict[str, Any] = {**dict.fromkeys(_ESTIMATES, True), "engine": set(ENGINE_ROUNDING)}
_JUDGE_ASIDE: dict[str, Any] = {**_ASIDE, "unfit": True, "panel": {"__all__": _ASIDE}}


def _training(config: Config) -> dict[str, Any]:
    """Settings of training that can change its result."""
    plain = config.training.model_dump(mode="json")
    return {k: v for k, v in plain.items() if k not in TRAINING_ROUNDING | {"sft", "reward", "dpo"}}


def _engine(config: Config) -> dict[str, Any]:
    """Settings of the engines that can change what they answer."""
    return config.inference.engine.model_dump(mode="json", exclude=set(ENGINE_ROUNDING))


def _source(config: Config) -> list[Any]:
    if config.speeches.source == "nano":
        return [bank_digest()]
    return fingerprint(config.speeches)


def _pairs_source(config: Config) -> dict[str, Any]:
    """What a run that starts from published pairs depends on in place of speeches; a hub id stands for itself."""
    named = [name for name in (config.pairs.source, config.pairs.test_source) if name]
    facts = [fact for name in named for fact in source_facts(name)]
    sides = config.pairs.model_dump(include={"test_share", "resplit"})
    return {"pairs": named, "facts": facts, **sides, "seed": config.seed}


def _prepare(config: Config) -> Settings:
    if config.pairs.source:
        return _pairs_source(config)
    labels = [model for model in config.generation.pool if model.name == config.speeches.topic_model]
    return {
        "speeches": config.speeches.model_dump(mode="json", exclude={"batch_timeout_s"}),
        "source": _source(config),
        "topic_model": [identity(config, model.model) for model in labels],
        "seed": config.seed,
    }


def _generate(config: Config) -> Settings:
    pool = config.generation.pool
    aside: Any = {"budget": True, "pool": {"__all__": {**_ASIDE, "price": True, "remote": True}}}
    return {
        "generation": config.generation.model_dump(mode="json", exclude=aside),
        "models": [f"{m.remote.url} {m.model}" if m.remote else identity(config, m.model) for m in pool],
        "engine": _engine(config),
        "seed": config.seed,
    }


def _judge(config: Config) -> Settings:
    members = config.judge.members()
    return {
        "judge": config.judge.model_dump(mode="json", exclude=_JUDGE_ASIDE),
        "models": [identity(config, member.model) for member in members],
        "prompts": [prompt_version(m.template, "direct" if m.mode == "direct" else "evidence") for m in members],
        "engine": _engine(config),
        "seed": config.seed,
    }


def _pair(config: Config) -> Settings:
    pairs = config.pairs.model_dump(mode="json", exclude={"source", "test_source", "test_share", "resplit"})
    return {"pairs": pairs, "seed": config.seed}


def starts_from_pairs(config: Config) -> bool:
    """True for a run on published pairs: it samples and judges no responses of its own before training."""
    return config.pairs.source is not None


def _train_sft(config: Config) -> Settings:
    return {
        "training": _training(config),
        "sft": config.training.sft,
        "policy": identity(config, config.policy),
        "dev_share": config.pairs.dev_share,  # what is kept to choose by is not trained on
        "seed": config.seed,
    }


def _train_reward(config: Config) -> Settings:
    init = config.training.reward.init
    return {
        "training": _training(config),
        "reward": config.training.reward,
        "init": identity(config, config.policy if init == "policy" else init),
        "seed": config.seed,
    }


def _train_dpo(config: Config) -> Settings:
    return {
        "training": _training(config),
        "dpo": config.training.dpo,
        "policy": identity(config, config.policy),
        "seed": config.seed,
    }


def _asked(config: Config, judge: JudgeConfig) -> list[Any]:
    """A judge that online DPO asks."""
    return [_unkept(judge), identity(config, judge.model)]


def _unkept(judge: JudgeConfig) -> dict[str, Any]:
    """Settings of a judge whose evidence nobody keeps, so that its check changes nothing."""
    return judge.model_dump(mode="json", exclude={**_JUDGE_ASIDE, "evidence_check": True})


def _train_online(config: Config) -> Settings:
    where = {"round_timeout_s", "scorer_workers", "scorer_gpus_per_worker", "probes", "sync_tolerance", "kl_samples"}
    where |= {"placement", "transport", "sync_bucket_mib", "sleep_level"}
    aside: Any = {**dict.fromkeys(where, True), "scorer_engine": set(ENGINE_ROUNDING)}
    held_out = config.evaluation.judge
    return {
        "training": _training(config),
        "online": config.online.model_dump(mode="json", exclude=aside),
        "judge": _asked(config, config.judge) if config.online.judged else None,
        "held_out": _asked(config, held_out) if held_out and config.online.gold_every else None,
        "dev_share": config.pairs.dev_share,
        "engine": _engine(config),
        "seed": config.seed,
    }


def _evaluate(config: Config) -> Settings:
    judge = evaluation_judge(config)
    return {
        "evaluation": config.evaluation.model_dump(mode="json", exclude={"judge"}),
        "judge": _unkept(judge),
        "models": [identity(config, m) for m in (config.policy, judge.model, config.evaluation.baseline)],
        "engine": _engine(config),
        "seed": config.seed,
    }


def _report(config: Config) -> Settings:
    """A calibration may come at any time, and the report shows it."""
    return {"name": config.name, "calibration": storage.read_text(storage.join(config.run_dir, *CALIBRATION))}


def evaluation_judge(config: Config) -> Any:
    """The judge of the win rate: its own setting, else the label judge."""
    return config.evaluation.judge or config.judge


def same_judge(config: Config) -> bool:
    """True when the judge that labelled the pairs decides the win rate too, so that its taste counts twice."""
    return not starts_from_pairs(config) and evaluation_judge(config).model == config.judge.model


def nano_among_people(config: Config) -> str | None:
    """A sentence where models of the nano world would meet speeches of another one; None where all is well."""
    if config.speeches.source == "nano" and not starts_from_pairs(config):
        return None
    settings = dict.fromkeys(
        setting.partition(" ")[0] for setting, model in named_models(config).items() if model.startswith(NANO)
    )
    if not settings:
        return None
    return (
        f"{', '.join(settings)}: models of the nano world know its speeches alone, so their answers and ratings mean "
        "nothing for real people; start from configs/smollm2.yaml, or with a GPU from configs/small-1gpu.yaml"
    )


STAGES: tuple[Stage, ...] = (
    Stage("prepare", lambda c: (), _prepare, ("speeches",)),
    Stage("generate", lambda c: ("prepare",), _generate, ("responses",)),
    Stage("judge", lambda c: ("generate",), _judge, ("ratings",)),
    Stage("pair", lambda c: ("prepare",) if starts_from_pairs(c) else ("judge",), _pair, ("preferences",)),
    Stage("train_sft", lambda c: ("pair",) if starts_from_pairs(c) else ("judge",), _train_sft, ("models/sft",)),
    Stage("train_reward", lambda c: ("pair",), _train_reward, ("models/reward",)),
    Stage(
        "train_dpo",
        lambda c: ("pair", "train_sft") if c.training.dpo.init == "sft" else ("pair",),
        _train_dpo,
        ("models/dpo",),
    ),
    Stage(
        "train_online",
        lambda c: ("prepare", "train_dpo", "train_reward") if c.online.rewarded else ("prepare", "train_dpo"),
        _train_online,
        ("models/online", "online"),
    ),
    Stage(
        "evaluate",
        lambda c: ("train_sft", "train_reward", "train_dpo", "train_online"),
        _evaluate,
        ("evaluation",),
    ),
    Stage("report", lambda c: ("evaluate",), _report, ("report.html",)),
)


def check_config(config: Config) -> None:
    """Look for what would fail later, before anything is started.

    Raises:
        BadInput: a setting that the loop needs is empty, settings contradict each other, or a model's folder is not
            whole.
    """
    secrets.filled(config)
    check_placement(config)
    check_together(config)
    for setting, model in used_models(config).items():
        if not model:
            raise BadInput(f"{setting} is empty; name a model folder, a hub id, fetched:smollm2 or nano:<name>")
        if resolve(config, model) == model:  # others are made when they are needed
            check_model(model, needs_chat_template=setting != "training.reward.init")
    for entry in config.generation.pool:
        api_key(entry)
    if not config.generation.pool and not starts_from_pairs(config):
        raise BadInput("generation.pool is empty; list at least generation.models_per_speech models")


def provide_models(config: Config, say: Callable[[str], None]) -> None:
    """Fetch and convert what the run names and this machine has not yet got.

    Raises:
        BadInput: a model cannot be had, or is not whole.
    """
    for setting, model in used_models(config).items():
        if folder := provide(model, say):
            check_model(str(folder), needs_chat_template=setting != "training.reward.init")


def used_models(config: Config) -> dict[str, str]:
    """The models that the run has work for, by the setting that names them."""
    named = named_models(config)
    if not starts_from_pairs(config):
        return named
    idle = [setting for setting in named if setting.startswith("generation.pool")]
    idle += [] if _judges(config) else ["judge.model"]
    return {setting: model for setting, model in named.items() if setting not in idle}


def _judges(config: Config) -> bool:
    """True when the label judge has work to do after the pairs are made."""
    return config.online.judged or config.evaluation.judge is None
