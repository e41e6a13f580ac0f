"""The nano models: made once by the project's own SFT, kept outside the run, found again by content key.

A backbone learns the language and the judge's drills; judge, generators, base policy and reference are fine-tuned
from it. The key is a hash of everything that they depend on (banks, grammar, recipes, seed, versions of the code), so a
change of any makes new ones and a second run makes none.
"""

from __future__ import annotations

import ast
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout

from psycho import storage
from psycho.config import NanoConfig, SFTConfig, TrainingConfig
from psycho.errors import BadInput, WaitTimedOut
from psycho.inference.models import cache_root
from psycho.judging import rubric
from psycho.nano import corpora
from psycho.principles import STEMS
from psycho.progress import Progress
from psycho.run import content_key
from psycho.training.launch import TrainJob, train

MAX_LENGTH = 2048
_LOCK_TIMEOUT_S = 3600.0
POLICIES = ("base", "brisk", "warm", "coach", "skilled", "reference")
MODELS = ("backbone", "judge", *POLICIES)
_SOURCES = ("grammar.py", "gold.py", "corpora.py", "tokenizer.py", "build.py")


@dataclass(frozen=True)
class Recipe:
    """How one model is trained: steps of `batch` rows at a peak learning rate."""

    steps: int
    batch: int
    lr: float
    prompt_loss_weight: float


BACKBONE = Recipe(steps=850, batch=32, lr=3e-3, prompt_loss_weight=0.3)
JUDGE = Recipe(steps=340, batch=48, lr=2e-3, prompt_loss_weight=0.05)
POLICY = Recipe(steps=48, batch=32, lr=1e-3, prompt_loss_weight=0.0)


def nano_key(config: NanoConfig) -> str:
    """The content key of the nano models."""
    digest = hashlib.sha256()
    package = resources.files("psycho.nano")
    for name in _SOURCES:
        digest.update(_code(package.joinpath(name).read_text(encoding="utf-8")))
    digest.update(repr(_format()).encode())
    for bank in sorted(package.joinpath("banks").iterdir(), key=lambda entry: entry.name):
        if bank.name.endswith(".yaml"):
            digest.update(bank.read_bytes())
    return content_key(digest.hexdigest(), config.model_dump())


def _format() -> tuple[Any, ...]:
    """The compact format's very words, which the judge learns."""
    answer = rubric.answer(dict.fromkeys(STEMS, 3), dict.fromkeys(STEMS, "some words"))
    return rubric.single_prompt("speech", "reply", "compact"), rubric.second_turn("reply"), rubric.dump(answer)


def _code(source: str) -> bytes:
    """The code without comments, docstrings and layout: a change of words is no reason to train again."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def nano_folder(config: NanoConfig) -> Path:
    """Where the models of this key lie."""
    return cache_root() / "nano" / nano_key(config)


def is_built(config: NanoConfig) -> bool:
    """True when all models of this key are there."""
    return (nano_folder(config) / "complete").is_file()


def build(config: NanoConfig, training: TrainingConfig, progress: Progress) -> None:
    """Make the models that are not there yet; an interrupted build goes on with the next model.

    Raises:
        BadInput: the cache cannot be written.
        WaitTimedOut: another process is making the same models and does not finish.
        StageFailed: a training failed.
    """
    target = nano_folder(config)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"the cache {target.parent} cannot be written ({error.strerror}); set PSYCHO_CACHE") from None
    work = target / "work"
    try:
        with FileLock(target / "lock", timeout=_LOCK_TIMEOUT_S):
            if is_built(config):
                return
            _fresh(work / "init", config.seed)
            jobs = [job for job in _jobs(target, config) if not Path(job.output).exists()]
            rows = sum(storage.read_table(job.data).num_rows for job in jobs)
            with progress.stage("nano", rows, "texts") as reporter:
                train(jobs, nano_training(training), reporter, str(work / "ray"))
            shutil.rmtree(work)
            storage.write_text(str(target / "complete"), nano_key(config))
    except Timeout:
        raise WaitTimedOut(f"another process that makes the nano models in {target}", _LOCK_TIMEOUT_S) from None


def nano_training(training: TrainingConfig) -> TrainingConfig:
    """The training section for the nano models: its workers and device, in single precision."""
    return training.model_copy(update={"precision": "fp32", "max_length": MAX_LENGTH, "gradient_checkpointing": False})


def _fresh(folder: Path, seed: int) -> None:
    """The untrained model: 0.9 M parameters, one token a word."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from psycho.nano.grammar import STAGES, vocabulary
    from psycho.nano.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([*vocabulary(), *STAGES], MAX_LENGTH)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=320,
            tie_word_embeddings=True,
            max_position_embeddings=MAX_LENGTH,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _jobs(root: Path, config: NanoConfig) -> Iterator[TrainJob]:
    def job(name: str, start: str, recipe: Recipe, rows: Iterator[corpora.Row]) -> TrainJob:
        data = root / "work" / "data" / name
        storage.write_table(pa.Table.from_pylist(list(rows)), str(data))
        settings = SFTConfig(
            lr=recipe.lr,
            batch_size=recipe.batch,
            epochs=1,
            prompt_loss_weight=recipe.prompt_loss_weight,
        )
        # The order of the rows is the curriculum.
        return TrainJob(
            "sft",
            str(root / start),
            str(data),
            str(root / name),
            settings,
            config.seed,
            shuffle=False,
            name=name,
        )

    def steps(recipe: Recipe) -> int:
        return max(1, round(recipe.steps * config.scale))

    seed = config.seed * 1000
    yield job("backbone", "work/init", BACKBONE, corpora.backbone_rows(seed + 1, steps(BACKBONE), BACKBONE.batch))
    yield job("judge", "backbone", JUDGE, corpora.judge_rows(seed + 2, steps(JUDGE), JUDGE.batch))
    for number, style in enumerate(POLICIES):
        rows = corpora.style_rows(seed + 10 + number, style, steps(POLICY), POLICY.batch)
        yield job(style, "backbone", POLICY, rows)


def speeches(config: NanoConfig, train_count: int, evaluation_count: int, seed: int) -> list[dict[str, str]]:
    """Client speeches of the nano world; those for evaluation combine slots that no model was trained on."""
    import random

    from psycho.nano.grammar import sample_speech
    from psycho.schema import stable_id

    rng = random.Random(f"speeches-{config.seed}-{seed}")
    found: dict[str, dict[str, str]] = {}
    for split, count, held_out in (("train", train_count, False), ("evaluation", evaluation_count, True)):
        wanted = len(found) + count
        while len(found) < wanted:
            speech = sample_speech(rng, held_out_combinations=held_out)
            key = stable_id("speech", speech.text)
            found.setdefault(key, {"speech_id": key, "question": speech.text, "split": split, "topic": speech.topic})
    return list(found.values())
