"""What the figures of a run say in words, for a reader who is a counsellor: the story, its limits, what to look at.

A sentence appears only where its figures are there, and each of the warnings has a threshold that is written here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from psycho.config import Config
from psycho.evaluation.captions import preference_settings
from psycho.evaluation.steps import NAMES, best_sentence, step_sentence
from psycho.stages import evaluation_judge, same_judge, starts_from_pairs

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
    """The policy with the highest win rate by the judge; whether it stands apart, `summary["best"]` says."""
    best = summary.get("best")
    return best["highest"] if best else None


def percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}\u00a0%"


def interval(row: Mapping[str, float], low: str = "low", high: str = "high") -> str:
    """The 95 % interval of a rate, without the words."""
    return f"{100 * row[low]:.1f}–\u2060{100 * row[high]:.1f}\u00a0%"


def story(config: Config, summary: Summary) -> list[str]:
    """What was done and what came of it, a paragraph each."""
    parts = (_training(config, summary), _result(config, summary), _best(summary), _reward(summary))
    return [text for text in parts if text]


def _training(config: Config, summary: Summary) -> str:
    counts = summary["counts"]
    if "speeches" not in counts:
        return "This run holds nothing yet."
    parts = [f"This run used {counts['speeches']:,} things a client might say (“client speeches”)."]
    if "ratings" in counts:
        panel = config.judge.mode == "panel"
        parts.append(
            f"Each went to {config.generation.models_per_speech} of {len(config.generation.pool)} language models; "
            f"{'a panel of judge models' if panel else 'a judge model'} rated {counts['ratings']:,} of their responses "
            "from 1 to 5 on seven principles of good counselling."
        )
    elif "responses" in counts:
        parts.append(
            f"{config.generation.models_per_speech} of {len(config.generation.pool)} language models answered each, "
            f"{counts['responses']:,} responses in all; nothing has been rated yet."
        )
    if "pairs_train" in counts:
        parts.append(
            f"{'The pairs that were read' if starts_from_pairs(config) else 'That'} gave {counts['pairs_train']:,} "
            f"pairs of a better and a worse response to learn from, and {counts.get('pairs_test', 0):,} to test with."
        )
    trained = [name for name in ("sft", "reward", "dpo", "online") if f"train_{name}" in summary["stages"]]
    if trained:
        after_sft = " (from that of the best responses)" if config.training.dpo.init == "sft" else ""
        names = {
            "sft": "a model of the best responses",
            "reward": "a reward model",
            "dpo": f"a preference-tuned model{after_sft}",
        }
        listed = [names.get(name, "a model tuned further on its own rated responses") for name in trained]
        init = config.training.reward.init
        apart = f" (the reward model from {init})" if "reward" in trained and init != "policy" else ""
        parts.append(f"From {config.policy} it trained {_join(listed)}{apart}.")
    else:
        parts.append("No model has been trained yet.")
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
    judge = evaluation_judge(config).model
    parts = [
        f"On {row['n']:,} client speeches that nothing in this run was trained on, the judge {judge} preferred "
        f"{NAMES[name]} to the baseline {config.evaluation.baseline} in {percent(row['rate'])} of cases (a tie counts "
        f"half; 95\u00a0% interval {interval(row)}): {verdict}."
    ]
    if row.get("length_controlled") is not None:
        parts.append(f"With both responses equally long it would be {percent(row['length_controlled'])}.")
    if "gold" in row:
        parts.append(
            f"By the true quality, known in this practice world, it is {percent(row['gold']['rate'])} "
            f"({interval(row['gold'])})."
        )
    return " ".join(parts)


def _best(summary: Summary) -> str:
    """Which policy is best, by the judge and by the truth."""
    best = summary.get("best")
    if not best:
        return ""
    gold = best.get("gold")
    return " ".join([best_sentence(best), *([best_sentence(gold, by="the truth")] if gold else [])])


def _reward(summary: Summary) -> str:
    reward = summary.get("reward_model")
    if not reward:
        return ""
    return (
        f"The reward model put the preferred response first in {percent(reward['accuracy'])} of {reward['n']:,} test "
        f"pairs (95\u00a0% interval {interval(reward, 'accuracy_low', 'accuracy_high')})."
    )


def limits(config: Config, summary: Summary) -> list[str]:
    """What the figures do not show."""
    found = []
    if is_nano(summary) or (config.speeches.source == "nano" and not starts_from_pairs(config)):
        found.append(
            "This is the embedded practice world: a small grammar made the speeches and the models are tiny. It "
            "shows whether the method works, and nothing about real clients."
        )
    if summary.get("win_rate") and same_judge(config):
        found.append(
            "The judge that labelled the training pairs also decided the win rate, so its taste counts twice. Set "
            "evaluation.judge to another model for an independent view."
        )
    elif summary.get("win_rate") and summary["fitness"]["fit"] is not None and not starts_from_pairs(config):
        found.append(
            f"Whether a judge is fit was looked at for the one that labelled the pairs, {config.judge.model}, and not "
            f"for the one that decided the win rate, {evaluation_judge(config).model}."
        )
    if summary.get("win_rate") or "ratings" in summary["counts"]:
        found.append("A judge model is not a client or a therapist: its preference is not a benefit to anybody.")
    if summary.get("best"):
        found.append(
            "The best policy is the one that did best on these very speeches, so its rate flatters it a little; its "
            "lead over the others is what the intervals of the steps are for."
        )
    if summary.get("reward_model") and not starts_from_pairs(config):
        found.append(
            "Test pairs set a speech's best response against its worst, which makes the reward model's accuracy an "
            "easy figure."
        )
    found.append("Each response answers one client speech; where a longer conversation would lead is not known.")
    found.append(
        "This report holds no safety test: it does not show how the model answers a client in danger or crisis."
    )
    return found


def is_nano(summary: Summary) -> bool:
    """True where the true quality of a response is known."""
    return "correlation_gold" in summary.get("judge", {}) or any(
        "gold" in row for row in summary.get("win_rate", {}).values()
    )


def warnings(config: Config, summary: Summary, first_place: float | None, histories: Histories) -> list[str]:
    """Known ways in which such a training goes wrong, where these figures show them."""
    found = [*_step_warnings(summary), *_policy_warnings(summary), *_reward_warnings(config, histories)]
    if first_place is not None and abs(first_place - 0.5) > PLACE_BIAS:
        found.append(
            f"The judge prefers a place: the response shown first won {percent(first_place)} of comparisons. Each "
            "pair was shown in both orders, so no model gains, but the judge is noisy."
        )
    return found


def _step_warnings(summary: Summary) -> list[str]:
    """Steps that did not gain by the judge or by the truth, and a best policy that the truth does not confirm."""
    figures = ("win_rate", "gold_win_rate")
    found = [
        step_sentence(step)
        for step in summary.get("steps", [])
        if any(step[figure]["low"] <= 0 for figure in figures if figure in step)
    ]
    best = summary.get("best") or {}
    gold = best.get("gold")
    if gold and best["policy"] and gold["policy"] and best["policy"] != gold["policy"]:
        found.append(f"The judge's best policy is {NAMES[best['policy']]}, the true best {NAMES[gold['policy']]}.")
    return found


def _policy_warnings(summary: Summary) -> list[str]:
    """The first of each kind that holds for the policy with the highest win rate; drift is looked for in all."""
    name, rates = headline_policy(summary), summary.get("win_rate", {})
    if name is None:
        return []
    found = []
    if rates[name]["n"] < FEW_SPEECHES:
        found.append(f"Only {rates[name]['n']:,} speeches were compared, so the interval is wide.")
    for policy, row in rates.items():
        found += _drift(policy, row, rates.get("base", {}).get("mean_chars"))
    return found


def _drift(policy: str, row: Mapping[str, Any], chars_before: float | None) -> list[str]:
    """What a trained policy may have learned in place of better answers."""
    found = []
    if policy != "base" and chars_before and row["mean_chars"] > LONGER * chars_before:
        found.append(
            f"Responses of {NAMES[policy]} grew from {chars_before:.0f} to {row['mean_chars']:.0f} characters; judges "
            "favour length, so look at the rate at equal length."
        )
    gold = row.get("gold")
    if policy != "base" and gold and row["rate"] - gold["rate"] > GOLD_DIFFERENCE:
        found.append(
            f"The judge sees {percent(row['rate'])} for {NAMES[policy]} where the truth is {percent(gold['rate'])}: "
            "the model may have learned what pleases the judge (over-optimisation)."
        )
    if policy != "base" and gold and gold["on_grammar"] < OFF_GRAMMAR:
        found.append(
            f"Only {percent(gold['on_grammar'])} of the responses of {NAMES[policy]} are still well-formed in the "
            "practice language."
        )
    return found


def _reward_warnings(config: Config, histories: Histories) -> list[str]:
    """Without a reference the curves are log-probabilities, which are below 0 by nature."""
    found = []
    for name, rows in histories.items():
        last = rows[-max(1, len(rows) // 10) :]
        mean = sum(row["reward_chosen"] for row in last) / len(last)
        if mean < 0 and preference_settings(config, name).needs_reference:
            found.append(
                f"In {name} the reward of the chosen responses fell to \u2212{-mean:.2f}: the model learned to avoid "
                "the rejected responses and made the chosen ones less likely too."
            )
    return found


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
