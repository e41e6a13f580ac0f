"""What the figures of a run say in words, for a reader who is a counsellor: the story, its limits, what to look at.

A sentence appears only where its figures are there, and each of the warnings has a threshold that is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import Config
from psycho.stages import POLICIES, same_judge

Summary = Mapping[str, Any]
Histories = Mapping[str, Sequence[Mapping[str, float]]]

LABELS = {
    "base": "before training",
    "sft": "after the best examples",
    "dpo": "after preference pairs",
    "online": "after online rounds",
}
FEW_SPEECHES = 100
LONGER = 1.25  # times the characters of the model before training
GOLD_DIFFERENCE = 0.1  # between the judge's win rate and the true one
PLACE_BIAS = 0.1  # of first-place wins, away from one half
OFF_GRAMMAR = 0.9


def headline_policy(summary: Summary) -> str | None:
    """The furthest trained policy that was evaluated."""
    there = [name for name in POLICIES if name in summary.get("win_rate", {})]
    return there[-1] if there else None


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def interval(row: Mapping[str, float], low: str = "low", high: str = "high") -> str:
    """The 95 % interval of a rate, without the words."""
    return f"{100 * row[low]:.1f}–\u2060{100 * row[high]:.1f}\u00a0%"


def story(config: Config, summary: Summary) -> list[str]:
    """What was done and what came of it, a paragraph each."""
    return [text for text in (_training(config, summary), _result(config, summary), _reward(summary)) if text]


def _training(config: Config, summary: Summary) -> str:
    counts = summary["counts"]
    if "speeches" not in counts:
        return "Nothing has been trained yet."
    parts = [f"This run used {counts['speeches']:,} things a client might say (“client speeches”)."]
    if "ratings" in counts:
        parts.append(
            f"Each went to {config.generation.models_per_speech} of {len(config.generation.pool)} language models; "
            f"a judge model rated {counts['ratings']:,} of their responses from 1 to 5 on seven principles of good "
            "counselling."
        )
    if "pairs_train" in counts:
        parts.append(
            f"That gave {counts['pairs_train']:,} pairs of a better and a worse response to learn from, and "
            f"{counts['pairs_test']:,} to test with."
        )
    trained = [name for name in ("sft", "reward", "dpo", "online") if f"train_{name}" in summary["stages"]]
    if trained:
        names = {
            "sft": "a model of the best responses",
            "reward": "a reward model",
            "dpo": "a preference-tuned model",
        }
        listed = [names.get(name, "a model tuned further on its own rated responses") for name in trained]
        parts.append(f"From {config.policy} it trained {_join(listed)}.")
    return " ".join(parts)


def _result(config: Config, summary: Summary) -> str:
    name = headline_policy(summary)
    if name is None:
        return ""
    row = summary["win_rate"][name]
    if row["low"] > 0.5:
        verdict = "better than the baseline, by this judge"
    elif row["high"] < 0.5:
        verdict = "worse than the baseline, by this judge"
    else:
        verdict = "not clearly better or worse than the baseline: the interval includes one half"
    parts = [
        f"On {row['n']:,} client speeches that no model was trained on, the judge preferred the trained model "
        f"({name}) to the baseline {config.evaluation.baseline} in {percent(row['rate'])} of cases "
        f"(95\u00a0% interval {interval(row)}): {verdict}."
    ]
    if row.get("length_controlled") is not None:
        parts.append(f"With both responses equally long it would be {percent(row['length_controlled'])}.")
    base = summary["win_rate"].get("base")
    if base and name != "base":
        parts.append(f"Before training it was {percent(base['rate'])} ({interval(base)}).")
    if "gold" in row:
        parts.append(f"By the true quality, known in this practice world, it is {percent(row['gold']['rate'])}.")
    return " ".join(parts)


def _reward(summary: Summary) -> str:
    reward = summary.get("reward_model")
    if not reward:
        return ""
    return (
        f"The reward model put the better response first in {percent(reward['accuracy'])} of {reward['n']:,} test "
        f"pairs ({interval(reward, 'accuracy_low', 'accuracy_high')})."
    )


def limits(config: Config, summary: Summary) -> list[str]:
    """What the figures do not show."""
    found = []
    if is_nano(summary):
        found.append(
            "This is the embedded practice world: a small grammar made the speeches and the models are tiny. It "
            "shows whether the method works, and nothing about real clients."
        )
    if summary.get("win_rate") and same_judge(config):
        found.append(
            "The judge that labelled the training pairs also decided the win rate, so its taste counts twice. Set "
            "evaluation.judge to another model for an independent view."
        )
    found.append("A judge model is not a client or a therapist: its preference is not a benefit to anybody.")
    if summary.get("reward_model"):
        found.append(
            "Test pairs set a speech's best response against its worst, which makes the reward model's accuracy an "
            "easy figure."
        )
    found.append("Every conversation is a single speech and a single response.")
    found.append(
        "This report holds no safety test: it does not show how the model answers a client in danger or crisis."
    )
    return found


def is_nano(summary: Summary) -> bool:
    """True where the true quality of a response is known."""
    return "correlation_gold" in summary.get("judge", {}) or any(
        "gold" in row for row in summary.get("win_rate", {}).values()
    )


def warnings(summary: Summary, first_place: float | None, histories: Histories) -> list[str]:
    """Known ways in which such a training goes wrong, where these figures show them."""
    found = [*_policy_warnings(summary), *_reward_warnings(histories)]
    if first_place is not None and abs(first_place - 0.5) > PLACE_BIAS:
        found.append(
            f"The judge prefers a place: the response shown first won {percent(first_place)} of comparisons. Each "
            "pair was shown in both orders, so no model gains, but the judge is noisy."
        )
    return found


def _policy_warnings(summary: Summary) -> list[str]:
    name, rates = headline_policy(summary), summary.get("win_rate", {})
    if name is None:
        return []
    row, found = rates[name], []
    if row["n"] < FEW_SPEECHES:
        found.append(f"Only {row['n']:,} speeches were compared, so the interval is wide.")
    if "base" in rates and name != "base" and row["mean_chars"] > LONGER * rates["base"]["mean_chars"]:
        found.append(
            f"Responses grew from {rates['base']['mean_chars']:.0f} to {row['mean_chars']:.0f} characters; judges "
            "favour length, so look at the rate at equal length."
        )
    gold = row.get("gold")
    if gold and row["rate"] - gold["rate"] > GOLD_DIFFERENCE:
        found.append(
            f"The judge sees {percent(row['rate'])} where the truth is {percent(gold['rate'])}: the model may have "
            "learned what pleases the judge (over-optimisation)."
        )
    if gold and gold["on_grammar"] < OFF_GRAMMAR:
        found.append(f"Only {percent(gold['on_grammar'])} of the text is still well-formed in the practice language.")
    return found


def _reward_warnings(histories: Histories) -> list[str]:
    found = []
    for name, rows in histories.items():
        last = rows[-max(1, len(rows) // 10) :]
        mean = sum(row["reward_chosen"] for row in last) / len(last)
        if mean < 0:
            found.append(
                f"In {name} the reward of the chosen responses fell to \u2212{-mean:.2f}: the model learned to avoid "
                "the rejected responses and made the chosen ones less likely too."
            )
    return found


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
