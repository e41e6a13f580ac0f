"""A SIGINT that falls into a destructor still ends the job at the next look."""

from __future__ import annotations

import os
import signal

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
