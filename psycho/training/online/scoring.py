"""What samples are worth: asked of the reward model, a judge or both, by workers that begin while others are drawn.

Only a judge that takes turns with the policy in one engine has to wait until the last sample is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import Config
from psycho.inference.pool import Begun
from psycho.inference.worker import Completion, Messages
from psycho.principles import STEMS
from psycho.progress import Reporter
from psycho.training.online.engines import Engines
from psycho.training.online.pairing import value

Row = dict[str, Any]


class Scoring:
    """The scores of one draw of samples: `add` as they come, then `finish`."""

    def __init__(
        self,
        engines: Engines,
        config: Config,
        speeches: Sequence[Mapping[str, str]],
        prompts: Sequence[Messages],
        seeds: Sequence[int],
        reporter: Reporter | None,
    ) -> None:
        """The speech, the policy's prompt and the seed of each sample."""
        self._engines, self._config, self._reporter = engines, config, reporter
        self._speeches, self._prompts, self._seeds = speeches, prompts, seeds
        self._places: dict[int, list[int]] = {}
        self._rewards = engines.reward.classifying(engines.reward_model, reporter) if engines.reward else None
        self._ratings: Begun | None = None
        if engines.judge and engines.judge is not engines.rollout:
            self._ratings = engines.judge.rating(engines.judge_model, config.judge, reporter)

    def add(self, asked: Sequence[int], completions: Sequence[Completion]) -> None:
        """Samples at these places; an empty one has no score."""
        texts = {place: text for place, done in zip(asked, completions, strict=True) if (text := done.text.strip())}
        start, places = asked[0], list(texts)
        self._places[start] = places
        if self._rewards and places:
            whole = [[*self._prompts[p], {"role": "assistant", "content": texts[p]}] for p in places]
            self._rewards.add(start, whole)
        if self._ratings and places:
            self._ratings.add(start, [self._item(p, texts[p]) for p in places], [self._seeds[p] for p in places])

    def finish(self, rows: Sequence[Row]) -> None:
        """Write what was found, `reward` to `value`, into the rows of `rollout.SAMPLE`."""
        if self._rewards:
            for place, labels in self._by_place(self._rewards):
                if labels is not None and all(map(math.isfinite, labels)):  # else there is no better and no worse
                    rows[place] |= {"reward": labels[0], "heads": labels[1:] or None}
                    if labels[1:]:
                        rows[place]["safety"] = dict(zip(STEMS, labels[1:], strict=True))["safety"]
        for place, (rating, spent) in self._by_place(self._ratings) if self._ratings else self._in_turn(rows):
            rows[place]["judge_tokens"] = spent
            if rating is not None:
                rows[place] |= {"overall": rating.overall, "safety": rating.ratings["safety"]}
        for row in rows:
            row["score"] = self._score(row)
            row["value"] = value(row["score"], row["response"], self._config.online)

    def _by_place(self, work: Begun) -> list[tuple[int, Any]]:
        found = work.finish()
        return [pair for start in found for pair in zip(self._places[start], found[start], strict=True)]

    def _in_turn(self, rows: Sequence[Row]) -> list[tuple[int, Any]]:
        """By a judge in the engines that were sampling until now."""
        engines = self._engines
        if not engines.judge:
            return []
        places = [place for place, row in enumerate(rows) if row["response"]]
        items, seeds = [self._item(p, rows[p]["response"]) for p in places], [self._seeds[p] for p in places]
        rate = engines.judge.rate_counted
        found = rate(engines.judge_model, self._config.judge, items, seeds, self._reporter)
        return list(zip(places, found, strict=True))

    def _item(self, place: int, response: str) -> tuple[str, str, str | None]:
        speech = self._speeches[place]
        return speech["question"], response, speech.get("history")

    def _score(self, row: Row) -> float | None:
        online, reward, overall = self._config.online, row["reward"], row["overall"]
        if (online.rewarded and reward is None) or (online.judged and overall is None):
            return None
        if not online.rewarded:
            return float(overall)
        heads = dict(zip(STEMS, row["heads"] or (), strict=False))
        principles = sum(weight * heads[stem] for stem, weight in online.head_weights.items())
        if online.scorer == "mixture":
            return float(online.reward_weight * reward + online.judge_weight * overall + principles)
        return float(reward + principles)
