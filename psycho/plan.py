"""What a run would do, before it does anything: rows, requests, steps, GPUs and memory of every stage (`--dry-run`).

It reads the configuration, counts the speech file's rows and reads the run folder's manifests; it touches nothing.
Memory is estimated from the number of parameters alone, with every sequence as long as it may be. With P parameters
and N workers:

- model states of training in bf16 with Adam, bytes (Rajbhandari et al. 2020, ZeRO, section 5): weights 2P, gradients
  2P, optimizer 12P (fp32 weights and two moments); stage 1 divides the optimizer by N, stage 2 the gradients too,
  stage 3 the weights too. In fp32: 4P + 4P + 8P. Offloading moves the optimizer to the host.
- DeepSpeed's own buffers: a bucket of 5e8 gradients from stage 1 on, up to 1e9 gathered weights at stage 3.
- activations in 16 bits: 34 bytes per token, layer and hidden unit, attention matrix not stored (Korthikanti et al.
  2022, equation 1); with gradient checkpointing 2 bytes, and 34 of the one layer that is recomputed. Logits of
  language models: 14 bytes per token and entry of the vocabulary (16 bits, then fp32, log-softmax, gradient).
- inference: weights / tensor parallel, the KV cache of one sequence of max_model_len, and 2 GiB of the engine's own.
- hidden width h and L layers from P = 12 L h^2 with h = 128 L (Kaplan et al. 2020); keys and values h/4 wide (GQA).
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from psycho import storage
from psycho.config import Config, EngineConfig, JudgeConfig, LoopConfig, SamplingConfig, TrainingConfig
from psycho.errors import BadInput
from psycho.run import Run
from psycho.stages import POLICIES, STAGES, check_config, evaluation_judge

GIB = 2**30
CARDS_GIB = (24, 48, 80)
PAPER_SPEECHES = 26_483
NANO_PARAMETERS_B = 0.0009
_GAP_Z = 1.183  # gaps as half a normal curve: 23.7 % reach 1.0 (paper: 34,329 pairs of 24,159 speeches x 6)
_CHARS_PER_TOKEN, _RUBRIC_TOKENS = 4, 700
_VOCABULARY, _DEFAULT_MODEL_LEN = 152_064, 8192  # Qwen2.5's, the larger of the usual two
_CONTEXT_GIB, _ENGINE_GIB = 1.0, 2.0


@dataclass(frozen=True)
class Load:
    """Workers of one kind: a vLLM engine or a training rank each. Memory is None where the size is unknown."""

    model: str
    workers: int
    gpus: float
    """A worker's GPUs; 0 on CPUs, where all memory is the host's."""
    gib: float | None
    """GPU memory needed on each of its GPUs."""
    host_gib: float | None = 0.0
    """Host memory of one worker."""
    reserved: float | None = None
    """Share of a card that vLLM takes whatever it needs."""


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


def print_plan(config: Config, job: str, console: Console) -> None:
    """Print what `job` would do with this configuration; nothing is created, started or downloaded."""
    plan = build_plan(config, job)
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
    """Every stage with its expected rows and needs. Rows of a file are counted before cleaning, an upper bound."""
    count, told = count_speeches(config)
    held = config.speeches.evaluation
    if config.speeches.source != "nano":
        held = min(held, int(count * config.speeches.max_evaluation_share))
    done = _done(config)
    stages = [*_data_stages(config, count, held), *_training_stages(config, count - held, held)]
    stages += [_evaluate(config, held), StagePlan("report", 1, 1)]
    stages = [replace(stage, done=stage.name in done) for stage in stages]
    return Plan(config, job, told, tuple(stages), tuple(_warnings(config, told, stages)))


def count_speeches(config: Config) -> tuple[int, str]:
    """Speeches of the source, and a sentence on where the number comes from; a missing file is not an error."""
    speeches = config.speeches
    if speeches.source == "nano":
        made = speeches.nano_train + speeches.evaluation
        return made, f"{made:,} made by the nano grammar"
    path = Path(speeches.source).expanduser()
    try:
        found, told = _count_rows(path), "rows before cleaning"
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        why = "not there yet" if isinstance(error, FileNotFoundError) else "cannot be read"
        found, told = PAPER_SPEECHES, f"{why}; assuming {PAPER_SPEECHES:,} as in the paper"
    else:
        told = f"{found:,} {told}"
    kept = min(found, speeches.limit or found)
    return kept, f"{speeches.source} ({told}{f'; speeches.limit {kept:,}' if kept < found else ''})"


def _count_rows(path: Path) -> int:
    if path.suffix.lower() == ".parquet":
        return pq.ParquetFile(path).metadata.num_rows
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            return max(0, sum(1 for row in csv.reader(file) if row) - 1)
        return sum(1 for line in file if line.strip())


def expected_pairs(speeches: int, responses: int, min_gap: float, limit: int | None = None) -> int:
    """Train pairs to expect: the paper's yield, spread over other gaps as half a normal curve would be."""
    share = math.erfc(min_gap * _GAP_Z / math.sqrt(2))
    each = math.comb(responses, 2) * share
    return round(speeches * min(each, limit or each))


