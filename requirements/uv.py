"""`uv pip` for `make install`, told what pip is told: people set up an index or wheels on a disk for pip, and uv looks
at neither pip's variables nor its files. Where pip has a setting that has no counterpart here this ends with 3 and
names it, and the Makefile lets pip install: slower, and sure.

    .venv/bin/python requirements/uv.py install --python .venv/bin/python -r requirements/cpu.txt
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

# pip's name of a setting -> uv's variable
SAME = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "no-cache-dir": "UV_NO_CACHE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
# Settings that say nothing of where packages come from or which are taken.
IDLE = {"break-system-packages", "cache-dir", "exists-action", "log", "no-python-version-warning", "prefer-binary"}
IDLE |= {"disable-pip-version-check", "no-color", "no-input", "no-warn-script-location", "progress-bar"}
IDLE |= {"quiet", "require-virtualenv", "resume-retries", "retries", "root-user-action", "verbose"}
SECTIONS = ("global", "install", ":env:")  # the later wins; others are of other commands
NO_COUNTERPART = 3


def variables(settings: Iterable[str]) -> dict[str, str]:
    """uv's variables for the lines of `pip config list`.

    Raises:
        LookupError: a setting that has no counterpart; its text is the setting's name.
    """
    held: dict[str, str] = {}
    lines = [line.partition("=") for line in settings if "=" in line]
    for wanted in SECTIONS:
        for key, _, value in lines:
            section, _, name = key.partition(".")
            if section == wanted and name not in IDLE:
                if name not in SAME:
                    raise LookupError(name)
                held[SAME[name]] = " ".join(filter(_is_there, str(ast.literal_eval(value)).split()))
    # pip takes the best of all indexes; uv by itself stays with the first that knows a name.
    return {name: value for name, value in held.items() if value} | {"UV_INDEX_STRATEGY": "unsafe-best-match"}


def _is_there(word: str) -> bool:
    """False for a folder that is not there: pip passes over it, uv would end."""
    if word.startswith("file:"):
        return Path(url2pathname(urlsplit(word).path)).exists()
    return Path(word).exists() if word.startswith(("/", "~")) else True


def main() -> int:
    """Replaces this process by uv."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    try:
        told = variables(listed.stdout.splitlines())
    except LookupError as setting:
        print(f"uv has no counterpart of pip's setting {setting.args[0]}", file=sys.stderr)
        return NO_COUNTERPART
    uv = str(Path(sys.executable).with_name("uv"))
    os.execve(uv, [uv, "pip", *sys.argv[1:]], told | os.environ)  # who sets uv's own variables means them
    return 0


if __name__ == "__main__":
    sys.exit(main())
