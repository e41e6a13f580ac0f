"""Online DPO on tiny random models, in a process that a test may kill.

`python online_driver.py ROOT POLICY REWARD WHAT`: four rounds below ROOT. The process ids of its workers are in
ROOT/pids.json once they are there, that of the training's last rank in ROOT/rank. Where WHAT is to be killed, `node` or
`training within the run`, the training may fail once; with `node` Ray has a head for the driver and two more nodes,
either of which has room for all the work.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.train import get_context

from psycho.config import Config
from psycho.errors import StageFailed
from psycho.training.launch import launch
from psycho.training.online.engines import engines
from psycho.training.online.rollout import Rollout
from psycho.training.online.rounds import OnlineJob, online_worker

ROUNDS, SPEECHES, SAMPLES = 4, 12, 4


def settings(failures: int) -> Config:
    """Small, on the CPU."""
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    engine: dict[str, Any] = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}
    inference: dict[str, Any] = {
        "workers": 1,
        "cpus_per_worker": 0.5,
        "gpus_per_worker": 0,
        "engine": engine,
        "env": env,
    }
    training: dict[str, Any] = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "gpus_per_worker": 0,
        "device": "cpu",
        "precision": "fp32",
    }
    training |= {"threads_per_worker": 1, "max_length": 512, "bin_tokens": 2048, "collective_timeout_s": 300}
    training |= {"max_failures": failures}
    online: dict[str, Any] = {
        "rounds": ROUNDS,
        "speeches_per_round": SPEECHES,
        "samples_per_speech": SAMPLES,
        "batch_size": 4,
    }
    online |= {"lr": 1e-3, "probes": 2, "kl_samples": 2, "sampling": {"temperature": 1.0, "max_tokens": 48}}
    return Config.model_validate({"inference": inference, "training": training, "online": online})


def connect(what: str) -> dict[str, int]:
    """Start Ray; the process ids of the nodes that may be killed, where there are several."""
    if what != "node":
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
        return {}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=3) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    return {f"node {place}": node.all_processes["raylet"][0].process.pid for place, node in enumerate(nodes)}


def noted_worker(config: dict[str, Any]) -> None:
    """A rank that says which process it is."""
    if get_context().get_world_rank() == config["job"].training.workers - 1:
        Path(config["note"]).write_text(str(os.getpid()))
    online_worker(config)


def main() -> None:
    """Go on with the rounds that are there, and exit 1 where a part of it was killed."""
    root, policy, reward, what = Path(sys.argv[1]), *sys.argv[2:5]
    pids = connect(what)
    config = settings(failures=int(what in ("node", "training within the run")))
    speeches = [{"speech_id": f"s{n}", "question": f"I have not slept for {n} nights. Why?"} for n in range(SPEECHES)]
    with engines(config, policy, reward) as workers:
        workers.start(policy)
        for name, pool in {"rollout": workers.rollout, "reward": workers.reward}.items():
            if pool:
                pids[name] = ray.get(pool._actors[0].__ray_call__.remote(lambda _: os.getpid()))
        (root / "pids.json").write_text(json.dumps(pids))
        job = OnlineJob(
            config, config.training, policy, str(root / "rounds"), str(root / "online"), speeches, [],
            Rollout(workers, config),
        )  # fmt: skip
        try:
            launch(noted_worker, {"job": job, "note": str(root / "rank")}, config.training, str(root / "ray"))
        except StageFailed as error:
            sys.exit(f"{error}")


if __name__ == "__main__":
    main()
