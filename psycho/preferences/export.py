"""A run's preferences as a data set that others load: Parquet shards in the published schema, and a card.

Two configurations lie in one folder. `default` has the published columns by name and in order, our own after them, and
a `prompt` as plain text, which TRL's trainers take as they are. `conversational` has the same pairs as messages, for
models with a chat template. A folder that was exported can start a run (`pairs.source`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.errors import BadInput
from psycho.preferences.card import card
from psycho.schema import PREFERENCE_PAIR

SPLITS = ("train", "dev", "test")
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TEXT = pa.schema([*PREFERENCE_PAIR, ("prompt", pa.string())])
CONVERSATIONAL = pa.schema(
    [
        *[(name, _MESSAGES) for name in ("prompt", "chosen", "rejected")],
        *[field for field in PREFERENCE_PAIR if field.name not in ("question", "chosen", "rejected", "history")],
    ]
)
_ROLES = {"user": "Client", "assistant": "Therapist", "system": "System"}


def export_pairs(
    preferences: str, target: str, facts: Mapping[str, Any], rows_per_shard: int = 50_000
) -> dict[str, int]:
    """Write shards and the card below `target`; returns pairs by split of the hub.

    Args:
        preferences: the run's folder of pairs.
        target: a folder that is not there yet, or is empty.
        facts: what the card says of the run (`card.card`).

    Raises:
        BadInput: there is something in `target`, or there are no pairs.
    """
    check_target(target)
    counts = count_pairs(preferences)
    for name in SPLITS:
        split = HUB_SPLITS[name]
        if split not in counts:
            continue
        rows = storage.read_table(storage.join(preferences, name)).select(PREFERENCE_PAIR.names).to_pylist()
        text = pa.Table.from_pylist([row | {"prompt": text_prompt(row)} for row in rows], schema=TEXT)
        _write_shards(text, storage.join(target, "data"), split, rows_per_shard)
        chat = pa.Table.from_pylist([_messages(row) for row in rows], schema=CONVERSATIONAL)
        _write_shards(chat, storage.join(target, "conversational"), split, rows_per_shard)
    storage.write_text(storage.join(target, "README.md"), card(counts, facts))
    return counts


def check_target(target: str) -> None:
    """Refuse a folder that holds a data set.

    Raises:
        BadInput: there is something in `target`.
    """
    if storage.exists(storage.join(target, "README.md")) or any(storage.parquet_files(target)):
        raise BadInput(f"{target} holds a data set already; give another folder with --to")


def count_pairs(preferences: str) -> dict[str, int]:
    """Pairs by split of the hub, of the splits that there are.

    Raises:
        BadInput: there are no pairs.
    """
    files = {name: storage.parquet_files(storage.join(preferences, name)) for name in SPLITS}
    rows = {name: sum(pq.read_metadata(path, filesystem=fs).num_rows for fs, path in files[name]) for name in SPLITS}
    counts = {HUB_SPLITS[name]: count for name, count in rows.items() if count}
    if not counts:
        raise BadInput(f"{preferences} holds no pairs; run the stage pair first")
    return counts


def text_prompt(pair: Mapping[str, Any]) -> str:
    """The conversation so far as plain text; a response goes straight behind it."""
    turns = [f"{_ROLES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in _turns(pair)]
    return "\n\n".join([*turns, "Therapist:\n"])


def _turns(pair: Mapping[str, Any]) -> list[dict[str, str]]:
    return [*json.loads(pair.get("history") or "[]"), {"role": "user", "content": pair["question"]}]


def _messages(pair: Mapping[str, Any]) -> dict[str, Any]:
    sides = {side: [{"role": "assistant", "content": pair[side]}] for side in ("chosen", "rejected")}
    return {**pair, "prompt": _turns(pair), **sides}


def _write_shards(table: pa.Table, folder: str, split: str, rows_per_shard: int) -> None:
    shards = list(_slices(table, rows_per_shard))
    fs, path = storage.resolve(folder)
    fs.create_dir(path, recursive=True)
    for number, part in enumerate(shards):
        pq.write_table(part, f"{path}/{split}-{number:05}-of-{len(shards):05}.parquet", filesystem=fs)


def _slices(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def push(folder: str, repository: str, private: bool) -> str:
    """Send an exported folder to the hub; returns its address. Only ever called behind an explicit flag.

    Raises:
        BadInput: the hub says no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, repo_type="dataset")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise BadInput(
            f"{repository} could not be written ({type(error).__name__}); check the name, the network and HF_TOKEN"
        ) from None
    return str(address)
