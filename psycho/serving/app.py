"""The Ray Serve application: a gateway, replicas of the policy, one reward model; how they start and stop.

`start` is what `ray_jobs/serve.py` calls; `from_args` is the import path for `serve deploy` and KubeRay's
RayService (`import_path: psycho.serving.app:from_args`, with `args: {config, policy, reward}`).
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from typing import Any

import httpx
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatus

from psycho import storage
from psycho.config import Config, load_config
from psycho.errors import BadInput, StageFailed, WaitTimedOut
from psycho.inference.models import check_model, looks_like_path
from psycho.serving.engine import PolicyServer, RewardServer
from psycho.serving.gateway import Settings, build_api
from psycho.serving.guard import digest

APP = "psycho"
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
_POLL_S = 0.2
_LIMIT = "serving.start_timeout_s"
_SPARE = 8  # places of a replica beside the requests themselves, so that health is asked even when it is full


@serve.ingress()
class Gateway:
    """The ingress deployment; its routes are `psycho/serving/gateway.py`."""

    def __init__(self, settings: Settings, policy: Any, reward: Any) -> None:
        self._api = build_api(settings, policy, reward)

    def __serve_build_asgi_app__(self) -> Any:
        return self._api


def build_app(config: Config, policy: str, reward: str) -> serve.Application:
    """The application around two models (folders, hub ids, or folders on an object store).

    Raises:
        BadInput: a model folder is not one, or the key's environment variable is empty.
    """
    check_model(policy)
    check_model(reward)
    _check_reward(reward)
    serving, inference = config.serving, config.inference
    settings = Settings(
        policy_name=_name(policy),
        reward_name=_name(reward) if _name(reward) != _name(policy) else f"{_name(reward)}-reward",
        sampling=config.evaluation.sampling,
        max_tokens=serving.max_tokens,
        policy_slots=serving.replicas * serving.max_ongoing_requests,
        reward_slots=serving.max_ongoing_requests,
        max_queued_requests=serving.max_queued_requests,
        request_timeout_s=serving.request_timeout_s,
        system_prompt=config.generation.system_prompt,
        key_digest=_key(serving.api_key_env),
    )
    resources = {"num_cpus": inference.cpus_per_worker, "num_gpus": inference.gpus_per_worker}
    engine: dict[str, Any] = {
        "ray_actor_options": resources,
        "max_ongoing_requests": serving.max_ongoing_requests + _SPARE,
        # The gateway counts its queue exactly; this one is the net below it.
        "max_queued_requests": settings.policy_slots + serving.max_queued_requests + _SPARE,
        "health_check_period_s": 5,
        "health_check_timeout_s": 30,
        "graceful_shutdown_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 2,
    }
    policies = serve.deployment(name="PolicyServer", num_replicas=serving.replicas, **engine)(PolicyServer)
    rewards = serve.deployment(name="RewardServer", num_replicas=1, **engine)(RewardServer)
    gateway = serve.deployment(
        name="Gateway",
        num_replicas=1,  # it counts admissions
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2 * (settings.policy_slots + serving.max_queued_requests) + 64,
        graceful_shutdown_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.5,
    )(Gateway)
    return gateway.bind(
        settings,
        policies.bind(policy, inference, config.seed),
        rewards.bind(reward, inference, config.seed),
    )


def start(config: Config, policy: str, reward: str) -> str:
    """Serve both models from the Ray that is up; returns the base URL once health is good.

    Raises:
        BadInput: the port is taken, or as `build_app` raises.
        StageFailed: a deployment failed to start.
        WaitTimedOut: `serving.start_timeout_s` passed.
    """
    serving = config.serving
    deadline = time.monotonic() + serving.start_timeout_s
    app = build_app(config, policy, reward)
    check_port(serving.host, serving.port)
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=serving.host, port=serving.port),
        )
        target = serve.RunTarget(app, name=APP, route_prefix="/")
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(deadline, serving.start_timeout_s)
        url = base_url(serving.host, serving.port)
        _wait_until_healthy(url, deadline, serving.start_timeout_s)
    except BaseException:
        stop()
        raise
    return url


def stop() -> None:
    """End the application, and Serve with it unless it serves others too."""
    others = set(serve.status().applications) - {APP}
    if others:
        serve.delete(APP)
    else:
        serve.shutdown()


def from_args(args: dict[str, str]) -> serve.Application:
    """The application of `serve deploy`: args are `config`, `policy` and `reward`."""
    missing = {"config", "policy", "reward"} - set(args)
    if missing:
        raise BadInput(f"args of the Serve application lack {', '.join(sorted(missing))}; add them")
    return build_app(load_config(args["config"]), args["policy"], args["reward"])


def base_url(host: str, port: int) -> str:
    """Where a client on this machine finds the gateway."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"


def _wait_until_running(deadline: float, seconds: float) -> None:
    while True:
        status = serve.status().applications.get(APP)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status in _FAILED:
            raise StageFailed(f"the application did not start (-v shows the engines' logs): {_reason(status)}")
        if time.monotonic() > deadline:
            deployments = status.deployments if status else {}
            waiting = sorted(name for name, one in deployments.items() if one.status != "HEALTHY")
            raise WaitTimedOut(f"{', '.join(waiting) or 'Ray Serve'} to start", seconds, _LIMIT)
        time.sleep(_POLL_S)


def _reason(status: Any) -> str:
    """The last line of the first failed deployment's message, which is the exception itself."""
    messages = [one.message for one in status.deployments.values() if one.status != "HEALTHY"]
    lines = [line.strip() for message in [*messages, status.message] for line in message.splitlines()]
    errors = [line for line in lines if "Error" in line or "Exception" in line]
    return (errors or lines or ["no reason was given"])[-1][:500]


def _wait_until_healthy(url: str, deadline: float, seconds: float) -> None:
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=15).status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        if time.monotonic() > deadline:
            raise WaitTimedOut(f"{url}/health to be good", seconds, _LIMIT)
        time.sleep(_POLL_S)


def check_port(host: str, port: int) -> None:
    """See that a server can listen there.

    Raises:
        BadInput: the port is taken or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise BadInput(f"port {port} of {host} is in use; choose another with --set serving.port=...") from None
        raise BadInput(
            f"cannot listen on port {port} of {host} ({error.strerror or type(error).__name__}); "
            "set serving.host and serving.port"
        ) from None


def _check_reward(reward: str) -> None:
    if not looks_like_path(reward):
        return
    config = json.loads(storage.read_text(storage.join(reward, "config.json")) or "{}")
    names = config.get("architectures") or []
    labels = len(config.get("id2label") or ()) or 2  # transformers writes none for its default of two
    if labels != 1 or not any("SequenceClassification" in name for name in names):
        raise BadInput(
            f"{reward} is not a reward model (a sequence classifier with one label); "
            "give the one that train_reward wrote"
        )


def _key(variable: str | None) -> bytes | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise BadInput(f"the environment variable {variable} named by serving.api_key_env is empty; put the key in it")
    return digest(key)


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]
