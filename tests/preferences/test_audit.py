"""The audit of pairs: planted shortcuts are found, absent ones are not, and no speech tells on itself."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from psycho.evaluation.metrics import clustered_rate
from psycho.preferences.audit import audit_pairs, shortcuts
from psycho.principles import STEMS

Row = dict[str, Any]
WORDS = ("quiet", "river", "morning", "table", "window", "garden", "silver", "paper", "music", "orange", "letter")


def pair(speech: int, chosen: str, rejected: str, safety: tuple[int, int] = (4, 3), **more: Any) -> Row:
    ratings = {
        f"{side}_{stem}_rating": 4 if side == "chosen" else 3 for side in ("chosen", "rejected") for stem in STEMS
    }
    ratings |= {"chosen_safety_rating": safety[0], "rejected_safety_rating": safety[1]}
    models = {"chosen_model": "a", "rejected_model": "b"}
    row = {"ID": f"s{speech}", "speech_id": f"s{speech}", "prefID": 0, "chosen": chosen, "rejected": rejected}
    return row | {"gap": 1.0} | models | ratings | more


def text(rng: random.Random, words: int = 12) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


def plain(count: int = 240) -> list[Row]:
    rng = random.Random(0)
    return [pair(n, text(rng, rng.randint(8, 16)), text(rng, rng.randint(8, 16))) for n in range(count)]


def rules(pairs: Sequence[Row]) -> dict[str, Any]:
    return shortcuts(pairs, clustered_rate)


def test_without_a_shortcut_no_rule_knows_anything() -> None:
    for rule in rules(plain()).values():
        assert rule["n"] == 240 and rule["low"] < 0.5 < rule["high"]


def test_an_opening_phrase_is_found_and_length_is_not_blamed() -> None:
    pairs = [
        p | {"chosen": f"I hear you {p['chosen']}", "rejected": f"Well my friend {p['rejected']}"} for p in plain()
    ]
    found = rules(pairs)
    assert found["opening"]["low"] > 0.95
    assert found["length"]["accuracy"] < 0.65 and found["longer"]["accuracy"] < 0.65


def test_a_phrase_further_back_is_no_opening() -> None:
    pairs = [p | {"chosen": f"{p['chosen']} I hear you", "rejected": f"{p['rejected']} my friend"} for p in plain()]
    assert rules(pairs)["opening"]["low"] < 0.5 < rules(pairs)["opening"]["high"]


def test_length_is_found_in_either_direction() -> None:
    rng = random.Random(1)
    longer = [pair(n, text(rng, 20), text(rng, 8)) for n in range(60)]
    shorter = [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in longer]
    assert rules(longer)["longer"]["accuracy"] == 1 and rules(longer)["length"]["low"] > 0.9
    assert rules(shorter)["longer"]["accuracy"] == 0 and rules(shorter)["length"]["low"] > 0.9
    same = [pair(n, "one two", "two one") for n in range(60)]
    assert rules(same)["longer"]["accuracy"] == 0.5


def test_what_is_true_of_one_speech_alone_is_not_learnt() -> None:
    """The same chosen opening in all pairs of a speech: a split by row would look it up."""
    pairs = [pair(n, f"good{n} start{n}", f"bad{n} begin{n}", prefID=k) for n in range(60) for k in range(6)]
    opening = rules(pairs)["opening"]
    assert 0.3 < opening["accuracy"] < 0.7 and opening["n"] == 360


def test_too_few_speeches_give_no_figure_for_what_is_fitted() -> None:
    found = rules([pair(n % 3, "a b", "c") for n in range(30)])
    assert found["opening"] is None and found["length"] is None and found["longer"]["accuracy"] == 1


def test_the_audit_by_hand() -> None:
    pairs = [
        pair(0, "aaaa", "b", (4, 3), gap=1.0),
        pair(0, "a", "bbb", (3, 4), gap=2 / 7, chosen_model="b", rejected_model="a"),
        pair(1, "aa", "bb", (2, 4), gap=3.0),
    ]
    audit = audit_pairs({"train": pairs, "test": []}, clustered_rate)
    assert set(audit) == {"train"}
    train = audit["train"]
    assert (train["pairs"], train["speeches"]) == (3, 2)
    assert train["safety"] == {"inverted": 2, "by_loss": {"1": 1, "2": 1}}
    assert {(w["chosen"], w["rejected"]): w["pairs"] for w in train["wins"]} == {("a", "b"): 2, ("b", "a"): 1}
    assert [(place, n) for place, n in enumerate(train["gap"]["by_sevenths"]) if n] == [(2, 1), (7, 1), (21, 1)]
    length = train["length"]
    assert length["chosen_longer"] == 0.5 and length["difference_mean"] == pytest.approx(1 / 3)
    assert sum(length["counts"]) == 3 and length["edges"][0] == -length["edges"][-1] == -3
    assert "aaaa" not in str(audit)
