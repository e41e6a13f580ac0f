"""GGUF files: what is converted is the same model, by content, once, whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from psycho.errors import BadInput
from psycho.inference import gguf
from psycho.inference.models import check_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PSYCHO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def file(folder: Path, name: str, content: bytes = b"GGUF one") -> str:
    path = folder / name
    path.write_bytes(content)
    return str(path)


def test_a_model_is_named_by_what_the_file_holds(tmp_path: Path) -> None:
    one = file(tmp_path, "a.gguf")
    before = gguf.folder_of(one)
    os.utime(one, (1, 1))
    assert gguf.folder_of(one) == before
    assert gguf.folder_of(file(tmp_path, "a.gguf", b"GGUF two")) != before


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [("no.gguf", None, "cannot be read .No such file"), ("x.gguf", b"<html>", "is not a GGUF file")],
)
def test_what_is_no_model_is_said(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    path = str(tmp_path / name) if content is None else file(tmp_path, name, content)
    with pytest.raises(BadInput, match=sentence):
        gguf.folder_of(path)
    with pytest.raises(BadInput, match="not on this machine"):
        gguf.folder_of("s3://bucket/x.gguf")


def test_whole_or_not_at_all(cache: Path) -> None:
    target = cache / "models" / "m"
    with pytest.raises(ZeroDivisionError), gguf.making(target) as (_, work):
        assert work is not None
        (work / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert [path.name for path in target.parent.iterdir()] == ["m.lock"]
    with gguf.making(target) as (_, work):
        assert work is not None and not any(work.iterdir())
    with gguf.making(target) as (folder, work):
        assert folder.is_dir() and work is None


def test_two_at_once_make_one(cache: Path) -> None:
    made, start = [], threading.Barrier(2)

    def make() -> None:
        start.wait(10)
        with gguf.making(cache / "models" / "m") as (_, work):
            made.append(work is not None)

    threads = [threading.Thread(target=make) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(made) == [False, True]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file")
    with pytest.raises(BadInput, match="set PSYCHO_CACHE"), gguf.making(cache / "models" / "m"):
        pass


def test_a_file_that_cannot_be_converted_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"cut\.gguf cannot be converted \(.+\); name a model folder"):
        gguf.ensure_converted(file(tmp_path, "cut.gguf", b"GGUF cut short"), lambda text: None)


def test_the_converted_model_is_the_same(tmp_path: Path) -> None:
    """A small Llama written as GGUF: its weights, its end of a turn, its chat template and its licence come along."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("gguf")
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    weights = write_llama(tmp_path / "small.gguf")
    said: list[str] = []
    folder = gguf.ensure_converted(str(tmp_path / "small.gguf"), said.append)
    check_model(str(folder))
    found = load_file(folder / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    for name, value in weights.items():
        torch.testing.assert_close(found[name].float(), value.bfloat16().float())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|end|>" and tokenizer.model_max_length == 64
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1
    source = json.loads((folder / gguf.SOURCE).read_text())
    assert source["licence"] == "apache-2.0" and source["file"] == "small.gguf" and len(said) == 1


def write_llama(path: Path) -> dict[str, Any]:
    """A Llama of one layer with random weights; returns those that GGUF stores as they are."""
    import torch
    from gguf import GGUFWriter

    width, inner, words = 8, 16, ["<|start|>", "<|end|>", "a", "b", "ab", "Ġ"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_license("apache-2.0")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(width // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 1, 1, 1, 1])  # 3: control
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    torch.manual_seed(0)
    shapes = {
        "token_embd": (len(words), width), "output_norm": (width,), "blk.0.attn_norm": (width,),
        "blk.0.ffn_norm": (width,), "blk.0.attn_q": (width, width), "blk.0.attn_k": (width, width),
        "blk.0.attn_v": (width, width), "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner),
    }  # fmt: skip
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    for name, value in made.items():
        writer.add_tensor(f"{name}.weight", value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    kept = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj", "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
        "blk.0.ffn_down": "model.layers.0.mlp.down_proj", "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    }  # fmt: skip
    return {f"{theirs}.weight": made[ours] for ours, theirs in kept.items()}
