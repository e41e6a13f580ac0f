"""The embedded world as the rest of the system meets it: models that ship with the package, and client speeches.

The models are ordinary folders (bf16 safetensors, tokenizer) below `psycho/nano/models`; `nano.json` beside them says
which recipe, seed and versions made them and which gates each passed. `psycho nano --rebuild` makes others, and
`nano.models` names their folder.
"""

from __future__ import annotations

import hashlib
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from psycho.config import NanoConfig
from psycho.errors import BadInput
from psycho.nano.grammar import sample_speech
from psycho.schema import stable_id

FACTS = "nano.json"
WEIGHTS = "model.safetensors"
POLICIES = ("base", "brisk", "warm", "coach", "listener", "reference")
MODELS = ("judge", *POLICIES)
PACKAGED = Path(__file__).parent / "models"


def models_root(config: NanoConfig) -> Path:
    """The folder of the models: those that ship, or those that `nano.models` names."""
    return Path(config.models).expanduser().absolute() if config.models else PACKAGED


def model_folder(config: NanoConfig, name: str) -> str:
    """The folder of one model.

    Raises:
        BadInput: there is no nano model of that name.
    """
    if name not in MODELS:
        raise BadInput(f"there is no model nano:{name}; the nano models are {', '.join(MODELS)}")
    return str(models_root(config) / name)


def facts(config: NanoConfig) -> dict[str, Any]:
    """What `nano.json` says: recipe, seed, versions, and by model its checksum and the gates it passed.

    Raises:
        BadInput: it is not there or is not whole.
    """
    return _read_facts(models_root(config))


@lru_cache(maxsize=8)
def _read_facts(root: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((root / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{root} holds no nano models ({FACTS}: {type(error).__name__}); set nano.models to a folder that "
            "`psycho nano --rebuild` made, or leave it out for those that ship"
        ) from None
    return found


def identity(config: NanoConfig, name: str) -> str:
    """What a stage's key says of a model: the checksum of its weights, so that a copy elsewhere is the same model."""
    known = facts(config)["models"].get(name, {})
    return f"nano:{name}@{known.get('sha256', 'unknown')[:16]}"


def checksum(folder: Path) -> str:
    """SHA-256 of a model's weights."""
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()


def speeches(train_count: int, evaluation_count: int, seed: int) -> list[dict[str, str]]:
    """Client speeches of the nano world; those for evaluation combine slots that no model was trained on."""
    rng = random.Random(f"speeches-{seed}")
    found: dict[str, dict[str, str]] = {}
    for split, count, held_out in (("train", train_count, False), ("evaluation", evaluation_count, True)):
        wanted = len(found) + count
        while len(found) < wanted:
            speech = sample_speech(rng, held_out_combinations=held_out)
            key = stable_id("speech", speech.text)
            found.setdefault(key, {"speech_id": key, "question": speech.text, "split": split, "topic": speech.topic})
    return list(found.values())
