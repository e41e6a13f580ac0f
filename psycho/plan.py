"""What a run would do, before it does anything: rows, requests, steps, GPUs and memory of every stage (`--dry-run`).

It reads the configuration, the source's columns (and counts its rows) and the run folder's manifests; it touches
nothing. A source that the run would refuse is refused here. Memory is estimated in `memory.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from psycho import storage
from psycho.checks import cannot_split, engines, short_answers
from psycho.config import (
    Config,
    InferenceConfig,
    JudgeConfig,
    LoopConfig,
    ModelConfig,
    SamplingConfig,
    SpeechesConfig,
)
from psycho.errors import BadInput
from psycho.inference.requests import shares
from psycho.memory import Load, engine_load, fits, parameters_b, phase_gib, training_load
from psycho.models import resolve
from psycho.preferences.published import check_published
from psycho.preferences.shapes import COLUMNS
from psycho.preferences.source import source_files
from psycho.rowfile import text_rows
from psycho.run import Run
from psycho.speeches.read import file_rows
from psycho.speeches.source import SourceFile, find_files, is_hub_id
from psycho.stages import (
    POLICIES,
    STAGES,
    check_config,
    evaluation_judge,
    nano_among_people,
    same_judge,
    starts_from_pairs,
)
from psycho.training.online.pairing import most_pairs

CARDS_GIB = (24, 48, 80)
PAPER_SPEECHES = 26_483
PAPER_PAIRS = 34_329 + 2_324
_GAP_Z = 1.183  # gaps as half a normal curve: 23.7 % reach 1.0 (paper: 34,329 pairs of 24,159 speeches x 6)
_CHARS_PER_TOKEN, _RUBRIC_TOKENS = 4, 700


@dataclass(frozen=True)
class StagePlan:
    """One stage; its phases come one after the other, the loads of a phase live together."""

    name: str
    rows_in: int
    rows_out: int
    requests: int = 0
    steps: int = 0
    tokens: int = 0
    phases: tuple[tuple[Load, ...], ...] = ()
    done: bool = False

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(load.model for phase in self.phases for load in phase))

    @property
    def gpus(self) -> float:
        return max((sum(load.workers * load.gpus for load in phase) for phase in self.phases), default=0)

    @property
    def gpu_gib(self) -> float | None:
        return _most(phase_gib(phase) for phase in self.phases)

    @property
    def host_gib(self) -> float | None:
        return _most(load.host_gib for phase in self.phases for load in phase)


@dataclass(frozen=True)
class Plan:
    """The whole run; `job` is the stage that was asked for, or `pipeline`."""

    config: Config
    job: str
    speeches: str
    stages: tuple[StagePlan, ...]
    warnings: tuple[str, ...]


def print_plan(config: Config, job: str, console: Console, until: Sequence[str] = ()) -> None:
    """Print what `job` would do with this configuration; nothing is created, started or downloaded.

    `until`: the stages that a pipeline would go through; all without any.
    """
    plan = build_plan(config, job)
    if until:
        plan = replace(plan, stages=tuple(stage for stage in plan.stages if stage.name in until))
    size = parameters_b(config, config.policy)
    done = ", ".join(stage.name for stage in plan.stages if stage.done) or "none"
    for line in (
        f"plan of {config.name}: {job}",
        f"policy: {config.policy} ({f'{size:g} B parameters' if size else 'size unknown'})",
        f"run folder: {config.run_dir} ({_there(config)}; stages done: {done})",
        f"speeches: {plan.speeches}",
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print("", _table(plan), "", sep="\n")
    for line in [*_models(plan), "", *_totals(plan), *(f"warning: {text}" for text in plan.warnings)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _there(config: Config) -> str:
    try:
        return "is there" if storage.exists(config.run_dir) else "not there yet"
    except OSError as error:
        return f"cannot be reached: {type(error).__name__}"


def _totals(plan: Plan) -> list[str]:
    legend = "* done before; > asked for. Rows from pair on are estimates. Nothing was started, written or downloaded."
    peak = max(plan.stages, key=lambda stage: stage.gpus)
    if not peak.gpus:
        return ["no GPU is used; memory is the host's, of one worker", legend]
    phases = [phase for stage in plan.stages for phase in stage.phases]
    cards = [f"{card} GB: {'fits' if all(fits(x, card) for x in phases) else 'does not fit'}" for card in CARDS_GIB]
    largest = _gib(_most(stage.gpu_gib for stage in plan.stages))
    return [
        f"most GPUs at once: {peak.gpus:g} ({peak.name})",
        f"most memory on a GPU: {largest} GiB; cards of {', '.join(cards)}",
        legend,
    ]


def _table(plan: Plan) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("\nstage", no_wrap=True)
    counted = ("rows\nin", "rows\nout", "\nrequests", "\nsteps", "tokens\n(M)")
    for column in (*counted, "\nGPUs", "GiB a\nGPU", "host\nGiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage in plan.stages:
        counts = (stage.rows_in, stage.rows_out, stage.requests, stage.steps)
        table.add_row(
            ">" if stage.name == plan.job else "*" if stage.done else "",
            stage.name,
            *(f"{count:,}" if count else "" for count in counts),
            f"{stage.tokens / 1e6:,.1f}" if stage.tokens else "",
            f"{stage.gpus:g}" if stage.gpus else "",
            _gib(stage.gpu_gib),
            _gib(stage.host_gib),
            style="bold" if stage.name == plan.job else "dim" if stage.done else None,
        )
    return table


def _models(plan: Plan) -> list[str]:
    """Who is at work in each stage, with sizes; a pool as its span."""
    lines = []
    for stage in plan.stages:
        sizes = {model: parameters_b(plan.config, model) for model in stage.models}
        shown = [f"{Path(model).name} ({f'{b:g} B' if b else 'size unknown'})" for model, b in sizes.items()]
        if len(sizes) > 4:
            known = [b for b in sizes.values() if b]
            shown = [f"{len(sizes)} models" + (f" of {min(known):g} to {max(known):g} B" if known else "")]
        lines += [f"{stage.name:<13} {', '.join(shown)}"] if shown else []
    return lines


def _gib(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}" if value else ""


def _most(values: Iterable[float | None]) -> float | None:
    """The largest; unknown (None) where one of them is."""
    found = list(values)
    return None if None in found else max((value for value in found if value is not None), default=0.0)


def build_plan(config: Config, job: str) -> Plan:
    """Every stage with its expected rows and needs. Rows of a file are counted before cleaning, an upper bound.

    Raises:
        BadInput: there is a source that the run would refuse: it lacks a column, or its rows do not fit.
    """
    count, told = count_speeches(config)
    held = config.speeches.evaluation
    if starts_from_pairs(config):
        held = int(count * config.pairs.test_share)
    elif config.speeches.source != "nano":
        held = min(held, int(count * config.speeches.max_evaluation_share))
    done = _done(config)
    stages = [*_data_stages(config, count, held), *_training_stages(config, count - held, held)]
    stages += [_evaluate(config, held), StagePlan("report", 1, 1)]
    stages = [replace(stage, done=stage.name in done) for stage in stages]
    return Plan(config, job, told, tuple(stages), tuple(_warnings(config, told, stages)))


def count_speeches(config: Config) -> tuple[int, str]:
    """Speeches of the source, and a sentence on where the number comes from; a missing file is not an error.

    Raises:
        BadInput: a file that is there cannot be used.
    """
    speeches = config.speeches
    if starts_from_pairs(config):
        return _count_pairs(config)
    if speeches.source == "nano":
        made = speeches.nano_train + speeches.evaluation
        return made, f"{made:,} made by the nano grammar"
    far = storage.is_remote(speeches.source) or is_hub_id(speeches.source)
    there = not far and Path(speeches.source.removeprefix("file://")).expanduser().exists()
    found = sum(_count_speeches_of(file, speeches) for file in find_files(speeches)) if there else 0
    told = f"{found:,} rows before cleaning"
    if not there:
        why = "not counted from here" if far else "not there yet"
        found, told = PAPER_SPEECHES, f"{why}; assuming {PAPER_SPEECHES:,} as in the paper"
    elif not found:
        raise BadInput(f"{speeches.source} holds no rows; give a file with client speeches")
    kept = min(found, speeches.limit or found)
    return kept, f"{speeches.source} ({told}{f'; speeches.limit {kept:,}' if kept < found else ''})"


def _count_pairs(config: Config) -> tuple[int, str]:
    """Pairs of an imported set in place of speeches: an upper bound of them."""
    named = [name for name in (config.pairs.source, config.pairs.test_source) if name]
    if not all(Path(name).expanduser().exists() for name in named):
        return PAPER_PAIRS, f"{config.pairs.source} (not read; taken as the {PAPER_PAIRS:,} published pairs)"
    check_published(config.pairs)
    found = sum(_count_pairs_of(file) for name in named for file in source_files(name))
    return found, f"{config.pairs.source} ({found:,} pairs; no responses are sampled or judged for them)"


def _count_speeches_of(file: SourceFile, config: SpeechesConfig) -> int:
    """Rows of a file whose columns are those that the configuration names."""
    rows = file_rows(file, config, Counter())
    if file.kind not in ("parquet", "arrow"):
        return sum(1 for _ in rows)
    next(iter(rows), None)
    if file.kind == "parquet":
        return pq.ParquetFile(file.uri).metadata.num_rows
    with pa.ipc.open_stream(file.uri) as batches:
        return sum(batch.num_rows for batch in batches)


def _count_pairs_of(file: Path) -> int:
    if file.suffix.lower() == ".parquet":
        return pq.ParquetFile(file).metadata.num_rows
    return sum(1 for _ in text_rows(str(file), COLUMNS, lambda names: None, Counter()))


def expected_pairs(speeches: int, responses: int, min_gap: float, limit: int | None = None) -> int:
    """Train pairs to expect: the paper's yield, spread over other gaps as half a normal curve would be."""
    share = math.erfc(min_gap * _GAP_Z / math.sqrt(2))
    each = math.comb(responses, 2) * share
    return round(speeches * min(each, limit or each))


