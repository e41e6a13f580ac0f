"""The card of an exported data set: what it is, where it came from, what is wrong with it, whose words are in it.

Everything is said from the run's own manifests. What the run did not look at (personal data, for one) is said to be
unknown rather than left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from psycho.principles import PRINCIPLES

_LANGUAGE = re.compile("[a-z]{2,3}")  # ISO 639, the only names the hub takes
_REASONS = 5  # of those why rows were left out, the most frequent
_FORMS = {
    "responses": "every rated response, its seven ratings and the evidence that the judge quoted for each",
    "sft": "the best response of each client speech as messages, where it is rated high enough to learn from; for "
    "TRL's `SFTTrainer`",
    "kto": "single responses, wanted (`label` true) where they were chosen more often than rejected; for TRL's "
    "`KTOTrainer`",
    "ranked": "all rated responses of a client speech, best first, with their overall ratings",
}
_COLUMNS = {
    "responses": "`{principle}_rating`, `{principle}_evidence` (null where it was invented, then named in "
    "`unfaithful_evidence`), `overall`, `expected_overall` (by the judge's own probabilities), `floored` (under the "
    "fluency floor), `disagreement` (of a panel), `judge`.",
    "sft": "`messages`; `speech_id`, `model`, `overall`.",
    "kto": "`prompt` and `completion` (messages), `label`; `speech_id`, `model`.",
    "ranked": "`prompt` (messages), `responses`, `scores`, `models`; `speech_id`.",
}
_SHORTCUTS = {
    "longer": "taking the longer response",
    "length": "a rule fitted on lengths alone",
    "opening": "a rule fitted on the first five words alone",
}


def card(
    counts: Mapping[str, int], facts: Mapping[str, Any], written: Mapping[str, Mapping[str, int]] | None = None
) -> str:
    """Markdown with the front matter that the hub and `datasets` read.

    Args:
        counts: pairs by split of the hub.
        written: rows by form (`forms.FORMS`) and split of the hub; None: the pairs alone.
        facts: `name`, `licence`, `sources`, `judge`, `models`, `pairs` (settings), `audit` (`preferences/audit.json`),
            `left_out` (by reason), `personal_data` and `languages` (counts; None: nobody looked), `nano`, `quality`
            (`psycho.quality.quality_facts`), `concerns` (why it should not be passed on) and `fluency_floor`.
    """
    written = {"pairs": counts} if written is None else written
    parts = [
        _front_matter(written, facts),
        f"# {facts['name']}: preferences for counselling responses",
        *([_stamp(facts["concerns"])] if facts["concerns"] else []),
        "Pairs of a better and a worse response to what a client says, by seven principles of good counselling "
        "([arXiv 2502.19731](https://arxiv.org/abs/2502.19731)), made by psycho.",
        "**For research on drafting aids for therapists.** What is trained on it writes drafts that a therapist reads, "
        "changes and answers for. It never faces clients alone and is no substitute for care in a crisis.",
        "## How to load it\n\n" + _loading(written),
        "## Counts\n\n" + _counts(counts, facts, written),
        "## Sources and licence\n\n" + _sources(facts),
        "## Labels\n\n" + _labels(facts),
        "## Quality\n\n" + _quality(facts),
        "## Personal data\n\n" + _personal_data(facts),
        "## Caveats\n\n" + _caveats(facts),
        "## Columns\n\n" + _columns(written),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(written: Mapping[str, Mapping[str, int]], facts: Mapping[str, Any]) -> str:
    def entry(name: str, form: str, folder: str) -> dict[str, Any]:
        files = [{"split": split, "path": f"{folder}/{split}-*.parquet"} for split in written[form]]
        return {"config_name": name, "data_files": files}

    folders = {"default": "data", "conversational": "conversational"} if "pairs" in written else {}
    configs = [entry(name, "pairs", folder) for name, folder in folders.items()]
    configs += [entry(form, form, form) for form in written if form != "pairs"]
    configs[:1] = [config | {"default": True} for config in configs[:1]]
    codes = [code for code in facts["languages"] or () if _LANGUAGE.fullmatch(code)]
    matter = {
        "license": facts["licence"],
        **({"language": sorted(codes)} if codes else {}),
        "tags": ["counselling", "preference-learning", "dpo", "reward-modelling"],
        "configs": configs,
    }
    return f"---\n{yaml.safe_dump(matter, sort_keys=False)}---"


def _stamp(concerns: Sequence[str]) -> str:
    listed = "; ".join(concerns)
    return f"> **Not fit for training or for conclusions: {listed}.** Exported in spite of that, to show the machinery."


def _loading(written: Mapping[str, Any]) -> str:
    lines = []
    if "pairs" in written:
        lines.append(
            "`load_dataset(<this>)` gives the published columns and `prompt`, the conversation as plain text: TRL's "
            "`DPOTrainer` and `RewardTrainer` take it as it is. For a model with a chat template use "
            '`load_dataset(<this>, "conversational")`, the same pairs as messages. In psycho: `pairs.source: <this>`.'
        )
    lines += [f'- `load_dataset(<this>, "{form}")`: {_FORMS[form]}' for form in written if form in _FORMS]
    return "\n".join(lines)


def _counts(counts: Mapping[str, int], facts: Mapping[str, Any], written: Mapping[str, Mapping[str, int]]) -> str:
    lines = ["| split | pairs | client speeches | mean gap |", "|---|---|---|---|"]
    names = {"train": "train", "validation": "dev", "test": "test"}
    for split, pairs in counts.items():
        audit = facts["audit"].get(names[split])
        mean = audit["gap"]["mean"] if audit else None
        more = f"{audit['speeches']:,} | {'unknown' if mean is None else f'{mean:.2f}'}" if audit else "– | –"
        lines.append(f"| {split} | {pairs:,} | {more} |")
    left_out = ", ".join(f"{count:,} {reason}" for reason, count in facts["left_out"].items()) or "none"
    lines += ["", f"Candidates that became no pair: {left_out}. No client speech is in two splits."]
    for form, by_split in written.items():
        if form != "pairs":
            told = ", ".join(f"{count:,} {split}" for split, count in by_split.items()) or "none"
            lines.append(f"Rows of `{form}`: {told}.")
    return "\n".join(lines)


def _sources(facts: Mapping[str, Any]) -> str:
    models = ", ".join(facts["models"]) or "unknown"
    return (
        f"Client speeches: {facts['sources']}. Responses: {models}. Licence: {facts['licence']}. The licences of the "
        "speeches and of the models whose output this is hold beside it."
    )


def _labels(facts: Mapping[str, Any]) -> str:
    pairs = facts["pairs"]
    stems = ", ".join(principle.stem for principle in PRINCIPLES)
    if not any(audit.get("rated", audit["pairs"]) for audit in facts["audit"].values()) and facts["audit"]:
        return (
            f"Which response is the better one was said by the imported set. No pair has ratings on {stems}: their "
            "columns are null, `gap` is the difference of the set's own scores where it has any, and safety was no "
            "constraint."
        )
    lines = [
        f"Judge: {facts['judge']}. It rated each response from 1 to 5 on {stems}; the overall rating is their mean.",
        f"Train pairs: strategy `{pairs['strategy']}`, gap at least {pairs['min_gap']:g}. Test pairs: a speech's best "
        f"response against its worst, gap at least {pairs['min_test_gap']:g}. Ties make no pair.",
    ]
    if pairs["max_safety_loss"] is None:
        lines.append("Safety is no constraint here: a chosen response may be rated less safe than the rejected one.")
    else:
        lines.append(f"No chosen response is rated less safe by {pairs['max_safety_loss']} or more.")
    return "\n".join(lines)


def _quality(facts: Mapping[str, Any]) -> str:
    found = facts["quality"]
    lines = [f"- Judge: {_fitness(found.get('fitness'))}"]
    for counts in found["left_out"].values():
        kinds = "; ".join(f"{count:,} {reason}" for reason, count in list(counts["reasons"].items())[:_REASONS])
        share = f"{counts['rows']:,} of {counts['of']:,} ({counts['rows'] / counts['of']:.1%})"
        lines.append(f"- Left out of the {counts['what']}: {share}{f': {kinds}' if kinds else ''}.")
    floor, floored = facts["fluency_floor"], found.get("floored")
    if floor is None:
        lines.append("- Fluency floor: none, so that broken text may have been rated as if it were language.")
    elif floored:
        share = f"{floored['rows']:,} of {floored['of']:,} ({floored['rows'] / floored['of']:.1%})"
        lines.append(
            f"- Fluency floor {floor:g} (log-probability of a token by the judge): {share} responses under it."
        )
    evidence = found.get("evidence")
    if evidence:
        told = ", ".join(f"{stem} {row['unfaithful_share']:.1%} of {row['quoted']:,}" for stem, row in evidence.items())
        lines.append(f"- Quotations of the judge that do not stand in what they quote: {told}. They were dropped.")
    else:
        lines.append("- Whether the judge's quotations stand in what they quote was not looked up, or it made none.")
    return "\n".join(lines)


def _fitness(fitness: Mapping[str, Any] | None) -> str:
    if not fitness or fitness.get("fit") is None:
        return f"nobody checked whether it is fit{': ' + fitness['why'] if fitness and fitness.get('why') else ''}."
    return f"{'fit' if fitness['fit'] else 'UNFIT'}: {fitness.get('why', 'by its gates')}."


def _personal_data(facts: Mapping[str, Any]) -> str:
    found = facts["personal_data"]
    if facts["nano"]:
        return "None: a grammar made the client speeches, and no person said them."
    if found is None:
        return (
            "Not looked for: no search for names, places or other personal data was made before this was written. "
            "Have it checked before you pass it on."
        )
    listed = ", ".join(f"{count:,} {kind}" for kind, count in found.items()) or "none found"
    return (
        f"Found and masked before anything was stored, by pattern and model: {listed}. A search like this misses some. "
        "Client speech is health data; treat it so."
    )


def _caveats(facts: Mapping[str, Any]) -> str:
    lines = [
        "- The labels are a model's opinion. No client and no therapist took part, unless the sources say so.",
        "- A test pair is a best against a worst response, so that test accuracy is an easy figure.",
    ]
    for name, rule in facts["audit"].get("train", {}).get("shortcuts", {}).items():
        if rule:
            lines.append(
                f"- Without reading, {_SHORTCUTS[name]} is right in {rule['accuracy']:.1%} of the train pairs "
                f"(95 % interval {rule['low']:.1%} to {rule['high']:.1%}, n = {rule['n']:,})."
            )
    inverted = facts["audit"].get("train", {}).get("safety", {}).get("inverted")
    if inverted is not None:
        lines.append(f"- In {inverted:,} train pairs the chosen response is rated less safe than the rejected one.")
    return "\n".join(lines)


def _columns(written: Mapping[str, Any]) -> str:
    lines = [f"- `{form}`: {_COLUMNS[form]}" for form in written if form in _COLUMNS]
    return "\n".join([*([_pair_columns()] if "pairs" in written else []), *lines])


def _pair_columns() -> str:
    return (
        "`ID`, `prefID`, `question`, `chosen`, `rejected`, `chosen_model`, `rejected_model` and fourteen "
        "`{chosen,rejected}_{principle}_rating` are those of PsychoCounsel-Preference. Ours follow: `speech_id`, `gap` "
        "(difference of the overall ratings), `history` (JSON of earlier turns, null for a single turn), `prompt`."
    )
