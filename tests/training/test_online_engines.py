"""Real engines side by side: sampling and scoring in turn, new weights in place, the proof that they are there."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from psycho.config import Config
from psycho.errors import BadInput, StageFailed
from psycho.training.online import engines as module
from psycho.training.online import proof
from psycho.training.online.engines import Engines, engines
from psycho.training.online.placement import reward_workers, takes_turns
from psycho.training.online.rollout import Rollout

SPEECHES = [{"speech_id": f"s{n}", "question": f"I have not slept for {n} nights. Why?"} for n in range(3)]


def _config(**online: Any) -> Config:
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    engine = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "enforce_eager": True}
    inference = {"workers": 1, "cpus_per_worker": 0.5, "gpus_per_worker": 0, "engine": engine, "env": env}
    training = {"workers": 2, "cpus_per_worker": 0.5, "gpus_per_worker": 0, "device": "cpu", "precision": "fp32"}
    online = {"samples_per_speech": 2, "sampling": {"temperature": 1.0, "max_tokens": 24}} | online
    return Config.model_validate({"inference": inference, "training": training, "online": online})


@pytest.fixture(scope="module")
def started(local_ray: None, tiny_llama: Callable[..., str]) -> Iterator[Engines]:
    with engines(_config(), tiny_llama(0), tiny_llama(1, reward=True)) as workers:
        workers.start(tiny_llama(0))
        workers.wait(tiny_llama(0))
        yield workers


def _pids(workers: Engines) -> list[int]:
    pools = [pool for pool in (workers.rollout, workers.reward) if pool]
    return list(ray.get([pool._actors[0].__ray_call__.remote(lambda _: os.getpid()) for pool in pools]))


def _expected(model: str, rows: list[list[int]]) -> list[list[float]]:
    policy = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        found = [policy(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
    return [f[:-1].gather(1, torch.tensor(r[1:])[:, None])[:, 0].tolist() for f, r in zip(found, rows, strict=True)]


def _assert_same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """The same samples; what they score depends in its last bits on what the engine read beside them."""
    assert [row["response"] for row in one] == [row["response"] for row in other]
    assert [row["score"] for row in one] == pytest.approx([row["score"] for row in other], abs=1e-5)


def test_both_engines_live_through_rounds_and_take_new_weights(
    started: Engines, tiny_llama: Callable[..., str]
) -> None:
    """Sample, score, new weights, again: the processes stay, and a policy's samples depend on its weights alone."""
    rollout, before = Rollout(started, _config()), _pids(started)
    first = rollout(tiny_llama(0), 0, SPEECHES)
    other = rollout(tiny_llama(2), 0, SPEECHES)
    again = rollout(tiny_llama(0), 0, SPEECHES)
    _assert_same(first.samples, again.samples)
    assert [row["response"] for row in first.samples] != [row["response"] for row in other.samples]
    assert all(row["reward"] is not None for row in first.samples)
    assert _pids(started) == before


def test_the_engine_says_what_the_model_says(started: Engines, tiny_llama: Callable[..., str]) -> None:
    for seed in (0, 2, 0):
        model = tiny_llama(seed)
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = [row.ids for row in proof.probes(SPEECHES, None, tokenizer, 3, 512)]
        assert proof.check(_expected(model, rows), started.rollout.read_by_each(model, rows), 1e-4) <= 1e-4


def test_one_changed_tensor_is_caught(started: Engines, tiny_llama: Callable[..., str], tmp_path: Path) -> None:
    model = tiny_llama(0)
    changed = shutil.copytree(model, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"] *= 1.01
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    rows = [row.ids for row in proof.probes(SPEECHES, None, AutoTokenizer.from_pretrained(model), 3, 512)]
    with pytest.raises(StageFailed, match=r"does not hold the trainer's weights.*sync_tolerance 0.0001"):
        proof.check(_expected(model, rows), started.rollout.read_by_each(str(changed), rows), 1e-4)


def test_a_worker_that_is_killed_comes_back_with_the_weights_asked_for(
    started: Engines, tiny_llama: Callable[..., str]
) -> None:
    rollout = Rollout(started, _config())
    first = rollout(tiny_llama(2), 1, SPEECHES)
    os.kill(_pids(started)[0], signal.SIGKILL)
    _assert_same(rollout(tiny_llama(2), 1, SPEECHES).samples, first.samples)


def test_workers_that_never_fit_together_are_refused(local_ray: None) -> None:
    config = _config(scorer_workers=9)
    with pytest.raises(BadInput, match=r"6 CPU in all, and the cluster has 4; lower inference.workers"):
        module.check_room(config, [config.inference, reward_workers(config)])


def test_a_judge_shares_the_workers_where_it_can(tiny_llama: Callable[..., str]) -> None:
    policy, judge, reward = tiny_llama(0), tiny_llama(1), tiny_llama(1, reward=True)
    config = _config(scorer="judge")
    assert takes_turns(config, policy, judge)
    assert not takes_turns(config, policy, reward)
    assert not takes_turns(_config(scorer="judge", scorer_workers=1), policy, judge)
    own = config.model_copy(update={"judge": config.judge.model_copy(update={"engine": config.inference.engine})})
    assert not takes_turns(own, policy, judge)


@pytest.mark.parametrize(("shares", "colocated"), [(False, False), (True, False), (False, True), (True, True)])
def test_engines_that_may_share_a_gpu_start_one_after_the_other(shares: bool, colocated: bool) -> None:
    """Each measures what memory is free, so that it must be up before the next begins."""
    calls: list[str] = []

    class Pool:
        shares_gpus = shares

        def __init__(self, name: str) -> None:
            self.name = name

        def use(self, model: str, runner: str) -> None:
            calls.append(f"{self.name} up")

        def start(self, model: str, runner: str) -> None:
            calls.append(f"{self.name} begun")

        def sleep(self, level: int) -> None:
            calls.append(f"{self.name} asleep")

    pools: Any = [Pool("rollout"), Pool("reward")]
    Engines(pools[0], pools[1], colocated=colocated).start("policy")
    each = ["up", "asleep"] if colocated else ["up"] if shares else ["begun"]
    assert calls == [f"{name} {what}" for name in ("rollout", "reward") for what in each]
