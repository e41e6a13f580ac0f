"""GGUF files as models: converted once into a model folder, kept in the cache by what the file holds.

Training and vLLM want safetensors, a configuration and a tokenizer with its chat template; a GGUF file has all of it
in one piece, its weights in a few bits each. They are unpacked to bf16, which loses nothing more. The conversion is a
process of its own: it needs the memory of the whole model for a moment, and what it changes in its libraries ends
with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from psycho import interrupt, storage
from psycho.errors import BadInput, WaitTimedOut

SUFFIX = ".gguf"
SOURCE = "SOURCE.json"  # in a converted folder: what it was made from
_LIMIT_S = 3600.0
_FORMAT = 1  # of what is written: another number converts anew
Say = Callable[[str], None]


def folder_of(file: str) -> Path:
    """Where the model that is made from a GGUF file lies, or will.

    Raises:
        BadInput: there is no such file, or it is no GGUF.
    """
    if storage.is_remote(file):
        raise BadInput(f"model {file} is not on this machine; copy the GGUF file here, or name a model folder")
    path = Path(file).expanduser()
    try:
        with path.open("rb") as stream:
            magic = stream.read(4)
        facts = path.stat()
    except OSError as error:
        raise BadInput(f"model {file} cannot be read ({error.strerror}); give a GGUF file or a model folder") from None
    if magic != b"GGUF":
        raise BadInput(f"model {file} is not a GGUF file; download it again")
    return cached(path.stem.lower(), _digest(str(path), facts.st_size, facts.st_mtime_ns))


def cached(name: str, digest: str) -> Path:
    """The folder of a model by its file's SHA-256."""
    key = hashlib.sha256(f"{_FORMAT} {digest}".encode()).hexdigest()[:12]
    return storage.cache_root() / "models" / f"{name}-{key}"


@lru_cache(maxsize=64)
def _digest(path: str, size: int, time: int) -> str:
    """Asked for by every stage of a run, so that a file is read once as long as its size and time stay."""
    return sha256(Path(path))


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def ensure_converted(file: str, say: Say) -> Path:
    """The folder made from a GGUF file; converted now where it is not there.

    Raises:
        BadInput: the file cannot be read or converted, or the cache cannot be written.
        WaitTimedOut: the conversion, or another process that makes the same model, took over an hour.
    """
    with making(folder_of(file)) as (folder, work):
        if work is not None:
            say(f"  {file}: converting it to bf16 safetensors; it is kept for later runs")
            convert(Path(file).expanduser(), work, {"file": Path(file).name})
    return folder


@contextmanager
def making(folder: Path) -> Iterator[tuple[Path, Path | None]]:
    """(the folder, where to write what is to stand there: None where it does already); whole or not at all.

    Raises:
        BadInput: the cache cannot be written.
        WaitTimedOut: another process is making the same and does not finish.
    """
    if folder.is_dir():
        yield folder, None
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", timeout=_LIMIT_S)
        lock.acquire()
    except Timeout:
        raise WaitTimedOut(f"another process that makes {folder}", _LIMIT_S) from None
    except OSError as error:
        raise BadInput(f"the cache {folder.parent} cannot be written ({error.strerror}); set PSYCHO_CACHE") from None
    with lock:
        if folder.is_dir():
            yield folder, None
            return
        work = storage.aside(str(folder))
        storage.remove(work)
        try:
            Path(work).mkdir()
            yield folder, Path(work)
            storage.publish(work, str(folder))
        finally:
            storage.remove(work)


def convert(file: Path, folder: Path, source: Mapping[str, Any]) -> None:
    """Write a model folder, and `SOURCE.json` with what it was made from.

    Args:
        source: what `SOURCE.json` says beside the file's SHA-256 and the versions.

    Raises:
        BadInput: transformers cannot read the file.
        WaitTimedOut: it took over an hour.
    """
    command = [sys.executable, "-m", "psycho.inference.gguf", str(file.absolute()), str(folder)]
    # The model is unpacked on the CPU, wherever it is to run later.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise WaitTimedOut(f"the conversion of {file.name}", _LIMIT_S) from None
    interrupt.check()  # a Ctrl-C that ended the other process is no failure of it
    if done.returncode:
        reason = (done.stdout.splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BadInput(f"{file} cannot be converted ({reason}); name a model folder with safetensors instead")
    written = json.loads(done.stdout.splitlines()[-1])
    about = {**written, **source, "sha256": {**source.get("sha256", {}), file.name: sha256(file)}}
    storage.write_text(str(folder / SOURCE), json.dumps(about, indent=2) + "\n")


def _unpack(file: Path, folder: Path) -> dict[str, Any]:
    """Read with transformers, write as safetensors; says what was done."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: dict[str, Any] = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **read)
    # The loaded model counts as quantized and refuses to be saved, though its weights are plain by now.
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **read)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    return {"dtype": "bfloat16", "licence": _licence(file), "transformers": transformers.__version__}


def _licence(file: Path) -> str | None:
    """The licence that the file itself names."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("general.license")
    return str(field.contents()) if field else None


def main() -> None:
    """`python -m psycho.inference.gguf FILE FOLDER`: the last line of the output says what was done, or why not."""
    try:
        print(json.dumps(_unpack(Path(sys.argv[1]), Path(sys.argv[2]))))
    except ImportError as error:
        print(f"the package {error.name or 'gguf'} is missing")
        raise SystemExit(1) from None
    except Exception as error:
        print(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
