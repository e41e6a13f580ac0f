"""A SIGINT that falls into a destructor still ends the job at the next look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psycho import interrupt


class _Deaf:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs within this loop
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_lost_interrupt_is_remembered() -> None:
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    try:
        with interrupt.remembered():
            interrupt.check()
            deaf = _Deaf()
            del deaf  # its KeyboardInterrupt is printed and forgotten
            with pytest.raises(KeyboardInterrupt):
                interrupt.check()
        interrupt.check()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_handler_is_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupt.remembered():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_a_job_ends_in_a_line_with_its_folder_free(tmp_path: Path, number: int, code: int) -> None:
    """Also where a library has put a handler of its own in place meanwhile, as Ray does for SIGTERM."""
    program = f"""
import signal, sys, time
from psycho import interrupt
from psycho.job import Options, execute
def recipe(job):
    signal.signal(signal.SIGTERM, lambda *_: print("a dump", file=sys.stderr))
    interrupt.renew()
    print("in", flush=True)
    time.sleep(60)
sys.exit(execute("prepare", recipe, Options(run_dir={str(tmp_path / "run")!r})))
"""
    job = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[1], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert job.stdout is not None and job.stdout.readline() == "in\n"
    job.send_signal(number)
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said) == (code, "interrupted; the same command goes on from here\n")
    assert (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / "lease.json").exists()


def test_afterwards_the_defaults_are_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with interrupt.remembered():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
