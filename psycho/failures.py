"""What went wrong, in one line: the innermost cause of an error, wherever in the cluster it began, and the remedy.

An error of a worker comes through Ray as layers of errors and as the text of tracebacks. The line names the cause
alone; all the rest goes into a log file that the line names. What libraries quote of a cell is left out of both, and so
are the values of private environment variables.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from psycho import secrets, storage
from psycho.errors import BadInput, StageFailed

_QUOTED_CELL = re.compile(  # of pyarrow, pydantic, int() and float()
    r"(\bArrow\w+: Could not convert|\binput_value=|invalid literal for \w+\(\) with base \d+:|string to float:).*"
)
_LONGEST = 300  # characters of a cause in the line
_TRACEBACK = re.compile(r'^Traceback \(most recent call last\)|^\s*File ".*", line \d|^ray::', re.MULTILINE)
_COUNTED = re.compile(r"\d+ validation errors? for ")
_BAD_INPUT = re.compile(r"^psycho\.errors\.BadInput: (.+)$", re.MULTILINE)
_RAISED_FROM = "The above exception was the direct cause of the following exception"
_RAISED_WHILE = "During handling of the above exception, another exception occurred"
_LAST_LINE = re.compile(r"^(?:[\w.]+\.)?([A-Za-z]\w*(?:Error|Exception|Failed|TimedOut))(?:: (.*))?$", re.M)
_CAUSES = (
    (
        r"unexpected keyword argument '(\w+)'",
        "vLLM knows no argument {0}; take it out of engine.extra (inference.engine.extra), or write it as vLLM does",
    ),
    (
        r"gated repo|Invalid repository ID|GatedRepoError|RepositoryNotFoundError|40[13] Client Error"
        r"|not a valid model identifier",
        "the hub does not give it: it is gated, private, or not there; look at its name, accept its terms on its page, "
        "and give your token: export HF_TOKEN, or for a cluster --runtime-env-json of `ray job submit` "
        "(`psycho doctor` looks for it)",
    ),
    (
        r"LocalEntryNotFoundError|couldn't connect to|offline mode is enabled|outgoing traffic has been disabled",
        "the hub cannot be reached from there and its cache holds no such model; see to the network, or name a folder",
    ),
    (
        r"trust_remote_code",
        "the model brings code of its own; read it, and set inference.engine.trust_remote_code=true if you trust it",
    ),
    (
        r"less than desired GPU memory utilization",
        "too little of the GPU's memory is free; lower engine.gpu_memory_utilization (inference.engine), or end what "
        "else uses that GPU",
    ),
    (
        r"No available memory for the cache|KV cache is needed|available KV cache memory",
        "no room is left for its context; raise engine.gpu_memory_utilization (on a CPU VLLM_CPU_KVCACHE_SPACE in "
        "inference.env), or lower engine.max_model_len (inference.engine)",
    ),
    (
        r"CUDA out of memory|OutOfMemoryError: CUDA|HIP out of memory",
        "the GPU's memory is full; where it answers lower engine.max_num_seqs or engine.gpu_memory_utilization "
        "(inference.engine), where it trains training.bin_tokens",
    ),
    (
        r"^MemoryError|^OutOfMemoryError|an't allocate memory|annot allocate memory|running low on memory|bad_alloc",
        "the machine's memory is full; lower engine.max_num_seqs or inference.workers where it answers, "
        "training.bin_tokens where it trains, or end other programs",
    ),
)


def explain(error: BaseException) -> str | None:
    """The sentence for an error that the user can put right, wherever in the chain (or a Ray worker) it began."""
    links = list(_chain(error))
    # What was said for a person comes first, and then what is known of causes.
    for said in (_own_sentence, _sentence):
        for link in links:
            sentence = said(link)
            if sentence:
                return sentence
    return None


def cause(error: BaseException) -> tuple[str, str]:
    """Type and message, of one line, of what began it; of a stage's own failure its own words."""
    links = list(_explicit(error))
    # The text of a traceback knows what an error was raised from, which does not travel with the error itself.
    texts = [link for link in links if _TRACEBACK.search(str(link))]
    own = next((link for link in links if isinstance(link, StageFailed) and link not in texts), None)
    kind, message = _told(own or (texts or links)[-1])
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if lines and _COUNTED.match(lines[0]):  # pydantic says how many first, and then which
        lines = [" ".join(lines[1:]).partition(" [type=")[0]]
    return kind, lines[0][:_LONGEST] if lines else ""


