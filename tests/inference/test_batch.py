"""Batch inference on a real Ray Data with a stage that costs nothing: every request once, whatever happened before."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from psycho import storage
from psycho.config import InferenceConfig
from psycho.errors import BadInput, StageFailed, WaitTimedOut
from psycho.failures import cause, is_plain
from psycho.inference.batch import check_room, run_batches, split_errors, wait_for

CONFIG = InferenceConfig(
    workers=2, cpus_per_worker=0.5, gpus_per_worker=0, batch_size=4, start_timeout_s=120, batch_timeout_s=120
)
COUNT = 22


@pytest.fixture(autouse=True, scope="module")
def _stages_travel_by_value() -> None:
    """The workers cannot import this file."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def _wait_for_answers(folder: Path) -> None:
    """Until other batches are on disk, so that it is no luck what a crash leaves."""
    pause = threading.Event()
    for _ in range(2000):
        if len(list(folder.rglob("*.parquet"))) >= 3:
            return
        pause.wait(0.05)


class Echo:
    """Answers a request with its own number, and writes down that it was asked."""

    def __init__(self, log: str, poison: int | None = None) -> None:
        self._log, self._poison = Path(log), poison

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        numbers = batch["number"].to_pylist()
        if self._poison in numbers:
            _wait_for_answers(self._log.with_name("answers"))
            raise RuntimeError("the engine is dead")
        with self._log.open("a", encoding="utf-8") as file:
            file.write("".join(f"{number}\n" for number in numbers))
        errors = ["odd one" if number == 7 else None for number in numbers]
        ids = batch["request_id"]
        return pa.table({"request_id": ids, "answer": numbers, "error": pa.array(errors, pa.string())})


class Doubling(Echo):
    """Gives every answer twice."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        import pyarrow as pa

        answers = super().__call__(batch)
        return pa.concat_tables([answers, answers])


class Losing(Echo):
    """Loses the first answer of a batch."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        return super().__call__(batch).slice(1)


def _requests(count: int = COUNT) -> pa.Table:
    return pa.table({"request_id": [f"r{number:03d}" for number in range(count)], "number": list(range(count))})


class Run:
    """A folder of answers and the log of what was asked."""

    def __init__(self, root: Path) -> None:
        self.folder, self.log = str(root / "answers"), root / "log"
        self.resumed: list[int] = []

    def __call__(
        self, stage: type = Echo, poison: int | None = None, config: InferenceConfig = CONFIG
    ) -> list[pa.Table]:
        self.log.write_text("")
        arguments = {"log": str(self.log), "poison": poison}
        return run_batches(_requests(), self.folder, stage, arguments, config, on_resume=self.resumed.append)

    def asked(self) -> list[int]:
        return sorted(int(line) for line in self.log.read_text().split())

    def answered(self) -> list[int]:
        return sorted(n for table in storage.read_finished(self.folder) for n in table["answer"].to_pylist())


