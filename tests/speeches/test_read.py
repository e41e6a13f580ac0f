"""Reading speeches: every file that cannot be used is one sentence, and no sentence holds a client's words."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psycho import textfile
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.speeches.clean import clean_batch
from psycho.speeches.prepare import prepare_speeches
from psycho.speeches.read import read_speeches
from psycho.textfile import CP1252

SECRET = "Since my brother Tobias died I cannot sleep, and nobody at work has asked me once how I am doing."
ROWS = [(1, SECRET, None), (2, "second", None)]


def read(path: Path | str, **settings: Any) -> list[tuple[int, Any, str | None]]:
    return [(row.number, row.text, row.id) for row in read_speeches(SpeechesConfig(source=str(path), **settings))]


def reasons(path: Path, **settings: Any) -> list[str | None]:
    """Why each row is left out, None where it is not; without the language filter and near-duplicates."""
    plain = SpeechesConfig(source=str(path), languages=(), near_duplicates="ignore", min_chars=50, **settings)
    return clean_batch(list(read_speeches(plain)), plain, 0).table["reason"].to_pylist()


def refused(path: Path, **settings: Any) -> str:
    """The sentence for a file that cannot be used; it names the file and tells nothing a client said."""
    with pytest.raises(BadInput) as caught:
        read(path, **settings)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert not any(word in message for word in ("Tobias", "brother", "sleep", "second"))
    return message


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"speeches.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "csv":
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


KINDS = pytest.mark.parametrize("kind", ["csv", "jsonl", "ndjson", "parquet"])


@KINDS
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    path = write(tmp_path, kind, [{"question": SECRET, "key": "a"}, {"question": "second", "key": "b"}])
    assert read(path) == ROWS
    assert read(path, id_column="key") == [(1, SECRET, "a"), (2, "second", "b")]
    assert read(path, text_column="key") == [(1, "a", None), (2, "b", None)]


@KINDS
def test_a_wrong_column_lists_the_columns(tmp_path, kind):
    path = write(tmp_path, kind, [{"text": SECRET, "topic": "grief"}])
    assert "no column question; its columns are text, topic: set speeches.text_column" in refused(path)
    assert "no column key; its columns are text, topic: set speeches.id_column" in refused(
        path, text_column="text", id_column="key"
    )


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_file_without_a_header_does_not_show_its_first_speech(tmp_path, kind):
    path = tmp_path / f"speeches.{kind}"
    path.write_text(f"{SECRET}\nsecond\n" if kind == "csv" else json.dumps({SECRET: 1}) + "\n")
    assert "is the header missing?" in refused(path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("none.csv", "does not exist; give a CSV, JSONL, JSON or Parquet file"),
        ("folder.csv", "is a folder without files of rows"),
        (
            "speeches.xlsx",
            "ends in '.xlsx'; give .csv (a sheet saved as CSV UTF-8), .jsonl, .json (each also .gz) or .parquet",
        ),
        ("speeches", "ends in ''"),
    ],
)
def test_what_is_not_a_file_of_a_known_kind(tmp_path, name, part):
    (tmp_path / "folder.csv").mkdir()
    for other in ("speeches.xlsx", "speeches"):
        (tmp_path / other).write_text(SECRET)
    assert part in refused(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n\n"])
def test_an_empty_csv(tmp_path, content):
    path = tmp_path / "speeches.csv"
    path.write_bytes(content)
    assert "is empty; give a file with a header and rows" in refused(path)


@pytest.mark.parametrize(("kind", "content"), [("csv", b"question,topic\n"), ("jsonl", b""), ("jsonl", b"\n \n")])
def test_no_rows(tmp_path, kind, content):
    path = tmp_path / f"speeches.{kind}"
    path.write_bytes(content)
    config = SpeechesConfig(source=str(path))
    assert read(path) == []
    with pytest.raises(BadInput, match="holds no rows"):
        prepare_speeches(config, 0, str(tmp_path / "out"))


def test_no_rows_in_a_parquet_file(tmp_path):
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), tmp_path / "speeches.parquet")
    assert read(tmp_path / "speeches.parquet") == []


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_lines_in_windows_code_page_are_read_and_counted(tmp_path, kind):
    path = tmp_path / f"speeches.{kind}"
    texts = [SECRET, "café – “so”", "naïve in UTF-8"]
    lines = [json.dumps({"question": t}, ensure_ascii=False) if kind == "jsonl" else f'"{t}"' for t in texts]
    coded = [lines[0].encode(), lines[1].encode("cp1252"), lines[2].encode()]
    path.write_bytes(b"\n".join([b"question"] * (kind == "csv") + coded) + b"\n")
    notes: Counter[str] = Counter()
    rows = list(read_speeches(SpeechesConfig(source=str(path)), notes))
    assert [row.text for row in rows] == texts and notes == {CP1252: 1}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps({"question": SECRET}).encode("utf-16-le"),
        b"\x1f\x8b\x08" + SECRET.encode(),
        b"PK\x03\x04" + SECRET.encode(),
        SECRET.encode() + b"\0\1\2",
    ],
)
def test_a_binary_file_is_a_sentence(tmp_path, kind, content):
    path = tmp_path / f"speeches.{kind}"
    path.write_bytes(content)
    assert "is not text in UTF-8 (binary, or UTF-16 without its mark?); save it as UTF-8" in refused(path)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_line_ends_and_delimiters_of_other_systems(tmp_path, end, delimiter):
    path = tmp_path / "speeches.csv"
    rows = [["key", "question"], ["a", f'"{SECRET}"'], ["b", '"two' + end + 'lines, ""quoted"""'], ["c", "second"]]
    path.write_bytes("".join(delimiter.join(row) + end for row in rows).encode())
    assert read(path, id_column="key") == [(1, SECRET, "a"), (2, f'two{end}lines, "quoted"', "b"), (3, "second", "c")]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path, kind):
    path = write(tmp_path, kind, [{"question": SECRET}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path) == [(1, SECRET, None)]


def test_a_speech_of_10_mb_is_left_out_and_the_others_kept(tmp_path):
    path = write(tmp_path, "csv", [{"question": SECRET}, {"question": "x" * 10_000_000}, {"question": SECRET[::-1]}])
    assert reasons(path) == [None, "10000000 characters, over speeches.max_chars 1000", None]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
@pytest.mark.parametrize("filling", ["x", 'x""', "x, ", "ü"])
def test_a_line_of_any_length_costs_no_more_than_its_row(tmp_path, monkeypatch, kind, filling):
    monkeypatch.setattr(textfile, "MAX_LINE", 4096)
    long = {"csv": filling * 30_001, "jsonl": filling.replace('"', "'") * 30_001}[kind]
    path = write(tmp_path, kind, [{"question": SECRET}, {"question": long}, {"question": SECRET[::-1]}])
    found = read(path)
    assert [found[0][1], found[2][1]] == [SECRET, SECRET[::-1]]
    assert found[1][1] is None
    first, second, third = reasons(path)
    assert first is third is None and second == "a line of 16 MiB or more"


def test_a_quote_that_was_cut_out_swallows_no_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(textfile, "MAX_LINE", 4096)
    path = tmp_path / "speeches.csv"
    path.write_text(f'question,other\n"{SECRET}",a\n"{"x" * 9000}",{"y" * 9000}\n"{SECRET[::-1]}",b\n')
    assert reasons(path) == [None, "a line of 16 MiB or more", None]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_line_of_100_mb(tmp_path, kind):
    path = write(tmp_path, kind, [{"question": SECRET}, {"question": "x" * 100_000_000}, {"question": SECRET[::-1]}])
    first, second, third = reasons(path)
    assert first is third is None and second == "a line of 16 MiB or more"


@pytest.mark.parametrize(
    "line",
    ['{"question": "Tobias', "[1, 2]", '"Tobias"', "null", "7", "[" * 100_000, '{"question": ' + "[" * 100_000],
)
def test_a_broken_line_of_jsonl_is_left_out_and_the_others_kept(tmp_path, line):
    good = json.dumps({"question": SECRET})
    path = tmp_path / "speeches.jsonl"
    path.write_text(f"{good}\n{line}\n\n{good}\n")
    assert read(path) == [(1, SECRET, None), (2, None, None), (3, SECRET, None)]
    assert reasons(path) == [None, "not a JSON object", None]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), ({"a": SECRET}, None), (1.5, None), (True, None), (7, "7"), ("a\ud800b", "a?b")],
)
def test_values_that_are_no_text(tmp_path, value, text):
    path = tmp_path / "speeches.jsonl"
    path.write_text(json.dumps({"question": value}) + "\n")
    config = SpeechesConfig(source=str(path), min_chars=1, languages=(), near_duplicates="ignore")
    [row] = clean_batch(list(read_speeches(config)), config, 0).table.to_pylist()
    assert row["question"] == text and row["reason"] == (None if text else "no text in this row")


