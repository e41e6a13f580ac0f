"""The taxonomy: 8 coarse and 42 fine topics, the nano world's among them, and labels of other data sets."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pytest

from psycho.nano.grammar import load_bank
from psycho.speeches.label import parse_topic, topic_prompt, topic_schema
from psycho.speeches.topics import UNLABELLED, coarse, coarse_counts, taxonomy, topic

COUNSEL_CHAT = Path(__file__).parents[3] / "shared" / "data" / "counsel_chat_questions.csv"


def test_8_coarse_and_42_fine_topics_each_with_a_description():
    fine = [name for topics in taxonomy().values() for name in topics]
    assert len(taxonomy()) == 8 and len(fine) == len(set(fine)) == 42
    descriptions = [about for topics in taxonomy().values() for about in topics.values()]
    assert all(len(about) > 10 for about in descriptions) and len(set(descriptions)) == 42


def test_the_topics_of_the_nano_world_are_the_same():
    for group, topics in load_bank("topics").items():
        for name in topics:
            assert topic(name) == name and coarse(name) == group


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("depression", "low_mood"),
        ("Anger-Management", "anger"),
        ("  Grief and Loss ", "bereavement"),
        ("work_and_study", "work_and_study"),
        ("LGBTQ", "identity"),
        ("something else", ""),
        ("", ""),
        (None, ""),
    ],
)
def test_labels_of_other_data_sets(label, name):
    assert topic(label) == name


def test_no_label_means_two_topics():
    from psycho.speeches.topics import _file, _plain

    labels = Counter(
        _plain(label) for fine in _file().values() for name, entry in fine.items() for label in {name, *entry["also"]}
    )
    assert [label for label, count in labels.items() if count > 1] == []


def test_counts_by_coarse_topic():
    assert coarse_counts(["sleep", "pain", "anger", "", "body"]) == {"body": 3, "mood": 1, UNLABELLED: 1}


@pytest.mark.skipif(not COUNSEL_CHAT.is_file(), reason=f"{COUNSEL_CHAT} is not here; the project does not ship it")
def test_labels_of_real_speeches_are_known():
    with COUNSEL_CHAT.open(encoding="utf-8", newline="") as file:
        labels = [row["topic"] for row in csv.DictReader(file)]
    assert sum(bool(topic(label)) for label in labels) / len(labels) > 0.9


def test_a_model_may_answer_with_a_topic_and_nothing_else():
    prompt = topic_prompt("I cannot sleep.")
    assert all(f"{name}:" in prompt[0]["content"] for fine in taxonomy().values() for name in fine)
    assert "I cannot sleep." not in prompt[0]["content"] and "I cannot sleep." in prompt[1]["content"]
    assert topic_schema().count('"') == 2 * (42 + 3)
    assert [parse_topic(a) for a in ('"sleep"', '"slee', '"dreams"', "3", "")] == ["sleep", "", "", "", ""]
