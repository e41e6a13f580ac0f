"""The rounds on disk: each half of a round, sampled and trained, is there whole or not at all.

    sampling-<n>/  answers to round n so far, while it is sampled (`drawn.py`)
    sampled-<n>/   samples.parquet, pairs/, report.json: round n before its training
    trained-<i>/   policy/, optimizer/, report.json: the state after i rounds
    after-<i>.json what was found after that: the proof of the weights, the dev score, the time

Samples and pairs stay when the job is done (`evidence`): they are what its rewards can be checked by.

A half is written aside and renamed, so an interrupted job goes on from the last one that is there. A worker can outlive
its killed driver for a moment and write the same half once more: the later one replaces the earlier, and as content
depends on seeds they say the same, but for rounding.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.training.online.heldout import KEYS
from psycho.training.online.rollout import PAIR, SAMPLE, Sampled

Row = dict[str, Any]
_ASIDE = ".unfinished-"
_TAG = "state"


class RoundStore:
    """The folder of an online job in progress, on a file system that all ranks share."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def tidy(self) -> None:
        """Remove what was being written when an earlier try was interrupted."""
        done = [self._folder / path.name.replace("sampled", "sampling") for path in self._folder.glob("sampled-*")]
        for aside in [*self._folder.glob(f"{_ASIDE}*"), *self._folder.glob("*.old"), *done]:
            storage.remove(str(aside))

    def aside(self) -> Path:
        """A new folder to write a half into."""
        folder = self._folder / f"{_ASIDE}{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        return folder

    def trained(self) -> int:
        """How many rounds are trained."""
        return max(self._trained(), default=0)

    def policy(self, index: int, first: str) -> str:
        """The model folder of the policy after `index` rounds."""
        return str(self._folder / f"trained-{index}" / "policy") if index else first

    def pairs(self, number: int) -> str:
        """The folder of a round's pairs."""
        return str(self._folder / f"sampled-{number}" / "pairs")

    def sampling(self, number: int) -> str:
        """The folder of answers to a round that is not sampled yet."""
        return str(self._folder / f"sampling-{number}")

    def has_sampled(self, number: int) -> bool:
        return (self._folder / f"sampled-{number}").is_dir()

    def keep_sampled(self, number: int, sampled: Sampled) -> None:
        """The first half of a round."""
        folder = self.aside()
        storage.write_rows(pa.Table.from_pylist(sampled.samples, schema=SAMPLE), str(folder / "samples.parquet"))
        storage.write_table(pa.Table.from_pylist(sampled.pairs, schema=PAIR), str(folder / "pairs"))
        self._publish(folder, f"sampled-{number}", sampled.report)
        storage.remove(self.sampling(number))

    def keep_trained(self, index: int, folder: Path, report: Row) -> None:
        """The second half, whose policy and optimizer all ranks have written into `folder`."""
        self._publish(folder, f"trained-{index}", report)

    def doubt(self, index: int) -> None:
        """The engines do not say of the policy after `index` rounds what the trainer does: it is not gone on from.

        Unless it was proven once, or nothing is left of the one before: then the fault is not in the folder.
        """
        before = self._folder / f"trained-{index - 1}" / "optimizer"
        if index and not self.after(index) and (index == 1 or before.is_dir()):
            storage.remove(str(self._folder / f"trained-{index}"))

    def keep_after(self, index: int, facts: Row) -> None:
        storage.write_text(str(self._folder / f"after-{index}.json"), json.dumps(facts))

    def after(self, index: int) -> Row:
        """What was found after `index` rounds; empty where it was interrupted before."""
        return _read(self._folder / f"after-{index}.json")

    def training(self, index: int) -> Row:
        """The report of the round's training (`history`, `shards`)."""
        return _read(self._folder / f"trained-{index}" / "report.json")

    def rounds(self) -> list[Row]:
        """One report a trained round, of all its parts; `before`, in the first, says what the first policy scored."""
        reports = []
        for number in range(self.trained()):
            parts = [_read(self._folder / f"sampled-{number}" / "report.json"), self.after(number + 1)]
            parts[1]["too_long"] = self.training(number + 1)["too_long"]
            seconds = {name: value for part in parts for name, value in part.get("seconds", {}).items()}
            reports.append(parts[0] | parts[1] | {"seconds": seconds})
        if reports:
            first = self.after(0)
            reports[0]["before"] = {name: first[name] for name in ("dev_score", "dev_tokens", *KEYS) if name in first}
        return reports

    def evidence(self, folder: str) -> None:
        """`samples/` and `pairs/`, a Parquet file a trained round, below `folder`."""
        for number in range(self.trained()):
            samples = pq.read_table(self._folder / f"sampled-{number}" / "samples.parquet")
            for name, table in (("samples", samples), ("pairs", storage.read_table(self.pairs(number)))):
                storage.write_rows(table, storage.join(folder, name, f"round-{number:03d}.parquet"))

    def forget(self, keep: set[int]) -> None:
        """Remove the policies after other numbers of rounds, and all optimizers but that of the last."""
        last = self.trained()
        for index in self._trained():
            folder = self._folder / f"trained-{index}"
            if index != last:
                storage.remove(str(folder / "optimizer"))
            if index not in keep:
                storage.remove(str(folder / "policy"))

    def _trained(self) -> list[int]:
        names = [path.name.partition("-")[2] for path in self._folder.glob("trained-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def _publish(self, folder: Path, name: str, report: Row) -> None:
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        storage.publish(str(folder), str(self._folder / name))


def save_optimizer(engine: Any, folder: Path) -> None:
    """Every rank writes its shard of DeepSpeed's state, frozen weights included; collective.

    `states.gather` holds only what is trained, and a round goes on from a policy with its adapters merged in, to which
    they must not be added once more.
    """
    engine.save_checkpoint(str(folder / "optimizer"), tag=_TAG, save_latest=False)


def load_optimizer(engine: Any, policy: str) -> None:
    """Go on with the state beside a trained policy; collective."""
    engine.load_checkpoint(str(Path(policy).parent / "optimizer"), tag=_TAG)


def _read(file: Path) -> Row:
    text = storage.read_text(str(file))
    return dict(json.loads(text)) if text else {}
