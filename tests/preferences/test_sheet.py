"""The sheet for a clinician shows what the run holds, escapes it, and reads in screen readers and spreadsheets."""

from __future__ import annotations

import csv
import io
import re
from html.parser import HTMLParser
from typing import Any

from psycho.preferences.sheet import WARNING, html, pair_entries, pick, response_entries, table
from psycho.principles import STEMS

Row = dict[str, Any]
EVIL = "<script>alert('x')</script> & =2+3"
FACTS = {"name": "nano", "judge": "nano:judge", "what": "pairs", "by": "gap", "of": 1200, "concerns": []}


def pair(number: int, chosen: int = 4, **more: Any) -> Row:
    ratings = {f"{side}_{stem}_rating": r for side, r in (("chosen", chosen), ("rejected", 2)) for stem in STEMS}
    return {
        "ID": f"s{number}", "prefID": 0, "speech_id": f"s{number}", "question": EVIL, "history": None,
        "chosen": f"good {number}", "rejected": f"=bad {number}", "chosen_model": "warm", "rejected_model": "brisk",
        "gap": float(chosen - 2), **ratings, **more,
    }  # fmt: skip


def rated(number: int) -> Row:
    return {
        "speech_id": f"s{number}", "request_id": f"r{number}", "model": "warm", "response": f"good {number}",
        "question": EVIL, "history": None, "overall": 4.0, "floored": True, "unfaithful_evidence": ["safety"],
        **{f"{stem}_rating": 4 for stem in STEMS}, **{f"{stem}_evidence": f"on {stem}" for stem in STEMS},
    }  # fmt: skip


class Page(HTMLParser):
    """Elements of a page; fails where one is closed that is not open."""

    void = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_shows_ratings_and_evidence_and_escapes_every_text() -> None:
    text = html(pair_entries([pair(0)], [rated(0)]), FACTS)
    page = Page(text)
    assert "<script" not in text and "&lt;script&gt;" in text and "good 0" in text and "=bad 0" in text
    assert WARNING in text and "1 of 1,200 pairs" in text and "on empathy" in text and "4.00" in text
    assert "(invented, dropped)" in text and "on safety" not in text and "under the fluency floor" in text
    tags = [tag for tag, _ in page.seen]
    assert tags.count("h1") == 1 and tags.count("h2") == 1 and tags.count("caption") == tags.count("table") == 1
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.seen if tag == "th")
    assert ("html", {"lang": "en"}) in page.seen
    assert not re.search(r"(src|href)=|url\(|@import", text), "it is self-contained"
    assert "Not fit" not in text and "Not fit" in html([], FACTS | {"concerns": ["the judge is unfit"]})


def test_the_csv_is_a_row_a_pair_and_no_formula() -> None:
    text = table(pair_entries([pair(0), pair(1)], [rated(0)]))
    assert text.startswith("\ufeff")
    (warning,), head, *rows = csv.reader(io.StringIO(text.removeprefix("\ufeff")))
    assert warning == WARNING and len(rows) == 2 and all(len(row) == len(head) for row in rows)
    first = dict(zip(head, rows[0], strict=True))
    assert (first["chosen"], first["rejected"], first["gap"]) == ("good 0", "'=bad 0", "2.00")
    assert (first["chosen empathy rating"], first["chosen empathy evidence"]) == ("4", "on empathy")
    assert first["rejected empathy evidence"] == "" and first["conversation"] == f"user: {EVIL}"
    assert table(response_entries([rated(0)])).count("\r\n") == 3


def test_what_is_picked() -> None:
    entries = pair_entries([pair(n, chosen=3 + n % 3, **{"gap": n / 10}) for n in range(20)], [])
    gaps = [entry["gap"] for entry in pick(entries, 5, "gap", 0)]
    assert gaps == sorted(gaps, reverse=True) and (gaps[0], gaps[-1]) == (1.9, 0.0), "both ends, and between them"
    assert pick(entries, 5, "random", 1) == pick(entries, 5, "random", 1) != pick(entries, 5, "random", 2)
    for by in ("gap", "random", "principle"):
        assert len({entry["id"] for entry in pick(entries, 50, by, 0)}) == 20  # type: ignore[arg-type]
    apart = pair(99, chosen=2) | {"chosen_staging_rating": 5}
    level = [pair(n, chosen=2) for n in range(30)]
    assert "s99/0" in [entry["id"] for entry in pick(pair_entries([*level, apart], []), 7, "principle", 0)]