def _tokens(config: Config, sampling: SamplingConfig) -> tuple[int, int]:
    """Tokens of a prompt (a speech of middling length and the template) and of an answer (half its limit)."""
    speech = (config.speeches.min_chars + config.speeches.max_chars) // 2 + len(config.generation.system_prompt or "")
    return speech // _CHARS_PER_TOKEN + 20, sampling.max_tokens // 2


def _data_stages(config: Config, count: int, held: int) -> list[StagePlan]:
    if starts_from_pairs(config):
        return [StagePlan("prepare", count, count), StagePlan("pair", count, count)]
    k = config.generation.models_per_speech
    prompt, answer = _tokens(config, config.generation.sampling)
    pool = [(pool_load(config, model),) for model in config.generation.pool]
    judges_in_turn = tuple((_judge_load(config, judge, judge.model),) for judge in config.judge.members())
    read = _RUBRIC_TOKENS * (config.judge.template == "rubric") + prompt + answer + config.judge.max_tokens // 2
    asked = count * k * len(judges_in_turn)
    pairs = expected_pairs(count - held, k, config.pairs.min_gap, config.pairs.max_pairs_per_speech) + held
    return [
        StagePlan("prepare", count, count),
        StagePlan("generate", count * k, count * k, count * k, 0, count * k * (prompt + answer), tuple(pool)),
        StagePlan("judge", count * k, count * k, asked, 0, asked * read, judges_in_turn),
        StagePlan("pair", (count - held) * math.comb(k, 2) + held, pairs),
    ]


