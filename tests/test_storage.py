"""Files of a run folder: whole or not at all, on a local path and on a store that knows no folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs
import pytest
from filelock import FileLock

from psycho import storage
from psycho.config import Config
from psycho.errors import BadInput
from psycho.run import Run, Stage, StageResult

TABLE = pa.table({"id": ["a", "b"], "n": [1, 2]})


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """`mem://bucket`: an object store in memory behind pyarrow."""
    memory = pafs.PyFileSystem(pafs.FSSpecHandler(fsspec.filesystem("memory", skip_instance_cache=True)))
    real = storage.resolve

    def resolve(uri: str) -> tuple[pafs.FileSystem, str]:
        return (memory, uri.removeprefix("mem:/")) if uri.startswith("mem://") else real(uri)

    monkeypatch.setattr(storage, "resolve", resolve)
    memory.create_dir("/bucket")
    yield "mem://bucket"
    memory.delete_dir("/bucket")


@pytest.fixture(params=["local", "store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("store")


@pytest.mark.parametrize(
    ("uri", "remote"),
    [("runs/a", False), ("/runs/a", False), ("file:///a", False), ("s3://b/a", True), ("gs://b", True)],
)
def test_what_is_remote(uri, remote):
    assert storage.is_remote(uri) is remote


def test_join_adds_one_slash():
    assert storage.join("s3://b/a/", "x", "y") == storage.join("s3://b/a", "x", "y") == "s3://b/a/x/y"


def test_text_comes_back_and_what_is_not_there_is_none(root):
    uri = storage.join(root, "deep", "er", "a.txt")
    assert storage.read_text(uri) is None and not storage.exists(uri)
    for text in ("héllo\n", "", "other"):
        storage.write_text(uri, text)
        assert storage.read_text(uri) == text and storage.exists(uri)


def test_lines_are_added(root):
    for line in ("one", "two"):
        storage.append_line(storage.join(root, "ledger.jsonl"), line)
    assert storage.read_text(storage.join(root, "ledger.jsonl")) == "one\ntwo\n"


def test_tables_come_back_with_the_columns_asked_for(root):
    folder = storage.join(root, "rows")
    storage.write_table(TABLE, folder)
    assert storage.read_table(folder) == TABLE
    assert storage.read_table(folder, columns=["n"]) == TABLE.select(["n"])


def test_an_empty_folder_is_a_sentence_or_an_empty_table(root):
    folder = storage.join(root, "rows")
    assert list(storage.parquet_files(folder)) == []
    with pytest.raises(BadInput, match="holds no Parquet file; run the stage"):
        storage.read_table(folder)
    assert storage.read_table(folder, schema=TABLE.schema).num_rows == 0


def test_remove_takes_files_and_folders_and_minds_nothing_missing(root):
    storage.write_text(storage.join(root, "a", "b.txt"), "x")
    storage.write_text(storage.join(root, "c.txt"), "x")
    for name in ("a", "c.txt", "never"):
        storage.remove(storage.join(root, name))
        assert not storage.exists(storage.join(root, name))


def test_publish_replaces_a_folder_and_a_file_whole(root):
    for text in ("old", "new"):
        storage.write_text(storage.join(root, ".partial", "rows", text), text)
        storage.write_text(storage.join(root, ".partial", "page.html"), text)
        for name in ("rows", "page.html"):
            storage.publish(storage.join(root, ".partial", name), storage.join(root, name))
            assert not storage.exists(storage.join(root, ".partial", name))
    assert storage.read_text(storage.join(root, "page.html")) == "new"
    assert storage.read_text(storage.join(root, "rows", "new")) == "new"
    assert storage.read_text(storage.join(root, "rows", "old")) is None


def test_publish_leaves_nothing_else_behind(tmp_path):
    for text in ("old", "new"):
        storage.write_text(str(tmp_path / "aside" / "a"), text)
        storage.publish(str(tmp_path / "aside"), str(tmp_path / "rows"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows"]


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    uri = str(tmp_path / "a.txt")
    storage.write_text(uri, "old")

    def full(self: Path, *_: object, **__: object) -> None:
        if failing == "write_text":
            self.write_bytes(b"ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, full)
        with pytest.raises(OSError, match="No space left"):
            storage.write_text(uri, "new")
    assert storage.read_text(uri) == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_cut_short_by_a_crash_is_dropped_and_the_others_kept(root):
    folder = storage.join(root, "answers")
    for part in ("0", "1"):
        storage.write_table(TABLE, storage.join(folder, part))
    fs, path = storage.resolve(storage.join(folder, "1", "part-0.parquet"))
    with fs.open_input_stream(path) as stream:
        whole = stream.read()
    with fs.open_output_stream(path) as stream:
        stream.write(whole[: len(whole) // 2])
    assert storage.read_finished(folder) == [TABLE]
    assert len(list(storage.parquet_files(folder))) == 1


@pytest.mark.parametrize(
    ("error", "stays"),
    [(PermissionError(errno.EACCES, "no"), True), (OSError(errno.EIO, "no"), True), (OSError("torn page"), False)],
)
def test_answers_that_cannot_be_read_just_now_are_not_thrown_away(tmp_path, monkeypatch, error, stays):
    def refuse(*_, **__):
        raise error

    storage.write_rows(TABLE, str(tmp_path / "a.parquet"))
    monkeypatch.setattr("psycho.storage.pq.read_table", refuse)
    with pytest.raises(type(error)) if stays else nullcontext():
        assert storage.read_finished(str(tmp_path)) == []
    assert (tmp_path / "a.parquet").exists() == stays


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Where copies of models are: in a cache of the test's own."""
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def folders(copies: Path) -> set[str]:
    return {str(path) for path in copies.iterdir() if path.is_dir()}


