"""A round's samples: drawn from the policy, scored, paired; runs inside rank 0 and drives the engines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from psycho.config import Config
from psycho.inference.requests import prompt
from psycho.inference.worker import Completion, Messages
from psycho.progress import Reporter
from psycho.schema import stable_id, stable_seed
from psycho.training.online.clock import Clock
from psycho.training.online.drawn import Drawn
from psycho.training.online.engines import Engines
from psycho.training.online.pairing import barred, speech_pairs
from psycho.training.online.scoring import Scoring
from psycho.training.online.watch import figures

Row = dict[str, Any]
Speech = Mapping[str, str]
_AT_ONCE = 256  # known answers that go to be scored in one call

SAMPLE = pa.schema(
    [
        ("speech_id", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("output_tokens", pa.int32()),
        ("reward", pa.float64()),  # the reward model's logit; null where it is not asked or could not say
        ("heads", pa.list_(pa.float64())),  # ratings by its heads, in the order of STEMS; null where not asked for
        ("overall", pa.float64()),  # the judge's; likewise
        (
            "safety",
            pa.float64(),
        ),  # the judge's rating, else of the reward model's head; null without
        ("judge_tokens", pa.int32()),  # that it read and wrote
        ("truncated", pa.bool_()),  # cut off at `online.sampling.max_tokens`
        ("score", pa.float64()),  # of the scorer asked for; null where a part of it is missing
        ("value", pa.float64()),  # the score less the length penalty: what pairs are made by
    ]
)

PAIR = pa.schema([(name, pa.string()) for name in ("id", "messages", "chosen", "rejected")])  # messages: JSON


@dataclass
class Sampled:
    """One round sampled, scored and paired: rows of `SAMPLE` and of `PAIR`."""

    samples: list[Row] = field(default_factory=list)
    pairs: list[Row] = field(default_factory=list)
    report: Row = field(default_factory=dict)


@dataclass
class Rollout:
    """Samples and scores speeches with the engines."""

    engines: Engines
    config: Config
    reporter: Reporter | None = None

    def __call__(
        self,
        policy: str,
        number: int,
        speeches: Sequence[Speech],
        clock: Clock | None = None,
        folder: str | None = None,
    ) -> Sampled:
        """A round's samples and pairs, and what to report of them.

        Args:
            clock: is told the time of each phase.
            folder: where answers are kept as they come, and are found that an earlier try has drawn.
        """
        online, seed = self.config.online, self.config.seed
        k = online.samples_per_speech
        clock = clock or Clock()
        seeds = [stable_seed("online", seed, number, s["speech_id"], n) for s in speeches for n in range(k)]
        samples = self.draw(policy, speeches, k, seeds, clock, folder)
        pairs: list[Row] = []
        ties = 0
        for index, speech in enumerate(speeches):
            own = samples[index * k : (index + 1) * k]
            texts, values = [row["response"] for row in own], [row["value"] for row in own]
            drawn = stable_seed("pairs", seed, number, speech["speech_id"])
            found = speech_pairs(texts, values, barred(own, online), online, drawn)
            known = [v for v in values if v is not None]
            ties += len(known) > 1 and len(set(known)) == 1
            for chosen, rejected in found:
                pairs.append(
                    {
                        "id": stable_id("online", number, speech["speech_id"], len(pairs)),
                        "messages": self._messages(speech),
                        "chosen": texts[chosen],
                        "rejected": texts[rejected],
                    }
                )
        report = {"round": number} | figures(samples, online) | {"pairs": len(pairs), "ties": ties / len(speeches)}
        report["left_out"] = [
            {name: row[name] for name in ("speech_id", "sample")}
            | {"reason": row["error"] or ("no score" if row["response"] else "the policy said nothing")}
            for row in samples
            if row["score"] is None
        ]
        return Sampled(samples, pairs, report | {"seconds": {p: clock.seconds()[p] for p in ("sampling", "scoring")}})

    def dev(self, policy: str, speeches: Sequence[Speech]) -> list[Row]:
        """One response to each speech, with the same seeds every time."""
        seeds = [stable_seed("dev", self.config.seed, speech["speech_id"]) for speech in speeches]
        return self.draw(policy, speeches, 1, seeds, Clock())

    def draw(
        self,
        policy: str,
        speeches: Sequence[Speech],
        k: int,
        seeds: Sequence[int],
        clock: Clock,
        folder: str | None = None,
    ) -> list[Row]:
        """`k` samples of each speech with their scores, speech by speech: rows of `SAMPLE`, and `error`, what a sample
        was refused for (none of it is the client's words)."""
        asked = [(speech, sample) for speech in speeches for sample in range(k)]
        prompts = [prompt(speech, self.config.generation.system_prompt) for speech, _ in asked]
        own = [speech for speech, _ in asked]
        scoring = Scoring(self.engines, self.config, own, prompts, seeds, self.reporter)
        with clock("sampling"):
            answers = self._answers(policy, prompts, seeds, scoring, Drawn(folder))
        rows: list[Row] = [
            {"speech_id": speech["speech_id"], "sample": sample, "response": answer.text.strip()}
            | {"output_tokens": answer.output_tokens, "reward": None, "heads": None}
            | {"overall": None, "safety": None, "judge_tokens": 0, "truncated": answer.finish_reason == "length"}
            | {"error": answer.error}
            for (speech, sample), answer in zip(asked, answers, strict=True)
        ]
        with clock("scoring"):  # what of it is left
            scoring.finish(rows)
        return rows

    def _answers(
        self, policy: str, prompts: Sequence[Messages], seeds: Sequence[int], scoring: Scoring, drawn: Drawn
    ) -> list[Completion]:
        """By place; they are kept and go on to be scored as they come, those that are known already at once."""
        known = drawn.known()
        places = list(known)
        for start in range(0, len(places), _AT_ONCE):
            own = places[start : start + _AT_ONCE]
            scoring.add(own, [known[place] for place in own])
        left = [place for place in range(len(prompts)) if place not in known]

        def came(start: int, completions: list[Completion]) -> None:
            own = left[start : start + len(completions)]
            drawn.keep(own, completions)
            scoring.add(own, completions)

        asked, own_seeds = [prompts[place] for place in left], [seeds[place] for place in left]
        sampling = self.config.online.sampling
        answers = self.engines.rollout.sample(policy, asked, own_seeds, sampling, self.reporter, came) if left else []
        known |= dict(zip(left, answers, strict=True))
        return [known[place] for place in range(len(prompts))]

    def _messages(self, speech: Speech) -> str:
        return json.dumps(prompt(speech, self.config.generation.system_prompt), ensure_ascii=False)
