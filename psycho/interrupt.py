"""A Ctrl-C that is not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be; in a destructor or a weak reference's callback
it is printed and forgotten, and the job would go on to its end. So what was asked is remembered, and looked at between
stages and in every wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def remembered() -> Iterator[None]:
    """Within the block a SIGINT is remembered; only on the main thread, and where Python's own handler is in place."""
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    _asked.clear()
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _asked.clear()


def check() -> None:
    """Raise the interrupt that may have got lost.

    Raises:
        KeyboardInterrupt: somebody asked for it.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
