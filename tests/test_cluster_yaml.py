"""cluster.yaml, as far as it can be tried without an account: Ray's own validation, and sums."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[1]

# (CPUs, GPUs, accelerator) as AWS sells them
INSTANCES = {
    "m5.2xlarge": (8, 0, None),
    "m5.8xlarge": (32, 0, None),
    "g5.12xlarge": (48, 4, "A10G"),
    "p4d.24xlarge": (96, 8, "A100"),
    "p5.48xlarge": (192, 8, "H100"),
}


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def config(written) -> dict[str, Any]:
    return prepare_config(written)


@pytest.fixture(scope="module")
def workers(config) -> dict[str, Any]:
    return {n: t for n, t in config["available_node_types"].items() if n != config["head_node_type"]}


def test_ray_accepts_it(config):
    validate_config(config)


def test_the_head_offers_no_cpu_so_that_no_task_lands_beside_the_drivers(config):
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}


def test_workers_offer_what_their_machines_have(workers):
    for node_type in workers.values():
        cpus, gpus, accelerator = INSTANCES[node_type["node_config"]["InstanceType"]]
        expected = {"CPU": cpus}
        if gpus:
            expected |= {"GPU": gpus, f"accelerator_type:{accelerator}": 1}
        assert node_type["resources"] == expected


def test_it_costs_only_the_head_until_a_job_asks(config, workers):
    assert all(node_type["min_workers"] == 0 for node_type in workers.values())
    assert all(0 < node_type["max_workers"] <= config["max_workers"] for node_type in workers.values())
    assert 0 < config["idle_timeout_minutes"] <= 30
    assert config["provider"]["cache_stopped_nodes"] is False


def test_there_is_a_place_for_cpu_tasks_for_serving_and_for_spot_training(workers):
    def spot(node_type: dict[str, Any]) -> bool:
        return node_type["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot"

    kinds = {("GPU" in node_type["resources"], spot(node_type)) for node_type in workers.values()}
    assert kinds == {(False, False), (True, False), (True, True)}


def test_ray_is_the_same_in_the_image_the_pins_and_here(config):
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (pinned,) = [d.split("==")[1] for d in dependencies if d.startswith("ray[")]
    assert config["docker"]["image"].startswith(f"rayproject/ray:{pinned}-py311")
    assert version("ray") == pinned


def installs(commands: Iterable[str]) -> list[str]:
    """The arguments of every `pip install`, in order; what pip keeps in its cache is no matter."""
    found = [re.search(r"python -m pip install (?:--no-cache-dir )?(.+)", command) for command in commands]
    return [install[1] for install in found if install]


def test_setup_installs_the_locked_set_and_nothing_beside_it(written):
    assert installs(written["setup_commands"]) == [
        "--constraint requirements/gpu.txt torch setuptools",  # DeepSpeed is built with these
        "--no-deps --no-build-isolation --requirement requirements/gpu.txt",
        "--no-deps --no-build-isolation .",
    ]
    commands = [command for key, value in written.items() if key.endswith("_commands") for command in value]
    assert len(installs(commands)) == 3
    assert "\nboto3==" in (ROOT / "requirements" / "gpu.txt").read_text(), "the head's autoscaler wants it"


def test_only_what_installing_needs_is_copied_and_links_hold_where_it_goes(config):
    mounts = {source: target for target, source in config["file_mounts"].items() if source != "~/.ray/auth_token"}
    assert set(mounts) == {
        "pyproject.toml",
        "LICENSE",
        "requirements/gpu.txt",
        "configs",
        "examples",
        "psycho",
        "ray_jobs",
    }
    assert all((ROOT / source).exists() and target == f"~/psycho/{source}" for source, target in mounts.items())
    for source in ("psycho", "ray_jobs"):
        links = [path for path in (ROOT / source).iterdir() if path.is_symlink()]
        assert {str(path.resolve().relative_to(ROOT)) for path in links} <= set(mounts)


def test_every_node_starts_ray_with_authentication_and_the_dashboard_stays_inside(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("RAY_AUTH_MODE=token ray start" in command for command in config[key])
    assert not any("0.0.0.0" in command for command in config["head_start_ray_commands"])


def test_it_names_no_account_and_no_key():
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"\b\d{12}\b|AKIA|arn:aws|\.pem|aws_secret", text)


# deploy/Dockerfile


@pytest.fixture(scope="module")
def docker() -> list[tuple[str, str]]:
    """Its instructions as (name, arguments)."""
    text = (ROOT / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, arguments.strip()) for name, _, arguments in (line.partition(" ") for line in lines)]


def test_the_image_is_built_from_the_same_image_with_the_same_commands(docker, written):
    assert docker[0] == ("FROM", written["docker"]["image"])
    assert installs(a for name, a in docker if name == "RUN") == installs(written["setup_commands"])


def test_the_image_takes_what_the_cluster_takes_and_docker_may_see_no_more(docker, written):
    copied = [word for n, a in docker if n in ("COPY", "ADD") for word in a.split()[:-1] if not word.startswith("--")]
    assert set(copied) | {"~/.ray/auth_token"} == set(written["file_mounts"].values())
    seen = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text().splitlines()
    assert seen[1] == "*" and {line[1:] for line in seen if line.startswith("!")} == set(copied)


def test_the_image_runs_as_rays_user_and_holds_no_secret(docker):
    assert [arguments for name, arguments in docker if name == "USER"][-1] == "ray"
    assert not [name for name, _ in docker if name in ("ARG", "ENV", "ADD")]
