"""What a rating costs and what it is worth: modes, prefix caching, agreement with gold.

    python -m benchmarks.judging [--quick]

Cost is measured with the full-length rubric that a large judge gets, on the nano judge's engine (one core, responses to
a speech together, as the stage `judge` sends them). The nano judge was never trained on that rubric: its answers there
are noise, so quotations are held to a few words, which makes an answer about as long as a large judge's. Worth is
measured in the compact format that it was trained on, on speeches that no model has seen. Each engine has a process of
its own and rates once unmeasured; a second is one of that process's CPU time, which other work on the machine does not
stretch. Caches hold whole blocks of tokens, here of 32 (a GPU's: 16): a short speech would never fill one of the 128
that vLLM takes on a CPU.

Caching saves the prompt and nothing of the answer, so `prefix_cache_speedup` is of the mode with the short answer, and
`prefix_cache_speedup_evidence` of the default mode, where writing the answer is most of the cost. A ratio of rows/s is
ours over the other; correlations are of overall ratings. The panel is the mean of the nano judge in its two modes, the
only judges that this world has; it costs what both cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from rich.console import Console
from rich.table import Table

from psycho.config import Config, JudgeConfig, load_config

CONFIG = "configs/nano.yaml"
RESPONSES = 4  # a speech, as in the default run
EVIDENCE_CHARS = 20
BLOCK_TOKENS = 32
PANEL = ("compact evidence", "compact direct")
Figures = dict[str, Any]


def judges(config: Config) -> dict[str, JudgeConfig]:
    """The judge in each format and mode, without the floor, which reads the whole prompt and so undoes caching."""
    compact = config.judge.model_copy(update={"fluency_floor": None})
    rubric = compact.model_copy(update={"template": "rubric", "max_evidence_chars": EVIDENCE_CHARS, "max_tokens": 600})
    return {
        f"{name} {mode}": judge.model_copy(update={"mode": mode})
        for name, judge in (("rubric", rubric), ("compact", compact))
        for mode in ("evidence", "direct")
    }


def measure(names: list[str], caching: bool, speeches: int, rounds: int) -> dict[str, Figures]:
    """Rate the same responses with each of the named judges on one engine; figures by name."""
    config = load_config(CONFIG)
    os.environ.update(config.inference.env)
    from psycho.inference.worker import EngineSpec, VLLMWorker
    from psycho.nano import gold, world
    from psycho.nano.grammar import sample_response, sample_speech

    rng = random.Random("judging")
    said = [sample_speech(rng, held_out_combinations=True) for _ in range(speeches)]
    items = [(speech, sample_response(rng, speech, "any")) for speech in said for _ in range(RESPONSES)]
    truth = [gold.rate(speech, text) for speech, text in items]
    extra = {"block_size": BLOCK_TOKENS}
    engine = config.inference.engine.model_copy(update={"enable_prefix_caching": caching, "extra": extra})
    worker = VLLMWorker(EngineSpec(engine, config.seed, config.inference.env))
    worker.use(world.model_folder(config.nano, "judge"))
    texts = [(speech.text, text) for speech, text in items]
    found = {name: _rate(worker, judges(config)[name], texts, truth, rounds) for name in names}
    if names == list(PANEL):
        found["compact panel"] = _panel([found[name] for name in names], truth)
    return {name: {key: value for key, value in row.items() if key != "rows"} for name, row in found.items()}


def _rate(worker: Any, judge: JudgeConfig, items: list[tuple[str, str]], truth: list[Any], rounds: int) -> Figures:
    from psycho.judging.judge import rate_single
    from psycho.judging.rows import rating_row

    seeds = [0] * len(items)
    rate_single(worker, judge, items[: 2 * RESPONSES], seeds[: 2 * RESPONSES], expected=True)
    seconds = []
    for _ in range(rounds):
        worker._llm.reset_prefix_cache()  # what is shared is shared within the job, not with an earlier round
        started = time.process_time()
        rated = rate_single(worker, judge, items, seeds, expected=True)
        seconds.append(time.process_time() - started)
    rows = []
    for number, ((speech, _), result) in enumerate(zip(items, rated, strict=True)):
        if result[0] is not None:
            known = {"request_id": str(number), "speech_id": speech, "split": "", "model": ""}
            rows.append(rating_row(known, judge, *result))
    return {
        "rows_per_s": len(items) / min(seconds),
        "tokens": sum(completion.output_tokens for *_, completion in rated) / len(rated),
        "prompt_tokens": sum(completion.prompt_tokens for *_, completion in rated) / len(rated),
        "rows": rows,
        **_worth(rows, truth),
    }


def _panel(members: list[Figures], truth: list[Any]) -> Figures:
    """The mean of the members' ratings, at what they cost together."""
    from psycho.judging.panel import join_panel

    panel = JudgeConfig.model_validate({"mode": "panel", "panel": [{"model": name} for name in PANEL]})
    rows, _ = join_panel([str(number) for number in range(len(truth))], [row["rows"] for row in members], panel)
    summed = {key: sum(row[key] for row in members) for key in ("tokens", "prompt_tokens")}
    return {"rows_per_s": 1 / sum(1 / row["rows_per_s"] for row in members), **summed, **_worth(rows, truth)}


