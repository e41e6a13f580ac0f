"""The loop on real DeepSpeed and real process groups: one rank in this process, two under Ray Train."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho import storage
from psycho.config import DPOConfig, LoopConfig, LoRAConfig, RewardConfig, SFTConfig, TrainingConfig
from psycho.errors import BadInput, StageFailed
from psycho.training.checkpoint import Best, Checkpoints, best_folder
from psycho.training.launch import TrainJob, read_history, read_rows, train
from psycho.training.loop import Trainer, write_history
from psycho.training.packing import padded

SPEECHES = (
    "My partner left and I feel lost.",
    "I cannot sleep. Work is too much and my boss shouts at me when I come late.",
    "I drink again.",
    "My mother calls me every day and I do not know what to say to her.",
)
GOOD = ("That sounds painful. What do you miss?", "You carry a lot. What would help you?", "You noticed it.")
BAD = ("Cheer up.", "Just find another job and stop it, it is not that hard to do.")
ROWS = 21  # neither 8 nor 4 nor 2 divides it
BASE = TrainingConfig(
    workers=1,
    cpus_per_worker=0.5,
    gpus_per_worker=0,
    device="cpu",
    precision="fp32",
    zero_stage=0,
    threads_per_worker=1,
    max_length=128,
    bin_tokens=1024,
    start_timeout_s=300,
    collective_timeout_s=120,
)
SETTINGS: dict[str, LoopConfig] = {
    "sft": SFTConfig(lr=5e-4, batch_size=8, epochs=2, prompt_loss_weight=0.2),
    "reward": RewardConfig(lr=5e-4, batch_size=8, epochs=2),
    "dpo": DPOConfig(lr=5e-4, batch_size=8, epochs=2, nll_weight=0.1),
}
Weights = dict[str, torch.Tensor]


def _rows(kind: str, count: int = ROWS) -> list[dict[str, Any]]:
    turns = list(islice(zip(cycle(SPEECHES), cycle(GOOD), cycle(BAD), strict=False), count))
    if kind == "sft":
        talks = [[{"role": "user", "content": s}, {"role": "assistant", "content": g}] for s, g, _ in turns]
        return [{"id": str(i), "messages": json.dumps(talk)} for i, talk in enumerate(talks)]
    return [{"id": str(i), "question": s, "chosen": g, "rejected": b} for i, (s, g, b) in enumerate(turns)]


def _fit(
    kind: str, model: str, folder: Path, training: TrainingConfig = BASE, **changes: Any
) -> list[dict[str, float]]:
    """Train in this process and save; the history without what depends on the machine."""
    trainer = Trainer(kind, model, SETTINGS[kind].model_copy(update=changes), training, seed=0)
    groups, too_long = trainer.groups(_rows(kind))
    assert not too_long
    history = trainer.fit(groups, seed=0)
    trainer.save(str(folder))
    trainer.close()
    return [_steady(row) for row in history]


def _steady(row: dict[str, float]) -> dict[str, float]:
    """Without speed and memory, and without the norm, which DeepSpeed does not keep at every stage."""
    return {name: value for name, value in row.items() if name not in ("tokens_per_s", "memory_gib", "grad_norm")}


def _weights(folder: Path | str) -> Weights:
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def _assert_same(one: Weights, other: Weights, tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def _distance(one: Weights, other: Weights) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one if name in other)


@pytest.fixture(scope="module")
def whole(one_rank: None, tiny_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each kind trained in whole batches: folder and history, to compare others with."""
    made: dict[str, Any] = {}
    for kind in SETTINGS:
        folder = tmp_path_factory.mktemp("whole") / kind
        made[kind] = (folder, _fit(kind, tiny_llama(0), folder))
    return made


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("how", [{"bin_tokens": 100}, {"bin_tokens": 200}, {"packing": False}])
def test_one_bin_is_many_and_packed_is_padded(
    kind: str, how: dict[str, Any], whole: dict[str, Any], tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """Also where a speech's pairs do not fit one bin, and over texts of unequal length."""
    history = _fit(kind, tiny_llama(0), tmp_path / "out", BASE.model_copy(update=how))
    folder, expected = whole[kind]
    assert _distance(_weights(tiny_llama(0)), _weights(folder)) > 5e-4
    if how != {"bin_tokens": 100} or kind == "sft":  # a split group may fall into two steps
        # As a whole: Adam divides by the gradient's size, and where that is nothing but rounding, so is the step.
        ours, theirs, before = (_weights(f) for f in (tmp_path / "out", folder, tiny_llama(0)))
        same = [name for name in before if name in theirs]
        off = sum((ours[n] - theirs[n]).pow(2).sum() for n in same) / sum(
            (theirs[n] - before[n]).pow(2).sum() for n in same
        )
        assert off < 1e-4
        assert history[0] == pytest.approx(expected[0], abs=1e-5)
        for mine, other in zip(history, expected, strict=True):
            assert mine == pytest.approx(other, abs=2e-3)


@pytest.mark.parametrize("kind", SETTINGS)
def test_statistics_say_what_happened(kind: str, whole: dict[str, Any]) -> None:
    _, history = whole[kind]
    assert [row["step"] for row in history] == list(range(len(history)))
    assert [row["lr"] for row in history] == sorted((row["lr"] for row in history), reverse=True)
    if kind == "dpo":
        assert history[0]["margin"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_loss_falls(kind: str, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    first, *_, last = _fit(kind, tiny_llama(0), tmp_path / "out", lr=5e-3, epochs=4)
    assert last["loss"] < 0.7 * first["loss"]
    if kind != "sft":
        assert last["accuracy"] == 1.0
        assert last["margin"] > 0.5


def test_tokens_of_an_epoch_are_those_of_its_examples(whole: dict[str, Any], nano_tokenizer: Any) -> None:
    from psycho.training.groups import encode_conversation

    count = sum(len(encode_conversation(nano_tokenizer, json.loads(row["messages"])).ids) for row in _rows("sft"))
    assert sum(row["tokens"] for row in whole["sft"][1]) == 2 * count


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_zero_stages_agree(
    stage: int, kind: str, whole: dict[str, Any], tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    _fit(kind, tiny_llama(0), tmp_path / "out", BASE.model_copy(update={"zero_stage": stage, "bin_tokens": 200}))
    _assert_same(_weights(tmp_path / "out"), _weights(whole[kind][0]), 1e-5)


def test_an_sft_step_is_the_mean_over_its_weights(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """The loss of a batch is not a mean of the means of its micro-batches."""
    trainer = Trainer("sft", tiny_llama(0), SETTINGS["sft"], BASE.model_copy(update={"bin_tokens": 100}), seed=0)
    groups, _ = trainer.groups(_rows("sft", 8))
    module = trainer.objective.wrap(AutoModelForCausalLM.from_pretrained(tiny_llama(0)))
    total, weights = 0.0, 0.0
    with torch.no_grad():
        for group in groups:
            batch = padded([group], 0)
            loss, parts = trainer.objective.sums(module(batch), batch)
            total, weights = total + loss.item(), weights + parts["loss_weight"].item()
    first = trainer.fit(groups, seed=0)[0]
    trainer.close()
    assert first["loss"] == pytest.approx(total / weights, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_gradient_is_that_of_the_mean(
    kind: str, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """Of a short batch too: divided by what is in it, not by what would fit. Adam alone would hide a wrong scale."""
    settings = SETTINGS[kind].model_copy(update={"epochs": 1, "max_grad_norm": 1e9, "warmup_share": 0.0})
    # Stage 0 keeps no norm in single precision.
    training = BASE.model_copy(update={"zero_stage": 2, "bin_tokens": 100})
    trainer = Trainer(kind, tiny_llama(0), settings, training, seed=0)
    groups, _ = trainer.groups(_rows(kind, 5))
    found = trainer.fit(groups, seed=0)[0]["grad_norm"]
    model = AutoModelForCausalLM.from_pretrained(tiny_llama(0))
    module = trainer.objective.wrap(model)
    batch = padded(groups, 0)
    if kind == "dpo":
        with torch.no_grad():
            batch = replace(batch, references=trainer.objective.logprobs(module(batch), batch))
    loss, _ = trainer.objective.sums(module(batch), batch)
    (loss / sum(trainer.objective.weight(group) for group in groups)).backward()
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]))
    trainer.close()
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_saved_is_what_was_trained(
    kind: str, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """transformers and a fresh Trainer read the folder back to the same logits, tied weights included."""
    trainer = Trainer(kind, tiny_llama(0), SETTINGS[kind], BASE, seed=0)
    groups, _ = trainer.groups(_rows(kind))
    trainer.fit(groups, seed=0)
    trainer.save(str(tmp_path / "out"))
    ids = trainer.tokenizer(SPEECHES[1], return_tensors="pt").input_ids
    trainer.engine.eval()
    with torch.no_grad():
        expected = trainer.engine.module.model(input_ids=ids).logits
    trainer.close()
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out").eval()
    again = Trainer(kind, str(tmp_path / "out"), SETTINGS[kind], BASE, seed=1)
    again.engine.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(again.engine.module.model(input_ids=ids).logits, expected, atol=1e-6, rtol=0)
    assert again.tokenizer.chat_template == trainer.tokenizer.chat_template
    again.close()


def test_the_reference_is_the_model_a_round_starts_from(one_rank: None, tiny_llama: Callable[..., str]) -> None:
    """Online DPO fits again and again: each time the first loss is ln 2 anew, whatever was trained before."""
    settings = SETTINGS["dpo"].model_copy(update={"epochs": 1, "nll_weight": 0.0})
    trainer = Trainer("dpo", tiny_llama(0), settings, BASE, seed=0)
    groups, _ = trainer.groups(_rows("dpo"))
    first, second = trainer.fit(groups, seed=0), trainer.fit(groups, seed=1)
    trainer.close()
    for history in (first, second):
        assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-4)
        assert history[-1]["margin"] > 0


def test_the_seed_makes_the_training(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """The reward head is drawn by seed: the same seed gives the same model to the last bit, another another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer = Trainer("reward", tiny_llama(0), SETTINGS["reward"], BASE, seed)
        trainer.fit(trainer.groups(_rows("reward"))[0], seed)
        trainer.save(str(tmp_path / name))
        trainer.close()
    _assert_same(_weights(tmp_path / "a"), _weights(tmp_path / "b"), 0.0)
    assert _distance(_weights(tmp_path / "a"), _weights(tmp_path / "c")) > 1e-3


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (1, "bf16")])
def test_resumed_is_uninterrupted(
    stage: int, precision: str, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """Killed after any step, the same call goes on from the last checkpoint to the same model and statistics."""
    training = BASE.model_copy(update={"zero_stage": stage, "precision": precision, "checkpoint_every_steps": 2})
    where, kept = str(tmp_path / "checkpoints"), {}

    class Killed(Exception):
        pass

    def kill(rows: int, tokens: int, statistics: dict[str, float]) -> None:
        if statistics["step"] == 2:
            raise Killed

    for name, on_steps in (("through", [None]), ("resumed", [kill, None])):
        for on_step in on_steps:
            trainer = Trainer("dpo", tiny_llama(0), SETTINGS["dpo"], training, seed=0)
            groups, _ = trainer.groups(_rows("dpo"))
            try:
                history = trainer.fit(groups, 0, on_step, checkpoints=where if name == "resumed" else None)
            except Killed:
                trainer.close()
        trainer.save(str(tmp_path / name))
        trainer.close()
        kept[name] = [_steady(row) for row in history]
    assert len(kept["through"]) > 4
    for one, other in zip(kept["through"], kept["resumed"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    _assert_same(_weights(tmp_path / "through"), _weights(tmp_path / "resumed"), 1e-6)


def test_a_shard_cut_short_is_not_gone_on_from(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """Of two checkpoints the newer one lacks a rank's shard: the older one counts."""
    checkpoints = Checkpoints(str(tmp_path), "key", 1, 60.0)
    checkpoints._last()
    for name in ("step-2/shard-0-of-1.pt", "step-4/shard-1-of-2.pt", "step-4/shard-0-of-2.unfinished"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert checkpoints._last() == str(tmp_path / "step-2")
    assert not (tmp_path / "step-4").exists()
    assert Checkpoints(str(tmp_path), "another key", 1, 60.0)._last() is None
    assert not (tmp_path / "step-2").exists()


def test_checkpoints_of_another_training_that_cannot_be_removed_end_it(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the new key they would be gone on from."""
    Checkpoints(str(tmp_path), "key", 1, 60.0)._last()
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2" / "shard-0-of-1.pt").touch()

    def busy(uri: str) -> None:
        raise OSError("in use")

    monkeypatch.setattr("psycho.storage.remove", busy)
    with pytest.raises(OSError, match="in use"):
        Checkpoints(str(tmp_path), "another key", 1, 60.0)._last()
    assert (tmp_path / "key").read_text() == "key"


def test_the_best_weights_are_never_written_over(one_rank: None, tmp_path: Path) -> None:
    """A step that is done again after a crash has a folder of its own: what is named is whole at any moment."""
    best, saved = Best(str(tmp_path), 1), []

    def save(folder: str) -> None:
        assert not Path(folder).exists()
        Path(folder).mkdir()
        saved.append(folder)

    for loss in (0.5, 0.4, 0.45):
        best.offer(loss, 3, save)
    assert len(saved) == 2 and best_folder(str(tmp_path)) == saved[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["best.json", Path(saved[1]).name])


def test_an_error_of_the_writing_thread_is_raised(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(shard: Any, file: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("psycho.training.checkpoint._write", full)
    training = BASE.model_copy(update={"checkpoint_every_steps": 2})
    trainer = Trainer("sft", tiny_llama(0), SETTINGS["sft"], training, seed=0)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(trainer.groups(_rows("sft"))[0], 0, checkpoints=str(tmp_path / "checkpoints"))
    trainer.close()


def test_a_checkpoint_of_other_data_is_not_gone_on_from(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    training = BASE.model_copy(update={"checkpoint_every_steps": 2})
    steps = []
    for rows in (_rows("sft"), _rows("sft")[::-1], _rows("sft")[::-1]):
        trainer = Trainer("sft", tiny_llama(0), SETTINGS["sft"], training, seed=0)
        seen: list[float] = []
        trainer.fit(
            trainer.groups(rows)[0], 0, lambda r, t, s, to=seen: to.append(s["step"]), checkpoints=str(tmp_path)
        )
        trainer.close()
        steps.append(len(seen))
    assert steps[0] == steps[1] > steps[2]


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_lora_trains_little_and_saves_a_plain_model(
    kind: str, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """The first DPO loss is ln 2 without a copy of the base; what is saved loads without peft and answers alike."""
    training = BASE.model_copy(update={"lora": LoRAConfig(r=4, alpha=8), "zero_stage": 2})
    settings = SETTINGS[kind].model_copy(update={"lr": 5e-3, **({"nll_weight": 0.0} if kind == "dpo" else {})})
    trainer = Trainer(kind, tiny_llama(0), settings, training, seed=0)
    groups, _ = trainer.groups(_rows(kind))
    history = trainer.fit(groups, seed=0)
    batch = padded(groups, 0)
    trainer.engine.eval()
    with torch.no_grad():
        expected = trainer.engine(batch)
    trainer.save(str(tmp_path / "out"))
    trainer.close()
    if kind == "dpo":
        assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert history[-1]["loss"] < history[0]["loss"]
    auto = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path / "out")
    names = _weights(tmp_path / "out").keys()
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    with torch.no_grad():
        torch.testing.assert_close(trainer.objective.wrap(loaded)(batch), expected, atol=1e-4, rtol=1e-4)


def test_rows_over_the_maximal_length_are_named(one_rank: None, tiny_llama: Callable[..., str]) -> None:
    """A pair is as long as its longer side."""
    trainer = Trainer("dpo", tiny_llama(0), SETTINGS["dpo"], BASE.model_copy(update={"max_length": 32}), seed=0)
    rows = _rows("dpo", 4)
    rows[1] = rows[1] | {"rejected": "I see. " * 30}
    rows[3] = rows[3] | {"chosen": "I see. " * 30}
    kept, too_long = trainer.groups(rows)
    trainer.close()
    assert too_long == [1, 3]
    assert sum(group.count for group in kept) == 2


def test_write_history_reads_back(tmp_path: Path) -> None:
    write_history(str(tmp_path / "out"), [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}])
    assert read_history(str(tmp_path / "out")) == [{"step": 0, "loss": 0.5}, {"step": 1, "loss": 0.25}]


# Under Ray Train: starting a group is what costs, so each of these starts one and asks all it can of it.

LONG_TALK = [{"role": "user", "content": "I feel lost. " * 60}, {"role": "assistant", "content": "Oh."}]


def _two_jobs(root: Path, model: str, batch: int = 4) -> list[TrainJob]:
    """SFT and then DPO from its result, in three steps of about 4."""
    rows = _rows("sft")
    rows.insert(5, {"id": "long", "messages": json.dumps(LONG_TALK)})
    storage.write_table(pa.Table.from_pylist(rows), str(root / "data" / "sft"))
    storage.write_table(pa.Table.from_pylist(_rows("dpo")), str(root / "data" / "dpo"))
    jobs, start = [], model
    for kind in ("sft", "dpo"):
        settings = SETTINGS[kind].model_copy(update={"batch_size": batch, "epochs": 1})
        jobs.append(TrainJob(kind, start, str(root / "data" / kind), str(root / kind), settings, seed=0, name=kind))
        start = str(root / kind)
    return jobs


def _here(jobs: list[TrainJob]) -> None:
    """The same jobs by the rank in this process."""
    for job in jobs:
        trainer = Trainer(job.kind, job.model, job.settings, BASE, job.seed)
        groups, _ = trainer.groups(read_rows(job.data))
        history = trainer.fit(groups, job.seed)
        trainer.save(job.output)
        write_history(job.output, history)
        trainer.close()


def _check_two_workers(stage: int, model: str, tmp_path: Path) -> None:
    jobs = _two_jobs(tmp_path / "two", model)
    train(
        jobs,
        BASE.model_copy(update={"workers": 2, "zero_stage": stage, "bin_tokens": 128, "max_length": 64}),
        None,
        str(tmp_path / "two" / "ray"),
    )
    expected = _two_jobs(tmp_path / "one", model)
    _here(expected)
    for ours, theirs in zip(jobs, expected, strict=True):
        _assert_same(_weights(ours.output), _weights(theirs.output), 1e-4)
        _assert_histories(read_history(ours.output), read_history(theirs.output))
    assert _distance(_weights(jobs[0].output), _weights(jobs[1].output)) > 1e-4
    assert json.loads(Path(jobs[0].output, "too_long.json").read_text()) == [5]
    assert json.loads(Path(jobs[1].output, "too_long.json").read_text()) == []
    assert not Path(tmp_path / "two" / "ray").exists()


def _assert_histories(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) > 1
    for mine, other in zip(ours, theirs, strict=True):
        assert _steady(mine) == pytest.approx(_steady(other), abs=1e-3)


def test_two_workers_are_one(one_rank: None, local_ray: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """Weights and statistics, where a batch does not divide and a rank is left with an empty micro-step."""
    _check_two_workers(2, tiny_llama(0), tmp_path)


@pytest.mark.slow
def test_two_workers_are_one_under_zero_3(
    one_rank: None, local_ray: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    _check_two_workers(3, tiny_llama(0), tmp_path)


def test_a_workers_error_is_named(local_ray: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """One rank's own error, not the connection that the other rank loses by it."""
    storage.write_table(pa.Table.from_pylist([{"id": "0", "speech": "no such column"}]), str(tmp_path / "data"))
    job = TrainJob("sft", tiny_llama(0), str(tmp_path / "data"), str(tmp_path / "out"), SETTINGS["sft"], seed=0)
    with pytest.raises(StageFailed, match=r"KeyError: 'messages'"):
        train([job], BASE.model_copy(update={"workers": 2}), None, str(tmp_path / "ray"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ray").exists()


class _RanksFailed(Exception):
    """As Ray Train's: one exception a rank."""

    def __init__(self, worker_failures: dict[int, BaseException]) -> None:
        super().__init__(
            "Training failed due to worker errors:\n[Error on rank 0]\n[Error on rank 1]: Connection closed"
        )
        self.worker_failures = worker_failures


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("own", "expected", "sentence"),
    [
        (ValueError("row 3 is odd\nand more"), StageFailed, "ValueError: row 3 is odd$"),
        (BadInput("model x has no chat template"), BadInput, "^training of the policy: model x has no chat template$"),
        (OSError(28, "No space left on device"), BadInput, "disk is full"),
    ],
)
def test_the_rank_that_failed_first_is_named(
    rank: int,
    own: Exception,
    expected: type[Exception],
    sentence: str,
    local_ray: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Whichever rank it was: the other only says that its connection was lost."""
    from ray.train.torch import TorchTrainer

    lost = RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer")

    def fail(self: Any) -> None:
        raise _RanksFailed({rank: own, 1 - rank: lost})

    monkeypatch.setattr(TorchTrainer, "fit", fail)
    with pytest.raises(expected, match=sentence):
        train([], BASE, None, str(tmp_path / "ray"))


def test_more_workers_than_the_cluster_holds_are_refused(local_ray: None, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"asks for 4\.5 CPU .*lower training\.workers"):
        train([], BASE.model_copy(update={"workers": 9}), None, str(tmp_path / "ray"))
    with pytest.raises(BadInput, match="1 GPU"):
        train([], BASE.model_copy(update={"gpus_per_worker": 1}), None, str(tmp_path / "ray"))


def test_workers_that_do_not_come_are_not_waited_for_for_ever(local_ray: None, tmp_path: Path) -> None:
    """The CPUs are there and taken: Ray Train by itself would ask for ever."""
    import ray

    holder = ray.remote(num_cpus=4)(_Holder).remote()
    ray.get(holder.here.remote())
    try:
        with pytest.raises(StageFailed, match="timed out"):
            train([], BASE.model_copy(update={"start_timeout_s": 0.5}), None, str(tmp_path / "ray"))
    finally:
        ray.kill(holder)


class _Holder:
    """Holds CPUs."""

    def here(self) -> bool:
        return True
