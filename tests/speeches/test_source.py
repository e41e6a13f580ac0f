"""What a source may be: folders, `datasets` folders, an object store, a hub id; and what its key hangs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psycho import storage
from psycho.config import SpeechesConfig
from psycho.errors import BadInput
from psycho.speeches.prepare import prepare_speeches
from psycho.speeches.read import read_speeches
from psycho.speeches.source import fingerprint, is_hub_id

TEXTS = ["first of all", "second text", "and a third"]


def texts(source: object, **settings: Any) -> list[str]:
    return [row.text for row in read_speeches(SpeechesConfig(source=str(source), **settings))]


def refused(source: object, **settings: Any) -> str:
    with pytest.raises(BadInput) as caught:
        texts(source, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def files(folder: Path) -> None:
    """One text in a file of each kind, and files that are none of our business."""
    (folder / "b").mkdir(parents=True)
    (folder / "a.csv").write_text(f"question\n{TEXTS[0]}\n")
    (folder / "b" / "b.jsonl").write_text(json.dumps({"question": TEXTS[1]}) + "\n")
    pq.write_table(pa.table({"question": [TEXTS[2]]}), folder / "c.parquet")
    for other in ("README.md", "_SUCCESS", ".hidden.csv"):
        (folder / other).write_text("not a speech")


def test_a_folder_of_files_is_read_in_order_and_numbered_through(tmp_path):
    files(tmp_path)
    assert texts(tmp_path) == TEXTS
    assert [row.number for row in read_speeches(SpeechesConfig(source=str(tmp_path)))] == [1, 2, 3]


def test_a_datasets_folder_with_and_without_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"question": TEXTS, "key": ["a", "b", "c"]})
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict({"train": data.select([0, 1]), "test": data.select([2])}).save_to_disk(tmp_path / "two")
    assert texts(tmp_path / "one", id_column="key") == TEXTS
    assert texts(tmp_path / "two") == TEXTS[:2]
    assert texts(tmp_path / "two", source_split="test") == TEXTS[2:]
    assert "has no split dev but train, test: set speeches.source_split" in refused(
        tmp_path / "two", source_split="dev"
    )
    assert "has no column text; its columns are question, key" in refused(tmp_path / "one", text_column="text")
    torn = next((tmp_path / "one").glob("*.arrow"))
    torn.write_bytes(torn.read_bytes()[:100])
    assert "is missing or cut short; save it again" in refused(tmp_path / "one")


def test_an_object_store(bucket, tmp_path):
    files(tmp_path / "local")
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"question": TEXTS}).save_to_disk(tmp_path / "local" / "saved")
    for path in sorted((tmp_path / "local").rglob("*")):
        if path.is_file():
            bucket.put(str(path.relative_to(tmp_path / "local")), path.read_bytes())
    assert texts("s3://speeches/a.csv") == TEXTS[:1]
    assert texts("s3://speeches/b/b.jsonl") == TEXTS[1:2]
    assert texts("s3://speeches/c.parquet") == TEXTS[2:]
    assert texts("s3://speeches/b/") == texts("s3://speeches/b") == TEXTS[1:2]
    assert texts("s3://speeches/saved") == TEXTS
    assert "s3://speeches/none.csv does not exist" in refused("s3://speeches/none.csv")
    before = fingerprint(SpeechesConfig(source="s3://speeches/a.csv"))
    bucket.put("a.csv", b"question\nother\n")
    assert fingerprint(SpeechesConfig(source="s3://speeches/a.csv")) != before


def test_an_object_store_from_end_to_end(bucket):
    rows = [f"I have said this {word} times and still nobody at home listens to what I say." for word in range(30)]
    bucket.put("in.csv", ("question\n" + "".join(f'"{row}"\n' for row in rows)).encode())
    config = SpeechesConfig(source="s3://speeches/in.csv", min_chars=20, near_duplicates="ignore", evaluation=5)
    result = prepare_speeches(config, 0, "s3://speeches/run")
    assert (result.rows_in, result.rows_out, len(result.quarantine)) == (30, 30, 0)
    assert storage.read_table("s3://speeches/run/speeches")["question"].to_pylist() == rows
    assert storage.read_text("s3://speeches/run/quarantine.jsonl") == ""


@pytest.mark.parametrize(
    ("source", "hub"),
    [
        ("owner/name", True),
        ("owner/na-me_2.0", True),
        ("owner/speeches.csv", False),
        ("./owner/name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("name", False),
        ("a/b/c", False),
        ("s3://owner/name", False),
    ],
)
def test_what_is_a_hub_id(source, hub):
    assert is_hub_id(source) is hub


def test_a_folder_of_that_name_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path / "owner" / "name")
    assert not is_hub_id("owner/name") and texts("owner/name") == TEXTS


def test_rows_of_a_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load(name: str, config: str | None, split: str, streaming: bool, **_: Any) -> Any:
        asked.append((name, config, split, streaming))
        return iter([{"question": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert texts("owner/name", source_config="en", source_split="test") == TEXTS
    assert asked == [("owner/name", "en", "test", True)]
    assert "owner/name has no column text" in refused("owner/name", text_column="text")


def test_a_hub_that_cannot_be_reached_is_a_sentence(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nwith many lines")

    monkeypatch.setattr(datasets, "load_dataset", load)
    said = refused("owner/name")
    assert "owner/name is no file or folder here and was not found on the hub (ConnectionError); check" in said


def test_a_key_hangs_on_every_file_of_a_folder(tmp_path):
    files(tmp_path)
    config = SpeechesConfig(source=str(tmp_path))
    before = fingerprint(config)
    assert before == fingerprint(config)
    (tmp_path / "b" / "b.jsonl").write_text("{}\n")
    assert fingerprint(config) != before
