"""Waiting for long work, with a limit, and so that Ctrl-C is heard.

The work runs in a thread of its own; the main thread looks after it once a second. On the main thread Ray Train would
put its own handler of SIGINT in place for the rest of the process, which ends it with exit code 0, or ignores it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from psycho import interrupt
from psycho.errors import WaitTimedOut


def wait_for(
    work: Callable[[], Any],
    progress: Callable[[], int],
    what: str,
    start_s: float,
    step_s: float,
    settings: tuple[str, str] = ("", ""),
) -> Any:
    """Run `work` in a thread and give up when `progress` stands still for too long.

    Args:
        settings: those that the two limits come from, for the error.

    Raises:
        WaitTimedOut: nothing came within `start_s` seconds, or nothing new within `step_s`.
    """
    result: list[Any] = []
    failure: list[BaseException] = []

    def target() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    last, since = progress(), time.monotonic()
    limit, setting = start_s, settings[0]
    while thread.is_alive():
        thread.join(timeout=1.0)
        interrupt.check()
        current = progress()
        if current != last:
            last, since, limit, setting = current, time.monotonic(), step_s, settings[1]
        elif time.monotonic() - since > limit:
            raise WaitTimedOut(what, limit, setting)
    if failure:
        raise failure[0]
    return result[0]
