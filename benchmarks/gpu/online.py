"""Rounds of online DPO on one GPU that engines and training share: what a sync costs, and who gives memory back.

    python -m benchmarks.gpu.online [--shapes 1b,3b] [--rounds 20] [--speeches 64] [--samples 4]
    python -m benchmarks.gpu.online --shapes tiny --rounds 2 --speeches 8       # tries the script, without a GPU too

Needs one CUDA GPU of 80 GiB or more (3B in full takes 55 GiB for its optimizer beside the engine's 30), the `gpu` extra
of pyproject.toml, 110 GB of disk for 3B and 40 GB for 1B (a round writes the policy and its optimizer before the last
one's are removed), and nothing from the network: weights are random. Engines and training are colocated: the engines
sleep (level 2) while the policy trains and take its weights by CUDA IPC. On a CPU they lie side by side and the weights
go by disk, which shows that the script runs and no figure of worth.

`<shape>_sync_s` is the median over rounds of all that a change of weights takes: sleeping, waking, sending, and the
proof that the engines say what the trainer says. `<shape>_asleep_gib` and `<shape>_awake_gib` are what the GPU holds
after the last round's sleep and waking; `_grown_gib` how much more that is than after the second's, where a leak shows.
`<shape>_busy_share` is the share of the rounds' wall time spent in sampling, scoring and training.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.training import SHAPES, folder
from benchmarks.training import data

BUSY = ("sampling", "scoring", "training")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}w2 {% endif %}{% endfor %}"
Report = dict[str, Any]


def policy_folder(shape: str, root: Path) -> str:
    """A random Llama of this shape, whose tokenizer knows a word for every token that it may sample."""
    from transformers import AutoTokenizer

    made = folder(shape, root / "policy")
    words = data.model_folder(replace(data.SIZES["tiny"], vocabulary=SHAPES[shape][5]), root / "words")
    tokenizer = AutoTokenizer.from_pretrained(words)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made)
    return str(made)


def scorer_folder(policy: str, root: Path) -> str:
    """A small random reward model of the policy's tokenizer."""
    import torch
    from transformers import AutoConfig, LlamaForSequenceClassification

    config = AutoConfig.from_pretrained(policy)
    for name, value in (("hidden_size", 128), ("intermediate_size", 256), ("num_hidden_layers", 2), ("num_labels", 1)):
        setattr(config, name, value)
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 4, 2, 32
    torch.manual_seed(1)
    made = root / "reward"
    LlamaForSequenceClassification(config).to(torch.bfloat16).save_pretrained(made)
    for file in Path(policy).glob("*token*"):
        shutil.copy(file, made)
    for file in Path(policy).glob("chat_template*"):
        shutil.copy(file, made)
    return str(made)


def settings(rounds: int, speeches: int, samples: int, cuda: bool, engine_share: float) -> Any:
    """One engine, one training worker, one scorer; on a GPU all on the same one."""
    from psycho.config import Config

    env = {} if cuda else {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    dtype = "bfloat16" if cuda else "float32"
    engine = {"dtype": dtype, "max_model_len": 1024, "gpu_memory_utilization": engine_share, "enforce_eager": not cuda}
    small = engine | {"gpu_memory_utilization": 0.04, "enforce_eager": True}
    online = {"rounds": rounds, "speeches_per_round": speeches, "samples_per_speech": samples, "lr": 1e-6,
              "batch_size": 16, "sampling": {"max_tokens": 256 if cuda else 24}, "scorer_engine": small,
              "scorer_gpus_per_worker": 0.1 * cuda, "placement": "colocate" if cuda else "separate"}  # fmt: skip
    training = {"workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0.3 if cuda else 0, "max_length": 1024,
                "device": "cuda" if cuda else "cpu", "precision": "bf16" if cuda else "fp32", "bin_tokens": 8192,
                "gradient_checkpointing": True, "checkpoint_every_steps": None}  # fmt: skip
    inference = {"workers": 1, "gpus_per_worker": 0.6 if cuda else 0, "engine": engine, "env": env}
    return Config.model_validate({"online": online, "training": training, "inference": inference})


def prompts(count: int) -> list[dict[str, str]]:
    """Random words of the domain's length."""
    made = data.speeches(replace(data.SIZES["full" if count > 8 else "tiny"], speeches=count))
    return [{"speech_id": f"s{n}", "question": " ".join(f"w{i}" for i in ids)} for n, (ids, *_) in enumerate(made)]


def rounds_of(config: Any, root: Path, policy: str) -> list[Report]:
    """The job; its rounds' reports."""
    from psycho.training.launch import launch
    from psycho.training.online.engines import engines
    from psycho.training.online.placement import check_placement
    from psycho.training.online.rollout import Rollout
    from psycho.training.online.rounds import OnlineJob, online_worker

    check_placement(config)
    reward, work, output = scorer_folder(policy, root), str(root / "rounds"), str(root / "online")
    speeches = prompts(config.online.speeches_per_round)
    with engines(config, policy, reward) as workers:
        workers.start(policy)
        job = OnlineJob(config, config.training, policy, work, output, speeches, [], Rollout(workers, config))
        launch(online_worker, {"job": job}, config.training, str(root / "ray"))
    return list(json.loads(Path(output, "rounds.json").read_text(encoding="utf-8")))


def figures(reports: Sequence[Report]) -> dict[str, float]:
    """Over all rounds but the first, which holds the start."""
    later = reports[1:]
    seconds = [report["seconds"] for report in later]
    found = {
        "sync_s": statistics.median(s["sync"] for s in seconds),
        "checkpoint_s": statistics.median(s["checkpoint"] for s in seconds),
        "busy_share": sum(s[phase] for s in seconds for phase in BUSY) / sum(s["wall"] for s in seconds),
        "sync_error": max(report["sync_error"] for report in later),
    }
    if "gpu_gib" in later[0]:
        for step in ("sampling", "asleep", "trained", "awake"):
            used = [report["gpu_gib"][step] for report in later]
            found |= {f"{step}_gib": used[-1], f"{step}_grown_gib": used[-1] - used[0]}
    return {name: round(value, 4) for name, value in found.items()}


def table(shape: str, reports: Sequence[Report]) -> Table:
    """A row a round."""
    phases = ("start", *BUSY, "sync", "checkpoint", "watch", "waiting", "wall")
    steps = ("sampling", "asleep", "trained", "awake")
    out = Table("round", *phases, *(f"{step} GiB" for step in steps), title=shape)
    for report in reports:
        seconds = [f"{report['seconds'].get(phase, 0.0):.2f}" for phase in phases]
        gib = [f"{report['gpu_gib'][step]:.1f}" if "gpu_gib" in report else "–" for step in steps]
        out.add_row(str(report["round"] + 1), *seconds, *gib)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1b,3b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=20, help="at least 2")
    parser.add_argument("--speeches", type=int, default=64, help="a round")
    parser.add_argument("--samples", type=int, default=4, help="a speech")
    parser.add_argument("--engine-share", type=float, default=0.3, help="of the GPU's memory, for the engine awake")
    options = parser.parse_args()
    import ray
    import torch

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(0) if cuda else "CPU", "torch": torch.__version__}
    console = Console(width=180)
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    for shape in options.shapes.split(","):
        with tempfile.TemporaryDirectory(prefix="online-") as scratch:
            root = Path(scratch)
            config = settings(options.rounds, options.speeches, options.samples, cuda, options.engine_share)
            reports = rounds_of(config, root, policy_folder(shape, root))
        console.print(table(shape, reports))
        result |= {f"{shape}_{name}": value for name, value in figures(reports).items()}
    ray.shutdown()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
