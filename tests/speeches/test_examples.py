"""The speeches that come along: all of them pass the cleaning, on every topic, with nobody named."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.run import StageResult
from psycho.speeches.prepare import prepare_speeches
from psycho.speeches.source import find_files

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "speeches.csv"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[StageResult, list[dict]]:
    """What `prepare` makes of them."""
    folder = tmp_path_factory.mktemp("prepared")
    config = SpeechesConfig(source=str(EXAMPLES), id_column="id", topic_column="topic", evaluation=24)
    result = prepare_speeches(config, 0, str(folder))
    return result, pq.read_table(folder / "speeches").to_pylist()


def rows() -> list[dict[str, str]]:
    with EXAMPLES.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_none_is_left_out(prepared: tuple[StageResult, list[dict]]) -> None:
    result, speeches = prepared
    assert result.extra["left_out"] == {}
    assert len(speeches) == len(rows()) >= 120
    assert [row["speech_id"] for row in speeches] == [row["id"] for row in rows()]


def test_nothing_in_them_tells_who_somebody_is(prepared: tuple[StageResult, list[dict]]) -> None:
    assert prepared[0].extra["personal_data"] == {}


def test_every_topic_occurs(prepared: tuple[StageResult, list[dict]]) -> None:
    topics = yaml.safe_load((ROOT / "psycho" / "speeches" / "topics.yaml").read_text())
    wanted = {fine for group in topics.values() for fine in group}
    assert {row["topic"] for row in prepared[1]} == wanted


def test_they_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`configs/smollm2.yaml` names them as they lie in a checkout; one's own file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    [file] = find_files(SpeechesConfig(source="examples/speeches.csv"))
    assert Path(file.uri).read_bytes() == EXAMPLES.read_bytes()
    with pytest.raises(BadInput, match=r"examples/other\.csv does not exist"):
        find_files(SpeechesConfig(source="examples/other.csv"))
    own = tmp_path / "examples" / "speeches.csv"
    own.parent.mkdir()
    own.write_text("question\n")
    assert find_files(SpeechesConfig(source="examples/speeches.csv"))[0].uri == "examples/speeches.csv"


def test_risks_and_lengths_vary() -> None:
    risks = Counter(row["risk"] for row in rows())
    assert set(risks) == {"low", "medium", "high"} and min(risks.values()) >= 8
    lengths = sorted(len(row["question"]) for row in rows())
    assert lengths[0] < 150 and lengths[-1] > 900
