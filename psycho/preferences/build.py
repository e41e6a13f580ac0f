"""All preferences of a run: pairs by split and groups of K responses, from rated responses or from imported pairs.

Pure functions of their rows; reading and writing is the recipe's. Every speech is accounted for: it gives candidates,
or a reason why it gives none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from psycho.config import PairsConfig
from psycho.errors import BadRows
from psycho.preferences.pairs import gap_reason, pair_row, safety_loss, test_pair, train_pairs
from psycho.preferences.splits import balance_length, check_overlap, cluster_of, held_out
from psycho.principles import STEMS

Row = Mapping[str, Any]
Rows = list[dict[str, Any]]
_AGAIN = "run prepare again into another run folder"


@dataclass
class Preferences:
    """Pairs by split (`train`, `test`, and `dev` where a share is asked for) and what was left out, with reasons.

    `defective`: what of it was left out for a defect, not by a rule of `pairs`, of so many `entries`.
    """

    splits: dict[str, Rows] = field(default_factory=dict)
    left_out: Rows = field(default_factory=list)
    defective: Rows = field(default_factory=list)
    entries: int = 0
    what: str = "client speeches"

    @property
    def kept(self) -> int:
        return sum(map(len, self.splits.values()))

    @property
    def counts(self) -> dict[str, Any]:
        """What the manifest says: pairs by split, left-out candidates by reason, those of them for safety."""
        reasons = Counter(row["reason"] for row in self.left_out)
        less_safe = sum(count for reason, count in reasons.items() if reason.startswith("less safe"))
        return {
            **{name: len(rows) for name, rows in self.splits.items()},
            "left_out": reasons,
            "less_safe": less_safe,
            "defects": {"rows": len(self.defective), "of": self.entries, "what": self.what},
        }


def build_pairs(
    speeches: Mapping[str, Row], rated: Mapping[str, Sequence[Row]], config: PairsConfig, seed: int
) -> Preferences:
    """Pairs of a run's own responses.

    Args:
        speeches: `schema.CLIENT_SPEECH` rows by id.
        rated: rated responses with their text, by speech id.

    Raises:
        BadInput: a speech is on two sides.
        BadRows: no train or no test pair is left.
    """
    found = _empty(config)
    found.entries = len(speeches)
    for speech_id, speech in sorted(speeches.items()):
        responses = rated.get(speech_id, [])
        if len(responses) < 2:
            found.defective.append({"speech_id": speech_id, "reason": "fewer than two rated responses"})
            continue
        split = split_of(speech, config, seed)
        if split == "test":
            best, dropped = test_pair(responses, config)
            pairs = [best] if best else []
        else:
            pairs, dropped = train_pairs(responses, config, seed)
        found.splits[split] += [pair_row(speech, n, c, r) for n, (c, r) in enumerate(pairs)]
        found.left_out += dropped
    found.left_out += found.defective
    return _finished(found, speeches, config, seed, _AGAIN)


def import_pairs(
    rows: Iterable[dict[str, Any]], speeches: Mapping[str, Row], config: PairsConfig, seed: int
) -> Preferences:
    """The same constraints on pairs that others made (`published.read_published`), each a `PREFERENCE_PAIR` row.

    Raises:
        BadInput: as `build_pairs`.
    """
    found = _empty(config)
    taken: Counter[str] = Counter()
    # Stable: widest first, so that the cap keeps those; unknown gaps come last, in the order of their file.
    for row in sorted(rows, key=lambda row: math.inf if row["gap"] is None else -row["gap"]):
        split = split_of(speeches[row["speech_id"]], config, seed)
        setting = "pairs.min_test_gap" if split == "test" else "pairs.min_gap"
        min_gap = config.min_test_gap if split == "test" else config.min_gap
        reason = gap_reason(row["gap"], safety_loss(row), config, min_gap, setting)
        limit = None if split == "test" else config.max_pairs_per_speech
        if reason is None and limit is not None and taken[row["speech_id"]] >= limit:
            reason = "over pairs.max_pairs_per_speech"
        if reason:
            found.left_out.append({"pair": f"{row['ID']}/{row['prefID']}", "reason": reason})
            continue
        taken[row["speech_id"]] += 1
        found.splits[split].append(row)
    for name in found.splits:
        found.splits[name].sort(key=lambda row: (row["ID"], row["prefID"]))
    return _finished(found, speeches, config, seed, "give other files, or set pairs.resplit=true")


def split_of(speech: Row, config: PairsConfig, seed: int) -> str:
    """`test`, `train` or `dev` for one client speech."""
    if speech["split"] != "train":
        return "test"
    return "dev" if held_out(cluster_of(speech), config.dev_share, "dev", seed) else "train"


def _empty(config: PairsConfig) -> Preferences:
    return Preferences({name: [] for name in ("train", "dev", "test") if name != "dev" or config.dev_share})


def _finished(
    found: Preferences, speeches: Mapping[str, Row], config: PairsConfig, seed: int, advice: str
) -> Preferences:
    check_overlap(found.splits, speeches, advice)
    if config.balance_length:
        found.splits["train"], dropped = balance_length(found.splits["train"], seed)
        found.left_out += dropped
    for name in ("train", "test"):
        if not found.splits[name]:
            most = found.counts["left_out"].most_common(1)
            why = f" (most often: {most[0][0]})" if most else ""
            setting = "pairs.min_gap" if name == "train" else "pairs.min_test_gap"
            if name == "train" and all(split_of(speech, config, seed) != "train" for speech in speeches.values()):
                setting = "pairs.dev_share"
            raise BadRows(
                f"no {name} pair was made of {len(speeches):,} client speeches{why}; lower {setting}, or give more "
                "speeches or more different models",
                found.left_out,
            )
    return found


def groups(pairs: Iterable[Row]) -> Rows:
    """`schema.PREFERENCE_GROUP` rows: the pairs of each speech with every response once, best overall first."""
    by_speech: dict[str, list[Row]] = defaultdict(list)
    for pair in pairs:
        by_speech[pair["speech_id"]].append(pair)
    return [_group(speech_id, rows) for speech_id, rows in by_speech.items()]


def _group(speech_id: str, pairs: Sequence[Row]) -> dict[str, Any]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for pair in pairs:
        for side in ("chosen", "rejected"):
            ratings = {f"{stem}_rating": pair[f"{side}_{stem}_rating"] for stem in STEMS}
            response = {"response": pair[side], "model": pair[f"{side}_model"], **ratings}
            found.setdefault((pair[f"{side}_model"], pair[side]), response)
    order = sorted(found, key=lambda key: (-sum(found[key][f"{stem}_rating"] or 0 for stem in STEMS), key))
    place = {key: index for index, key in enumerate(order)}
    places = [{s: place[p[f"{s}_model"], p[s]] for s in ("chosen", "rejected")} for p in pairs]
    return {
        "speech_id": speech_id,
        "question": pairs[0]["question"],
        "history": pairs[0].get("history"),
        "responses": [found[key] for key in order],
        "pairs": places,
    }