def pool_load(config: Config, model: ModelConfig) -> Load:
    """The workers that hold a model of the pool; a remote one needs nothing here."""
    if model.remote:
        return Load(f"{model.name}, remote", 1, 0, 0.0)
    return engine_load(config, model.model, model.engine, model.gpus_per_worker)


def remote_cost(config: Config, speeches: int) -> float:
    """What remote models would cost, at prompts and answers of middling length."""
    generation = config.generation
    drawn = shares({model.name: model.weight for model in generation.pool}, generation.models_per_speech)
    total = 0.0
    for model in generation.pool:
        if model.remote:
            prompt, answer = _tokens(config, model.sampling or generation.sampling)
            each = (prompt * model.price.input + answer * model.price.output) / 1e6
            total += speeches * drawn[model.name] * each
    return total


def _judge_load(config: Config, judge: JudgeConfig, model: str) -> Load:
    return engine_load(config, model, judge.engine, judge.gpus_per_worker)


def _training_stages(config: Config, train: int, held: int) -> list[StagePlan]:
    training, online, k = config.training, config.online, config.generation.models_per_speech
    pairs = expected_pairs(train, k, config.pairs.min_gap, config.pairs.max_pairs_per_speech)
    if starts_from_pairs(config):
        pairs = train
    length = min(training.max_length, sum(_tokens(config, config.generation.sampling)))
    start = config.policy if training.reward.init == "policy" else training.reward.init
    sampled = online.rounds * min(online.speeches_per_round, train)
    scorers, watchers = _online_engines(config, start)
    copies = int(online.reference == "fixed" and online.needs_reference)
    made = sampled * most_pairs(online)
    steps = online.rounds * _steps(made // online.rounds, online)
    answers = sampled * online.samples_per_speech
    seen = min(training.max_length, sum(_tokens(config, online.sampling)))
    asked = 1 + online.rewarded + online.judged
    # An answer to every dev speech with its scores, before the first round and after each, and every so often a rating.
    watched = asked * (1 + online.rounds)
    watched += 1 + -(-online.rounds // online.gold_every) if online.gold_every else 0
    watched *= round(train * config.pairs.dev_share)
    return [
        _fit(config, "train_sft", config.policy, train, training.sft, length),
        _fit(config, "train_reward", start, pairs, training.reward, length),
        _fit(config, "train_dpo", config.policy, pairs, training.dpo, length),
        StagePlan("train_online", answers, answers, asked * answers + watched, steps,
                  made * 2 * online.epochs * seen,
                  ((engine_load(config, config.policy, None, None), *scorers, *watchers,
                    training_load(config, config.policy, copies)),)),
    ]  # fmt: skip


def _online_engines(config: Config, reward_start: str) -> tuple[list[Load], list[Load]]:
    """The workers that score in online training and those that only watch, beside those that sample and train."""
    from psycho.training.online.placement import judge_workers, reward_workers

    online, held_out, policy = config.online, config.evaluation.judge, _online_start(config)

    def judging(judge: JudgeConfig) -> list[Load]:
        workers = judge_workers(config, judge, policy, _resolved(config, judge.model))
        return [_held(config, judge.model, workers)] if workers else []

    scorers = [_held(config, reward_start, reward_workers(config))] if online.rewarded else []
    scorers += judging(config.judge) if online.judged else []
    return scorers, judging(held_out) if online.gold_every and held_out else []


def _held(config: Config, model: str, pool: InferenceConfig) -> Load:
    return replace(engine_load(config, model, pool.engine, pool.gpus_per_worker), workers=pool.workers)


def _online_start(config: Config) -> str:
    """The folder that online training starts from, or one like it; a judge takes turns with no hub id."""
    trained = Path(Run(config, STAGES).path("models", "dpo"))
    base = Path(_resolved(config, config.policy))
    return str(base if (base / "config.json").is_file() and not (trained / "config.json").is_file() else trained)


def _resolved(config: Config, model: str) -> str:
    try:
        return resolve(config, model)
    except BadInput:  # a warning says so
        return model


def _fit(config: Config, name: str, model: str, rows: int, settings: LoopConfig, length: int) -> StagePlan:
    pairs = name != "train_sft"
    load = training_load(config, model)
    tokens = rows * (2 if pairs else 1) * length * settings.epochs
    return StagePlan(name, rows, rows, 0, _steps(rows, settings), tokens, ((load,),))


def _steps(rows: int, settings: LoopConfig) -> int:
    return -(-rows // settings.batch_size) * settings.epochs


def _evaluate(config: Config, held: int) -> StagePlan:
    judge, speeches = evaluation_judge(config), min(config.evaluation.speeches, held)
    answers, verdicts = speeches * (len(POLICIES) + 1), 2 * speeches * len(POLICIES)
    prompt, answer = _tokens(config, config.evaluation.sampling)
    read = _RUBRIC_TOKENS * (judge.template == "rubric") + prompt + 2 * answer + judge.max_tokens // 2
    tokens = answers * (prompt + answer) + verdicts * read
    phases = tuple((_judge_load(config, judge, m),) for m in (config.policy, config.evaluation.baseline, judge.model))
    rows = speeches * len(POLICIES)
    return StagePlan("evaluate", rows, rows, answers + verdicts + 2 * held, 0, tokens, phases)


def _done(config: Config) -> set[str]:
    """Stages that would be skipped; a manifest that cannot be read is one that is not there."""
    run, done = Run(config, STAGES), set()
    for stage in STAGES:
        try:
            if run.is_done(stage.name):
                done.add(stage.name)
        except (OSError, ValueError, KeyError, BadInput):
            continue
    return done


def _warnings(config: Config, speeches: str, stages: Sequence[StagePlan]) -> Iterator[str]:
    try:
        check_config(config)
    except BadInput as error:
        yield f"the run would stop at once: {error}"
    if "assuming" in speeches:
        yield f"speeches.source {speeches.partition(';')[0]}); the run needs it, and all counts hang on it"
    if misplaced := nano_among_people(config):
        yield misplaced
    if same_judge(config):
        yield f"{config.judge.model} labels the pairs and judges the policies too; set evaluation.judge to another"
    cost, budget = remote_cost(config, stages[0].rows_in), config.generation.budget
    if cost:
        limit = "no generation.budget is set" if budget is None else f"generation.budget is {budget:g}"
        yield f"remote models of the pool will cost about {cost:,.2f}; {limit}"
    for stage in stages:
        if (stage.gpu_gib or 0) > max(CARDS_GIB):
            yield f"{stage.name} needs {_gib(stage.gpu_gib)} GiB on a GPU, more than a card of {max(CARDS_GIB)} GB has"
    loads = {load.model: load for stage in stages for phase in stage.phases for load in phase}
    if unknown := [model for model, load in loads.items() if load.gib is None or load.host_gib is None]:
        yield f"size unknown of {', '.join(unknown)}: give parameters_b"
    yield from short_answers(config)
    for placed in engines(config):
        if placed.lacks_gpus and not cannot_split(config, placed):
            split = placed.split
            yield f"tensor_parallel_size is {split} but {placed.setting} is {placed.gpus:g}; give it {split}"
