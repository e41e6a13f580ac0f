"""The loop of rounds on one rank: a real trainer, and engines that read with transformers and answer from a table."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from psycho import storage
from psycho.config import Config, LoRAConfig, OnlineConfig, TrainingConfig
from psycho.errors import BadInput, StageFailed
from psycho.inference.models import local_model
from psycho.inference.pool import Begun
from psycho.inference.worker import Completion
from psycho.training.launch import read_history
from psycho.training.loop import Trainer
from psycho.training.online import heldout, watch
from psycho.training.online.drawn import Drawn
from psycho.training.online.engines import Engines
from psycho.training.online.rollout import Rollout
from psycho.training.online.rounds import OnlineJob, Rounds
from psycho.training.online.state import RoundStore
from ray_jobs.train_online import _result
from tests.training.online_pools import ScoringPool, in_chunks

TRAINING = TrainingConfig(
    workers=1,
    cpus_per_worker=0.5,
    gpus_per_worker=0,
    device="cpu",
    precision="fp32",
    zero_stage=0,
    threads_per_worker=1,
    max_length=256,
    bin_tokens=2048,
)
SPEECHES = [{"speech_id": f"s{n}", "question": f"I cannot sleep since {n} days. What is it?"} for n in range(6)]
WORDS = ("That sounds hard.", "You carry a lot.", "What helps you?", "Cheer up.", "I hear you.", "Tell me more.")


class Lost(Exception):
    """What a test raises where it interrupts the job."""


class Pool(ScoringPool):
    """Answers by seed, scores by the text, reads with transformers; `break_at` is called with the name of each call."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.break_at: Callable[[str], None] = lambda name: None
        self.given_up = threading.Event()

    def _note(self, name: str, model: str) -> None:
        self.asked.append((name, Path(model).parent.name if Path(model).name == "policy" else "first"))
        self.break_at(name)

    def use(self, model: str, runner: str = "generate") -> None:
        self._note("use", model)

    def sample(
        self, model: str, prompts: Any, seeds: Sequence[int], sampling: Any, reporter: Any, also: Any
    ) -> list[Completion]:
        self._note("sample", model)
        texts = [" ".join(WORDS[seed // 6**turn % 6] for turn in range(2 + seed % 3)) for seed in seeds]
        return in_chunks([Completion(text=text, output_tokens=8) for text in texts], also)

    def classifying(self, model: str, reporter: Any) -> Begun:
        begun = super().classifying(model, reporter)

        def finish() -> dict[int, list[Any]]:
            self._note("reward", model)
            return begun.finish()

        return Begun(begun.add, finish)

    def classify(self, model: str, conversations: Any) -> list[list[float] | None]:
        texts = [talk[-1]["content"] for talk in conversations]
        return [[text.count("hear") + text.count("What") - text.count("Cheer") + len(text) / 1000] for text in texts]

    def sleep(self, level: int) -> None:
        self._note(f"sleep {level}", "")

    def wake(self, tags: list[str] | None = None) -> None:
        self._note(f"wake {tags or 'all'}", "")

    def read(self, model: str, rows: Sequence[list[int]]) -> list[list[float]]:
        self._note("read", model)
        policy = AutoModelForCausalLM.from_pretrained(local_model(model)).eval()
        with torch.no_grad():
            logits = [policy(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
        return [
            found[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()
            for found, row in zip(logits, rows, strict=True)
        ]

    def read_by_each(self, model: str, rows: Sequence[list[int]]) -> list[list[list[float]]]:
        return [self.read(model, rows)]


pytestmark = pytest.mark.usefixtures("one_rank")


class Tried:
    """One job below a folder, which may be tried again."""

    def __init__(self, root: Path | str, policy: str, dev: int = 0, training: TrainingConfig = TRAINING, **online: Any):
        settings = {"rounds": 2, "speeches_per_round": 4, "samples_per_speech": 4, "lr": 1e-3, "batch_size": 2}
        self.root, self.policy, self.dev = root, policy, dev
        share = 0.5 if dev else 0.0
        engine = {"dtype": "float32"}
        config = {
            "seed": 5,
            "inference": {"engine": engine},
            "online": OnlineConfig(**(settings | {"probes": 2} | online)),
            "training": training,
        }
        self.config = Config.model_validate(config | {"pairs": {"dev_share": share}})
        self.pool = Pool()
        self.history: list[dict[str, float]] = []

    def __call__(self, reporter: Any = None) -> Rounds:
        engines: Any = Engines(self.pool, self.pool, None, "reward")  # type: ignore[arg-type]
        rollout = Rollout(engines, self.config, reporter)
        work, output = storage.join(str(self.root), "rounds"), self.output
        train, dev = SPEECHES[self.dev :], SPEECHES[: self.dev]
        rounds = Rounds(OnlineJob(self.config, self.config.training, self.policy, work, output, train, dev, rollout))
        try:
            rounds.run()
        finally:
            # No thread outlives its try: transformers swaps methods of its classes while it loads, for all threads, and
            # one that loads a policy here beside the next test's trainer leaves that with weights that are not tied.
            self.pool.given_up.set()
            rounds.threads.shutdown(wait=True)
            rounds.trainer.close()
        return rounds

    @property
    def output(self) -> str:
        return storage.join(str(self.root), "online")

    @property
    def reports(self) -> list[dict[str, Any]]:
        return list(json.loads(storage.read_text(f"{self.output}/rounds.json") or ""))

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(f"{local_model(self.output)}/model.safetensors")

    @property
    def losses(self) -> list[list[float]]:
        rows = read_history(self.output)
        return [[row["loss"] for row in rows if row["round"] == number] for number in range(self.config.online.rounds)]


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(tiny_llama: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Tried:
    """Two rounds without an interruption."""
    tried = Tried(tmp_path_factory.mktemp("whole"), tiny_llama(0))
    tried()
    return tried


def test_rounds_are_reported_whole(whole: Tried) -> None:
    assert [report["round"] for report in whole.reports] == [0, 1]
    for report in whole.reports:
        assert (report["samples"], report["failed"], report["policy"]) == (16, 0, report["round"])
        assert 0 < report["pairs"] <= 4 and 0 <= report["sync_error"] <= 1e-4
        assert report["mean_score"] <= report["best_score"] and report["spread"] > 0 and report["entropy"] > 0
        assert report["too_long"] == 0
        seconds = report["seconds"]
        parts = ("sampling", "scoring", "training", "sync", "checkpoint", "watch", "waiting")
        assert all(seconds[part] >= 0 for part in parts)
        assert sum(v for k, v in seconds.items() if k != "wall") == pytest.approx(seconds["wall"], abs=0.02)
    assert "start" in whole.reports[0]["seconds"] and "start" not in whole.reports[1]["seconds"]
    assert whole.reports[0]["kl"] == 0.0 and whole.reports[1]["kl"] != 0.0
    assert [report.get("chosen") for report in whole.reports] == [None, True]


def test_a_round_starts_where_the_policy_is_its_own_reference(whole: Tried) -> None:
    assert [losses[0] for losses in whole.losses] == [pytest.approx(math.log(2), abs=1e-5)] * 2
    assert all(losses[-1] != losses[0] for losses in whole.losses)


def test_a_fixed_reference_is_that_of_the_first_round(whole: Tried, tmp_path: Path) -> None:
    tried = Tried(tmp_path, whole.policy, reference="fixed")
    tried()
    assert tried.losses[0] == pytest.approx(whole.losses[0], abs=1e-6)  # where both are the same
    assert abs(tried.losses[1][0] - math.log(2)) > 1e-3


def test_the_next_round_is_sampled_by_the_policy_before_where_it_may_be_stale(whole: Tried, tmp_path: Path) -> None:
    tried = Tried(tmp_path, whole.policy, staleness=1, rounds=3, kl_samples=0)
    tried()
    assert [model for name, model in tried.pool.asked if name == "sample"] == ["first", "first", "trained-1"]
    assert [report["policy"] for report in tried.reports] == [0, 0, 1]
    fresh = Tried(tmp_path / "fresh", whole.policy, rounds=3, kl_samples=0)
    fresh()
    assert [model for name, model in fresh.pool.asked if name == "sample"] == ["first", "trained-1", "trained-2"]


# Interrupted


def _break_call(tried: Tried, name: str, turn: int) -> None:
    """The turn-th call of that name fails."""
    seen = [0]

    def fail(called: str) -> None:
        seen[0] += called == name
        if called == name and seen[0] == turn:
            raise Lost

    tried.pool.break_at = fail


def _lose(tried: Tried, name: str, turn: int) -> None:
    """A try that ends there."""
    _break_call(tried, name, turn)
    with pytest.raises(StageFailed, match="Lost"):
        tried()
    tried.pool.break_at = lambda name: None


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(
    ("call", "turn"),
    [("use", 1), ("read", 1), ("sample", 1), ("reward", 1), ("read", 3), ("sample", 2), ("reward", 2), ("read", 5)],
)
def test_a_rerun_goes_on_from_the_last_half(
    whole: Tried, tmp_path: Path, call: str, turn: int, staleness: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call of an engine fails: no half is done twice, and the result is that of an uninterrupted run."""
    settings = {"staleness": staleness, "rounds": 2}
    if staleness:
        other = Tried(tmp_path / "whole", whole.policy, **settings)
        other()
    else:
        other = whole
    trained: list[list[str]] = []
    fit = Trainer.fit

    def noted(self: Any, groups: Any, *args: Any, **kwargs: Any) -> Any:
        history = fit(self, groups, *args, **kwargs)
        trained.append(sorted(str(group.prompt) for group in groups))
        return history

    monkeypatch.setattr(Trainer, "fit", noted)
    tried = Tried(tmp_path / "broken", whole.policy, **settings)
    _lose(tried, call, turn)
    tried()
    assert _same(tried.weights, other.weights)
    assert tried.losses == other.losses
    assert all(report["sync_error"] <= 1e-4 for report in tried.reports)
    assert len(trained) == 2  # each round once
    drawn = sum(name == "reward" for name, _ in tried.pool.asked)
    assert drawn - 2 <= (call in ("reward", "read"))  # of the half that was interrupted alone


def test_samples_that_do_not_come_end_the_wait(whole: Tried, tmp_path: Path) -> None:
    tried = Tried(tmp_path, whole.policy, round_timeout_s=0.2)
    ended: list[bool] = []
    tried.pool.break_at = lambda name: ended.append(tried.pool.given_up.wait(60)) if name == "sample" else None
    with pytest.raises(StageFailed, match=r"the samples of round 1 and gave up; raise online.round_timeout_s"):
        tried()
    assert ended == [True]  # not before the job had given up


def test_what_an_earlier_try_left_is_cleared(whole: Tried, tmp_path: Path) -> None:
    """A half that was being replaced, and a model that was there already."""
    tried = Tried(tmp_path, whole.policy)
    left = tmp_path / "rounds" / "trained-1.0123.old"
    for folder in (left / "policy", tmp_path / "online" / "older"):
        folder.mkdir(parents=True)
    tried()
    assert not left.exists() and not (tmp_path / "online" / "older").exists()
    assert _same(tried.weights, whole.weights)


def test_a_training_that_is_interrupted_starts_from_the_rounds_beginning(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(tmp_path, whole.policy)
    fit, turn = Trainer.fit, [0]

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        history = fit(self, *args, **kwargs)
        turn[0] += 1
        if turn[0] == 2:
            raise Lost
        return history

    monkeypatch.setattr(Trainer, "fit", dies)
    with pytest.raises(Lost):
        tried()
    sampled = len(tried.pool.asked)
    tried()
    assert "sample" not in {name for name, _ in tried.pool.asked[sampled:]}
    assert _same(tried.weights, whole.weights)


def test_adapters_go_on_too(whole: Tried, tmp_path: Path) -> None:
    """LoRA: the engines get merged weights, the trainer its adapters back."""
    lora = TRAINING.model_copy(update={"lora": LoRAConfig(r=4, alpha=8)})
    other = Tried(tmp_path / "whole", whole.policy, training=lora)
    other()
    tried = Tried(tmp_path / "broken", whole.policy, training=lora)
    _lose(tried, "sample", 2)
    tried()
    assert _same(tried.weights, other.weights) and not _same(tried.weights, whole.weights)


@pytest.mark.parametrize("change", [{}, {"zero_stage": 2}])
def test_adapters_are_never_added_to_what_they_are_merged_into(
    whole: Tried, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Lost between two steps of the second round, by a checkpoint that holds the adapters of both rounds."""
    lora = TRAINING.model_copy(update={"lora": LoRAConfig(r=4, alpha=8), "checkpoint_every_steps": 1})
    other = Tried(tmp_path / "whole", whole.policy, training=lora)
    other()
    tried = Tried(tmp_path / "broken", whole.policy, training=lora)
    said: list[str] = []

    def add(rows: int, tokens: int, note: str = "") -> None:
        said.append(note)
        if sum(note.startswith("round 2 loss") for note in said) == 2:
            raise Lost

    with pytest.raises(Lost):
        tried(SimpleNamespace(add=add))
    changed = Tried(tmp_path / "broken", whole.policy, training=lora.model_copy(update=change))
    changed()
    name = "model.layers.0.self_attn.q_proj.weight"
    first = Tried(tmp_path / "first", whole.policy, training=lora, rounds=1)
    first()
    update = first.weights[name] - load_file(Path(whole.policy, "model.safetensors"))[name]
    apart = changed.weights[name] - other.weights[name]
    along = (apart * update).sum() / update.norm() ** 2  # 1: the first round's adapters are there twice
    assert update.norm() > 0 and along.abs() < (0.3 if change else 1e-6)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, alpha=8.0)])
@pytest.mark.parametrize("turn", [2, 1])
def test_rounds_on_an_object_store_are_those_on_disk(
    whole: Tried, tmp_path: Path, bucket: Any, cache: Path, monkeypatch: pytest.MonkeyPatch, turn: int,
    lora: LoRAConfig | None,
) -> None:  # fmt: skip
    """Lost in the second round, or while the first was proven; the disk has copies of what is still asked for."""
    training = TRAINING.model_copy(update={"lora": lora, "checkpoint_every_steps": 1})
    here = Tried(tmp_path / "here", whole.policy, training=training)
    here()
    monkeypatch.chdir(tmp_path)  # a path that took `s3:` for a folder would be below it
    there = Tried(f"{bucket.uri}/run", f"{bucket.uri}/first", training=training)
    storage.copy_dir(whole.policy, there.policy)
    _lose(there, "sample" if turn == 2 else "read", 2 if turn == 2 else 3)
    half = storage.join(str(there.root), "rounds", "trained-1")
    assert storage.exists(f"{half}/report.json") and storage.listing(f"{half}/optimizer")
    there()
    assert _same(there.weights, here.weights) and there.losses == here.losses
    RoundStore(f"{there.root}/rounds").evidence(f"{there.root}/kept")
    assert storage.parquet_sizes(f"{there.root}/kept").keys() == {
        f"{name}/round-00{number}.parquet" for name in ("samples", "pairs") for number in range(2)
    }
    assert {path.name for path in tmp_path.iterdir()} == {"here", "cache"}
    assert not list((cache / "tmp").iterdir())
    copies = [path for path in (cache / "models").iterdir() if path.is_dir()]
    # The first policy and the last two, the optimizer and the checkpoint that were gone on with, and the result.
    assert len(copies) <= 3 + 2 + 1


def test_a_half_on_an_object_store_that_was_cut_short_is_nothing(bucket: Any) -> None:
    """Nothing can be renamed there: files of a half come one by one, its report last."""
    rounds = RoundStore(f"{bucket.uri}/rounds")
    for name in ("sampled-0", "trained-1"):
        storage.write_text(storage.join(rounds.aside(name), "policy", "model.safetensors"), "half")
    assert rounds.trained() == 0 and not rounds.has_sampled(0)
    rounds.keep_trained(1, rounds.aside("trained-1"), {"history": []})
    assert rounds.trained() == 1
    rounds.tidy()
    assert storage.names(f"{bucket.uri}/rounds") == ["trained-1"]


def test_a_policy_that_is_doubted_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while its many files are removed, which takes its time: the next try does not find it."""
    rounds = RoundStore(str(tmp_path))
    for index in (1, 2):
        folder = rounds.aside(f"trained-{index}")
        storage.write_text(storage.join(folder, "optimizer", "state"), "state")
        rounds.keep_trained(index, folder, {})
    remove = storage.remove

    def killed(uri: str) -> None:
        if uri.endswith("trained-2"):
            raise Lost
        remove(uri)

    monkeypatch.setattr(storage, "remove", killed)
    with pytest.raises(Lost):
        rounds.doubt(2)
    assert rounds.trained() == 1


def test_half_a_half_is_nothing(whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut while a half is written: what lies about is removed and written again."""
    tried = Tried(tmp_path, whole.policy)
    keep = RoundStore.keep_trained

    def cut(self: Any, *args: Any) -> None:
        raise Lost

    monkeypatch.setattr(RoundStore, "keep_trained", cut)
    with pytest.raises(StageFailed, match="Lost"):
        tried()
    assert list((tmp_path / "rounds").glob(".unfinished-*"))
    monkeypatch.setattr(RoundStore, "keep_trained", keep)
    tried()
    assert not list((tmp_path / "rounds").glob(".unfinished-*"))
    assert _same(tried.weights, whole.weights)


def test_samples_and_pairs_of_every_round_stay_as_evidence(whole: Tried, tmp_path: Path) -> None:
    RoundStore(str(whole.root / "rounds")).evidence(str(tmp_path))
    for number, report in enumerate(whole.reports):
        samples, pairs = (pq.read_table(tmp_path / n / f"round-{number:03d}.parquet") for n in ("samples", "pairs"))
        assert samples.equals(pq.read_table(whole.root / "rounds" / f"sampled-{number}" / "samples.parquet"))
        assert pairs.num_rows == report["pairs"] and set(pairs["chosen"].to_pylist()) <= set(
            samples["response"].to_pylist()
        )


def test_samples_of_every_round_are_on_disk_with_their_scores(whole: Tried) -> None:
    for number in range(2):
        rows = pq.read_table(whole.root / "rounds" / f"sampled-{number}" / "samples.parquet").to_pylist()
        assert len({(row["speech_id"], row["sample"]) for row in rows}) == len(rows) == 16
        assert all(row["value"] == row["score"] == row["reward"] for row in rows)


# Proof


def test_an_engine_that_keeps_its_weights_stops_the_round_whatever_the_tolerance(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(tmp_path, whole.policy, sync_tolerance=100.0)
    read = tried.pool.read
    monkeypatch.setattr(tried.pool, "read", lambda model, rows: read(whole.policy, rows))
    with pytest.raises(StageFailed, match=r"engine 0 did not take the new weights: .* moved by 0 "):
        tried()


def test_an_optimizer_of_other_workers_is_not_gone_on_with_and_said(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(tmp_path, whole.policy)
    _lose(tried, "sample", 2)
    report = tmp_path / "rounds" / "trained-1" / "report.json"
    found = json.loads(report.read_text())
    report.write_text(json.dumps(found | {"shards": found["shards"] | {"world": 3}}))
    tried()
    assert "the optimizer started anew after round 1" in (tmp_path / "online" / "notes.json").read_text()
    assert not (whole.root / "online" / "notes.json").exists()
    assert not _same(tried.weights, whole.weights)


@pytest.mark.parametrize("change", [0.02, float("nan")])
def test_a_tensor_that_is_not_the_trainers_stops_the_round(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    tried = Tried(tmp_path, whole.policy)
    save = Trainer.save

    def corrupted(self: Any, folder: str) -> None:
        save(self, folder)
        file = Path(folder, "model.safetensors")
        weights = load_file(file)
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] += change
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(Trainer, "save", corrupted)
    with pytest.raises(StageFailed, match=r"does not hold the trainer's weights.*the same command again.* report it$"):
        tried()
    # What is on disk is not what was trained: it is no half to go on from, whoever goes on.
    assert not (tmp_path / "rounds" / "trained-1").exists() and (tmp_path / "rounds" / "sampled-0").exists()
    monkeypatch.setattr(Trainer, "save", save)
    tried()
    assert _same(tried.weights, whole.weights)


def test_weights_that_were_sent_and_are_not_the_trainers_have_another_way(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wire:
        def send(self, policy: str, before: str) -> None:
            tried.pool.read = lambda model, rows: [[value + 1 for value in row] for row in read(model, rows)]

    tried = Tried(tmp_path, whole.policy)
    read = tried.pool.read
    monkeypatch.setattr("psycho.training.online.rounds.transport", lambda *arguments: Wire())
    with pytest.raises(StageFailed, match=r"does not hold the trainer's weights.* set online.transport=disk$"):
        tried()


def test_a_policy_that_was_proven_once_stays_where_an_engine_fails_later(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = Tried(tmp_path, whole.policy)
    _lose(tried, "sample", 2)
    read = tried.pool.read
    monkeypatch.setattr(tried.pool, "read", lambda model, rows: read(whole.policy, rows))
    with pytest.raises(StageFailed, match="does not hold the trainer's weights"):
        tried()
    assert (tmp_path / "rounds" / "trained-1" / "policy").is_dir()


def test_answers_that_were_drawn_are_not_asked_for_again(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost after the first of two chunks, which is the later half: the next try asks for the other."""
    tried = Tried(tmp_path, whole.policy)
    asked: list[int] = []
    sample, keep = tried.pool.sample, Drawn.keep

    def sampled(model: str, prompts: Any, seeds: Any, *others: Any) -> list[Completion]:
        asked.append(len(seeds))
        return sample(model, prompts, seeds, *others)

    def kept(self: Drawn, places: Any, completions: Any) -> None:
        keep(self, places, completions)
        raise Lost

    monkeypatch.setattr(tried.pool, "sample", sampled)
    monkeypatch.setattr(Drawn, "keep", kept)
    with pytest.raises(StageFailed, match="Lost"):
        tried()
    monkeypatch.setattr(Drawn, "keep", keep)
    tried()
    assert asked == [16, 8, 16] and _same(tried.weights, whole.weights)
    assert not list((tmp_path / "rounds").glob("sampling-*"))
    for number in range(2):
        found = [
            pq.read_table(root / "rounds" / f"sampled-{number}" / "samples.parquet") for root in (tmp_path, whole.root)
        ]
        assert found[0].equals(found[1])


def test_a_round_without_a_pair_is_not_sampled_again(whole: Tried, tmp_path: Path) -> None:
    tried = Tried(tmp_path, whole.policy, min_gap=100.0)
    for _ in range(2):
        with pytest.raises(
            BadInput, match=r"round 1 made no pair: of 4 speeches, in 4 no gap reaches.*; lower online.min_gap$"
        ):
            tried()
    assert [name for name, _ in tried.pool.asked].count("sample") == 1


def test_pairs_that_are_all_too_long_are_said(whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried(tmp_path, whole.policy)
    sample = tried.pool.sample

    def long(*arguments: Any) -> list[Completion]:
        completions = sample(*arguments[:-1], None)
        return in_chunks([replace(done, text=done.text * 40) for done in completions], arguments[-1])

    monkeypatch.setattr(tried.pool, "sample", long)
    with pytest.raises(BadInput, match=r"every pair of round 1 is over training.max_length 256; raise it"):
        tried()


# Dev score


def _score_dev(monkeypatch: pytest.MonkeyPatch, scores: Sequence[float]) -> None:
    left = iter(scores)
    answer = {"response": "a", "output_tokens": 3, "judge_tokens": 2}
    monkeypatch.setattr(Rollout, "dev", lambda self, policy, speeches: [answer | {"value": next(left)}])


def test_the_policy_with_the_best_dev_score_is_kept(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _score_dev(monkeypatch, [0.5, 1.0, 3.0, 2.0])
    tried = Tried(tmp_path, whole.policy, dev=2, rounds=3)
    tried()
    assert [report["dev_score"] for report in tried.reports] == [1.0, 3.0, 2.0]
    assert [bool(report.get("chosen")) for report in tried.reports] == [False, True, False]
    kept = tmp_path / "rounds" / "trained-2" / "policy" / "model.safetensors"
    assert _same(tried.weights, load_file(kept))
    assert not (tmp_path / "rounds" / "trained-1" / "policy").exists()


def test_it_stops_when_the_dev_score_has_not_risen_for_so_long(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _score_dev(monkeypatch, [0.5, 1.0, 0.9, 0.8])
    tried = Tried(tmp_path, whole.policy, dev=2, rounds=6, patience=2)
    tried()
    assert len(tried.reports) == 3 and tried.reports[0]["chosen"]
    assert [report["dev_tokens"] for report in [tried.reports[0]["before"], *tried.reports]] == [5] * 4
    assert not (tmp_path / "online" / "notes.json").exists()


def test_what_was_sampled_ahead_of_an_early_stop_is_counted_and_kept(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _score_dev(monkeypatch, [2.0, 1.0, 1.0])
    tried = Tried(tmp_path, whole.policy, dev=2, rounds=6, patience=1, staleness=1)
    tried()
    assert len(tried.reports) == 1 and tried.reports[0]["dropped"]["samples"] == 16
    result = _result(tried.output)
    assert result.rows_in == 32 and result.rows_in == result.rows_out + len(result.quarantine)
    RoundStore(str(tmp_path / "rounds")).evidence(str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept" / "samples").iterdir())) == 2


def test_what_was_cut_off_says_nothing_of_the_divergence(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To its tokens an end would be added that the policy never said."""
    tried = Tried(tmp_path, whole.policy, rounds=1)
    sample = tried.pool.sample

    def cut(*args: Any) -> list[Completion]:
        answers = [replace(answer, finish_reason="length") for answer in sample(*args[:-1], None)]
        return in_chunks(answers[:1] + sample(*args[:-1], None)[1:], args[-1])

    assert "kl" in whole.reports[0] and whole.config.online.kl_samples >= 4
    monkeypatch.setattr(tried.pool, "sample", cut)
    read: list[int] = []
    divergence = watch.divergence

    def counted(pool: Any, tokenizer: Any, policy: str, first: str, texts: Any) -> dict[str, float]:
        read.append(len(texts))
        return divergence(pool, tokenizer, policy, first, texts)

    monkeypatch.setattr(watch, "divergence", counted)
    tried()
    assert read == [3]  # of four speeches


def test_rounds_that_only_made_it_worse_say_so(whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _score_dev(monkeypatch, [2.0, 1.0, 1.5])
    tried = Tried(tmp_path, whole.policy, dev=2)
    tried()
    (note,) = json.loads((tmp_path / "online" / "notes.json").read_text())
    assert note.startswith("no round was better by the dev score than the policy before the first (1.500 after round 2")


def test_the_held_out_judge_is_asked_about_the_policy_that_is_kept(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it was not its turn."""
    asked: list[int] = []
    drawn: list[str] = []
    scores = {"first": 0.5, "trained-1": 3.0, "trained-2": 1.0}
    answer = {"response": "a", "output_tokens": 3, "judge_tokens": 2}

    def dev(self: Any, policy: str, speeches: Any) -> list[dict[str, Any]]:
        drawn.append(Path(policy).parent.name if Path(policy).name == "policy" else "first")
        return [answer | {"value": scores[drawn[-1]]}]

    def opinion(engines: Any, config: Any, speeches: Any, rows: Any, reporter: Any) -> dict[str, Any]:
        asked.append(int(rows[0]["value"]))
        return dict(zip(heldout.KEYS, (3.0, 1, 0, 10), strict=True))

    monkeypatch.setattr(Rollout, "dev", dev)
    monkeypatch.setattr(heldout, "opinion", opinion)
    tried = Tried(tmp_path, whole.policy, dev=2, gold_every=5)
    tried()
    assert drawn == ["first", "trained-1", "trained-2", "trained-1"] and asked == [0, 1, 3]
    assert tried.reports[0]["chosen"] and tried.reports[0]["gold_tokens"] == 15


def test_the_dev_score_is_the_mean_value_of_the_dev_speeches(whole: Tried, tmp_path: Path) -> None:
    tried = Tried(tmp_path, whole.policy, dev=3, rounds=1)
    tried()
    score = tried.reports[0]["dev_score"]
    assert (
        score == json.loads((tmp_path / "rounds" / "after-0.json").read_text())["dev_score"]
    )  # the seeds are the same
    rows = pq.read_table(tmp_path / "rounds" / "sampled-0" / "samples.parquet").to_pylist()
    assert not {row["speech_id"] for row in rows} & {speech["speech_id"] for speech in SPEECHES[:3]}


# Held-out judge


class _Lines:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def add(self, rows: int, tokens: int = 0, note: str = "") -> None:
        self.notes.append(note)


def test_a_held_out_judge_watches_every_few_rounds_and_chooses_nothing(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores fall while the dev score rises: they are told, and the policy of the best dev score is kept."""
    opinions = iter([4.0, 2.0, 1.0, 1.5])
    seen: list[list[Any]] = []

    def opinion(engines: Any, config: Any, speeches: Any, rows: Any, reporter: Any) -> dict[str, Any]:
        seen.append([row["response"] for row in rows])
        return dict(zip(heldout.KEYS, (next(opinions), len(rows), 0, 50), strict=True))

    monkeypatch.setattr(heldout, "opinion", opinion)
    tried = Tried(tmp_path, whole.policy, dev=2, rounds=3, gold_every=2, kl_samples=0)
    lines: Any = _Lines()
    tried(lines)
    # The policy that is kept is that of the first round here, and it is asked about last.
    assert [report["gold_score"] for report in tried.reports] == [1.5, 2.0, 1.0] and tried.reports[0]["chosen"]
    assert tried.reports[0]["before"]["gold_score"] == 4.0 and "before" not in tried.reports[1]
    assert tried.reports[1]["gold_tokens"] == 50 and tried.reports[1]["seconds"]["gold"] >= 0
    told = [line for line in lines.notes if "held-out judge" in line]
    assert [line.partition(":")[0] for line in told] == [
        "after round 0",
        "after round 2",
        "after round 3",
    ] and "2.00" in told[1]
    dev = {number: report["dev_score"] for number, report in enumerate(tried.reports, 1)}
    assert tried.reports[watch.best(dev, 3) - 1]["chosen"]
    # By the answers that the dev score was taken by: each dev speech is answered once a round, and once more last.
    assert [name for name, _ in tried.pool.asked].count("sample") == 3 + 4 + 1 and all(len(rows) == 2 for rows in seen)


def test_its_opinion_is_asked_once_where_a_job_is_resumed(
    whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def opinion(engines: Any, config: Any, speeches: Any, rows: Any, reporter: Any) -> dict[str, Any]:
        asked.append(1)
        return dict(zip(heldout.KEYS, (3.0, 2, 0, 9), strict=True))

    monkeypatch.setattr(heldout, "opinion", opinion)
    tried = Tried(tmp_path, whole.policy, dev=2, gold_every=1, kl_samples=0)
    _lose(tried, "sample", 4)  # dev, round 0, dev, round 1
    tried()
    assert len(asked) == 3 and [report["gold_score"] for report in tried.reports] == [3.0, 3.0]


# Turns on a GPU


def test_engines_sleep_while_the_policy_trains(whole: Tried, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And have their weights before their cache; the rounds come out as they do side by side."""
    tried = Tried(tmp_path, whole.policy, placement="colocate", transport="disk", kl_samples=0)
    fit, save = Trainer.fit, Trainer.save

    def fitted(self: Any, *args: Any, **kwargs: Any) -> Any:
        tried.pool.asked.append(("fit", ""))
        return fit(self, *args, **kwargs)

    def saved(self: Any, folder: str) -> None:
        tried.pool.asked.append(("save", ""))
        save(self, folder)

    monkeypatch.setattr(Trainer, "fit", fitted)
    monkeypatch.setattr(Trainer, "save", saved)
    tried()
    names = [name for name, _ in tried.pool.asked]
    a_round = [
        "sample",
        "reward",
        "sleep 2",
        "sleep 2",
        "fit",
        "save",
        "wake ['weights']",
        "wake all",
        "wake all",
        "read",
    ]
    start = ["wake all", "wake all", "use", "use", "sleep 2", "sleep 2"]
    start += ["wake all", "wake all", "use", "use", "read"]
    assert names == [*start, *a_round, *a_round]
    assert _same(tried.weights, whole.weights)
    assert all(report["gpu_gib"].keys() == {"sampling", "asleep", "trained", "awake"} for report in tried.reports)
    assert "gpu_gib" not in whole.reports[0]
