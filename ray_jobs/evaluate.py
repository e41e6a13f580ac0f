"""Evaluation: the reward model on the test pairs, and every policy against the baseline.

    python -m ray_jobs.evaluate --config configs/nano.yaml

Each policy answers the evaluation speeches once; a judge compares each answer with the baseline's in both orders. In
the nano world the same is measured against the truth, so that one sees whether the loop fools itself.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from psycho import storage
from psycho.evaluation.comparison import Verdict, both_orders, first_place_rate, outcome, summarise
from psycho.evaluation.metrics import audit_reward_margins
from psycho.inference.pool import WorkerPool
from psycho.inference.requests import prompt
from psycho.inference.worker import Completion
from psycho.job import Job, main
from psycho.judging.judge import PairItem
from psycho.models import resolve
from psycho.nano import truth
from psycho.nano.gold import GoldRating
from psycho.progress import Reporter
from psycho.run import StageResult
from psycho.schema import stable_seed
from psycho.stages import CALIBRATION, POLICIES, evaluation_judge, same_judge, starts_from_pairs
from ray_jobs.pair import rated_speeches

BASELINE = "baseline"
Row = dict[str, Any]
Speeches = list[dict[str, str]]
Gold = dict[str, dict[str, GoldRating]]  # by policy (or the baseline) and speech


def evaluate(job: Job) -> None:
    """Write `evaluation/`."""
    config = job.config

    def body(partial: str) -> StageResult:
        job.need_ray()
        if same_judge(config):
            job.progress.say("  note: the judge that labelled the pairs also judges the policies (evaluation.judge)")
        speeches = evaluation_speeches(job)
        total = len(speeches) * (len(POLICIES) + 1 + 2 * len(POLICIES))
        with (
            WorkerPool(config.inference, config.seed, evaluation_judge(config), job.verbose) as pool,
            job.progress.stage("evaluate", total, "answers and verdicts") as reporter,
        ):
            answers = sample_all(job, pool, speeches, reporter)
            rows, verdicts = compare_all(job, pool, speeches, answers, reporter)
            reward = audit_reward(job, pool)
        judged = [row for row in rows if row["outcome"] is not None]
        known = gold_of_answers(speeches, answers)
        add_gold(rows, known)
        results = {
            "win_rate": win_rates(judged, speeches, known, first_place_rate(verdicts)),
            "reward_model": reward,
            "judge": {} if starts_from_pairs(config) else audit_judge(job),
        }
        for name, value in results.items():
            storage.write_text(storage.join(partial, "evaluation", f"{name}.json"), json.dumps(value, indent=2))
        storage.write_table(pa.Table.from_pylist(rows), storage.join(partial, "evaluation", "comparisons"))
        if kept := storage.read_text(job.run.path(*CALIBRATION)):  # the judge's, not this stage's: it stays
            storage.write_text(storage.join(partial, *CALIBRATION), kept)
        return StageResult(
            rows_in=len(rows),
            rows_out=len(judged),
            tokens=pool.output_tokens,
            quarantine=[
                {"speech_id": row["speech_id"], "policy": row["policy"], "reason": "comparison failed"}
                for row in rows
                if row["outcome"] is None
            ],
        )

    job.stage("evaluate", body)


def evaluation_speeches(job: Job) -> Speeches:
    """The held-out speeches, at most as many as configured."""
    speeches = [s for s in storage.read_table(job.run.path("speeches")).to_pylist() if s["split"] == "evaluation"]
    return sorted(speeches, key=lambda s: s["speech_id"])[: job.config.evaluation.speeches]


def sample_all(job: Job, pool: WorkerPool, speeches: Speeches, reporter: Reporter) -> dict[str, list[Completion]]:
    """One answer per speech from every policy and the baseline."""
    config = job.config
    folders = {"base": resolve(config, config.policy), BASELINE: resolve(config, config.evaluation.baseline)}
    for name in POLICIES[1:]:
        folders[name] = job.run.path("models", name)
    prompts = [prompt(s, config.generation.system_prompt) for s in speeches]
    return {
        name: pool.sample(
            folder,
            prompts,
            [stable_seed("evaluate", config.seed, name, s["speech_id"]) for s in speeches],
            config.evaluation.sampling,
            reporter,
        )
        for name, folder in folders.items()
    }


def compare_all(
    job: Job, pool: WorkerPool, speeches: Speeches, answers: dict[str, list[Completion]], reporter: Reporter
) -> tuple[list[Row], list[Verdict]]:
    """A row per policy and speech with the outcome over both orders (None: not judged), and all verdicts."""
    judge = evaluation_judge(job.config)
    rows: list[Row] = []
    items: list[PairItem] = []
    for policy in POLICIES:
        for speech, own, other in zip(speeches, answers[policy], answers[BASELINE], strict=True):
            mine, theirs = own.text.strip(), other.text.strip()
            rows.append(
                {
                    "speech_id": speech["speech_id"],
                    "policy": policy,
                    "response": mine,
                    "baseline_response": theirs,
                    "policy_chars": len(mine),
                    "baseline_chars": len(theirs),
                }
            )
            said, before = speech["question"], speech.get("history")
            items += [(said, mine, theirs, before), (said, theirs, mine, before)]
    seeds = [stable_seed("compare", job.config.seed, index) for index in range(len(items))]
    verdicts = pool.compare(resolve(job.config, judge.model), judge, items, seeds, reporter)
    for index, row in enumerate(rows):
        first, second = verdicts[2 * index], verdicts[2 * index + 1]
        answered = row["response"] and row["baseline_response"]
        row["outcome"] = both_orders(first, second) if answered else None
    return rows, verdicts


def gold_of_answers(speeches: Speeches, answers: dict[str, list[Completion]]) -> Gold | None:
    """The true ratings of every policy's and the baseline's answers; None where no truth is known."""
    rated = {}
    for name, given in answers.items():
        texts = [answer.text.strip() for answer in given]
        found = truth.gold_ratings([(s["question"], text) for s, text in zip(speeches, texts, strict=True)])
        if found is None:
            return None
        rated[name] = dict(zip((s["speech_id"] for s in speeches), found, strict=True))
    return rated


def add_gold(rows: list[Row], known: Gold | None) -> None:
    """Give each comparison its true outcome and rating, so that policies can be compared speech by speech."""
    if known is None:
        return
    for row in rows:
        own, other = known[row["policy"]][row["speech_id"]], known[BASELINE][row["speech_id"]]
        row |= {"gold_outcome": outcome(own.overall, other.overall), "gold_rating": own.overall}


def win_rates(judged: list[Row], speeches: Speeches, known: Gold | None, first_place: float | None) -> dict[str, Any]:
    """Win rate per policy; against gold too where the speeches are of the nano world."""
    ids = [s["speech_id"] for s in speeches]
    result: dict[str, Any] = {"first_place_rate": first_place}
    for policy in POLICIES:
        rows = [row for row in judged if row["policy"] == policy]
        if not rows:
            continue
        result[policy] = summarise(rows)
        if known:
            own, other = ([known[name][speech] for speech in ids] for name in (policy, BASELINE))
            result[policy]["gold"] = truth.gold_win_rate(own, other, ids)
    return result


def audit_reward(job: Job, pool: WorkerPool) -> dict[str, Any]:
    """Accuracy, AUC, ECE and Brier of the reward model on the test pairs, with its reliability curve."""
    pairs = storage.read_table(job.run.path("preferences", "test")).to_pylist()
    model = job.run.path("models", "reward")
    conversations = [
        [
            *prompt(p, job.config.generation.system_prompt),
            {"role": "assistant", "content": p[side]},
        ]
        for side in ("chosen", "rejected")
        for p in pairs
    ]
    scores = pool.reward(model, conversations)
    both = [
        (c - r, p["speech_id"])
        for c, r, p in zip(scores[: len(pairs)], scores[len(pairs) :], pairs, strict=True)
        if c is not None and r is not None
    ]
    return audit_reward_margins([m for m, _ in both], [s for _, s in both], seed=job.config.seed)


def audit_judge(job: Job) -> dict[str, Any]:
    """How the label judge spread its ratings; against gold where there is one."""
    said, speeches = rated_speeches(job)
    rows = [row for rated in speeches.values() for row in rated]
    overall = [row["overall"] for row in rows]
    result: dict[str, Any] = {"n": len(rows), "mean_overall": sum(overall) / len(overall), "overall": overall}
    known = truth.gold_ratings([(said[row["speech_id"]]["question"], row["response"]) for row in rows])
    return result | (truth.judge_against_gold(rows, known) if known else {})


if __name__ == "__main__":
    main("evaluate", evaluate, __doc__)
