"""A real model beside transformers and TRL: 30 layers, three key-value heads, a vocabulary of 49,152, real language.

`psycho fetch smollm2` puts it into the cache. Where it is not there these tests are skipped, unless
PSYCHO_REQUIRE_SMOLLM2=1 says that it has to be.
"""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from psycho import storage
from psycho.config import DPOConfig, RewardConfig
from psycho.inference.fetch import PACKAGED
from psycho.inference.template import conversation, render, stop_ids
from psycho.preferences import export
from psycho.principles import STEMS
from psycho.schema import PREFERENCE_PAIR
from psycho.training import losses
from psycho.training.modules import PolicyModel, use_packing
from psycho.training.objectives import Preference, Reward
from psycho.training.packing import packed, padded

SPEECHES = Path(__file__).parents[2] / "examples" / "speeches.csv"
ANSWERS = (
    "That sounds exhausting, and it makes sense that you are worn out. What would a good evening look like?",
    "You should just relax.",
    "I hear how much this hurts. Would you like to tell me what happened next?",
)
TRL: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def folder() -> str:
    """The model in the cache."""
    found = PACKAGED["smollm2"].folder
    if not found.is_dir():
        reason = f"SmolLM2 is not at {found}; `psycho fetch smollm2` fetches it"
        if os.environ.get("PSYCHO_REQUIRE_SMOLLM2") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return str(found)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def reference(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def policy(folder: str) -> Any:
    """The model a step away from the reference, so that no loss is that of equal models.

    One weight near the head has a gradient: the way to it is short, and small models test the rest of it.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.mlp.up_proj.weight
            weight += 0.02 * weight.std() * torch.randn_like(weight)
    model.requires_grad_(False)
    model.model.layers[28].mlp.up_proj.weight.requires_grad_(True)
    return model


def speeches(count: int) -> list[str]:
    with SPEECHES.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["question"] for row in rows[:: len(rows) // count]][:count]


def pairs(count: int) -> list[dict[str, str]]:
    """Two pairs of each speech: the first and the third answer before the second."""
    return [
        {"question": speech, "chosen": ANSWERS[best], "rejected": ANSWERS[1]}
        for speech in speeches(count)
        for best in (0, 2)
    ]


def as_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": row["question"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")},
    }


@pytest.mark.parametrize("system", [None, "You are a kind counsellor."])
def test_what_the_model_reads_is_what_its_template_says(system: str | None, tokenizer: Any) -> None:
    first = [{"role": "system", "content": system}] if system else []
    for speech in speeches(20):
        talk = [*first, {"role": "user", "content": speech}]
        text, ids = render(tokenizer, talk)
        assert text == tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert ids == tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
        talk += [{"role": "assistant", "content": ANSWERS[0]}, {"role": "user", "content": "Thank you."}]
        assert conversation(tokenizer, talk) == tokenizer.apply_chat_template(talk, tokenize=False)


def test_its_answers_end_with_its_turn(tokenizer: Any, folder: str) -> None:
    """The end of a turn is its EOS, for the engine, for transformers and for training."""
    assert tokenizer.eos_token == "<|im_end|>" and stop_ids(tokenizer) == []
    assert json.loads(Path(folder, "generation_config.json").read_text())["eos_token_id"] == tokenizer.eos_token_id


@torch.no_grad()
def test_logprobs_packed_are_those_of_transformers(folder: str, reference: Any, tokenizer: Any) -> None:
    """A prompt encoded once for its three answers, two speeches in a bin, against each text by itself."""
    objective = Preference(DPOConfig(), tokenizer)
    groups, _ = objective.groups(pairs(2), 10_000)
    alone = []
    for group in groups:
        for row in group.responses:
            ids = torch.tensor([group.prompt + row.ids])
            logprobs = reference(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
            alone.append(logprobs.gather(1, ids[0, 1:, None])[len(group.prompt) - 1 :, 0].sum())
    batch = packed(groups)
    ours = objective.load(folder, torch.float32)
    assert use_packing(ours) is None
    together = losses.sequence_sums(PolicyModel(ours)(batch), batch.response, len(batch.lengths))
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-5, atol=1e-3)
    # An answer of sense is likelier, a token, than one of its words in another order.
    assert (together / batch.lengths).min() > -6


def test_the_dpo_loss_is_trls(policy: Any, reference: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Loss, implicit rewards and a gradient."""
    import datasets
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    rows = pairs(1)
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=TRLConfig(str(tmp_path), beta=0.1, max_length=None, **TRL),
        train_dataset=datasets.Dataset.from_list([as_messages(row) for row in rows]),
        processing_class=tokenizer,
    )
    policy.eval()
    theirs = trainer.compute_loss(policy, trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))]))
    theirs.backward()
    weight = policy.model.layers[28].mlp.up_proj.weight
    expected, weight.grad = weight.grad.clone(), None
    metrics = {key: values[0] for key, values in trainer._metrics["eval"].items()}

    objective = Preference(DPOConfig(beta=0.1), tokenizer)
    batch = padded(objective.groups(rows, 10_000)[0], tokenizer.pad_token_id)
    with torch.no_grad():
        batch = replace(batch, references=objective.logprobs(objective.wrap(reference)(batch), batch))
    loss, parts = objective.sums(objective.wrap(policy)(batch), batch)
    (loss / len(rows)).backward()
    assert loss.item() / len(rows) == pytest.approx(theirs.item(), rel=1e-4)
    for part, metric in (("reward_chosen", "rewards/chosen"), ("reward_rejected", "rewards/rejected")):
        assert parts[part].item() / len(rows) == pytest.approx(metrics[metric], rel=1e-3, abs=1e-4)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_the_reward_loss_is_trls(folder: str, tokenizer: Any, tmp_path: Path) -> None:
    import datasets
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig as TRLConfig
    from trl import RewardTrainer

    rows = pairs(1)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    trainer = RewardTrainer(
        model=model,
        args=TRLConfig(str(tmp_path), disable_dropout=True, **TRL),
        train_dataset=datasets.Dataset.from_list([as_messages(row) for row in rows]),
        processing_class=tokenizer,
    )
    model.eval()
    with torch.no_grad():
        inputs = trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])
        theirs = trainer.compute_loss(model, inputs)
        objective = Reward(RewardConfig(), tokenizer)
        batch = padded(objective.groups(rows, 10_000)[0], tokenizer.pad_token_id)
        ours, _ = objective.sums(objective.wrap(model)(batch), batch)
    assert ours.item() / len(rows) == pytest.approx(theirs.item(), rel=1e-4)