def _worth(rows: list[dict[str, Any]], truth: list[Any]) -> Figures:
    """Agreement of rating rows, their `request_id` the place in `truth`, with gold."""
    from psycho.nano.truth import judge_against_gold

    known = [truth[int(row["request_id"])] for row in rows]
    found = judge_against_gold(rows, known) if rows else {"correlation_gold": {"overall": None}}
    return {
        "n": len(rows),
        "correlation": found["correlation_gold"]["overall"],
        "pairs": found.get("pair_agreement_gold"),
    }


def own_process(*arguments: Any) -> dict[str, Figures]:
    """`measure` where no other engine has been."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def table(found: dict[str, Figures]) -> Table:
    """A row a way of rating."""
    out = Table("format, mode", "rows/s", "tokens in", "tokens out", "n", "r with gold", "pairs as gold, gap ≥ 1")
    for name, row in found.items():
        worth = [f"{row[key]:.3f}" if row[key] is not None else "–" for key in ("correlation", "pairs")]
        if name.startswith("rubric"):
            worth = ["not trained on it", "–"]
        cost = [f"{row['rows_per_s']:.1f}", f"{row['prompt_tokens']:.0f}", f"{row['tokens']:.0f}"]
        out.add_row(name, *cost, str(row["n"]), *worth)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer responses, one round")
    quick = parser.parse_args().quick
    speeches, rounds = (16, 1) if quick else (48, 2)
    cached = own_process(["rubric evidence", "rubric direct"], True, speeches, rounds)
    plain = own_process(["rubric evidence", "rubric direct"], False, speeches, rounds)
    worth = own_process(list(PANEL), True, 50 if quick else 150, 1)
    found = cached | {f"{name}, no caching": row for name, row in plain.items()} | worth
    Console(width=140).print(table(found))
    speed = {name: row["rows_per_s"] for name, row in found.items()}
    last = {
        "prefix_cache_speedup": speed["rubric direct"] / speed["rubric direct, no caching"],
        "prefix_cache_speedup_evidence": speed["rubric evidence"] / speed["rubric evidence, no caching"],
        "direct_vs_evidence_throughput": speed["rubric direct"] / speed["rubric evidence"],
        "direct_correlation_gold": worth["compact direct"]["correlation"],
        "evidence_correlation_gold": worth["compact evidence"]["correlation"],
        "panel_correlation_gold": worth["compact panel"]["correlation"],
        "panel_vs_evidence_throughput": worth["compact panel"]["rows_per_s"] / worth["compact evidence"]["rows_per_s"],
    }
    print(json.dumps({key: None if value is None else round(value, 4) for key, value in last.items()}))


if __name__ == "__main__":
    main()
