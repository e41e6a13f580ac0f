"""How fast answers come: ours against a bare vLLM engine and against Ray Data's own `ray.data.llm`.

    python -m benchmarks.generation [--requests 3000] [--rounds 3] [--quick]
    python -m benchmarks.generation --model FOLDER --dtype bfloat16 --sequences 48 --top-p 1     # a real model

The same prompts, sampling and engine arguments go through (1) one bare engine that is fed from a plain loop,
(2) `ray.data.llm`'s processor, (3) our stage on Ray Data with one worker. Each arm runs in a process of its own, one
after the other, in rounds, each round beginning with another arm; ratios are of the same round, the line holds the
median over rounds. Throughput is that of the middle of a run: output tokens of the answers that finished between the
first and the last fifth of all tokens, by the time they finished. The start is measured apart: time to the first row
counts from a Ray that is up (imports, actors, the engine's start), for the bare engine from its process's first line.
`cpu_vs_vllm` is CPU time instead of throughput, of the process that holds the engine, over the same middle: what we add
to the bare engine, also where other work on the machine makes throughput say little.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate, cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
}
ENGINE = {"dtype": "float32", "max_model_len": 2048, "max_num_seqs": 128, "enforce_eager": True}
SAMPLING = {"temperature": 0.8, "top_p": 0.95, "max_tokens": 96}
ARMS = ("vllm", "ray_data_llm", "ours")
RATIOS = (
    ("throughput", "rate", "vllm"),
    ("throughput", "rate", "ray_data_llm"),
    ("first_row", "first", "ray_data_llm"),
    ("cpu", "cpu", "vllm"),
    ("first_row", "first", "vllm"),
)


class Seen(NamedTuple):
    """A row: when it was finished, its output tokens, and the CPU seconds of the engine's process up to then."""

    time: float
    tokens: int
    cpu: float = 0.0


def prompts(count: int, real: bool) -> list[list[dict[str, str]]]:
    """Speeches as messages: of the nano grammar, or the real ones of examples/, over and over."""
    if real:
        with (Path(__file__).parents[1] / "examples" / "speeches.csv").open(newline="", encoding="utf-8") as file:
            texts = [row["question"] for row in csv.DictReader(file)]
        return [[{"role": "user", "content": text}] for text in islice(cycle(texts), count)]
    from psycho.nano.grammar import sample_speech

    rng = random.Random(0)
    return [[{"role": "user", "content": sample_speech(rng).text}] for _ in range(count)]


def engine_arguments() -> dict[str, Any]:
    """What all three engines are built with."""
    from psycho.config import EngineConfig
    from psycho.inference.engine import engine_arguments as of

    return of(EngineConfig.model_validate(ENGINE), "generate", 0)


def run_vllm(model: str, talks: list[Any]) -> tuple[float, list[Seen]]:
    """One engine, never short of requests.

    Requests are rendered and added as there is room: given all at once, that work would fall before the middle of the
    run, which is what is measured, while the other arms do it there.
    """
    began = time.time()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.inputs.engine import tokens_input
    from vllm.sampling_params import RequestOutputKind

    llm = LLM(model, **engine_arguments())
    tokenizer, engine = llm.get_tokenizer(), llm.llm_engine

    def add(number: int, talk: Any) -> None:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        params = SamplingParams(**SAMPLING, seed=number, output_kind=RequestOutputKind.FINAL_ONLY)
        engine.add_request(str(number), tokens_input(tokenizer(text, add_special_tokens=False).input_ids), params)

    rows: list[Seen] = []
    waiting = iter(enumerate(talks))
    while True:
        room = ENGINE["max_num_seqs"] + 16 - engine.get_num_unfinished_requests()
        for number, talk in islice(waiting, max(0, room)):
            add(number, talk)
        if not engine.has_unfinished_requests():
            return rows[0].time - began, rows
        finished = [output for output in engine.step() if output.finished]
        rows += [Seen(time.time(), len(output.outputs[0].token_ids), time.process_time()) for output in finished]


