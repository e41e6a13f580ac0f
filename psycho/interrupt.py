"""A Ctrl-C or a SIGTERM that is not lost.

Python raises KeyboardInterrupt wherever the main thread happens to be; in a destructor or a weak reference's callback
it is printed and forgotten, and the job would go on to its end. So what was asked is remembered, and looked at between
stages and in every wait. A SIGTERM, as a scheduler or `docker stop` sends it, ends a job in the same way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_asked = threading.Event()
_DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
_ours: set[signal.Signals] = set()
_last = signal.SIGINT


@contextmanager
def remembered() -> Iterator[None]:
    """Within the block SIGINT and SIGTERM are remembered; only on the main thread, and each only where Python's own
    handler is in place."""
    global _last
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = {number for number, default in _DEFAULTS.items() if signal.getsignal(number) == default}
    _asked.clear()
    _last = signal.SIGINT
    _ours.update(own)
    renew()
    try:
        yield
    finally:
        _ours.difference_update(own)
        for number in own:
            signal.signal(number, _DEFAULTS[number])
        _asked.clear()


def renew() -> None:
    """Put the handlers back that a library has replaced: Ray's of SIGTERM prints a dump of the stack."""
    if threading.current_thread() is threading.main_thread():
        for number in _ours:
            signal.signal(number, _remember)


def last() -> signal.Signals:
    """The signal that was asked with, SIGINT where none was."""
    return _last


def check() -> None:
    """Raise the interrupt that may have got lost.

    Raises:
        KeyboardInterrupt: somebody asked for it.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _remember(number: int, frame: FrameType | None) -> None:
    global _last
    _last = signal.Signals(number)
    _asked.set()
    raise KeyboardInterrupt
