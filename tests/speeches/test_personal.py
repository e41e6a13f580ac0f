"""Personal data: recall and precision on a labelled set, and what masking must never do."""

from __future__ import annotations

import random
import re
import socket
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho.nano.grammar import sample_speech
from psycho.speeches import personal
from psycho.speeches.clean import plain_text
from psycho.speeches.personal import find, mask

LABELLED = yaml.safe_load((Path(__file__).parent / "personal_data.yaml").read_text(encoding="utf-8"))
HELD_OUT = LABELLED.pop("held_out")
WITHOUT = LABELLED.pop("none")
PLANTED = [(kind, sentence) for kind, sentences in LABELLED.items() for sentence in sentences]
UNSEEN = [(kind, sentence) for kind, sentences in HELD_OUT.items() for sentence in sentences]
EXPECTED = {"SIGNATURE": "NAME"}  # the placeholder of a signature is that of a name


def planted(sentence: str) -> tuple[str, list[tuple[int, int]]]:
    """The sentence without its braces, and where the planted items begin and end."""
    pieces = re.split(r"[{}]", sentence)
    ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
    return "".join(pieces), [(ends[i - 1], ends[i]) for i in range(1, len(pieces), 2)]


def measure(
    sentences: list[tuple[str, str]], without: list[str]
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Recall and precision in all and by type, and what went wrong.

    An item may be in several pieces ("Deborah and Luis" are two). It is found when a span of its type covers it up to
    punctuation; a span that touches no item is a false one.
    """
    hits, asked, found, true = (Counter[str]() for _ in range(4))
    wrong = []
    for kind, sentence in sentences:
        text, items = planted(sentence)
        spans = find(text)
        for start, end in items:
            hit = any(s.start <= start + 1 and s.end >= end - 1 and s.type == EXPECTED.get(kind, kind) for s in spans)
            hits.update({kind: hit, "all": hit})
            asked.update([kind, "all"])
            if not hit:
                wrong.append(f"missed {kind}: {sentence!r} -> {[(text[s.start : s.end], s.type) for s in spans]}")
        for span in spans:
            right = any(span.start < end and span.end > start for start, end in items)
            found.update([span.type, "all"])
            true.update({span.type: right, "all": right})
    for text in without:
        for span in find(text):
            found.update([span.type, "all"])
            wrong.append(f"false {span.type}: {text[span.start : span.end]!r}")
    return {k: hits[k] / asked[k] for k in asked}, {k: true[k] / found[k] for k in found}, wrong


def clean_speeches() -> list[str]:
    """200 speeches without personal data: half of them put together of sentences that look as if they held some."""
    draw = random.Random(0)
    tricky = [" ".join(draw.sample(WITHOUT, 4)) for _ in range(100)]
    return tricky + [sample_speech(draw).text for _ in range(100)]


def test_recall_and_precision_on_the_labelled_set():
    assert len(PLANTED) + len(UNSEEN) >= 200 and len(clean_speeches()) == 200
    recall, precision, wrong = measure(PLANTED, clean_speeches())
    print(recall, precision, *wrong, sep="\n")
    assert min(recall.values()) >= 0.95 and min(precision.values()) >= 0.98, wrong


def test_recall_and_precision_on_items_that_no_pattern_was_made_for():
    recall, precision, wrong = measure(UNSEEN, [])
    print(recall, precision, *wrong, sep="\n")
    assert recall["all"] >= 0.85 and precision["all"] >= 0.95, wrong


def test_nothing_is_found_in_speeches_without_any():
    assert [find(text) for text in WITHOUT] == [[]] * len(WITHOUT)


def test_mask_replaces_each_item_by_its_type_and_counts_them():
    text = "My name is Anna, call 617-555-0123 or 617-555-0124, or anna@example.com."
    assert mask(text) == (
        "My name is [NAME], call [PHONE] or [PHONE], or [EMAIL].",
        {"NAME": 1, "PHONE": 2, "EMAIL": 1},
    )


def test_a_masked_text_is_left_as_it_is():
    for _, sentence in PLANTED:
        once, _ = mask(plain_text(planted(sentence)[0]))
        assert mask(once) == (once, Counter())


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([planted(s)[0] for _, s in PLANTED] + ["@", "12 ", "Anna ", "é", "\n", "[NAME]"])))
def test_spans_are_ordered_and_do_not_overlap(parts):
    text = "".join(parts)
    spans = find(text)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))


def test_nothing_is_fetched(monkeypatch):
    asked: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    personal._domains.cache_clear()
    assert mask("write to a.b@mail.example.co.uk or see www.example.com or my.example.com/x")[1] == {
        "EMAIL": 1,
        "URL": 2,
    }
    assert asked == []


@pytest.mark.parametrize("text", ["", " ", "a", "[EMAIL]", "@" * 5000, "1 " * 5000, "A" * 5000, "Anna " * 2000])
def test_odd_texts_end(text):
    masked, counts = mask(text)
    assert len(masked) <= 7 * max(1, len(text)) and sum(counts.values()) <= len(text)
