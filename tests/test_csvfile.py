"""CSV as people make it: no text is cut at a comma or joined with the next row's without a word."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psycho import csvfile
from psycho.csvfile import BEHIND, FEWER, INNER, MORE, OPEN, CsvFile
from psycho.errors import BadInput
from psycho.textfile import Line

GOOD = [f'{n},"Speech {n}, with a comma",grief' for n in range(10, 210)]


def table(text: str, wanted: Sequence[str] = ("id", "question")) -> CsvFile:
    return CsvFile(map(Line, io.StringIO(text, newline="")), "a.csv", wanted)


def records(rows: Iterable[str], header: str = "id,question,topic") -> list[list[str] | str]:
    return list(table("\n".join([header, *rows]) + "\n").records())


def reasons(rows: Sequence[str], header: str = "id,question,topic") -> dict[str, int]:
    """Of bad rows among 200 good ones, which must all be kept as they are."""
    found = records([*GOOD[:100], *rows, *GOOD[100:]], header)
    kept = [cells for cells in found if isinstance(cells, list)]
    assert [cells for cells in kept if cells[0].isdecimal() and int(cells[0]) >= 10] == list(csv.reader(GOOD))
    return Counter(row for row in found if isinstance(row, str))


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["1,I feel sad, and tired,grief"], {MORE: 1}),
        (["1,I feel sad"], {FEWER: 1}),
        (['1,"Never closed,grief'], {OPEN: 1}),
        (['1,"He said "no" to me, and left",grief'], {INNER: 1}),
        (['1,"Two lines.\nHe said "no" to me,\nand left",grief'], {OPEN: 1, BEHIND: 2}),
        (["1,plain,grief,,"], {}),
        (['1,"two lines,\nmany words, too\n\nDear all,\nI earn 1,000 a month",grief'], {}),
        (['1,"a ""quoted"" word\nand ""more"", so",grief'], {}),
        (["   ", ""], {}),
        (['1,a 5" tape,grief'], {}),
    ],
)
def test_a_row_that_does_not_fit_is_left_out_and_the_others_are_kept(rows, found):
    assert reasons(rows) == found


def test_the_row_below_an_unclosed_quote_is_kept():
    found = records([*GOOD, '1,"Never closed', '2,"Somebody else, quite another",work', *GOOD])
    assert found[200:202] == [OPEN, ["2", "Somebody else, quite another", "work"]] and len(found) == 402


def test_two_mistakes_that_cancel_out_join_no_two_clients():
    found = records([*GOOD, '1,"Never closed,grief', '2,Never opened",work', *GOOD])
    assert found[200:202] == [OPEN, BEHIND] and len(found) == 402
    closed_by_inches = records([*GOOD, '1,"Never closed,grief', '2,it is 5",work', *GOOD])
    assert closed_by_inches[200] == OPEN


def test_an_unclosed_quote_at_the_end_of_the_file():
    assert records([*GOOD, '1,"Never closed', "2,plain,work", "3,plain,work"])[200:] == [
        OPEN,
        ["2", "plain", "work"],
        ["3", "plain", "work"],
    ]


def test_an_unclosed_quote_swallows_no_more_than_16_mib(monkeypatch):
    monkeypatch.setattr(csvfile, "MAX_LINE", 2000)
    plain = [f"{n},plain,work" for n in range(1000)]
    found = records([*GOOD, '1,"Never closed', *plain])
    assert found[200] == OPEN and len(found) == 1201


def test_rows_that_never_look_right_again_refuse_the_file():
    with pytest.raises(BadInput, match="80 behind a quote"):
        records([*GOOD, '1,"broken "quote" in it",grief', *["no row of this file"] * 100])


@pytest.mark.parametrize("share", [0.0, 0.011])
def test_over_one_in_a_hundred_the_file_is_refused(share):
    bad = int(share * 1000)
    rows = ["1,I feel sad, and tired,grief"] * bad + ["1,plain,grief"] * (1000 - bad)
    if not bad:
        assert len(records(rows)) == 1000
        return
    said = r"11 of 1,000 rows of a.csv do not fit its header of 3 columns \(11 more cells than the header\).* quotes"
    with pytest.raises(BadInput, match=said):
        records(rows)


def test_one_bad_row_refuses_no_small_file_unless_it_is_the_only_one():
    assert records(["1,a,b", "2,c"]) == [["1", "a", "b"], FEWER]
    with pytest.raises(BadInput, match="1 of 1 rows"):
        records(["2,c"])


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("start", ["", "sep={}\n", "sep={}\r\n"])
def test_delimiters_and_excels_first_line(delimiter, start):
    text = (
        start.format(delimiter) + delimiter.join(["id", "question"]) + "\n" + delimiter.join(["1", '"a, b; c"']) + "\n"
    )
    found = table(text)
    assert found.names == ["id", "question"] and list(found.records()) == [["1", "a, b; c"]]


def test_without_a_known_column_the_delimiter_is_what_parts_the_header_most():
    assert table("a;b;c,d\n1;2;3\n", ["question"]).names == ["a", "b", "c,d"]


def test_blanks_behind_delimiters():
    found = table('id, question\n1, "a, b"\n')
    assert found.names == ["id", "question"] and list(found.records()) == [["1", "a, b"]]


cells = st.text(st.sampled_from('ab1 ,;"\n\r\t.'), max_size=12)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 99).map(str), cells, cells), min_size=1, max_size=8), st.sampled_from(",;\t"))
def test_what_a_writer_quotes_is_read_as_it_was(rows, delimiter):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
    writer.writerows([("id", "question", "topic"), *rows])
    assert list(table(file.getvalue()).records()) == [list(row) for row in rows]
