"""DeepSpeed on the CPU, wherever the tests run, and a process group of one rank in this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a worker of Ray Train finds; one for all tests, since DeepSpeed keeps the first group of a process."""
    import torch
    import torch.distributed as dist

    from psycho.config import TrainingConfig
    from psycho.training.loop import setup_worker

    store = tmp_path_factory.mktemp("store") / "store"
    patch = pytest.MonkeyPatch()
    patch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    threads = torch.get_num_threads()
    setup_worker(TrainingConfig(device="cpu", threads_per_worker=1))
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)
    patch.undo()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models that lie on an object store are copied to."""
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
