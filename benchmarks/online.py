"""What a round of online DPO costs: where its time goes, and what it would cost to start everything anew each round.

    python -m benchmarks.online [--rounds 8] [--restarts 2] [--stale 5] [--quick]

All arms run on the nano models with the settings of `configs/nano.yaml` (the judge scores) and 64 speeches x 8 samples
a round. (1) `--rounds` rounds in one job. (2) The same rounds as jobs of one round each, as a shell loop does it: vLLM,
Ray Train and the optimizer start anew, from the policy that the one before left. (3) `--stale` rounds with staleness 1,
with one engine and one rank, so that sampling and training have a core each.
(4) A round's samples scored by a reward model of the policy's size in an engine of its own, which begins with the first
samples, or when all are there: `scored_beside_vs_after`.

The first round of a job also holds its start. `overhead_share` is (sync +
checkpoint + waiting + start) / wall over all rounds but the first; `overhead_share_with_start` over all of them.
`round_vs_restart` is the seconds of a round in (2) over one in (1), both from the command to the finished model, starts
included. `async_wall_vs_longest_phase` is, over the middle rounds of (3), the wall time of a round over the longer of
its training and the next round's sampling and scoring.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from psycho.config import Config, load_config
from psycho.training.online.clock import OVERHEAD

CONFIG = "configs/nano.yaml"
SPEECHES, SAMPLES = 64, 8
PHASES = ("start", "sampling", "scoring", "training", "sync", "checkpoint", "watch", "waiting")
Report = dict[str, Any]


def rounds_of(config: Config, policy: str, folder: Path) -> tuple[list[Report], float]:
    """One job: its rounds' reports and its seconds, with the start of workers and engines."""
    from psycho.models import resolve
    from psycho.nano import world
    from psycho.training.launch import launch
    from psycho.training.online.engines import engines
    from psycho.training.online.rollout import Rollout
    from psycho.training.online.rounds import OnlineJob, online_worker

    made = world.speeches(SPEECHES * 4, 2, config.seed)
    speeches = [row for row in made if row["split"] == "train"]
    work, output = str(folder / "rounds"), str(folder / "online")
    judge = resolve(config, config.judge.model)
    began = time.perf_counter()
    with engines(config, policy, judge_model=judge) as workers:
        workers.start(policy)
        job = OnlineJob(config, config.training, policy, work, output, speeches, [], Rollout(workers, config))
        launch(online_worker, {"job": job}, config.training, str(folder / "ray"))
    seconds = time.perf_counter() - began
    return json.loads(Path(output, "rounds.json").read_text(encoding="utf-8")), seconds


def settings(base: Config, rounds: int, staleness: int = 0) -> Config:
    """The nano settings for so many rounds of the benchmark's size."""
    update = {"rounds": rounds, "speeches_per_round": SPEECHES, "samples_per_speech": SAMPLES, "staleness": staleness}
    return base.model_copy(update={"online": base.online.model_copy(update=update)})


def restarted(base: Config, policy: str, folder: Path, count: int) -> float:
    """Seconds of `count` jobs of one round each, one after the other."""
    seconds = 0.0
    for number in range(count):
        place = folder / f"restart-{number}"
        place.mkdir()
        _, took = rounds_of(settings(base, 1), policy, place)
        seconds += took
        policy = str(place / "online")
    return seconds


def alone(base: Config) -> Config:
    """One engine and one rank, of a thread each."""
    update = {name: getattr(base, name).model_copy(update={"workers": 1}) for name in ("inference", "training")}
    return base.model_copy(update=update)


def share(reports: Sequence[Report]) -> float:
    """Overhead's share of these rounds' wall time."""
    spent = sum(report["seconds"].get(phase, 0.0) for report in reports for phase in OVERHEAD)
    return spent / sum(report["seconds"]["wall"] for report in reports)


def async_ratio(reports: Sequence[Report]) -> float:
    """Wall time of a round over its longer phase, over the rounds that are overlapped and hold no start."""
    walls = longest = 0.0
    for report, following in pairwise(reports[1:]):
        ahead = following["seconds"]["sampling"] + following["seconds"]["scoring"]
        walls += report["seconds"]["wall"]
        longest += max(report["seconds"]["training"], ahead)
    return walls / longest if longest else float("nan")


