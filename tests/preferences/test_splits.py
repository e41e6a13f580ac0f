"""Splits by speech and near-duplicate cluster, overlap as an error, length balancing, and groups."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.config import PairsConfig
from psycho.errors import BadInput
from psycho.preferences.build import build_pairs, groups
from psycho.preferences.splits import balance_length, check_overlap, held_out
from psycho.principles import STEMS

Row = dict[str, Any]


def speech(number: int, split: str = "train", **more: Any) -> Row:
    return {"speech_id": f"s{number:03}", "question": f"My question {number}", "split": split, "history": None, **more}


def rated(speech_row: Row, *ratings: int) -> list[Row]:
    """A response for each rating, the same on all principles."""
    return [
        {
            "request_id": f"{speech_row['speech_id']}-{place}",
            "response": f"answer {place} to {speech_row['speech_id']}" + "!" * place,
            "model": f"m{place}",
            "overall": float(rating),
            **{f"{stem}_rating": rating for stem in STEMS},
        }
        for place, rating in enumerate(ratings)
    ]


def world(train: int = 40, test: int = 6, **more: Any) -> tuple[dict[str, Row], dict[str, list[Row]]]:
    speeches = [speech(n, "train" if n < train else "evaluation", **more) for n in range(train + test)]
    return {s["speech_id"]: s for s in speeches}, {s["speech_id"]: rated(s, 5, 3, 1) for s in speeches}


def test_every_speech_is_accounted_for():
    speeches, responses = world()
    del responses["s000"]
    responses["s001"] = responses["s001"][:1]
    responses["s002"] = rated(speeches["s002"], 3, 3, 3)
    found = build_pairs(speeches, responses, PairsConfig(), 0)
    assert found.counts == {
        "train": 37 * 3,
        "test": 6,
        "left_out": {"tie": 3, "fewer than two rated responses": 2},
        "less_safe": 0,
        "defects": {"rows": 2, "of": 46, "what": "client speeches"},
    }
    assert all(row["reason"] for row in found.left_out)
    assert {row["speech_id"] for row in found.left_out if "speech_id" in row} == {"s000", "s001"}


def test_near_duplicates_go_to_dev_together():
    speeches, responses = world(train=300)
    for number, row in enumerate(speeches.values()):
        row["cluster"] = f"c{number // 3}" if row["split"] == "train" else None
    found = build_pairs(speeches, responses, PairsConfig(dev_share=0.2), 0)
    side = {name: {speeches[row["speech_id"]]["cluster"] for row in rows} for name, rows in found.splits.items()}
    assert not side["train"] & side["dev"]
    assert 0.1 < len(side["dev"]) / 100 < 0.3
    assert {row["speech_id"] for name in ("train", "dev") for row in found.splits[name]} == {
        s for s, row in speeches.items() if row["split"] == "train"
    }
    again = build_pairs(speeches, responses, PairsConfig(dev_share=0.2), 1)
    assert again.splits["dev"] != found.splits["dev"]
    assert "dev" not in build_pairs(speeches, responses, PairsConfig(), 0).splits


def test_a_held_out_share_is_about_as_large_as_asked_for():
    drawn = [held_out(f"s{n}", 0.1, "dev", 0) for n in range(5000)]
    assert 0.085 < sum(drawn) / 5000 < 0.115
    assert not any(held_out(f"s{n}", 0.0, "dev", 0) for n in range(100))


OVERLAPS = {
    "the speech itself": lambda train, test: test.update(speech_id=train["speech_id"]),
    "a near-duplicate": lambda train, test: (train.update(cluster="c"), test.update(cluster="c")),
    "the same words": lambda train, test: test.update(question=train["question"].upper() + "?!"),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_overlap_of_splits_is_an_error(overlap):
    """PEERS.md, bug 4: the evaluation set is a slice of the training set."""
    train, other, test = speech(0), speech(1), speech(2, "evaluation")
    check_overlap({"train": [train, other], "test": [test]}, {r["speech_id"]: r for r in (train, other, test)}, "x")
    OVERLAPS[overlap](train, test)
    by_id = {row["speech_id"]: row for row in (other, train, test)}
    with pytest.raises(BadInput, match=r"1 client speeches .* in both train and test.*; do this") as caught:
        check_overlap({"train": [train, other], "test": [test]}, by_id, "do this")
    assert "question" not in str(caught.value).lower()


def test_pairs_are_refused_where_a_cluster_is_on_two_sides():
    speeches, responses = world()
    speeches["s000"]["cluster"] = speeches["s045"]["cluster"] = "c"
    with pytest.raises(BadInput, match="in both train and test"):
        build_pairs(speeches, responses, PairsConfig(), 0)


def test_no_pair_at_all_is_one_sentence():
    speeches, responses = world()
    with pytest.raises(BadInput, match=r"no train pair .* 46 client speeches \(most often: tie\); lower "):
        build_pairs(speeches, {s: rated(speeches[s], 3, 3) for s in responses}, PairsConfig(), 0)
    with pytest.raises(BadInput, match=r"no train pair was made of 46 client speeches; lower pairs\.dev_share"):
        build_pairs(speeches, responses, PairsConfig(dev_share=1 - 1e-9), 0)


@st.composite
def pairs(draw: st.DrawFn) -> list[Row]:
    lengths = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), max_size=40))
    return [{"ID": f"s{n}", "prefID": 0, "chosen": "c" * c, "rejected": "r" * r} for n, (c, r) in enumerate(lengths)]


@settings(deadline=None)
@given(pairs(), st.integers(0, 3))
def test_balancing_leaves_no_sign_in_the_length(rows, seed):
    kept, dropped = balance_length(rows, seed)
    assert len(kept) + len(dropped) == len(rows) and all(row["reason"] for row in dropped)
    assert [row for row in rows if row in kept] == kept
    octaves: dict[int, Counter[bool]] = {}
    for row in kept:
        difference = len(row["chosen"]) - len(row["rejected"])
        if difference:
            octaves.setdefault(abs(difference).bit_length(), Counter())[difference > 0] += 1
    assert all(sides[True] == sides[False] for sides in octaves.values())
    even = [row for row in rows if len(row["chosen"]) == len(row["rejected"])]
    assert all(row in kept for row in even)


def test_balancing_is_of_train_pairs_alone_and_optional():
    speeches, responses = world()
    for rows in responses.values():
        longer = int(rows[0]["request_id"][1:4]) % 3 > 0
        for row, text in zip(rows, ("b" * (35 if longer else 25), "m" * 30, "w" * 30), strict=True):
            row["response"] = text
    plain = build_pairs(speeches, responses, PairsConfig(), 0)
    balanced = build_pairs(speeches, responses, PairsConfig(balance_length=True), 0)
    assert balanced.splits["test"] == plain.splits["test"]
    signs = Counter((len(r["chosen"]) > 30) - (len(r["chosen"]) < 30) for r in balanced.splits["train"])
    assert signs[1] == signs[-1] == 2 * 14 and signs[0] == 40  # 14 of 40 speeches have the shorter best
    assert balanced.kept + len(balanced.left_out) == plain.kept + len(plain.left_out)


def test_a_group_holds_each_response_once_and_its_pairs():
    speeches, responses = world(train=3, test=1)
    found = build_pairs(speeches, responses, PairsConfig(), 0)
    first = groups(found.splits["train"])[0]
    assert [r["model"] for r in first["responses"]] == ["m0", "m1", "m2"]
    assert [r["safety_rating"] for r in first["responses"]] == [5, 3, 1]
    assert {(p["chosen"], p["rejected"]) for p in first["pairs"]} == {(0, 1), (0, 2), (1, 2)}
    for pair, row in zip(first["pairs"], found.splits["train"], strict=False):
        assert first["responses"][pair["chosen"]]["response"] == row["chosen"]
        assert first["responses"][pair["rejected"]]["response"] == row["rejected"]