@pytest.fixture
def run(local_ray: None, tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_every_request_is_answered_once(run: Run) -> None:
    tables = run()
    assert run.asked() == run.answered() == list(range(COUNT))
    assert run.resumed == []
    good, bad = split_errors(tables)
    assert bad == [{"request_id": "r007", "reason": "odd one"}]
    assert good["request_id"].to_pylist() == [f"r{n:03d}" for n in range(COUNT) if n != 7]
    assert good["answer"].to_pylist() == [n for n in range(COUNT) if n != 7]
    assert "error" not in good.column_names


def test_what_stops_a_worker_is_found_behind_all_that_ray_says_of_it(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it stands on the terminal where the run is a quiet one: the line of the job says it once."""
    ray_logger = logging.getLogger("ray")
    before = ray_logger.level
    ray_logger.setLevel(logging.ERROR)
    try:
        with pytest.raises(Exception) as caught:
            run(poison=COUNT - 1)
    finally:
        ray_logger.setLevel(before)
    assert cause(caught.value) == ("RuntimeError", "the engine is dead") and not is_plain(caught.value)
    assert "ERROR" not in capfd.readouterr().err


def test_a_second_run_asks_nothing(run: Run) -> None:
    run()
    again = run()
    assert run.asked() == []
    assert run.resumed == [COUNT]
    assert sum(table.num_rows for table in again) == COUNT


def test_an_interrupted_run_goes_on_where_it_stopped(run: Run) -> None:
    """The answers that were written stay; only the others are asked for; the end is that of an unbroken run."""
    one_by_one = CONFIG.model_copy(update={"workers": 1, "batch_size": 2})
    with pytest.raises(Exception, match="engine is dead"):
        run(poison=COUNT - 1, config=one_by_one)
    kept = run.answered()
    assert 6 <= len(kept) < COUNT
    tables = run()
    assert run.resumed == [len(kept)]
    assert run.asked() == sorted(set(range(COUNT)) - set(kept))
    assert sorted(n for table in tables for n in table["answer"].to_pylist()) == list(range(COUNT))


def test_a_torn_file_is_made_again(run: Run) -> None:
    """A crash may cut a file short; its rows count as not answered, the other files' as answered."""
    run()
    files = sorted(Path(run.folder).rglob("*.parquet"))
    torn = pq.read_table(files[0])["answer"].to_pylist()
    files[0].write_bytes(files[0].read_bytes()[:-20])
    run()
    assert run.asked() == sorted(torn)
    assert run.answered() == list(range(COUNT))


def test_an_answer_that_is_missing_is_not_passed_over(run: Run) -> None:
    with pytest.raises(StageFailed, match=rf"of {COUNT} requests were answered"):
        run(Losing)


def test_an_answer_that_came_twice_is_not_passed_over(run: Run) -> None:
    with pytest.raises(StageFailed, match=r"\d+ requests were answered twice"):
        run(Doubling)


def test_an_answer_of_a_worker_that_outlived_its_driver_is_one_too_many(run: Run) -> None:
    """In two files: one of them counts."""
    run()
    first = sorted(Path(run.folder).rglob("*.parquet"))[0]
    late = Path(run.folder, "late")
    late.mkdir()
    shutil.copy(first, late / "late.parquet")
    tables = run()
    assert sorted(n for table in tables for n in table["answer"].to_pylist()) == list(range(COUNT))
    assert run.asked() == []


def test_a_worker_that_fits_no_node_is_refused(run: Run) -> None:
    with pytest.raises(BadInput, match=r"needs 5 CPU and 0 GPU .*inference\.cpus_per_worker"):
        run(config=CONFIG.model_copy(update={"cpus_per_worker": 5}))
    with pytest.raises(BadInput, match="1 GPU"):
        check_room("inference", 1, 1)
    check_room("inference", 4, 0)


def test_a_wait_without_an_end_is_given_up() -> None:
    """It says what was waited for, and for how long."""
    never = threading.Event()
    with pytest.raises(WaitTimedOut, match=r"waited 0 s for a batch of Echo and gave up; raise a.start_s if that"):
        wait_for(never.wait, lambda: 0, "a batch of Echo", start_s=0.01, step_s=100, settings=("a.start_s", "a.step_s"))
    never.set()


def test_a_wait_that_stands_still_after_a_start_is_given_up() -> None:
    """Once something came, the shorter limit holds."""
    never = threading.Event()
    counts = iter([0, 1])
    settings = ("a.start_s", "a.step_s")
    with pytest.raises(WaitTimedOut, match=r"waited 0 s for a batch of Echo and gave up; raise a.step_s if that"):
        wait_for(never.wait, lambda: next(counts, 1), "a batch of Echo", start_s=10_000, step_s=0.01, settings=settings)
    never.set()


def test_a_wait_goes_on_while_there_is_progress() -> None:
    """The limit is on standing still, not on the whole."""
    done = threading.Event()
    seen = iter(range(4))

    def progress() -> int:
        count = next(seen, None)
        if count is None:
            done.set()
            return 4
        return count

    assert wait_for(lambda: done.wait() and "done", progress, "a batch", start_s=0.01, step_s=0.01) == "done"


def test_what_the_work_raises_is_raised() -> None:
    def work() -> Any:
        raise ValueError("bad row")

    with pytest.raises(ValueError, match="bad row"):
        wait_for(work, lambda: 0, "a batch", start_s=100, step_s=100)
    assert wait_for(lambda: "done", lambda: 0, "a batch", start_s=100, step_s=100) == "done"
