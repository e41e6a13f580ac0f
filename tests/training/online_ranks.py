"""One of several ranks that train a little under ZeRO-3 and stream their weights; `test_online_weights.py` starts it.

`python online_ranks.py RANK WORLD STORE MODEL OUT`: all weights trained, then adapters, below OUT/full and OUT/lora.
There rank 0 writes what it saw to seen.json, every rank its weights to stream-RANK.safetensors, and all of them
together the trainer's own folder, saved.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0"}

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import save_file
from vllm.distributed.weight_transfer.packed_tensor import pack_tensors

from psycho.config import DPOConfig, LoRAConfig, TrainingConfig
from psycho.training import loop
from psycho.training.online.weights import WeightStream, check_names

BUCKET = 40_000  # bytes
SENTENCES = ("That sounds hard.", "What helps you?", "Cheer up.", "I hear you.")


def main() -> None:
    rank, world = int(sys.argv[1]), int(sys.argv[2])
    store, model, out = sys.argv[3], sys.argv[4], Path(sys.argv[5])
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    plain = loop.deepspeed_config

    def all_in_pieces(*args: Any) -> dict[str, Any]:
        """Small ones too, which DeepSpeed would keep whole."""
        found = plain(*args)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    loop.deepspeed_config = all_in_pieces
    for name, lora in (("full", None), ("lora", LoRAConfig(r=4, alpha=8))):
        training = TrainingConfig(
            workers=world, device="cpu", precision="fp32", zero_stage=3, threads_per_worker=1, max_length=256,
            bin_tokens=1024, gpus_per_worker=0, lora=lora,
        )  # fmt: skip
        loop.setup_worker(training)
        stream_of(training, model, out / name, rank)


def stream_of(training: TrainingConfig, model: str, out: Path, rank: int) -> None:
    """Train a little, stream and save."""
    trainer = loop.Trainer("dpo", model, DPOConfig(lr=1e-2, batch_size=2), training, seed=0)
    rows = [
        {"question": f"Why {n}?", "chosen": one, "rejected": other}
        for n, (one, other) in enumerate(pairwise(SENTENCES))
    ]
    trainer.fit(trainer.groups(rows)[0], seed=0)
    stream = WeightStream(trainer)
    check_names(stream, model)
    seen = watch(trainer, stream)
    seen["shapes"] = {name: list(shape) for name, _, shape in stream.shapes()}
    weights = dict(stream)
    seen["weights"] = {name: list(value.shape) for name, value in weights.items()}
    out.mkdir(exist_ok=True)
    save_file(weights, out / f"stream-{rank}.safetensors")
    trainer.save(str(out / "saved"))
    if rank == 0:
        (out / "seen.json").write_text(json.dumps(seen))
    trainer.close()


def watch(trainer: Any, stream: WeightStream) -> dict[str, Any]:
    """Go through the stream in vLLM's buckets, and note what is whole when."""
    parameters = list(trainer.engine.module.parameters())
    gathered: list[int] = []
    whole: list[int] = []
    enter = deepspeed.zero.GatheredParameters.__enter__

    def noted(self: Any) -> Any:
        result = enter(self)
        gathered.append(sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE))
        return result

    def between() -> Any:
        for name, value in stream:
            whole.append(sum(p.ds_numel for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE))
            yield name, value

    deepspeed.zero.GatheredParameters.__enter__ = noted
    pairs, names, sizes = between(), [], []
    while (bucket := pack_tensors(pairs, lambda pair: pair[1], BUCKET)) is not None:
        names += bucket.names
        sizes.append(bucket.packed_tensor.numel())
    deepspeed.zero.GatheredParameters.__enter__ = enter
    return {
        "names": names,
        "buckets": sizes,
        "gathered": gathered,
        "whole_between": max(whole),
        "parameters": sum(p.ds_numel for p in parameters),
    }


if __name__ == "__main__":
    main()
