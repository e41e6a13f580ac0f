"""Finding or starting Ray, quietly.

Inside `ray job submit`, or where RAY_ADDRESS or `cluster.address` names a cluster, a job joins it. Elsewhere it
starts a Ray of its own and ends that one, and no other, when it is done.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from psycho.config import ClusterConfig
from psycho.doctor import memory_gib
from psycho.errors import BadInput
from psycho.knock import KNOCK_S, answers

AUTOSCALING = "PSYCHO_AUTOSCALING"  # set while a job runs whose cluster grows
OWN_RAY = "PSYCHO_OWN_RAY"  # set while a job runs in a Ray of its own, which ends with it
_STDERR = 2
_LEVEL_LINE = b"Set ray log level from environment variable"
_QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
}
_QUIET_LIBRARIES = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Keep bars and warnings of the libraries from between a job's lines, its workers' too; before they are imported,
    which is when they look."""
    for name, value in _QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(config: ClusterConfig, verbose: bool) -> Iterator[None]:
    """Ray is up inside the block.

    Raises:
        BadInput: the named cluster does not answer, or a local run has too little memory.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    quiet_libraries()
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ[AUTOSCALING] = "1" if config.autoscaling else "0"
    if not verbose:
        _silence_libraries()
        # Ray Data makes Ray's core warn, on the driver's terminal, at the start of every actor pool.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with ExitStack() as resources:
        with nullcontext() if verbose else _without(_LEVEL_LINE):
            _start(config, verbose, resources)
        resources.callback(ray.shutdown)
        yield


@contextmanager
def own_token() -> Iterator[None]:
    """A token for a Ray that is started in the block, where there is none yet.

    Ray would make one and leave it in ~/.ray for good. From then on every head that is started there demands it, and
    who gives such a head a job is told nothing of that.
    """
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    before = {name: os.environ.get(name) for name in names}
    known = before["RAY_AUTH_TOKEN"] or before["RAY_AUTH_TOKEN_PATH"] or (Path.home() / ".ray" / "auth_token").exists()
    if known or (before["RAY_AUTH_MODE"] or "").lower() == "disabled":
        yield
        return
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]  # private, and pinned with Ray

    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    AuthenticationTokenLoader.instance().reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        AuthenticationTokenLoader.instance().reset_cache()


def _knock(address: str, setting: str) -> None:
    """Refuse within seconds what Ray would try to reach for minutes.

    Raises:
        BadInput: nothing listens there, or it is no address of a cluster.
    """
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"{setting} {address} is the address of a job server; give it the job with `ray job submit --working-dir . "
            f"-- python -m ray_jobs...`, or unset {setting} to start Ray here"
        )
    where = _found_by_ray(address) if address == "auto" else address
    if where is not None and answers(where) is False:
        raise BadInput(
            f"no Ray answers at {where} ({setting}) within {KNOCK_S:.0f} s; start that cluster, correct {setting}, or "
            f"unset it to start Ray here"
        )


def _found_by_ray(address: str) -> str | None:
    """The address that Ray takes `auto` for, which may be one that is left of a cluster that has ended."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        return canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, OSError):
        return None


def _start(config: ClusterConfig, verbose: bool, resources: ExitStack) -> None:
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS")
    os.environ[OWN_RAY] = "0" if address else "1"
    level = logging.INFO if verbose else logging.ERROR
    if address:
        _knock(address, "cluster.address" if config.address else "RAY_ADDRESS")
        try:
            ray.init(address=address, logging_level=level, log_to_driver=verbose)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"Ray at {address} does not answer ({type(error).__name__}); check cluster.address or RAY_ADDRESS, "
                "and RAY_AUTH_MODE=token where the head asks for it"
            ) from None
    else:
        _check_memory(config)
        resources.enter_context(own_token())
        store = int(config.object_store_gib * 2**30) if config.object_store_gib else None
        ray.init(
            address="local",
            num_cpus=config.local_cpus,
            include_dashboard=False,
            logging_level=level,
            log_to_driver=verbose,
            object_store_memory=store,
        )


@contextmanager
def _without(part: bytes) -> Iterator[None]:
    """Hold back what the process writes to its stderr inside the block, and let go at its end of all but the lines that
    hold `part`: Ray's core says which level it was given before that level counts. Nor does anybody need what it says
    of each try to reach a cluster, where a sentence of ours says that it did not."""
    sys.stderr.flush()
    before = os.dup(_STDERR)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
        except BadInput:
            held.seek(0)
            held.truncate()
            raise
        finally:
            sys.stderr.flush()
            os.dup2(before, _STDERR)
            os.close(before)
            held.seek(0)
            os.write(_STDERR, b"".join(line for line in held if part not in line))


def _check_memory(config: ClusterConfig) -> None:
    free, _ = memory_gib()
    if free < config.min_memory_gib:
        raise BadInput(
            f"this run needs {config.min_memory_gib:g} GiB of free memory and this machine has {free:.1f}; close "
            "other programs or lower cluster.min_memory_gib"
        )


def _silence_libraries() -> None:
    warnings.filterwarnings("ignore")
    for name in ("ray", "ray.serve", "vllm", "transformers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for name in ("ray.data", "ray.train"):  # what they say of an error, the error says too
        logging.getLogger(name).setLevel(logging.CRITICAL)