def run_ray_data_llm(model: str, talks: list[Any]) -> tuple[float, list[Seen]]:
    """Ray Data's processor, as its documentation shows it, with batches enough to keep its engine full."""
    _start_ray()
    began = time.time()
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs=engine_arguments(),
        batch_size=64,
        max_concurrent_batches=8,
        concurrency=1,
        runtime_env={"env_vars": ENV},
        placement_group_config={"bundle_per_worker": {"CPU": 1}},
        log_engine_metrics=False,
    )

    def before(row: dict[str, Any]) -> dict[str, Any]:
        return {"messages": json.loads(row["messages"]), "sampling_params": SAMPLING | {"seed": row["number"]}}

    def after(row: dict[str, Any]) -> dict[str, Any]:
        return {"time": time.time(), "tokens": int(row["num_generated_tokens"]), "text": row["generated_text"]}

    items = [{"number": number, "messages": json.dumps(talk)} for number, talk in enumerate(talks)]
    dataset = ray.data.from_items(items, override_num_blocks=max(1, len(items) // 64))
    dataset = build_processor(config, preprocess=before, postprocess=after)(dataset)
    first = 0.0
    rows: list[Seen] = []
    for row in dataset.iter_rows():
        first = first or time.time() - began
        rows.append(Seen(row["time"], row["tokens"]))
    return first, rows


def run_ours(model: str, talks: list[Any]) -> tuple[float, list[Seen]]:
    """Our stage, one worker; rows are on disk as Parquet at the end."""
    _start_ray()
    began = time.time()
    import pyarrow as pa

    from psycho.config import InferenceConfig, MarksConfig, PriceConfig, SamplingConfig
    from psycho.inference.batch import run_batches
    from psycho.inference.generate import GenerateBatch, Served
    from psycho.inference.worker import EngineSpec
    from psycho.schema import REQUEST

    class Stamped(GenerateBatch):
        """Writes down when each row was finished."""

        def __call__(self, batch: pa.Table) -> Iterator[dict[str, Any]]:
            lines = []
            for row in super().__call__(batch):
                lines.append(f"{time.time()} {row['output_tokens']} {time.process_time()}\n")
                yield row
            with open(stamps, "a", encoding="utf-8") as file:
                file.writelines(lines)

    config = InferenceConfig.model_validate({"gpus_per_worker": 0, "env": ENV, "engine": ENGINE})
    sampling = SamplingConfig.model_validate(SAMPLING)
    rows = [
        {"request_id": f"{n:06d}", "speech_id": f"s{n}", "split": "train", "model": "m", "sample": 0, "seed": n,
         "messages": json.dumps(talk)}
        for n, talk in enumerate(talks)
    ]  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="generation-"))
    stamps = str(folder / "stamps")
    arguments = {
        "spec": EngineSpec(config.engine, 0, ENV),
        "models": {"m": Served(model, sampling, PriceConfig(), {})},
        "policy": MarksConfig(),
        "reporter": None,
    }
    requests = pa.Table.from_pylist(rows, schema=REQUEST)
    run_batches(requests, str(folder / "rows"), Stamped, arguments, config, at_once=4 * config.engine.max_num_seqs)
    first = min(path.stat().st_mtime for path in (folder / "rows").rglob("*.parquet")) - began
    lines = [line.split() for line in (folder / "stamps").read_text().splitlines()]
    shutil.rmtree(folder)
    return first, [Seen(float(at), int(tokens), float(cpu)) for at, tokens, cpu in lines]


def _start_ray() -> None:
    import ray

    # Logical CPUs enough for every stage of theirs: they are small, and wait for one another on fewer.
    ray.init(address="local", num_cpus=12, include_dashboard=False, log_to_driver=False, object_store_memory=2**29)