def engine_failure(error: BaseException, model: str) -> Exception:
    """For an engine that does not start: which model, why, and what to change where that is known."""
    known = _known(*_told(error))
    if known:
        return BadInput(f"model {model} does not start: {known}")
    return StageFailed(f"model {model} does not start: {': '.join(filter(None, cause(error)))}")


def without_cells(text: str) -> str:
    """An error's text without the values that libraries quote in it: a client may have written them."""
    return _QUOTED_CELL.sub(r"\1 (what it quotes is not shown)", text)


def traceback_of(error: BaseException, private: Sequence[str] = ()) -> str:
    """The traceback without cells and without these values."""
    return secrets.scrub(without_cells("".join(traceback.format_exception(error))), private)


def is_plain(error: BaseException) -> bool:
    """True where the line says all there is: of our own errors and the system's that nothing lies behind."""
    behind = error.__cause__ or getattr(error, "cause", None)
    return isinstance(error, BadInput | StageFailed | OSError) and not isinstance(behind, BaseException)


def write_log(error: BaseException, job: str, root: str | None, private: Sequence[str] = ()) -> str | None:
    """Write the traceback into `<run>/logs/`, or to a temporary file where that is not on this machine or is full.

    Returns:
        The file's path; None where there is room for none.
    """
    text = traceback_of(error, private)
    name = f"{job}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}.log"
    if root and not storage.is_remote(root) and Path(root).is_dir():
        try:
            storage.write_text(storage.join(root, "logs", name), text)
            return storage.join(root, "logs", name)
        except OSError:
            pass
    try:
        handle, path = tempfile.mkstemp(prefix="psycho-", suffix=f"-{name}")
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        return path
    except OSError:
        return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all behind it, nearest first; of an error that Ray carries over the bare one, without its text."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        inner = getattr(current, "cause", None)
        carried = isinstance(inner, BaseException)
        if not carried or _TRACEBACK.search(str(current)):
            yield current
        context = None if current.__suppress_context__ else current.__context__
        waiting += [inner if carried else None, current.__cause__, context]


def _explicit(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, nearest first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        inner = getattr(current, "cause", None)
        yield current
        current = inner if isinstance(inner, BaseException) else current.__cause__


def _told(error: BaseException) -> tuple[str, str]:
    """Type and message; of an error whose message is a worker's traceback those that the traceback began with."""
    text = str(error)
    if not _TRACEBACK.search(text):
        return type(error).__name__, text
    first = text.partition(_RAISED_FROM)[0].rpartition(_RAISED_WHILE)[2]
    found = list(_LAST_LINE.finditer(first)) or list(_LAST_LINE.finditer(text))
    if not found:
        return type(error).__name__, next(iter(reversed(text.splitlines())), "")
    return found[-1][1], (found[-1][2] or "") + first[found[-1].end() :]


def _own_sentence(error: BaseException) -> str | None:
    if isinstance(error, BadInput) and not _TRACEBACK.search(str(error)):
        return str(error)
    found = _BAD_INPUT.search(str(error))
    return found[1] if found else None


def _sentence(error: BaseException) -> str | None:
    kind, message = _told(error)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and kind == type(error).__name__:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; free some space and give the same command again"
    if "No space left on device" in message:
        return "the disk is full; free some space and give the same command again"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "the port is in use; choose another with --set serving.port=..."
    return _known(kind, message)


def _known(kind: str, message: str) -> str | None:
    for pattern, advice in _CAUSES:
        found = re.search(pattern, f"{kind}: {message}")
        if found:
            return advice.format(*found.groups())
    return None