def test_trl_reads_an_exported_set_with_its_tokenizer(
    reference: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TRL then trains on is what we train on, token by token."""
    import datasets
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    ratings = {f"{side}_{stem}_rating": r for side, r in (("chosen", 4), ("rejected", 2)) for stem in STEMS}
    said = {"chosen_model": "one", "rejected_model": "other", "gap": 2.0, "history": None, **ratings}
    rows = [row | said | {"ID": f"s{n}", "speech_id": f"s{n}", "prefID": 0} for n, row in enumerate(pairs(3))]
    storage.write_table(pa.Table.from_pylist(rows, PREFERENCE_PAIR), str(tmp_path / "preferences" / "train"))
    monkeypatch.setattr(export, "card", lambda *_: "")  # it has tests of its own
    export.export_pairs(str(tmp_path / "preferences"), str(tmp_path / "set"), {})
    files = str(tmp_path / "set" / "conversational" / "train-*.parquet")
    data = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    args = TRLConfig(str(tmp_path), max_length=512, **TRL)
    made = DPOTrainer(model=reference, args=args, train_dataset=data, processing_class=tokenizer)
    assert len(made.train_dataset) == len(rows)
    groups, _ = Preference(DPOConfig(), tokenizer).groups(rows[:1], 10_000)
    [group], theirs = groups, made.train_dataset[0]
    assert theirs["prompt_ids"] == group.prompt
    assert [theirs["chosen_ids"], theirs["rejected_ids"]] == [response.ids for response in group.responses]
