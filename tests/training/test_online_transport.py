"""New weights from the trainer into running engines, by vLLM's weight transfer with files in place of the wire."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import cloudpickle
from safetensors.torch import load_file, save_file

from psycho.config import Config, DPOConfig, InferenceConfig, SamplingConfig, TrainingConfig
from psycho.errors import StageFailed
from psycho.inference import pool as pools
from psycho.inference.pool import WorkerPool
from psycho.training.loop import Trainer
from psycho.training.online import proof
from psycho.training.online.engines import Engines
from psycho.training.online.transport import (
    DirectTransport,
    DiskTransport,
    PoolClient,
    as_source,
    bucket_bytes,
    transport,
)
from psycho.training.online.weights import WeightStream

_spec = importlib.util.spec_from_file_location("online_files", Path(__file__).with_name("online_files.py"))
assert _spec and _spec.loader
files = importlib.util.module_from_spec(_spec)
sys.modules["online_files"] = files
_spec.loader.exec_module(files)

TRAINING = TrainingConfig(
    workers=1, device="cpu", precision="fp32", zero_stage=0, threads_per_worker=1, max_length=256, bin_tokens=1024
)
ROWS = [{"question": f"Why {n}?", "chosen": "What helps you?", "rejected": f"Cheer up. {'No. ' * n}"} for n in range(3)]
SPEECHES = [{"speech_id": f"s{n}", "question": f"I have not slept for {n} nights. Why?"} for n in range(3)]
TALKS = [[{"role": "user", "content": speech["question"]}] for speech in SPEECHES]
WARM = SamplingConfig(temperature=1.0, max_tokens=24)

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def rollout(local_ray: None, tiny_llama: Callable[..., str]) -> Iterator[WorkerPool]:
    """Two engines that hold the first model and take weights by files."""
    cloudpickle.register_pickle_by_value(files)
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    engine = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}
    config = {"workers": 2, "cpus_per_worker": 0.5, "gpus_per_worker": 0, "env": env, "batch_size": 2}
    remote = pools.ray.remote
    # Not the class itself: pickle looks its base up by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pools.ray, "remote", lambda _: remote(files.FilesWorker))
        made = WorkerPool(InferenceConfig.model_validate(config | {"engine": engine | {"extra": files.CONFIG}}), 0)
    with made as pool:
        pool.use(tiny_llama(0))
        yield pool


@pytest.fixture
def trainer(tiny_llama: Callable[..., str]) -> Iterator[Any]:
    made = Trainer("dpo", tiny_llama(0), DPOConfig(lr=1e-2, batch_size=2), TRAINING, 0)
    yield made
    made.close()


def _said(pool: WorkerPool, policy: str) -> list[str]:
    return [answer.text for answer in pool.sample(policy, TALKS, [1, 2, 3], WARM)]


def _prove(pool: WorkerPool, trainer: Any, policy: str) -> float:
    texts = proof.probes(SPEECHES, None, trainer.tokenizer, 3, 256)
    said = proof.trainer_logprobs(trainer, texts)
    return proof.check(said, pool.read_by_each(policy, [row.ids for row in texts]), 1e-4)


def test_engines_hold_what_was_sent_and_not_what_is_on_disk(
    rollout: WorkerPool, trainer: Any, tiny_llama: Callable[..., str], tmp_path: Path
) -> None:
    """Round after round, without a restart; a dead engine comes back and is connected anew; then from disk again."""
    first, elsewhere = tiny_llama(0), tiny_llama(2)  # the folder that is named holds other weights, so it is not read
    senders: list[Any] = []

    def connect(client: Any, source: Any) -> Any:
        senders.append(files.FilesSender(client, source, tmp_path))
        return senders[-1]

    rollout.use(first)
    before = _said(rollout, first)
    way = DirectTransport(trainer, Engines(rollout), first, connect, 300)
    names = rollout.incarnations(first)
    for seed in (0, 1):
        trainer.fit(trainer.groups(ROWS)[0], seed)
        way.send(elsewhere, first)
        assert _prove(rollout, trainer, elsewhere) <= 1e-4
    assert len(senders) == 1 and rollout.incarnations(first) == names and len(set(names)) == 2
    sent = [name for bucket in senders[0].sent for name in bucket]
    assert len(senders[0].sent) > 3 and len(set(sent)) == len(sent) == len(WeightStream(trainer).shapes())
    pids = ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in rollout._actors])
    os.kill(pids[0], signal.SIGKILL)
    trainer.fit(trainer.groups(ROWS)[0], 2)
    way.send(elsewhere, first)
    assert len(senders) == 2 and _prove(rollout, trainer, elsewhere) <= 1e-4
    assert _said(rollout, first) == before


def test_half_a_transfer_is_no_model(rollout: WorkerPool, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    """Engines whose transfer broke off start anew: vLLM would go on counting at the layer that is half there."""
    first = tiny_llama(0)
    rollout.use(first)
    before, names = _said(rollout, first), rollout.incarnations(first)
    part = dict(load_file(Path(tiny_llama(2), "model.safetensors")))
    halves = {name: value for name, value in part.items() if name.endswith("layers.0.self_attn.q_proj.weight")}
    assert len(halves) == 1
    save_file(halves, tmp_path / "half.safetensors")
    client = PoolClient(rollout)
    client.init_weight_transfer_engine({"rank_offset": 1})
    client.start_weight_update()
    client.update_weights({"file": str(tmp_path / "half.safetensors")})
    with pytest.raises(Exception, match="no_such_file"):
        client.update_weights({"file": "/no_such_file.safetensors"})
    assert _said(rollout, first) == before
    assert set(names).isdisjoint(rollout.incarnations(first))


def test_on_a_cpu_the_folder_is_the_way(trainer: Any, tiny_llama: Callable[..., str]) -> None:
    config = Config.model_validate({"training": {"device": "cpu"}})
    assert isinstance(transport(config, trainer, Engines(None), tiny_llama(0)), DiskTransport)  # type: ignore[arg-type]


def test_a_bucket_holds_the_largest_weight(trainer: Any) -> None:
    source = as_source(WeightStream(trainer))
    largest = max(value.numel() * 4 for _, value in source)
    assert bucket_bytes(source, 10) == largest and bucket_bytes(source, 2**30) == 2**30
    assert [meta.name for meta in source.metadata()] == [name for name, _ in source]


class _Pool:
    """Three engines of two GPUs each."""

    gpus_per_engine = 2

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __len__(self) -> int:
        return 3

    def transfer(self, call: str, infos: Any = None) -> None:
        self.told.append((call, infos))


def test_every_engine_has_ranks_of_its_own() -> None:
    pool = _Pool()
    client = PoolClient(pool)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 1 + client.ranks})
    ((call, infos),) = pool.told
    assert call == "init_weight_transfer_engine"
    assert [info["init_info"] for info in infos] == [{"rank_offset": rank, "world_size": 7} for rank in (1, 3, 5)]
    client.init_weight_transfer_engine({"packed": True})
    assert pool.told[1][1] == [{"init_info": {"packed": True}}] * 3


def test_an_engine_that_fails_is_told_to_all_ranks(trainer: Any, tiny_llama: Callable[..., str]) -> None:
    class Broken:
        def incarnations(self, model: str) -> list[str]:
            raise ConnectionError("gone")

    engines: Any = Engines(Broken())  # type: ignore[arg-type]
    way = DirectTransport(trainer, engines, tiny_llama(0), lambda client, source: None, 60)
    with pytest.raises(StageFailed, match="asking the engines: ConnectionError: gone"):
        way.send("a", "b")


def test_a_send_that_hangs_says_so_and_ends_the_process(
    trainer: Any, tiny_llama: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended = threading.Event()
    codes: list[int] = []

    class Hanging:
        def send_weights(self) -> None:
            assert ended.wait(60)

    class Pool:
        def incarnations(self, model: str) -> list[str]:
            return ["one"]

        def holds(self, model: str) -> None:
            pass

    def leave(code: int) -> None:
        codes.append(code)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    engines: Any = Engines(Pool())  # type: ignore[arg-type]
    way = DirectTransport(trainer, engines, tiny_llama(0), lambda client, source: Hanging(), 0.1)
    way.send("a", "b")
    assert codes == [1]
    assert "for the engines to take new weights and gave up; give the same command again" in capfd.readouterr().err