def steady(rows: list[Seen]) -> tuple[float, float]:
    """Tokens a second, and CPU seconds a token, between the first and the last fifth of all tokens."""
    rows = sorted(rows)
    ends = list(accumulate(row.tokens for row in rows))
    middle = [row for row, end in zip(rows, ends, strict=True) if 0.2 * ends[-1] <= end <= 0.8 * ends[-1]]
    tokens = sum(row.tokens for row in middle[1:])
    return tokens / (middle[-1].time - middle[0].time), (middle[-1].cpu - middle[0].cpu) / tokens


def measure(arm: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.generation", "--arm", arm, "--requests", str(arguments.requests)]
    command += ["--model", arguments.model, "--dtype", arguments.dtype, "--sequences", str(arguments.sequences)]
    command += ["--top-p", str(arguments.top_p), "--max-tokens", str(arguments.max_tokens)]
    command += ["--real"] if arguments.real else []
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_arm(arm: str, model: str, count: int, real: bool) -> None:
    """Inside the arm's process: run it and print what was seen."""
    os.environ.update(ENV)
    talks = prompts(count, real)
    first, rows = {"vllm": run_vllm, "ray_data_llm": run_ray_data_llm, "ours": run_ours}[arm](model, talks)
    lengths = sorted(row.tokens for row in rows)
    rate, cpu = steady(rows)
    print(json.dumps({
        "rows": len(rows), "tokens": sum(lengths), "rate": rate, "cpu": cpu, "first": first,
        "p10": lengths[len(lengths) // 10], "p90": lengths[len(lengths) * 9 // 10],
    }))  # fmt: skip


def nano_model() -> str:
    """The base policy of the nano world."""
    from psycho.config import load_config
    from psycho.job import DEFAULT_CONFIG
    from psycho.models import resolve

    return resolve(load_config(DEFAULT_CONFIG), "nano:base")


def main() -> None:
    """Run the arms in rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="", help="a model folder; none: the nano world's base policy")
    parser.add_argument("--quick", action="store_true", help="1,200 requests, one round")
    parser.add_argument("--dtype", default=ENGINE["dtype"])
    parser.add_argument("--sequences", type=int, default=ENGINE["max_num_seqs"], help="decoded together")
    parser.add_argument("--top-p", type=float, default=SAMPLING["top_p"])
    parser.add_argument("--max-tokens", type=int, default=SAMPLING["max_tokens"])
    parser.add_argument("--arms", default=",".join(ARMS), help="only these; the ratios need ours")
    parser.add_argument("--real", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    ENGINE.update(dtype=arguments.dtype, max_num_seqs=arguments.sequences)
    SAMPLING.update(top_p=arguments.top_p, max_tokens=arguments.max_tokens)
    if arguments.arm:
        run_arm(arguments.arm, arguments.model, arguments.requests, arguments.real)
        return
    arguments.real = bool(arguments.model)
    arguments.model = arguments.model or nano_model()
    arms = tuple(arm for arm in ARMS if arm in arguments.arms.split(","))
    if arguments.quick:
        arguments.requests, arguments.rounds = 1200, 1
    table = Table("round", "arm", "rows", "tokens", "p10-p90 of length", "output tok/s", "first row, s")
    rounds = []
    for number in range(arguments.rounds):
        turn = number % len(arms)
        found = {arm: measure(arm, arguments) for arm in (*arms[turn:], *arms[:turn])}
        rounds.append(found)
        for arm, seen in found.items():
            shown = (f"{seen['rows']:,}", f"{seen['tokens']:,}", f"{seen['p10']}-{seen['p90']}", f"{seen['rate']:,.0f}")
            table.add_row(str(number), arm, *shown, f"{seen['first']:.1f}")
    Console(width=120).print(table)
    ratios = {
        f"{name}_vs_{other}": statistics.median(r["ours"][what] / r[other][what] for r in rounds)
        for name, what, other in RATIOS
        if {"ours", other} <= set(arms)
    }
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
