"""The rounds on disk: each half of a round, sampled and trained, is there whole or not at all.

    sampling-<n>/  answers to round n so far, while it is sampled (`drawn.py`)
    sampled-<n>/   samples.parquet, pairs/, report.json: round n before its training
    trained-<i>/   policy/, optimizer/, report.json: the state after i rounds
    after-<i>.json what was found after that: the proof of the weights, the dev score, the time

Samples and pairs stay when the job is done (`evidence`): they are what its rewards can be checked by.

A half is written aside and renamed, so an interrupted job goes on from the last one that is there. An object store has
no renaming: there a half is whole once its report.json, written last, is there. A worker can outlive its killed driver
for a moment and write the same half once more: the later one replaces the earlier, and as content depends on seeds they
say the same, but for rounding.
"""

from __future__ import annotations

import json
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.inference.models import local_model
from psycho.training.online.heldout import KEYS
from psycho.training.online.rollout import PAIR, SAMPLE, Sampled

Row = dict[str, Any]
_ASIDE = ".unfinished-"
_REPORT = "report.json"
_SAMPLES = "samples.parquet"
_TAG = "state"


class RoundStore:
    """The folder of an online job in progress, on a file system that all ranks share or on an object store."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def tidy(self) -> None:
        """Remove what was being written when an earlier try was interrupted."""
        for name in storage.names(self._folder):
            half = name.startswith(("sampled-", "trained-")) and not self._whole(name)
            sampled = name.startswith("sampling-") and self._whole(name.replace("sampling", "sampled"))
            if half or sampled or name.startswith(_ASIDE) or name.endswith(".old"):
                storage.remove(self._path(name))

    def aside(self, name: str) -> str:
        """Where to write the half of this name: the place itself where nothing can be renamed."""
        return self._path(name if storage.is_remote(self._folder) else f"{_ASIDE}{uuid.uuid4().hex[:8]}")

    def trained(self) -> int:
        """How many rounds are trained."""
        return max(self._trained(), default=0)

    def policy(self, index: int, first: str) -> str:
        """The model folder of the policy after `index` rounds."""
        return self._path(f"trained-{index}", "policy") if index else first

    def pairs(self, number: int) -> str:
        """The folder of a round's pairs."""
        return self._path(f"sampled-{number}", "pairs")

    def samples(self, number: int) -> pa.Table:
        """A round's samples, rows of `SAMPLE`."""
        fs, path = storage.resolve(self._path(f"sampled-{number}", _SAMPLES))
        return pq.read_table(path, filesystem=fs)

    def sampling(self, number: int) -> str:
        """The folder of answers to a round that is not sampled yet."""
        return self._path(f"sampling-{number}")

    def has_sampled(self, number: int) -> bool:
        return self._whole(f"sampled-{number}")

    def keep_sampled(self, number: int, sampled: Sampled) -> None:
        """The first half of a round."""
        folder = self.aside(f"sampled-{number}")
        storage.write_rows(pa.Table.from_pylist(sampled.samples, schema=SAMPLE), storage.join(folder, _SAMPLES))
        storage.write_table(pa.Table.from_pylist(sampled.pairs, schema=PAIR), storage.join(folder, "pairs"))
        self._publish(folder, f"sampled-{number}", sampled.report)
        storage.remove(self.sampling(number))

    def keep_trained(self, index: int, folder: str, report: Row) -> None:
        """The second half, whose policy and optimizer all ranks have written into `folder`."""
        self._publish(folder, f"trained-{index}", report)

    def doubt(self, index: int) -> None:
        """The engines do not say of the policy after `index` rounds what the trainer does: it is not gone on from.

        Unless it was proven once, or nothing is left of the one before: then the fault is not in the folder.
        """
        before, doubted = self._path(f"trained-{index - 1}", "optimizer"), self._path(f"trained-{index}")
        if index and not self.after(index) and (index == 1 or storage.exists(before)):
            storage.remove(storage.join(doubted, _REPORT))  # without it, a folder that is half removed is nothing
            storage.remove(doubted)

    def keep_after(self, index: int, facts: Row) -> None:
        storage.write_text(self._path(f"after-{index}.json"), json.dumps(facts))

    def after(self, index: int) -> Row:
        """What was found after `index` rounds; empty where it was interrupted before."""
        return self._read(f"after-{index}.json")

    def training(self, index: int) -> Row:
        """The report of the round's training (`history`, `shards`)."""
        return self._read(f"trained-{index}", _REPORT)

    def rounds(self) -> list[Row]:
        """One report a trained round, of all its parts; `before`, in the first, says what the first policy scored, and
        `dropped`, in the last, what was sampled ahead when the job stopped early, and trained on by nobody."""
        reports = []
        for number in range(self.trained()):
            parts = [self._read(f"sampled-{number}", _REPORT), self.after(number + 1)]
            parts[1]["too_long"] = self.training(number + 1)["too_long"]
            seconds = {name: value for part in parts for name, value in part.get("seconds", {}).items()}
            reports.append(parts[0] | parts[1] | {"seconds": seconds})
        if reports:
            if dropped := self._read(f"sampled-{len(reports)}", _REPORT):
                reports[-1]["dropped"] = dropped
            first = self.after(0)
            reports[0]["before"] = {name: first[name] for name in ("dev_score", "dev_tokens", *KEYS) if name in first}
        return reports

    def evidence(self, folder: str) -> None:
        """`samples/` and `pairs/`, a Parquet file a sampled round, below `folder`."""
        trained = self.trained()
        for number in range(trained + self.has_sampled(trained)):
            for name, table in (("samples", self.samples(number)), ("pairs", storage.read_table(self.pairs(number)))):
                storage.write_rows(table, storage.join(folder, name, f"round-{number:03d}.parquet"))

    def forget(self, keep: set[int]) -> None:
        """Remove the policies after other numbers of rounds, and all optimizers but that of the last."""
        last = self.trained()
        for index in self._trained():
            if index != last:
                storage.remove(self._path(f"trained-{index}", "optimizer"))
            if index not in keep:
                storage.remove(self._path(f"trained-{index}", "policy"))

    def _path(self, *names: str) -> str:
        return storage.join(self._folder, *names)

    def _read(self, *names: str) -> Row:
        text = storage.read_text(self._path(*names))
        return dict(json.loads(text)) if text else {}

    def _whole(self, half: str) -> bool:
        return storage.exists(self._path(half, _REPORT))

    def _trained(self) -> list[int]:
        names = [name for name in storage.names(self._folder) if name.startswith("trained-") and self._whole(name)]
        numbers = [name.partition("-")[2] for name in names]
        return sorted(int(number) for number in numbers if number.isdigit())

    def _publish(self, folder: str, name: str, report: Row) -> None:
        storage.write_text(storage.join(folder, _REPORT), json.dumps(report))
        storage.publish(folder, self._path(name))


def save_optimizer(engine: Any, folder: str) -> None:
    """Every rank writes its shard of DeepSpeed's state, frozen weights included; collective.

    `states.gather` holds only what is trained, and a round goes on from a policy with its adapters merged in, to which
    they must not be added once more.
    """
    with storage.writing_folder(storage.join(folder, "optimizer")) as local:
        (local / _TAG).mkdir(exist_ok=True)  # which rank 0 alone would make, and only in a folder of its own
        engine.save_checkpoint(str(local), tag=_TAG, save_latest=False)


def load_optimizer(engine: Any, policy: str) -> None:
    """Go on with the state beside a trained policy; collective."""
    folder = storage.join(policy.rpartition("/")[0], "optimizer")
    engine.load_checkpoint(local_model(folder), tag=_TAG)
