"""cluster.yaml, as far as it can be tried without an account: Ray's own validation, and sums."""

from __future__ import annotations

import re
import tomllib
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


def test_setup_installs_the_gpu_set(config):
    assert any(".[gpu]" in command for command in config["setup_commands"])


def test_only_what_installing_needs_is_copied(config):
    local = set(config["file_mounts"].values()) - {"~/.ray/auth_token"}
    assert local == {"pyproject.toml", "LICENSE", "psycho", "ray_jobs"}


def test_every_node_starts_ray_with_authentication_and_the_dashboard_stays_inside(config):
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert any("RAY_AUTH_MODE=token ray start" in command for command in config[key])
    assert not any("0.0.0.0" in command for command in config["head_start_ray_commands"])


def test_it_names_no_account_and_no_key():
    text = (ROOT / "cluster.yaml").read_text()
    assert not re.search(r"\b\d{12}\b|AKIA|arn:aws|\.pem|aws_secret", text)
