"""A finished run folder with made-up results: real stages and manifests, no engine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from psycho import storage
from psycho.config import load_config
from psycho.evaluation.comparison import summarise
from psycho.evaluation.metrics import audit_reward_margins, clustered_rate
from psycho.evaluation.winrate import win_rate
from psycho.preferences.audit import audit_pairs
from psycho.principles import STEMS, overall
from psycho.run import Run, StageResult
from psycho.schema import CLIENT_SPEECH, PREFERENCE_PAIR, RATING, RESPONSE
from psycho.stages import STAGES

CONFIG = Path(__file__).parents[2] / "configs" / "nano.yaml"
HOSTILE = 'That sounds hard. <script>alert("x")</script> <img src="http://example.org/a.png"> What would help?'
QUALITY = {"base": 2.2, "brisk": 2.7, "warm": 3.2, "coach": 3.6, "skilled": 4.2}
SECONDS = {"prepare": 0.4, "generate": 61.2, "judge": 88.9, "pair": 0.7, "train_online": 210.4, "evaluate": 122.8}
SKILL = {"base": 0.12, "sft": 0.38, "dpo": 0.55, "online": 0.68}
Rows = list[dict[str, Any]]


class FakeRun:
    """Writes the artifacts of each stage through `Run.execute`, with figures drawn from a seed."""

    fitness: dict[str, Any] | None = None  # what the judge's manifest says of it

    def __init__(self, folder: Path, gold: bool = True, train: int = 70, evaluation: int = 120) -> None:
        self.run = Run(load_config(CONFIG, run_dir=str(folder)), STAGES)
        self.run.open()
        self.random = np.random.default_rng(0)
        self.gold, self.train, self.evaluation = gold, train, evaluation
        self.rated: dict[str, Rows] = {}

    def finish(self, last: str = "evaluate") -> Run:
        """Do all stages up to `last`."""
        for stage in STAGES:
            self.run.execute(stage.name, getattr(self, stage.name, None) or self._model(stage.name.split("_")[1]))
            self._slow_down(stage.name)
            if stage.name == last:
                break
        return self.run

    def _slow_down(self, name: str) -> None:
        """Give the manifest the seconds of a real run."""
        manifest = self.run.manifest(name) or {}
        path = self.run.path("manifests", f"{name}.json")
        storage.write_text(path, json.dumps(manifest | {"seconds": SECONDS.get(name, 45.0)}))

    def _table(self, rows: Rows, schema: pa.Schema | None, *parts: str) -> None:
        blank = {field.name: None for field in schema} if schema else {}
        storage.write_table(pa.Table.from_pylist([blank | row for row in rows], schema=schema), storage.join(*parts))

    def prepare(self, partial: str) -> StageResult:
        total = self.train + self.evaluation
        self.speeches = [
            {
                "speech_id": f"s{i:04d}",
                "question": f"I keep lying awake over case {i}. My partner says <i>it will pass</i> & I feel stuck.",
                "split": "train" if i < self.train else "evaluation",
                "topic": "sleep",
            }
            for i in range(total)
        ]
        self._table(self.speeches, CLIENT_SPEECH, partial, "speeches")
        quarantine = [{"row": i, "reason": "under speeches.min_chars"} for i in range(6)]
        return StageResult(rows_in=total + 6, rows_out=total, quarantine=quarantine)

    def generate(self, partial: str) -> StageResult:
        self.responses = [
            {
                "request_id": f"{speech['speech_id']}-{model}",
                "speech_id": speech["speech_id"],
                "split": speech["split"],
                "model": model,
                "response": f"It sounds exhausting, says {model} about {speech['speech_id']}.",
            }
            for speech in self.speeches
            for model in self.random.permutation(list(QUALITY))[:4].tolist()
        ]
        self._table(self.responses, RESPONSE, partial, "responses")
        return StageResult(rows_in=len(self.responses), rows_out=len(self.responses), tokens=41_250)

    def judge(self, partial: str) -> StageResult:
        rows = []
        for response in self.responses:
            level = QUALITY[response["model"]] + self.random.normal(0, 0.5)
            drawn = np.clip(np.rint(level + self.random.normal(0, 0.8, len(STEMS))), 1, 5).astype(int)
            ratings = dict(zip(STEMS, drawn.tolist(), strict=True))
            columns = {f"{stem}_rating": rating for stem, rating in ratings.items()}
            rows.append(
                {k: v for k, v in response.items() if k != "response"} | columns | {"overall": overall(ratings)}
            )
            self.rated.setdefault(response["speech_id"], []).append(rows[-1] | {"response": response["response"]})
        self._table(rows[:-3], RATING, partial, "ratings")
        quarantine = [{"request_id": row["request_id"], "reason": "no valid JSON"} for row in rows[-3:]]
        extra = {"fitness": self.fitness} if self.fitness else {}
        return StageResult(rows_in=len(rows), rows_out=len(rows) - 3, tokens=96_400, quarantine=quarantine, extra=extra)

    def pair(self, partial: str) -> StageResult:
        pairs: dict[str, Rows] = {"train": [], "test": []}
        left_out: Rows = []
        for number, rows in enumerate(self.rated.values()):
            split = "train" if number < self.train else "test"
            best = sorted(rows, key=lambda row: -row["overall"])
            for one, other in combinations(rows, 2) if split == "train" else [(best[0], best[-1])]:
                chosen, rejected = (one, other) if one["overall"] >= other["overall"] else (other, one)
                gap = chosen["overall"] - rejected["overall"]
                if gap < 1:
                    left_out.append({"reason": "gap under pairs.min_gap" if gap else "tie"})
                    continue
                pairs[split].append(_pair(chosen, rejected, gap))
        for split, rows in pairs.items():
            self._table(rows, PREFERENCE_PAIR, partial, "preferences", split)
        audit = audit_pairs(pairs, clustered_rate)
        storage.write_text(storage.join(partial, "preferences", "audit.json"), json.dumps(audit))
        kept = {split: len(rows) for split, rows in pairs.items()}
        return StageResult(
            rows_in=sum(kept.values()) + len(left_out),
            rows_out=sum(kept.values()),
            quarantine=left_out,
            extra=kept | {"left_out": Counter(row["reason"] for row in left_out)},
        )

    def _model(self, name: str) -> Callable[[str], StageResult]:
        def body(partial: str) -> StageResult:
            lines = [json.dumps(row) for row in self._history(name)]
            storage.write_text(storage.join(partial, "models", name, "training.jsonl"), "\n".join(lines) + "\n")
            return StageResult(rows_in=400, rows_out=400, tokens=55_000, extra={"steps": len(lines)})

        return body

    def train_online(self, partial: str) -> StageResult:
        rounds = [
            {"round": n, "samples": 1600, "pairs": 280 + 12 * n, "failed": n, "mean_score": 3.4 + 0.3 * n,
             "mean_chars": 212.0 + 31 * n, "sampled_tokens": 60_000}
            for n in range(3)
        ]  # fmt: skip
        for n, row in enumerate(rounds[1:], start=1):  # the first as an earlier psycho wrote it
            row |= {
                "best_score": 4.1 + 0.2 * n,
                "ties": 0.125,
                "floor_hits": 3,
                "truncated": 4,
                "too_long": 5,
                "spread": 0.42,
                "entropy": 1.5 / n,
                "kl": 0.4 * n,
                "dev_score": 3.9 + n % 2,
                "policy": n - 1,
                "sync_error": 3.2e-6 * n,
            }
            row |= {"seconds": {"wall": 40.0 + n}} | ({"chosen": True} if n == 1 else {})
        storage.write_text(storage.join(partial, "models", "online", "rounds.json"), json.dumps(rounds))
        storage.write_text(storage.join(partial, "online", "samples", "a-file.txt"), "")
        result = self._model("online")(partial)
        return StageResult(**(vars(result) | {"extra": {"rounds": rounds}}))

    def _history(self, name: str) -> Rows:
        steps = 60
        rows = []
        for step in range(steps):
            done, noise = step / steps, self.random.normal(0, 0.02)
            start = 2.4 if name == "sft" else np.log(2)
            row = {"step": step, "lr": 1e-4, "tokens": 900, "loss": start * (1 - 0.6 * done) + noise}
            if name in ("dpo", "online"):
                row |= {"reward_chosen": 0.4 * done - 1.1 * done**2 + noise, "reward_rejected": -2.2 * done + noise}
            if name == "online":
                row |= {"round": step // 20}
            rows.append(row)
        return rows

    def evaluate(self, partial: str) -> StageResult:
        rows = [self._comparison(policy, speech) for policy in SKILL for speech in self.speeches[self.train :]]
        judged = [row for row in rows if row["outcome"] is not None]
        results = {"win_rate": self._win_rates(rows, judged), "reward_model": self._audit(), "judge": self._judged()}
        for name, value in results.items():
            storage.write_text(storage.join(partial, "evaluation", f"{name}.json"), json.dumps(value))
        self._table(rows, None, partial, "evaluation", "comparisons")
        quarantine = [{"reason": "comparison failed"}] * (len(rows) - len(judged))
        return StageResult(rows_in=len(rows), rows_out=len(judged), tokens=38_000, quarantine=quarantine)

    def _comparison(self, policy: str, speech: dict[str, Any]) -> dict[str, Any]:
        chance = SKILL[policy]
        outcome = float(self.random.choice([1.0, 0.5, 0.0], p=[chance, 0.08, 0.92 - chance]))
        return {
            "speech_id": speech["speech_id"],
            "policy": policy,
            "response": HOSTILE,
            "baseline_response": "Try to sleep earlier.\nIt usually passes.",
            "policy_chars": int(150 + 90 * chance + self.random.integers(0, 60)),
            "baseline_chars": int(190 + self.random.integers(0, 60)),
            "outcome": None if self.random.random() < 0.01 else outcome,
        } | (self._truth(chance) if self.gold else {})

    def _truth(self, chance: float) -> dict[str, float]:
        rating = float(np.clip(2 + 2.5 * chance + self.random.normal(0, 0.4), 1, 5))
        return {"gold_outcome": float(self.random.random() < chance - 0.02), "gold_rating": rating}

    def _win_rates(self, rows: Rows, judged: Rows) -> dict[str, Any]:
        rates: dict[str, Any] = {"first_place_rate": 0.53}
        for policy, chance in SKILL.items():
            rates[policy] = summarise([row for row in judged if row["policy"] == policy])
            if self.gold:
                own = [row for row in rows if row["policy"] == policy]
                mean = float(np.mean([row["gold_rating"] for row in own]))
                outcomes = [row["gold_outcome"] for row in own]
                extra = {"mean_rating": mean, "on_grammar": 0.9 + 0.1 * chance}
                rates[policy]["gold"] = win_rate(outcomes, [row["speech_id"] for row in own]) | extra
        return rates

    def _audit(self) -> dict[str, Any]:
        margins = self.random.normal(1.6, 1.2, self.evaluation)
        return audit_reward_margins(margins, list(range(self.evaluation)))

    def _judged(self) -> dict[str, Any]:
        ratings = [row["overall"] for rows in self.rated.values() for row in rows]
        result = {"n": len(ratings), "mean_overall": float(np.mean(ratings)), "overall": ratings}
        if self.gold:
            known = dict(zip(STEMS, [0.81, 0.74, 0.62, 0.9, 0.7, 0.58, None], strict=True))
            result |= {"pair_agreement_gold": 0.93, "pairs": 412, "correlation_gold": known | {"overall": 0.88}}
        return result


def _pair(chosen: dict[str, Any], rejected: dict[str, Any], gap: float) -> dict[str, Any]:
    sides = {"chosen": chosen, "rejected": rejected}
    row = {"ID": chosen["speech_id"], "prefID": 0, "question": "", "speech_id": chosen["speech_id"], "gap": gap}
    for side, source in sides.items():
        row |= {side: source["response"], f"{side}_model": source["model"]}
        row |= {f"{side}_{stem}_rating": source[f"{stem}_rating"] for stem in STEMS}
    return row


@pytest.fixture
def fake_run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "nano")