def test_half_a_surrogate_pair_in_an_id_can_be_stored(tmp_path):
    path = tmp_path / "speeches.jsonl"
    path.write_text(json.dumps({"question": SECRET, "key": "a\udfff"}) + "\n")
    [(_, _, key)] = read(path, id_column="key")
    assert pa.array([key]).to_pylist() == ["a?"]


@pytest.mark.parametrize("cut", ["empty", "half", "not parquet", "torn page"])
def test_a_torn_parquet_file(tmp_path, cut):
    rows = [{"question": f"{SECRET} {i * 7919 % 1000}"} for i in range(2000)]
    path = write(tmp_path, "parquet", rows)
    whole = path.read_bytes()
    at = len(whole) // 3
    path.write_bytes(
        {
            "empty": b"",
            "half": whole[: len(whole) // 2],
            "not parquet": SECRET.encode(),
            "torn page": whole[:4] + b"\xff" * at + whole[4 + at :],
        }[cut]
    )
    assert "is not a Parquet file or is cut short; write it again" in refused(path)


@pytest.mark.parametrize("folder", [False, True])
def test_text_that_is_not_utf_8_in_a_parquet_file_or_datasets_folder(tmp_path, folder):
    raw = pa.array([SECRET.encode() + b"\xff"] * 3, pa.binary())
    table = pa.table({"question": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
    path = tmp_path / "speeches.parquet"
    if folder:
        path = tmp_path / "set"
        path.mkdir()
        (path / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')
        with pa.ipc.new_stream(path / "data.arrow", table.schema) as stream:
            stream.write_table(table)
    else:
        pq.write_table(table, path)
    assert "holds text that is not UTF-8" in refused(path)


@pytest.mark.parametrize(("given", "key"), [(7, "7"), (7.0, "7"), (7.5, None), (float("nan"), None)])
def test_a_whole_number_is_an_id_however_it_is_stored(tmp_path, given, key):
    path = tmp_path / "speeches.parquet"
    pq.write_table(pa.table({"question": [SECRET], "key": [given]}), path)
    assert [found for *_, found in read(path, id_column="key")] == [key]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@KINDS
def test_permission_denied(tmp_path, kind):
    path = write(tmp_path, kind, [{"question": SECRET}])
    path.chmod(0)
    assert "permission denied" in refused(path)


@pytest.mark.parametrize(("kind", "opens"), [("csv", "pathlib.Path.open"), ("parquet", "pyarrow.parquet.ParquetFile")])
def test_permission_denied_as_a_system_would_say_it(tmp_path, monkeypatch, kind, opens):
    path = write(tmp_path, kind, [{"question": SECRET}])

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(opens, denied)
    assert "cannot be read (permission denied); check its mode" in refused(path)


CAFE = "After the café – “never again” – I could not sleep; nobody, I thought, would ask me."


def as_bytes(rows: list[str], delimiter: str = ",") -> bytes:
    lines = [f'{number}{delimiter}"{text}"' for number, text in enumerate(rows, 1)]
    return "\r\n".join([f"id{delimiter}question", *lines, ""]).encode()


def as_json(rows: list[str], **how: Any) -> bytes:
    return json.dumps(
        [{"id": n, "question": text} for n, text in enumerate(rows, 1)], ensure_ascii=False, **how
    ).encode()


FORMATS = {
    "utf8.csv": lambda rows: b"\xef\xbb\xbf" + as_bytes(rows),
    "european.csv": lambda rows: as_bytes(rows, ";"),
    "excel.csv": lambda rows: as_bytes(rows, "\t").decode().encode("utf-16"),
    "big.csv": lambda rows: b"\xfe\xff" + as_bytes(rows, ";").decode().encode("utf-16-be"),
    "told.csv": lambda rows: b"sep=;\r\n" + as_bytes(rows, ";"),
    "a.tsv": lambda rows: as_bytes(rows, "\t"),
    "a.csv.gz": lambda rows: gzip.compress(as_bytes(rows)),
    "a.CSV.GZ": lambda rows: gzip.compress(as_bytes(rows, ";").decode().encode("utf-16")),
    "a.json": as_json,
    "long.json": lambda rows: b"\xef\xbb\xbf\n " + as_json(rows, indent=2),
    "lines.json": lambda rows: b"\n".join(json.dumps(row).encode() for row in json.loads(as_json(rows))),
    "a.json.gz": lambda rows: gzip.compress(as_json(rows)),
    "a.jsonl.gz": lambda rows: gzip.compress(FORMATS["lines.json"](rows)),
    "a.ndjson": lambda rows: FORMATS["lines.json"](rows),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [2, 5000])
def test_files_as_people_have_them(tmp_path, name, count):
    rows = [f"{CAFE} {number}" for number in range(count)]
    (tmp_path / name).write_bytes(FORMATS[name](rows))
    notes: Counter[str] = Counter()
    config = SpeechesConfig(source=str(tmp_path / name), id_column="id")
    assert [(row.text, row.id) for row in read_speeches(config, notes)] == [(t, str(n)) for n, t in enumerate(rows, 1)]
    assert not notes


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv.gz", b"question\nsecond\n", "is not a whole gzip file"),
        ("a.csv.gz", gzip.compress(as_bytes([SECRET] * 99))[:-20], "is not a whole gzip file; pack it again"),
        ("a.json", as_json([SECRET] * 3)[:-30], "is not a whole JSON list in UTF-8 (it breaks off behind row 2)"),
        ("a.json", b'[{"question": "Tobias \xe9"}]', "is not a whole JSON list in UTF-8"),
        ("a.json", as_json([SECRET]).replace(b"question", b"text"), "has no column question; its columns are id, text"),
    ],
)
def test_a_packed_file_or_a_list_that_is_cut_short(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert said in refused(tmp_path / name)


def test_what_is_no_object_in_a_list_is_left_out(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "second"}, 7, [1], {"question": SECRET}]))
    rows = list(read_speeches(SpeechesConfig(source=str(tmp_path / "a.json"))))
    assert [(row.text, row.reason) for row in rows] == [
        ("second", None), (None, "not a JSON object"), (None, "not a JSON object"), (SECRET, None),
    ]  # fmt: skip


def test_a_folder_reads_lists_only_where_there_is_nothing_else(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"question": "second"}]))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert [text for _, text, _ in read(tmp_path)] == ["second"]
    (tmp_path / "b.csv").write_text("question\nsecond\n")
    (tmp_path / "a.json").write_text("about the data")
    assert [text for _, text, _ in read(tmp_path)] == ["second"]