def test_a_local_copy_is_the_folder_itself_or_made_once(tmp_path, store, copies, monkeypatch):
    assert storage.local_copy(str(tmp_path)) == storage.local_copy(f"file://{tmp_path}") == str(tmp_path)
    model = storage.join(store, "model")
    storage.write_text(storage.join(model, "config.json"), "{}")
    copy = storage.local_copy(model)
    assert Path(copy, "config.json").read_text() == "{}"
    monkeypatch.setattr(storage, "copy_dir", None)
    assert storage.local_copy(model) == copy


def test_a_model_that_was_trained_again_is_copied_again(store, copies):
    """Under the same name: the old copy would be loaded for the new model."""
    model, other = storage.join(store, "v1.5-model"), storage.join(store, "other")
    storage.write_text(storage.join(other, "config.json"), "other")
    storage.write_text(storage.join(model, "config.json"), "{}")
    kept, old = storage.local_copy(other), storage.local_copy(model)
    storage.write_text(storage.join(model, "config.json"), "changed")
    new = storage.local_copy(model)
    assert Path(new, "config.json").read_text() == "changed"
    assert folders(copies) == {kept, new} and old != new
    storage.remove(model)  # as the policies of rounds that are past
    storage.write_text(storage.join(store, "next", "config.json"), "next")
    assert folders(copies) - {kept} == {new}
    following = storage.local_copy(storage.join(store, "next"))
    assert folders(copies) == {kept, following}


def test_a_copy_whose_store_cannot_be_reached_stays(store, copies, monkeypatch):
    for name in ("one", "other"):
        storage.write_text(storage.join(store, name, "config.json"), name)
    one, listing = storage.local_copy(storage.join(store, "one")), storage.listing

    def refuse(uri: str) -> list[tuple[str, int, int]]:
        if uri.endswith("one"):
            raise OSError("no route")
        return listing(uri)

    monkeypatch.setattr(storage, "listing", refuse)
    storage.local_copy(storage.join(store, "other"))
    assert Path(one).is_dir()


def test_workers_of_a_node_may_clean_up_at_once(store, copies, monkeypatch):
    """Each finds what another has just removed; what a killed worker left half copied goes too."""
    for number in range(4):
        storage.write_text(storage.join(store, f"m{number}", "config.json"), str(number))
    for number in range(3):
        storage.local_copy(storage.join(store, f"m{number}"))
        storage.remove(storage.join(store, f"m{number}"))
    (copies / "gone-0123.part").mkdir()
    (copies / "held-0123.part").mkdir()
    content = storage._content

    def first(uri: str) -> str | None:
        for origin in copies.glob("*.origin"):  # another worker's turn, in the middle of this one's
            origin.unlink()
        return content(uri)

    monkeypatch.setattr(storage, "_content", first)
    with FileLock(copies / "held-0123.lock"):
        storage.local_copy(storage.join(store, "m3"))
    assert (copies / "held-0123.part").is_dir() and not (copies / "gone-0123.part").exists()


def test_a_model_that_is_not_there_is_a_sentence(store, copies):
    with pytest.raises(BadInput, match="model does not exist or is empty; check the address"):
        storage.local_copy(storage.join(store, "model"))
    assert not copies.exists()


def test_a_query_stays_at_the_end():
    assert storage.join("s3://b/a?region=eu", "x") == "s3://b/a/x?region=eu"
    assert storage.join("/b/a?b", "x") == "/b/a?b/x"  # a folder may be called so