def parameters_b(config: Config, model: str) -> float | None:
    """Size in 10^9 parameters: as configured, else from the name (`8B`, `360M`), else from a folder's weights."""
    known = {entry.model: entry.parameters_b for entry in config.generation.pool}
    for judge in _judges(config):
        known |= {judge.model: judge.parameters_b} if judge.parameters_b else {}
    known |= {config.policy: config.policy_parameters_b} if config.policy_parameters_b else {}
    if model.startswith("nano:"):
        return NANO_PARAMETERS_B
    return known.get(model) or size_of_name(Path(model).name) or _size_of_folder(Path(model).expanduser())


def size_of_name(name: str) -> float | None:
    """`Qwen2.5-0.5B-Instruct` is 0.5, `SmolLM2-360M` 0.36, `8x7B` 56 (an upper bound), `Phi-3.5-mini` unknown."""
    found = re.search(r"(?<![a-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", name.lower())
    return int(found[1] or 1) * float(found[2]) * (1 if found[3] == "b" else 1e-3) if found else None


def _size_of_folder(folder: Path) -> float | None:
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if not stored:
        return None
    text = (folder / "config.json").read_text(encoding="utf-8") if (folder / "config.json").is_file() else "{}"
    facts = json.loads(text)
    return stored / (4 if "float32" in (facts.get("dtype"), facts.get("torch_dtype")) else 2) / 1e9


def zero_gib(size_b: float, workers: int, stage: int, precision: str = "bf16") -> tuple[float, float, float]:
    """Weights, gradients and optimizer states on one worker (Rajbhandari et al. 2020, section 5)."""
    bytes_each = (2, 2, 12) if precision == "bf16" else (4, 4, 8)
    divided = (stage >= 3, stage >= 2, stage >= 1)
    weights, gradients, optimizer = (
        size_b * 1e9 * b / GIB / (workers if split else 1) for b, split in zip(bytes_each, divided, strict=True)
    )
    return weights, gradients, optimizer


def shape(size_b: float) -> tuple[float, float]:
    """Hidden width and layers of a dense transformer of this size."""
    hidden = (size_b * 1e9 * 128 / 12) ** (1 / 3)
    return hidden, hidden / 128


def activation_gib(size_b: float, tokens: int, training: TrainingConfig, logits: bool) -> float:
    """Activations and, for language models, logits of one micro-batch of so many tokens."""
    hidden, layers = shape(size_b)
    vocabulary = min(_VOCABULARY, size_b * 1e9 / hidden)  # an embedding is no larger than its model
    kept = 2 * layers + 34 if training.gradient_checkpointing else 34 * layers
    scale = 1 if training.precision == "bf16" else 2
    return tokens * (kept * hidden * scale + (14 * vocabulary if logits else 0)) / GIB


