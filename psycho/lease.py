"""One process at a time in a run folder.

Who writes into a run holds its lease: a file in the folder that says which process on which machine, since when, and
when it last gave a sign of life. A second process refuses with a sentence. A lease whose holder is gone is taken over:
on the same machine at once, when that process has ended; else when no sign has come for `STALE_S` seconds. Clocks of
two machines may differ, so the lease of another machine that looks old is watched for a while first.

On a disk (a shared one too) who looks and writes holds a lock on the folder meanwhile. An object store has no such
thing: there the last of two writes counts, so a lease is read again a moment after it was written.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from psycho import storage
from psycho.errors import BadInput, WaitTimedOut

FILE = "lease.json"
BEAT_S, STALE_S = 10.0, 60.0
WATCH_S, SETTLE_S = 2.5 * BEAT_S, 1.0
LOCK_S = 10.0  # the longest wait for another process that is opening the folder
_TRIES = 3  # of taking a lease that others take and leave meanwhile


@dataclass(frozen=True)
class Holder:
    """The process that holds a lease; times in seconds since 1970, by its own clock."""

    name: str
    host: str
    pid: int
    namespace: str
    process_started: float
    since: float
    beat: float

    def is_here(self) -> bool:
        return (self.host, self.namespace) == (socket.gethostname(), _namespace())

    def is_dead(self) -> bool:
        """True where the process ran on this machine and has ended; its number may be another's by now."""
        if not self.is_here():
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.process_started) > 1.0
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def looks_alive(self) -> bool:
        return not self.is_dead() and abs(time.time() - self.beat) < STALE_S


class Lease:
    """The lease of one run folder, held until `release`."""

    def __init__(self, root: str) -> None:
        self.lost = False
        self._root, self._uri = root, storage.join(root, FILE)
        here, now = psutil.Process(), time.time()
        where = (socket.gethostname(), here.pid, _namespace())
        self._own = Holder(uuid.uuid4().hex, *where, here.create_time(), now, now)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the lease and keep it alive from a thread.

        Raises:
            BadInput: another process is at work in the folder.
            OSError: the folder cannot be written.
        """
        for _ in range(_TRIES):
            found = _read(self._uri)
            if found and (found.looks_alive() or not self._is_left(found)):
                raise BadInput(_in_use(self._root, found))
            if self._write_new(found):
                break
        else:
            raise BadInput(f"run folder {self._root} is being opened by other processes too; give the command again")
        self._thread = threading.Thread(target=self._beat, daemon=True, name="lease")
        self._thread.start()

    def check(self) -> None:
        """Look whether the lease is still held.

        Raises:
            BadInput: another process took it while this one gave no sign of life, as after a laptop slept.
        """
        if self.lost:
            raise BadInput(
                f"run folder {self._root} was taken over by another process while this one stood still; "
                "wait for that one, or give the same command again after it"
            )

    def release(self) -> None:
        """Give the lease back, if it is still this process's."""
        self._stop.set()
        if self._thread:
            self._thread.join(timeout=BEAT_S)
        with suppress(OSError, BadInput):
            if self._is_own():
                storage.remove(self._uri)

    def _is_left(self, found: Holder) -> bool:
        """Whether nobody is behind a lease that looks old."""
        if found.is_dead() or found.is_here():
            return True  # of this machine's processes the clock is known, and one that is stopped says nothing
        return not self._stop.wait(WATCH_S) and _read(self._uri) in (found, None)

    def _write_new(self, former: Holder | None) -> bool:
        if storage.is_remote(self._root):
            storage.write_text(self._uri, _text(self._own))
            self._stop.wait(SETTLE_S)
            return self._is_own()
        folder = Path(storage.resolve(self._root)[1])
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            now = _read(self._uri)
            if now is not None and (former is None or now.name != former.name):
                return False  # somebody was here since it was read
            storage.write_text(self._uri, _text(self._own))
        return True

    def _is_own(self) -> bool:
        found = _read(self._uri)
        return found is not None and found.name == self._own.name

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(OSError, BadInput):  # a full disk or a store that is away for a while: the next one may come
                if not self._is_own():
                    self.lost = True
                    return
                storage.write_text(self._uri, _text(self._own, time.time()))


@contextmanager
def held(root: str) -> Iterator[Lease]:
    """The lease of a run folder, until the block ends, however it does.

    Raises:
        BadInput, OSError: as `Lease.take`.
    """
    lease = Lease(root)
    lease.take()
    try:
        yield lease
    finally:
        lease.release()


def _read(uri: str) -> Holder | None:
    """Who holds it; None where nobody does, or what is there was cut short by a crash."""
    try:
        return Holder(**json.loads(storage.read_text(uri) or ""))
    except (ValueError, TypeError):
        return None


def _text(holder: Holder, beat: float | None = None) -> str:
    return json.dumps(asdict(holder) | ({} if beat is None else {"beat": beat}))


def _namespace() -> str:
    """What numbers of processes are of: two containers may share a host's name, and neither sees the other's."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time is in the block: a lock on the folder itself, which leaves no file behind.

    Raises:
        WaitTimedOut: another one stays in it.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + LOCK_S
        while not _locked(place):
            if time.monotonic() > until:
                raise WaitTimedOut(f"another process that is opening the run folder {folder}", LOCK_S)
            time.sleep(0.02)
        yield
    finally:
        os.close(place)


def _locked(place: int) -> bool:
    """False where another process holds the lock; a file system that knows no locks grants it."""
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _in_use(root: str, holder: Holder) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(holder.since))
    return (
        f"run folder {root} is in use by process {holder.pid} on {holder.host} since {since}; wait for it, end it, or "
        "choose another --run-dir"
    )
