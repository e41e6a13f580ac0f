"""Importing a library without what it could use and we do not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def leave_out(*names: str) -> Iterator[None]:
    """Imports inside the block do not find the modules `names`, unless they are loaded already."""
    absent = [name for name in names if name not in sys.modules]
    modules: dict[str, object] = sys.modules  # type: ignore[assignment]
    modules.update(dict.fromkeys(absent))
    try:
        yield
    finally:
        for name in absent:
            del modules[name]
