"""A run's preferences as a data set that others load: Parquet shards in the published schema, and a card.

Several configurations lie in one folder. `default` has the published columns by name and in order, our own after them,
and a `prompt` as plain text, which TRL's trainers take as they are. `conversational` has the same pairs as messages,
for models with a chat template. Beside them are the other forms of `forms.py`. A folder that was exported with its
pairs can start a run (`pairs.source`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from psycho import storage
from psycho.errors import BadInput
from psycho.preferences import forms
from psycho.preferences.card import card
from psycho.preferences.forms import MESSAGES, reply, turns
from psycho.schema import PREFERENCE_PAIR

Rows = list[dict[str, Any]]
SPLITS = ("train", "dev", "test")
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
TEXT = pa.schema([*PREFERENCE_PAIR, ("prompt", pa.string())])
CONVERSATIONAL = pa.schema(
    [
        *[(name, MESSAGES) for name in ("prompt", "chosen", "rejected")],
        *[field for field in PREFERENCE_PAIR if field.name not in ("question", "chosen", "rejected", "history")],
    ]
)
_FORMS = {"responses": forms.RESPONSES, "sft": forms.SFT, "kto": forms.KTO, "ranked": forms.RANKED}
_ROLES = {"user": "Client", "assistant": "Therapist", "system": "System"}


def export_pairs(
    preferences: str,
    target: str,
    facts: Mapping[str, Any],
    rows_per_shard: int = 50_000,
    what: Sequence[str] = ("pairs",),
    rated: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    min_overall: float = 0.0,
) -> dict[str, dict[str, int]]:
    """Write shards and the card below `target`; returns rows by form and split of the hub.

    Args:
        preferences: the run's folder of pairs.
        target: a folder that is not there yet, or is empty.
        facts: what the card says of the run (`card.card`).
        what: some of `forms.FORMS`.
        rated: rated responses with `question` and `history` by split (`train`, `dev`, `test`); None: those of the
            pairs.
        min_overall: least rating of a response for supervised training.

    Raises:
        BadInput: there is something in `target`, or there are no pairs.
    """
    check_target(target)
    counts = count_pairs(preferences)
    written: dict[str, dict[str, int]] = {form: {} for form in forms.FORMS if form in what}
    for name in SPLITS:
        split = HUB_SPLITS[name]
        pairs: Rows = []
        if split in counts:
            pairs = storage.read_table(storage.join(preferences, name)).select(PREFERENCE_PAIR.names).to_pylist()
        responses: Sequence[Mapping[str, Any]]
        responses = forms.responses_of_pairs(pairs) if rated is None else rated.get(name, ())
        for form, by_split in written.items():
            if rows := _rows(form, pairs, responses, min_overall):
                by_split[split] = len(rows)
                _write_form(form, rows, target, split, rows_per_shard)
    storage.write_text(storage.join(target, "README.md"), card(counts, facts, {k: v for k, v in written.items() if v}))
    return written


def _rows(form: str, pairs: Rows, responses: Sequence[Mapping[str, Any]], min_overall: float) -> Rows:
    if form == "responses":
        return forms.response_rows(responses)
    if form == "sft":
        return forms.sft_rows(responses, min_overall)
    if form == "ranked":
        return forms.ranked_rows(responses)
    return forms.kto_rows(pairs) if form == "kto" else pairs


def _write_form(form: str, rows: list[dict[str, Any]], target: str, split: str, rows_per_shard: int) -> None:
    if form != "pairs":
        _write_shards(
            pa.Table.from_pylist(rows, schema=_FORMS[form]), storage.join(target, form), split, rows_per_shard
        )
        return
    text = pa.Table.from_pylist([row | {"prompt": text_prompt(row)} for row in rows], schema=TEXT)
    _write_shards(text, storage.join(target, "data"), split, rows_per_shard)
    chat = pa.Table.from_pylist([_messages(row) for row in rows], schema=CONVERSATIONAL)
    _write_shards(chat, storage.join(target, "conversational"), split, rows_per_shard)


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
    said = [f"{_ROLES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns(pair)]
    return "\n\n".join([*said, "Therapist:\n"])


def _messages(pair: Mapping[str, Any]) -> dict[str, Any]:
    return {**pair, "prompt": turns(pair), **{side: reply(pair[side]) for side in ("chosen", "rejected")}}


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