def test_what_is_sent_to_s3_is_not_piled_up_in_memory(bucket, tmp_path, monkeypatch):
    """Arrow reads a disk ahead of the network, without a limit; and S3 itself copies nothing over 5 GiB."""
    targets: list[object] = []
    copy_files = pafs.copy_files

    def seen(*args, destination_filesystem, **options):
        background = destination_filesystem.__reduce__()[1][0]["background_writes"]
        targets.append((background, options["source_filesystem"] == destination_filesystem))
        copy_files(*args, destination_filesystem=destination_filesystem, **options)

    monkeypatch.setattr("psycho.storage.pafs.copy_files", seen)
    (tmp_path / "a.bin").write_bytes(b"12345")
    storage.copy_dir(str(tmp_path), f"{bucket.uri}/one")
    storage.copy_dir(f"{bucket.uri}/one", f"{bucket.uri}/two")
    monkeypatch.setattr(storage, "_MOST_COPIED_THERE", 4)
    storage.copy_dir(f"{bucket.uri}/one", f"{bucket.uri}/three")
    assert targets == [(False, False), (True, True), (False, False)]
    assert [storage.read_bytes(f"{bucket.uri}/{name}/a.bin") for name in ("one", "two", "three")] == [b"12345"] * 3


def test_a_linked_folder_costs_nothing_and_outlives_the_first(root, tmp_path):
    storage.write_text(storage.join(root, "one", "deep", "a.txt"), "a")
    storage.link_dir(storage.join(root, "one"), storage.join(root, "other"))
    if not storage.is_remote(root):
        assert Path(root, "other", "deep", "a.txt").samefile(Path(root, "one", "deep", "a.txt"))
    storage.remove(storage.join(root, "one"))
    assert storage.read_text(storage.join(root, "other", "deep", "a.txt")) == "a"


def test_names_and_the_listing_of_a_folder(root):
    assert storage.names(root) == [] == storage.listing(root)
    for name in ("b.txt", "a/c.txt", "a/d/e.txt"):
        storage.write_text(storage.join(root, name), name)
    assert storage.names(root) == ["a", "b.txt"]
    assert [(name, size) for name, size, _ in storage.listing(root)] == [("a/c.txt", 7), ("a/d/e.txt", 9), ("b.txt", 5)]


def test_a_file_that_others_write_is_there_whole_or_not_at_all(root, copies):
    uri = storage.join(root, "deep", "a.bin")
    with pytest.raises(KeyError), storage.writing(uri) as file:
        file.write_bytes(b"half")
        raise KeyError
    assert not storage.exists(uri)
    for content in (b"one", b"other"):
        with storage.writing(uri) as file:
            file.write_bytes(content)
        assert storage.read_bytes(uri) == content
    assert storage.names(storage.join(root, "deep")) == ["a.bin"]


def test_a_folder_that_others_write_may_have_several_writers(root, copies):
    uri = storage.join(root, "model")
    for name in ("one", "other"):
        with storage.writing_folder(uri) as folder:
            (folder / "deep").mkdir(exist_ok=True)
            (folder / "deep" / name).write_text(name)
    assert [name for name, _, _ in storage.listing(uri)] == ["deep/one", "deep/other"]


@pytest.mark.parametrize("uri", ["nowhere://bucket/run", "://run"])
def test_an_unknown_scheme_is_a_sentence(uri):
    with pytest.raises(BadInput, match="check the scheme"):
        storage.resolve(uri)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert storage.resolve("~/run")[1] == str(tmp_path / "run")


def test_a_whole_run_on_an_object_store(store):
    run = Run(Config(run_dir=store), (Stage("first", lambda c: (), lambda c: {}, ("rows", "page.html")),))

    def body(partial: str) -> StageResult:
        storage.write_table(TABLE, storage.join(partial, "rows"))
        storage.write_text(storage.join(partial, "page.html"), "<p>")
        return StageResult(rows_in=3, rows_out=2, quarantine=[{"row": 3, "reason": "empty"}])

    run.open()
    assert run.execute("first", body)["status"] == "done" and run.execute("first", body)["status"] == "skipped"
    assert storage.read_table(run.path("rows")) == TABLE and storage.read_text(run.path("page.html")) == "<p>"
    assert not storage.exists(run.partial("first"))


def test_a_table_in_several_files(tmp_path):
    table = pa.table({"row": list(range(10))})
    storage.write_table(table, str(tmp_path / "many"), files=4)
    assert sorted(storage.parquet_sizes(str(tmp_path / "many"))) == [f"part-{n}.parquet" for n in range(4)]
    assert storage.read_table(str(tmp_path / "many")) == table
    storage.write_table(table.slice(0, 0), str(tmp_path / "none"), files=4)
    assert storage.read_table(str(tmp_path / "none")).num_rows == 0
    assert storage.parquet_sizes(str(tmp_path / "nothing")) == {}


def test_rows_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    uri = str(tmp_path / "rows" / "one.parquet")

    def torn(table, where, **kwargs):
        Path(where).write_bytes(b"PAR1")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage.pq, "write_table", torn)
        with pytest.raises(OSError, match="No space"):
            storage.write_rows(pa.table({"row": [1]}), uri)
    assert list((tmp_path / "rows").iterdir()) == []
    storage.write_rows(pa.table({"row": [1]}), uri)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["one.parquet"]