def training_load(config: Config, model: str, settings: LoopConfig, pairs: bool, logits: bool = True) -> Load:
    """The ranks of one training; each also reads the whole model through its host's memory."""
    training, size_b = config.training, parameters_b(config, model)
    if size_b is None:
        return Load(model, training.workers, training.gpus_per_worker, None, None)
    stage, width = training.zero_stage, 2 if training.precision == "bf16" else 4
    weights, gradients, optimizer = zero_gib(size_b, training.workers, stage, training.precision)
    offloaded = optimizer if training.offload_optimizer else 0.0
    bucket = 5e8 if training.gpus_per_worker else min(5e8, size_b * 1e9)  # a CPU only pays for pages it writes
    buffers = (bucket * (stage >= 1) + min(1e9, size_b * 1e9) * (stage == 3)) * width / GIB
    micro = settings.micro_batch_size or -(-settings.batch_size // training.workers)
    work = activation_gib(size_b, micro * (2 if pairs else 1) * training.max_length, training, logits)
    total = weights + gradients + optimizer - offloaded + buffers + work + _CONTEXT_GIB
    if not training.gpus_per_worker:
        return Load(model, training.workers, 0, 0.0, total)
    host = size_b * 1e9 * width / GIB + offloaded
    return Load(model, training.workers, training.gpus_per_worker, total, host)


def engine_gib(size_b: float, engine: EngineConfig) -> float:
    """Least memory of an engine on each of its GPUs: weights, one whole sequence's KV cache, its own needs."""
    hidden, layers = shape(size_b)
    width = 4 if engine.dtype == "float32" else 2
    cache = 2 * layers * hidden / 4 * width * (engine.max_model_len or _DEFAULT_MODEL_LEN)
    return (size_b * 1e9 * width + cache) / engine.tensor_parallel_size / GIB + _ENGINE_GIB


def engine_load(config: Config, model: str, engine: EngineConfig | None, gpus: float | None) -> Load:
    """The vLLM workers that hold `model`; a model's or judge's own engine and GPUs replace those of inference."""
    used = engine or config.inference.engine
    gpus = config.inference.gpus_per_worker if gpus is None else gpus
    size_b = parameters_b(config, model)
    need = None if size_b is None else engine_gib(size_b, used)
    if not gpus:
        return Load(model, config.inference.workers, 0, 0.0, need)
    return Load(model, config.inference.workers, gpus, need, reserved=used.gpu_memory_utilization)


def phase_gib(phase: tuple[Load, ...]) -> float | None:
    """Memory on the fullest GPU: loads that ask for a share of one are taken to meet on the same card."""
    if any(load.gib is None for load in phase):
        return None
    together = sum(_copies(load) * (load.gib or 0) for load in phase if load.gpus < 1)
    return max([together, *((load.gib or 0) for load in phase if load.gpus >= 1)])


def fits(phase: tuple[Load, ...], card_gib: float) -> bool:
    """True when every load fits: an engine in the share that it reserves, training in what is left."""
    if any(load.gib is None or load.gib > card_gib * (load.reserved or 1) for load in phase):
        return False
    taken = [_copies(x) * (x.reserved * card_gib if x.reserved else x.gib or 0) for x in phase if 0 < x.gpus < 1]
    return sum(taken) <= card_gib


def _copies(load: Load) -> int:
    return min(load.workers, int(1 / load.gpus + 1e-6)) if load.gpus else 0


def _tokens(config: Config, sampling: SamplingConfig) -> tuple[int, int]:
    """Tokens of a prompt (a speech of middling length and the template) and of an answer (half its limit)."""
    speech = (config.speeches.min_chars + config.speeches.max_chars) // 2 + len(config.generation.system_prompt or "")
    return speech // _CHARS_PER_TOKEN + 20, sampling.max_tokens // 2


def _data_stages(config: Config, count: int, held: int) -> list[StagePlan]:
    k = config.generation.models_per_speech
    prompt, answer = _tokens(config, config.generation.sampling)
    pool = [(engine_load(config, m.model, m.engine, m.gpus_per_worker),) for m in config.generation.pool]
    judge = (_judge_load(config, config.judge, config.judge.model),)
    read = _RUBRIC_TOKENS * (config.judge.template == "rubric") + prompt + answer + config.judge.max_tokens // 2
    pairs = expected_pairs(count - held, k, config.pairs.min_gap, config.pairs.max_pairs_per_speech) + held
    return [
        StagePlan("prepare", count, count),
        StagePlan("generate", count * k, count * k, count * k, 0, count * k * (prompt + answer), tuple(pool)),
        StagePlan("judge", count * k, count * k, count * k, 0, count * k * read, (judge,)),
        StagePlan("pair", (count - held) * math.comb(k, 2) + held, pairs),
    ]


def _judge_load(config: Config, judge: JudgeConfig, model: str) -> Load:
    return engine_load(config, model, judge.engine, judge.gpus_per_worker)


def _training_stages(config: Config, train: int, held: int) -> list[StagePlan]:
    training, online, k = config.training, config.online, config.generation.models_per_speech
    pairs = expected_pairs(train, k, config.pairs.min_gap, config.pairs.max_pairs_per_speech)
    length = min(training.max_length, sum(_tokens(config, config.generation.sampling)))
    start = config.policy if training.reward.init == "policy" else training.reward.init
    sampled = online.rounds * min(online.speeches_per_round, train)
    judged = online.scorer == "judge"
    policy = engine_load(config, config.policy, *_online_engine(config))
    scorer = engine_load(config, config.judge.model if judged else start, *_online_engine(config))
    trained = training_load(config, config.policy, online, True)
    made = sampled * min(online.max_pairs_per_speech, online.samples_per_speech // 2)
    steps = online.rounds * _steps(made // online.rounds, online)
    answers = sampled * online.samples_per_speech
    seen = min(training.max_length, sum(_tokens(config, online.sampling)))
    return [
        _fit(config, "train_sft", config.policy, train, training.sft, length),
        _fit(config, "train_reward", start, pairs, training.reward, length),
        _fit(config, "train_dpo", config.policy, pairs, training.dpo, length),
        StagePlan("train_online", answers, answers, 2 * answers, steps, made * 2 * online.epochs * seen, (
            (policy, trained), (scorer, trained))),
    ]  # fmt: skip


def _online_engine(config: Config) -> tuple[EngineConfig | None, float | None]:
    judged = config.online.scorer == "judge"
    return (config.judge.engine, config.judge.gpus_per_worker) if judged else (None, None)


def _fit(config: Config, name: str, model: str, rows: int, settings: LoopConfig, length: int) -> StagePlan:
    pairs = name != "train_sft"
    load = training_load(config, model, settings, pairs, logits=name != "train_reward")
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
    if evaluation_judge(config).model == config.judge.model:
        yield f"{config.judge.model} labels the pairs and judges the policies too; set evaluation.judge to another"
    for stage in stages:
        if (stage.gpu_gib or 0) > max(CARDS_GIB):
            yield f"{stage.name} needs {_gib(stage.gpu_gib)} GiB on a GPU, more than a card of {max(CARDS_GIB)} GB has"
    loads = {load.model: load for stage in stages for phase in stage.phases for load in phase}
    if unknown := [model for model, load in loads.items() if load.gib is None or load.host_gib is None]:
        yield f"size unknown of {', '.join(unknown)}: give parameters_b"
    engines = [(m.name, m.engine, m.gpus_per_worker) for m in config.generation.pool]
    engines += [(judge.model, judge.engine, judge.gpus_per_worker) for judge in _judges(config)]
    for name, engine, gpus in [("inference", None, None), *engines]:
        split = (engine or config.inference.engine).tensor_parallel_size
        held = config.inference.gpus_per_worker if gpus is None else gpus
        if split > max(1, held):
            yield f"{name}: tensor_parallel_size is {split} but gpus_per_worker is {held:g}; give it {split}"


def _judges(config: Config) -> list[JudgeConfig]:
    return [judge for judge in (config.judge, config.evaluation.judge) if judge]
