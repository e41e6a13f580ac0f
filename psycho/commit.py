"""Which commit psycho runs from, for the manifests: a version alone does not say it while the project is worked on."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path

import psycho

_GIT_S = 10.0  # the longest that git may take


@functools.cache
def commit(root: Path = Path(psycho.__file__).parents[1]) -> str:
    """The git commit that psycho runs from, with `-changed` where its files differ from it; empty where it is in no
    checkout of its own (installed, or sent along with a Ray job), or git does not say."""

    def git(*arguments: str) -> str:
        told = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=True
        )
        return told.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return ""  # an environment that lies in somebody else's checkout
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "psycho", "ray_jobs")
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
