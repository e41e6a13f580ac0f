"""What several areas' tests start from: a random model of the nano world, a Ray of their own, an object store."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.fs as pafs
import pytest

# What starts Ray, vLLM or DeepSpeed: whoever asks for one of these fixtures, and everything in these folders.
ENGINE_FIXTURES = {"local_ray", "one_rank", "run_ranks", "served", "vllm_server"}
ENGINE_FOLDERS = {"chaos", "e2e", "parity"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `engine` what `make check` leaves to `make test`; nobody has to think of it."""
    tests = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(tests).parts[0]
        if folder in ENGINE_FOLDERS or ENGINE_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("engine")


@pytest.fixture(scope="session")
def nano_tokenizer() -> Any:
    """The nano world's tokenizer."""
    from psycho.nano.grammar import vocabulary
    from psycho.nano.tokenizer import build_tokenizer

    return build_tokenizer(vocabulary(), 512)


@pytest.fixture(scope="session")
def tiny_llama(nano_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Folder of a random two-layer Llama with the nano tokenizer, by seed; made once a session.

    Its weights are large for a random model's, so that its distributions are far from uniform and from one another.
    """
    made: dict[tuple[int, bool], str] = {}

    def folder(seed: int = 0, reward: bool = False) -> str:
        if (seed, reward) not in made:
            made[seed, reward] = _make(nano_tokenizer, tmp_path_factory.mktemp("model"), seed, reward)
        return made[seed, reward]

    return folder


def _make(tokenizer: Any, folder: Path, seed: int, reward: bool) -> str:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=128,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=not reward,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        num_labels=1,
    )
    model = (LlamaForSequenceClassification if reward else LlamaForCausalLM)(config)
    # Single bytes are never the likeliest: half a character is shown differently by different decoders.
    places = [place for piece, place in tokenizer.get_vocab().items() if piece.startswith("<0x")]
    model.get_input_embeddings().weight.data[places] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of the module's own, with more logical CPUs than the machine has; nothing else is touched."""
    import ray

    from psycho.cluster import own_token

    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with own_token():  # else it would leave one in ~/.ray, which every later head of this machine demands
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=2**28)
        yield
        ray.shutdown()


class Bucket:
    def __init__(self, address: str) -> None:
        self.fs = pafs.S3FileSystem(endpoint_override=address, scheme="http", allow_bucket_creation=True)
        self.fs.create_dir("speeches")
        self.uri = "s3://speeches"

    def put(self, name: str, content: bytes) -> None:
        with self.fs.open_output_stream(f"speeches/{name}") as stream:
            stream.write(content)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """`s3://speeches` on a moto server of this machine."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        yield Bucket(f"{host}:{port}")
        httpx.post(f"http://{host}:{port}/moto-api/reset").raise_for_status()  # it outlives its server
    finally:
        server.stop()


RunRanks = Callable[[Sequence[Sequence[str]]], None]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """Runs Python once for each list of arguments, side by side, as the ranks of a training; all must end well."""
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }

    def run(commands: Sequence[Sequence[str]]) -> None:
        ranks = [
            subprocess.Popen(
                [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]  # fmt: skip
        try:
            for rank in ranks:
                _, said = rank.communicate(timeout=800)
                assert rank.returncode == 0, said[-3000:]
        finally:
            for rank in ranks:
                rank.kill()

    return run


@pytest.fixture(scope="session")
def ranking_rows() -> Callable[[int], list[dict[str, Any]]]:
    """The pairs of three speeches with k responses each; the last rows say again what the first say."""
    speeches = ("My partner left and I feel lost.", "I cannot sleep.", "I drink again.")
    texts = ("That sounds painful. What do you miss?", "You carry a lot.", "You noticed it.", "Cheer up.")

    def rows(k: int) -> list[dict[str, Any]]:
        found = [
            {"id": f"{s}/{i}/{j}", "question": s, "chosen": texts[i], "rejected": texts[j], "gap": float(j - i)}
            for s in speeches
            for i in range(k)
            for j in range(i + 1, k)
        ]
        return [*found, *found[:2]] if k > 2 else found

    return rows
