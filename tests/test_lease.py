"""One process at a time in a run folder: who is refused, what is taken over, and that nothing of it stays behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from psycho import lease as module
from psycho import storage
from psycho.errors import BadInput, WaitTimedOut
from psycho.lease import FILE, Holder, Lease, held


def holder(**changes: Any) -> Holder:
    """A lease of this very process, as it stands in a file."""
    here = psutil.Process()
    now = time.time()
    own = Holder("name", socket.gethostname(), here.pid, module._namespace(), here.create_time(), now, now)
    return replace(own, **changes)


def written(root: str, found: Holder) -> None:
    storage.write_text(storage.join(root, FILE), json.dumps(asdict(found)))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waits: of another machine's lease nothing new is ever seen."""
    monkeypatch.setattr(module, "WATCH_S", 0.0)
    monkeypatch.setattr(module, "SETTLE_S", 0.0)


def test_the_second_is_told_who_holds_it_and_since_when(root):
    with held(str(root)), pytest.raises(BadInput) as caught, held(str(root)):
        pytest.fail("both are in")
    said = str(caught.value)
    assert f"run folder {root} is in use by process {os.getpid()} on {socket.gethostname()} since 20" in said
    assert "choose another --run-dir" in said


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), RuntimeError(), SystemExit()])
def test_it_is_given_back_however_the_work_ends_and_no_thread_stays(root, error):
    try:
        with held(str(root)):
            assert names(root) == [FILE]
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert names(root) == [] and "lease" not in [thread.name for thread in threading.enumerate()]
    with held(str(root)):
        pass


def test_that_of_a_process_which_was_killed_is_taken_over_at_once(root):
    program = f"from psycho.lease import Lease; Lease({str(root)!r}).take(); print('in', flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert other.stdout is not None and other.stdout.readline() == "in\n"
    try:
        with pytest.raises(BadInput, match=f"in use by process {other.pid} on"), held(str(root)):
            pytest.fail("both are in")
    finally:
        other.kill()
        other.communicate()
    with held(str(root)):
        assert names(root) == [FILE]


@pytest.mark.parametrize(
    ("changes", "free"),
    [
        ({}, False),
        ({"process_started": 1.0}, True),  # its number is another process's by now
        ({"pid": 2**22 + 1}, True),
        ({"beat": time.time() - 1e6}, True),  # of this machine, stopped: no sign of life for long
        ({"host": "elsewhere"}, False),
        ({"host": "elsewhere", "pid": 2**22 + 1}, False),  # what runs there cannot be seen from here
        ({"namespace": "pid:[1]", "pid": 2**22 + 1}, False),  # nor what runs in another container
        ({"host": "elsewhere", "beat": time.time() - 1e6}, True),
        ({"host": "elsewhere", "beat": time.time() + 1e6}, True),  # a clock that is wrong
    ],
)
def test_whose_holder_is_gone(root, quick, changes, free):
    written(str(root), holder(**changes))
    if free:
        with held(str(root)):
            assert json.loads((root / FILE).read_text())["name"] != "name"
        assert names(root) == []
    else:
        with pytest.raises(BadInput, match="is in use by process"), held(str(root)):
            pytest.fail("both are in")
        assert names(root) == [FILE]


def test_another_machine_whose_clock_is_late_is_seen_to_live(root, monkeypatch):
    """It looks old by this clock, and while it is watched it gives a sign."""
    late = holder(host="elsewhere", beat=time.time() - 1e6)
    written(str(root), late)
    lease = Lease(str(root))

    def watch(seconds: float) -> bool:
        written(str(root), replace(late, beat=late.beat + 10))
        return False

    monkeypatch.setattr(lease._stop, "wait", watch)
    with pytest.raises(BadInput, match=r"in use by process .* on elsewhere"):
        lease.take()


def test_a_lease_cut_short_is_none(root):
    root.mkdir()
    (root / FILE).write_text('{"name": "')
    with held(str(root)):
        assert json.loads((root / FILE).read_text())["pid"] == os.getpid()


def test_signs_of_life_are_given(root, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    with held(str(root)):
        first = json.loads((root / FILE).read_text())["beat"]
        ends = time.monotonic() + 30
        while json.loads((root / FILE).read_text())["beat"] == first and time.monotonic() < ends:
            pass
        found = json.loads((root / FILE).read_text())
        assert found["beat"] > first == found["since"]


def test_who_stood_still_and_lost_it_notices_and_leaves_the_others_alone(root, monkeypatch):
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    with held(str(root)) as lease:
        lease.check()
        written(str(root), holder(host="elsewhere"))
        thread = lease._thread
        assert thread is not None
        thread.join(timeout=30)
        with pytest.raises(BadInput, match="taken over by another process while this one stood still"):
            lease.check()
    assert json.loads((root / FILE).read_text())["host"] == "elsewhere"


def test_of_many_at_once_one_is_in(root):
    written(str(root), holder(pid=2**22 + 1))  # left by a process that is gone: all try to take it over
    leases = [Lease(str(root)) for _ in range(8)]
    start = threading.Barrier(len(leases))
    won: list[Lease] = []

    def take(lease: Lease) -> None:
        start.wait()
        try:
            lease.take()
            won.append(lease)
        except BadInput:
            pass

    threads = [threading.Thread(target=take, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and won[0]._is_own() and names(root) == [FILE]
    won[0].release()


def test_a_process_that_stays_in_the_folders_lock_is_not_waited_for_for_ever(root, monkeypatch):
    monkeypatch.setattr("psycho.lease.LOCK_S", 0.05)
    root.mkdir()
    place = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX)
        with pytest.raises(WaitTimedOut, match="another process that is opening the run folder"):
            Lease(str(root)).take()
    finally:
        os.close(place)
    with held(str(root)):
        pass


def test_a_file_system_without_locks_still_has_leases(root, monkeypatch):
    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with held(str(root)), pytest.raises(BadInput, match="in use by process"), held(str(root)):
        pytest.fail("both are in")


def test_on_an_object_store(bucket, quick):
    root = f"{bucket.uri}/run"
    with held(root), pytest.raises(BadInput, match=f"in use by process {os.getpid()} on"), held(root):
        pytest.fail("both are in")
    assert storage.read_text(storage.join(root, FILE)) is None
    written(root, holder(pid=2**22 + 1))
    with held(root):
        pass


def test_on_an_object_store_the_last_of_two_writes_counts(bucket, monkeypatch):
    root = f"{bucket.uri}/run"
    lease = Lease(root)

    def settle(seconds: float) -> bool:
        written(root, holder(host="elsewhere"))
        return False

    monkeypatch.setattr(lease._stop, "wait", settle)
    with pytest.raises(BadInput, match=r"in use by process .* on elsewhere"):
        lease.take()
