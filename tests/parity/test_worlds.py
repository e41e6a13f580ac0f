"""One rank, two and four, ZeRO 0 to 3: the same training, step by step and in its weights.

Real process groups on gloo, one process a rank. Batches that the ranks do not divide, so that some are left with
nothing in a micro-step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STAGES = (0, 1, 2, 3)
RunRanks = Callable[[Sequence[Sequence[str]]], None]
RANK = """
import json, os, sys
import torch.distributed as dist
from psycho.config import DPOConfig, TrainingConfig
from psycho.training.loop import Trainer, setup_worker, write_history

rank, world, out, model, stages = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5]
checkpoints, stop = sys.argv[6] or None, int(sys.argv[7])

class Killed(Exception):
    pass

def on_step(rows, tokens, statistics):
    if statistics["step"] == stop:
        raise Killed
os.environ["LOCAL_RANK"] = str(rank)
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
speeches = ("I feel lost.", "I cannot sleep. Work is too much.", "I drink again.", "My mother calls me every day.")
good, bad = ("That sounds painful. What do you miss?", "You noticed it."), ("Cheer up.", "Just find another job.")
rows = [
    {"id": str(n), "question": f"{speeches[n % 4]} {n}", "chosen": good[n % 2], "rejected": bad[n % 3 % 2]}
    for n in range(21)
]
settings = DPOConfig(lr=5e-4, batch_size=8, epochs=2, nll_weight=0.1)
for stage in map(int, stages.split(",")):
    training = TrainingConfig(
        workers=world, gpus_per_worker=0, device="cpu", precision="fp32", zero_stage=stage, threads_per_worker=1,
        max_length=64, bin_tokens=128, checkpoint_every_steps=2,
    )
    setup_worker(training)
    trainer = Trainer("dpo", model, settings, training, seed=0)
    try:
        history = trainer.fit(trainer.groups(rows)[0], 0, on_step, checkpoints=checkpoints)
    except Killed:
        break
    trainer.save(f"{out}/{stage}")
    if rank == 0:
        write_history(f"{out}/{stage}", history)
    trainer.close()
dist.destroy_process_group()
"""


def _run(
    run_ranks: RunRanks,
    world: int,
    folder: Path,
    model: str,
    stages: tuple[int, ...],
    checkpoints: Path | str = "",
    stop: int = -1,
) -> None:
    """Train on `world` ranks, at one stage after the other, into `folder/<stage>`; all end at once in step `stop`."""
    folder.mkdir()
    arguments = [str(world), str(folder), model, ",".join(map(str, stages)), str(checkpoints), str(stop)]
    run_ranks([["-c", RANK, str(rank), *arguments] for rank in range(world)])


def _history(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
    # Speed and memory are the machine's, and not every stage keeps the norm.
    return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "memory_gib", "grad_norm")} for row in rows]


def _assert_same(ours: Path, theirs: Path) -> None:
    mine, other = _history(ours), _history(theirs)
    assert len(mine) == len(other) > 4
    for one, two in zip(mine, other, strict=True):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-5)
    weights, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    off = sum((weights[name] - expected[name]).pow(2).sum() for name in expected).sqrt()
    assert off < 1e-5 * sum(value.pow(2).sum() for value in expected.values()).sqrt()


def _moved(folder: Path, model: str) -> float:
    before, after = load_file(Path(model) / "model.safetensors"), load_file(folder / "model.safetensors")
    return float(torch.stack([(after[n] - before[n]).abs().max() for n in after]).max())


def test_two_ranks_are_one_at_zero_1_and_3(tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks) -> None:
    model = tiny_llama(0)
    for world in (1, 2):
        _run(run_ranks, world, tmp_path / str(world), model, (1, 3))
    assert _moved(tmp_path / "1" / "1", model) > 1e-4
    for name in ("1/3", "2/1", "2/3"):
        _assert_same(tmp_path / name, tmp_path / "1" / "1")


def test_another_number_of_ranks_goes_on(tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks) -> None:
    """Two ranks at ZeRO 2 are ended in the fourth step; one goes on from their checkpoint, at ZeRO 3."""
    _resumes(run_ranks, tiny_llama(0), tmp_path, (2, 2), (1, 3))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [((1, 3), (2, 3)), ((2, 3), (4, 1)), ((4, 2), (2, 0)), ((2, 0), (1, 2))])
def test_any_number_of_ranks_goes_on(
    before: tuple[int, int], after: tuple[int, int], tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks
) -> None:
    _resumes(run_ranks, tiny_llama(0), tmp_path, before, after)


def _resumes(run_ranks: RunRanks, model: str, root: Path, before: tuple[int, int], after: tuple[int, int]) -> None:
    """(ranks, ZeRO stage) of the interrupted training and of the one that goes on from it."""
    checkpoints = root / "checkpoints"
    _run(run_ranks, 1, root / "through", model, (0,))
    _run(run_ranks, before[0], root / "before", model, (before[1],), checkpoints, stop=3)
    assert len(list(checkpoints.glob(f"step-2/shard-*-of-{before[0]}.pt"))) == before[0]
    _run(run_ranks, after[0], root / "after", model, (after[1],), checkpoints)
    assert (checkpoints / "step-4").is_dir()
    assert not list(checkpoints.glob(f"step-2/*-of-{after[0]}.pt"))  # it did not begin anew
    _assert_same(root / "after" / str(after[1]), root / "through" / "0")


@pytest.mark.slow
def test_worlds_and_stages_are_one(tiny_llama: Callable[..., str], tmp_path: Path, run_ranks: RunRanks) -> None:
    for world in (1, 2, 4):
        _run(run_ranks, world, tmp_path / str(world), tiny_llama(0), STAGES)
    for world in (1, 2, 4):
        for stage in STAGES:
            _assert_same(tmp_path / str(world) / str(stage), tmp_path / "1" / "0")
