"""What a training leaves: the best weights, heads of the principles, statistics, notes. One rank, in this process."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from psycho import storage
from psycho.config import Config, DPOConfig, LoopConfig, PairsConfig, RewardConfig, TrainingConfig
from psycho.errors import BadInput
from psycho.inference.models import local_model
from psycho.training import stage
from psycho.training.checkpoint import best_folder
from psycho.training.launch import TrainJob, _train_worker, read_history
from psycho.training.loop import Trainer
from psycho.training.packing import padded

TRAINING = TrainingConfig(
    workers=1, gpus_per_worker=0, device="cpu", precision="fp32", zero_stage=2, threads_per_worker=1,
    max_length=128, bin_tokens=256, checkpoint_every_steps=1,
)  # fmt: skip
DPO = DPOConfig(lr=5e-3, batch_size=4, epochs=2, schedule="constant", warmup_share=0.0)
SPEECHES = ("My partner left and I feel lost.", "I cannot sleep.", "I drink again.", "My mother calls me every day.")


def _rows(swapped: bool = False) -> list[dict[str, Any]]:
    sides = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    texts = ("That sounds painful. What do you miss?", "Cheer up.")
    return [{"id": s, "question": s, **dict(zip(sides, texts, strict=True))} for s in SPEECHES]


def _run(root: Path | str, model: str, reporter: Any = None, dev: bool = False, **changes: Any) -> Path:
    """One job as a worker runs it; the dev pairs say the opposite, so training makes their loss worse."""
    data, opposite, out = (storage.join(str(root), name) for name in ("data", "dev", "out"))
    storage.write_table(pa.Table.from_pylist(_rows()), data)
    storage.write_table(pa.Table.from_pylist(_rows(swapped=True)), opposite)
    job = TrainJob("dpo", model, data, out, DPO, seed=0, dev=opposite if dev else None)
    training = TRAINING.model_copy(update=changes)
    _train_worker({"jobs": [job], "training": training, "reporter": reporter})
    return Path(out)


def test_the_best_weights_are_kept_by_the_dev_loss(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    out = _run(tmp_path, tiny_llama(0), dev=True)
    losses = [row["dev_loss"] for row in read_history(str(out))]
    assert len(losses) == 2
    assert losses[0] < losses[1]  # so the last weights are not the best
    trainer = Trainer("dpo", tiny_llama(0), DPO, TRAINING, seed=0)
    groups = trainer._with_references(trainer.groups(_rows(swapped=True))[0], None)
    kept = AutoModelForCausalLM.from_pretrained(out)
    trainer.engine.module.load_state_dict({f"model.{k}": v for k, v in kept.state_dict().items()})
    found = trainer._mean_loss(groups)
    trainer.close()
    assert found == pytest.approx(losses[0], abs=1e-5)
    assert not (tmp_path / "out.checkpoints").exists()


def test_without_dev_pairs_the_last_are_kept(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    out = _run(tmp_path, tiny_llama(0))
    history = read_history(str(out))
    assert "dev_loss" not in history[-1]
    assert not best_folder(str(tmp_path / "out.checkpoints"))


@pytest.mark.parametrize("dev", [False, True])
def test_a_training_on_an_object_store_is_that_on_disk(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path, bucket: Any, dev: bool, cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """From a model there to a model there, killed in between; the disk has the copy of the model and nothing else."""

    class Killed(Exception):
        pass

    here = _run(tmp_path / "here", tiny_llama(0), dev=dev)
    monkeypatch.chdir(tmp_path)  # a path that took `s3:` for a folder would be below it
    there = f"{bucket.uri}/run"
    storage.copy_dir(tiny_llama(0), f"{there}/model")
    steps: list[float] = []

    def on_step(rows: int, tokens: int, note: str) -> None:
        steps.append(tokens)
        if len(steps) == 2:
            raise Killed

    with pytest.raises(Killed):
        _run(there, f"{there}/model", SimpleNamespace(add=on_step), dev=dev)
    assert storage.names(f"{there}/out.checkpoints/step-1") == ["shard-0-of-1.pt"]
    _run(there, f"{there}/model", SimpleNamespace(add=on_step), dev=dev)
    assert len(steps) == 2 + 1  # the step whose checkpoint was not taken
    found, expected = (load_file(f"{local}/model.safetensors") for local in (local_model(f"{there}/out"), here))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert [row["loss"] for row in read_history(f"{there}/out")] == [row["loss"] for row in read_history(str(here))]
    assert not storage.names(f"{there}/out.checkpoints")
    assert {path.name for path in tmp_path.iterdir()} == {"here", "cache"}


def test_best_without_dev_pairs_is_refused(tmp_path: Path) -> None:
    config = Config(training=TRAINING.model_copy(update={"keep": "best"}), pairs=PairsConfig(dev_share=0.1))
    job: Any = SimpleNamespace(config=config, run=SimpleNamespace(path=lambda *names: str(tmp_path.joinpath(*names))))
    with pytest.raises(BadInput, match=r"training\.keep is best .* raise pairs\.dev_share or set training\.keep=last"):
        stage.dev_rows(job, stage.preference_rows)


def test_what_is_finished_is_not_trained_again(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """Where a worker is lost after that, the group starts again with all of its jobs."""
    file = _run(tmp_path, tiny_llama(0)) / "model.safetensors"
    before = file.stat()
    assert _run(tmp_path, tiny_llama(0)) == file.parent
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_checkpoint_outlives_changed_timeouts_but_not_another_loss(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """A person raises a timeout after a failure, or lowers what needs memory: what was done is not lost."""

    class Killed(Exception):
        pass

    def steps(settings: LoopConfig, training: TrainingConfig, kill: bool) -> list[float]:
        seen: list[float] = []

        def on_step(rows: int, tokens: int, statistics: dict[str, float]) -> None:
            seen.append(statistics["step"])
            if kill and len(seen) == 2:
                raise Killed

        trainer = Trainer("dpo", tiny_llama(0), settings, training, seed=0)
        with contextlib.suppress(Killed):
            trainer.fit(trainer.groups(_rows() * 2)[0], 0, on_step, checkpoints=str(tmp_path))
        trainer.close()
        return seen

    short = DPO.model_copy(update={"batch_size": 2})
    patient = TRAINING.model_copy(update={"collective_timeout_s": 3600.0, "max_failures": 3, "bin_tokens": 300})
    assert steps(short, TRAINING, kill=True) == [0, 1]
    assert steps(short, patient, kill=True)[0] == 1
    assert steps(short.model_copy(update={"beta": 0.5}), patient, kill=False)[0] == 0


def test_a_refused_model_is_said(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    reporter = SimpleNamespace(add=lambda rows, tokens, note: said.append(note))
    monkeypatch.setattr("psycho.training.loop.use_packing", lambda model: "OddForCausalLM attends in chunks")
    out = _run(tmp_path, tiny_llama(0), reporter)
    assert sum("OddForCausalLM attends in chunks" in note for note in said) == 1
    assert "OddForCausalLM" in json.loads((out / "notes.json").read_text())[0]


def test_padding_that_was_asked_for_is_no_news(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    out = _run(tmp_path, tiny_llama(0), packing=False)
    assert not (out / "notes.json").exists()


def test_the_stage_says_the_note_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def trained(jobs: list[TrainJob], *_: Any) -> None:
        Path(jobs[0].output).mkdir(parents=True)
        Path(jobs[0].output, "notes.json").write_text('["not packed: it attends in chunks"]')
        Path(jobs[0].output, "training.jsonl").write_text('{"step": 0, "tokens": 5, "dev_loss": 1}\n{"tokens": 5}\n')

    class Stage:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: Any) -> None:
            return None

    monkeypatch.setattr(stage, "train", trained)
    monkeypatch.setattr(stage, "fingerprint", lambda path: path)
    progress = SimpleNamespace(say=said.append, stage=lambda *_: Stage())
    run = SimpleNamespace(path=lambda *names: str(tmp_path.joinpath(*names)))
    job: Any = SimpleNamespace(config=Config(), run=run, progress=progress, need_ray=lambda: None)
    result = stage.train_stage(job, "dpo", "dpo", "start", _rows(), DPO, str(tmp_path / "partial"))
    assert [text for text in said if "it attends in chunks" in text] == said
    assert len(said) == 1
    assert result.extra["notes"] == ["not packed: it attends in chunks"]
    assert not (tmp_path / "partial" / "models" / "dpo" / "notes.json").exists()


def test_speed_against_the_peak_and_memory_are_there(
    one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    out = _run(tmp_path, tiny_llama(0), peak_tflops=1e-3)
    for row in read_history(str(out)):
        assert 0 < row["mfu"] < 1000
        assert 0.05 < row["memory_gib"] < 64
    without = _run(tmp_path / "other", tiny_llama(0))
    assert "mfu" not in read_history(str(without))[0]


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_principle_heads_learn_the_ratings_beside_a_plain_reward_model(
    zero_stage: int, one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    settings = RewardConfig(lr=5e-3, batch_size=4, epochs=8, principle_heads=1.0)
    rows = [
        r | {"chosen_ratings": [5, 5, 4, 4, 5, 3, math.nan], "rejected_ratings": [1, 2, 1, 2, 1, 3, 1]} for r in _rows()
    ]
    rows[-1] |= {"chosen_ratings": None, "rejected_ratings": None}  # a row of somebody else's, without ratings
    trainer = Trainer("reward", tiny_llama(0), settings, TRAINING.model_copy(update={"zero_stage": zero_stage}), seed=0)
    groups, _ = trainer.groups(rows)
    history = trainer.fit(groups, seed=0)
    trainer.save(str(tmp_path / "reward"))
    trainer.engine.eval()
    batch = trainer.collate(groups[:1])
    with torch.no_grad():
        expected = trainer.engine(batch)
    trainer.close()
    assert history[-1]["rating_error"] < 0.3 * history[0]["rating_error"]
    assert history[-1]["accuracy"] == 1.0
    model, about = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", output_loading_info=True)
    assert model.config.num_labels == 1
    assert not about["missing_keys"] and not about["unexpected_keys"]
    with safe_open(tmp_path / "reward" / "principle_heads" / "heads.safetensors", "pt") as heads:
        assert heads.metadata()["principles"].startswith("empathy,")
        state = {name: heads.get_tensor(name) for name in heads.keys()}  # noqa: SIM118 - not a dict
    again = trainer.objective.wrap(model)
    again.load_state_dict(state, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(padded(groups[:1], 0)), expected, atol=1e-4, rtol=1e-4)
    assert abs(float(expected[0, 1]) - 2) < 1.5  # a 5 is 3 + 2


def test_without_heads_nothing_is_different(one_rank: None, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    trainer = Trainer("reward", tiny_llama(0), RewardConfig(lr=1e-3, batch_size=4), TRAINING, seed=0)
    groups, _ = trainer.groups([row | {"chosen_ratings": [5] * 7, "rejected_ratings": [1] * 7} for row in _rows()])
    trainer.save(str(tmp_path / "reward"))
    trainer.close()
    assert not groups[0].ratings
    assert not (tmp_path / "reward" / "principle_heads").exists()


def test_reward_rows_hold_the_ratings_where_heads_want_them() -> None:
    from psycho.principles import STEMS

    base = {"ID": "s", "prefID": 0, "question": "q", "chosen": "a", "rejected": "b", "history": None, "gap": 1.0}
    ratings = {f"{side}_{stem}_rating": n for side, n in (("chosen", 5), ("rejected", 2)) for stem in STEMS}
    pairs = pa.Table.from_pylist([base | ratings | {"rejected_safety_rating": None}])
    plain = Config()
    with_heads = Config(training=TRAINING.model_copy(update={"reward": RewardConfig(principle_heads=0.5)}))
    assert "chosen_ratings" not in stage.reward_rows(plain, pairs)[0]
    (row,) = stage.reward_rows(with_heads, pairs)
    assert row["chosen_ratings"] == [5.0] * 7
    assert sum(map(math.isnan, row["rejected_ratings"])) == 1