def scoring(base: Config, policy: str, folder: Path, turns: int = 4) -> tuple[float, float]:
    """Seconds of a round's sampling and scoring: scored while others are sampled, and after all are. Medians.

    The reward model has random weights, which cost what trained ones cost. The first turn of each is not counted.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from psycho.inference.requests import prompt
    from psycho.nano import world
    from psycho.schema import stable_seed
    from psycho.training.online.clock import Clock
    from psycho.training.online.engines import engines
    from psycho.training.online.rollout import Rollout

    reward = str(folder / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1, pad_token_id=0)
    model.save_pretrained(reward)
    AutoTokenizer.from_pretrained(policy).save_pretrained(reward)
    made = world.speeches(SPEECHES * 4, 2, base.seed)
    speeches = [row for row in made if row["split"] == "train"][:SPEECHES]
    asked = [speech for speech in speeches for _ in range(SAMPLES)]
    prompts = [prompt(speech, base.generation.system_prompt) for speech in asked]
    online = base.online.model_copy(update={"scorer": "reward"})
    config = alone(base).model_copy(update={"online": online})  # one core samples, one scores
    beside, after = [], []
    with engines(config, policy, reward) as workers:
        workers.wait(policy)
        rollout = Rollout(workers, config)
        for turn in range(turns):  # other seeds each time, or the engines would find the answers in their caches
            drawn = [stable_seed("beside", turn, place) for place in range(len(asked))]
            began = time.perf_counter()
            rollout.draw(policy, speeches, SAMPLES, drawn, Clock())
            beside.append(time.perf_counter() - began)
            drawn = [stable_seed("after", turn, place) for place in range(len(asked))]
            began = time.perf_counter()
            answers = workers.rollout.sample(policy, prompts, drawn, online.sampling)
            said = [{"role": "assistant", "content": answer.text.strip()} for answer in answers]
            assert workers.reward
            workers.reward.reward(reward, [[*talk, own] for talk, own in zip(prompts, said, strict=True)])
            after.append(time.perf_counter() - began)
    return statistics.median(beside[1:]), statistics.median(after[1:])


def table(arms: dict[str, list[Report]]) -> Table:
    """A row a round."""
    out = Table("job", "round", *PHASES, "wall", "pairs", "sync error")
    for name, reports in arms.items():
        for report in reports:
            seconds = [f"{report['seconds'].get(phase, 0.0):.2f}" for phase in (*PHASES, "wall")]
            out.add_row(name, str(report["round"] + 1), *seconds, str(report["pairs"]), f"{report['sync_error']:.1e}")
    return out


def measure(
    base: Config, rounds: int, restarts: int, stale: int, folder: Path
) -> tuple[dict[str, list[Report]], dict[str, float]]:
    """All arms; their reports and the figures of the last line."""
    from psycho.models import resolve

    policy = resolve(base, base.policy)
    for name in ("kept", "stale"):
        (folder / name).mkdir(parents=True)
    kept, kept_s = rounds_of(settings(base, rounds), policy, folder / "kept")
    anew_s = restarted(base, policy, folder, restarts)
    late, _ = rounds_of(settings(alone(base), stale, staleness=1), policy, folder / "stale")
    beside, after = scoring(base, policy, folder)
    return {"kept alive": kept, "staleness 1": late}, {
        "overhead_share": share(kept[1:]),
        "overhead_share_with_start": share(kept),
        "round_s": kept_s / rounds,
        "restart_round_s": anew_s / restarts,
        "round_vs_restart": (anew_s / restarts) / (kept_s / rounds),
        "steady_round_vs_restart": (anew_s / restarts) / (sum(r["seconds"]["wall"] for r in kept[1:]) / (rounds - 1)),
        "async_wall_vs_longest_phase": async_ratio(late),
        "scored_beside_s": beside,
        "scored_after_s": after,
        "scored_beside_vs_after": beside / after,
        "rounds": rounds,
        "samples_per_round": SPEECHES * SAMPLES,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of the job that keeps everything alive; at least 2")
    parser.add_argument("--restarts", type=int, default=2, help="jobs of one round")
    parser.add_argument("--stale", type=int, default=5, help="rounds with staleness 1; at least 3")
    parser.add_argument("--config", default=CONFIG, help="whose models and engines are measured")
    parser.add_argument("--quick", action="store_true", help="fewest rounds")
    arguments = parser.parse_args()
    counts = (2, 1, 3) if arguments.quick else (arguments.rounds, arguments.restarts, arguments.stale)
    from psycho.cluster import ray_session

    config = load_config(arguments.config)
    with tempfile.TemporaryDirectory(prefix="online-") as folder, ray_session(config.cluster, False):
        arms, figures = measure(config, *counts, Path(folder))
    Console(width=160).print(table(arms))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
