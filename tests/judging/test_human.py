"""Files of human ratings: every kind is read alike, a bad row is counted, a bad file is one sentence without text."""

from __future__ import annotations

import gzip
import json

import pandas as pd
import pytest

from psycho.errors import BadInput
from psycho.judging.human import read_human_ratings
from psycho.principles import STEMS

RATINGS = {f"{stem}_rating": 3 for stem in STEMS}
ROWS = [
    {"speech": "I feel lost.", "response": "Oh.", **RATINGS, "rater": "A"},
    {"speech": "I feel lost.", "response": "Oh.", **RATINGS, "rater": "B"},
    {"speech": "I feel lost.", "response": "Ah.", **RATINGS, "rater": "A"},
]


def write(path, rows):
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_is_read_alike_and_a_response_is_rated_once(tmp_path, kind):
    human = read_human_ratings(write(tmp_path / f"ratings.{kind}", ROWS), 0)
    assert [row["rater"] for row in human.rows] == ["A", "B", "A"] and human.quarantine == []
    assert human.responses.num_rows == 2 and len({row["request_id"] for row in human.rows}) == 2
    assert set(human.responses["speech_id"].to_pylist()) == {row["speech_id"] for row in human.rows}
    same = read_human_ratings(write(tmp_path / "again.jsonl", ROWS), 0)
    assert (same.digest, same.rows) == (human.digest, human.rows)


@pytest.mark.parametrize("value", [0, 6, 3.5, None, "good", True])
def test_a_row_without_seven_whole_ratings_is_left_out(tmp_path, value):
    bad = ROWS[0] | {"clarity_rating": value}
    human = read_human_ratings(write(tmp_path / "r.jsonl", [ROWS[0], bad | {"rater": "C"}, ROWS[2]]), 0)
    assert len(human.rows) == 2
    assert human.quarantine == [{"row": 2, "reason": "clarity_rating is not a whole number from 1 to 5"}]


def test_a_row_without_text_is_left_out(tmp_path):
    human = read_human_ratings(write(tmp_path / "r.csv", [ROWS[0], ROWS[0] | {"response": " "}]), 0)
    assert human.quarantine == [{"row": 2, "reason": "no response"}] and human.rows[0]["question"] == "I feel lost."


TURNS = [{"role": "user", "content": "Befóre."}, {"role": "assistant", "content": "I see."}]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("given", [TURNS, json.dumps(TURNS)])
def test_earlier_turns_come_along_as_a_list_or_as_json(tmp_path, kind, given):
    given = json.dumps(given) if kind == "csv" and isinstance(given, list) else given
    rows = [ROWS[0] | {"history": given}, ROWS[1] | {"history": None}]
    human = read_human_ratings(write(tmp_path / f"r.{kind}", rows), 0)
    assert human.quarantine == []
    assert [row["history"] and json.loads(row["history"]) for row in human.rows] == [TURNS, None]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"history": "secret, no JSON"}, "history is no list of turns with role and content"),
        ({"history": [{"role": "user"}]}, "history is no list of turns with role and content"),
        ({"rater": ["A", "B"]}, "rater is no name"),
    ],
)
def test_a_row_that_no_judge_could_be_asked_about_is_left_out(tmp_path, bad, reason):
    human = read_human_ratings(write(tmp_path / "r.jsonl", [ROWS[0], ROWS[2] | bad]), 0)
    assert human.quarantine == [{"row": 2, "reason": reason}] and len(human.rows) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.csv", None, "does not exist"),
        ("ratings.xlsx", b"x", r"ends in '.xlsx'"),
        ("r.csv", b"speech,response\na,b\n", "no column empathy_rating"),
        ("r.csv", b"", "is empty"),
        ("r.csv", b"\xff\xfe\x00", "no column speech"),
        ("r.jsonl", b'{"speech": "secret words"', "no row"),
        ("r.json", b'[{"speech": "secret words"', "is not a whole JSON list"),
        ("r.csv.gz", b"secret", "is not a whole gzip file"),
        ("r.parquet", b"PAR1 secret words", "is not whole parquet"),
        ("r.csv", f"question,response,{','.join(RATINGS)}\n".encode(), "no row"),
    ],
)
def test_a_bad_file_is_one_sentence(tmp_path, name, content, said):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=said) as caught:
        read_human_ratings(str(path), 0)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["r.json", "r.jsonl.gz", "semicolons.csv", "excel.csv", "r.csv.gz"])
def test_files_as_people_have_them(tmp_path, name):
    frame = pd.DataFrame(ROWS)
    content = {
        "r.json": json.dumps(ROWS).encode(),
        "r.jsonl.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode()),
        "semicolons.csv": frame.to_csv(index=False, sep=";").encode("cp1252"),
        "excel.csv": frame.to_csv(index=False, sep="\t").encode("utf-16"),
        "r.csv.gz": gzip.compress(frame.to_csv(index=False).encode("utf-8-sig")),
    }[name]
    (tmp_path / name).write_bytes(content)
    human = read_human_ratings(str(tmp_path / name), 0)
    assert human.quarantine == [] and human.rows == read_human_ratings(write(tmp_path / "same.jsonl", ROWS), 0).rows
