"""Weights from GPU to GPU, and turns on one: what no CPU can show (`make test-gpu`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psycho.config import Config

pytestmark = pytest.mark.gpu
torch = pytest.importorskip("torch")
SPEECHES = [{"speech_id": f"s{n}", "question": f"I have not slept for {n} nights. Why?"} for n in range(8)]


def _run(root: Path, policy: str, reward: str, **sections: Any) -> list[dict[str, Any]]:
    """Three rounds; their reports."""
    import ray

    from psycho.training.launch import launch
    from psycho.training.online.engines import engines
    from psycho.training.online.rollout import Rollout
    from psycho.training.online.rounds import OnlineJob, online_worker

    engine = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}
    engine["gpu_memory_utilization"] = 0.2
    online = {"rounds": 3, "speeches_per_round": 8, "samples_per_speech": 4, "batch_size": 4, "lr": 1e-3, "probes": 2}
    online |= {"sampling": {"max_tokens": 32}, "scorer_engine": engine | {"gpu_memory_utilization": 0.1}}
    training = {"workers": 1, "precision": "fp32", "max_length": 512, "bin_tokens": 2048, "zero_stage": 3}
    config = Config.model_validate(
        {
            "online": online | sections.get("online", {}),
            "training": training | sections.get("training", {}),
            "inference": {"workers": 1, "engine": engine} | sections.get("inference", {}),
        }
    )
    env = {"env_vars": {"DS_ACCELERATOR": "cuda"}}  # the tests beside this one say cpu
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, runtime_env=env)
    try:
        with engines(config, policy, reward) as workers:
            workers.start(policy)
            names = root / "rounds", root / "online"
            job = OnlineJob(config, config.training, policy, *map(str, names), SPEECHES, [], Rollout(workers, config))
            launch(online_worker, {"job": job}, config.training, str(root / "ray"))
    finally:
        ray.shutdown()
    return list(json.loads((root / "online" / "rounds.json").read_text()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("level", [1, 2])
def test_engines_and_training_take_turns_on_one_gpu(tiny_llama: Callable[..., str], tmp_path: Path, level: int) -> None:
    """Weights by CUDA IPC, proven after every round; memory given back, and no more of it each round."""
    reports = _run(
        tmp_path,
        tiny_llama(0),
        tiny_llama(1, reward=True),
        online={"placement": "colocate", "sleep_level": level, "scorer_gpus_per_worker": 0.1, "sync_tolerance": 0.01},
        training={"gpus_per_worker": 0.3},
        inference={"gpus_per_worker": 0.6},
    )
    assert [report["round"] for report in reports] == [0, 1, 2]
    assert all(report["sync_error"] <= 0.01 for report in reports)
    gib = [report["gpu_gib"] for report in reports]
    assert all(used["asleep"] < used["sampling"] - 1 and used["awake"] > used["trained"] + 1 for used in gib)
    assert gib[2]["asleep"] <= gib[1]["asleep"] + 0.2


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three CUDA GPUs")
def test_weights_go_over_nccl_to_engines_of_their_own(tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    reports = _run(tmp_path, tiny_llama(0), tiny_llama(1, reward=True), online={"sync_tolerance": 0.01})
    assert all(report["sync_error"] <= 0.01 for report in reports)
