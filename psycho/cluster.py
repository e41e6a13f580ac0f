"""Finding or starting Ray, quietly.

Inside `ray job submit`, or where RAY_ADDRESS or `cluster.address` names a cluster, a job joins it. Elsewhere it
starts a Ray of its own and ends that one, and no other, when it is done.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from psycho.config import ClusterConfig
from psycho.doctor import memory_gib
from psycho.errors import BadInput

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
    "DS_ACCELERATOR_QUIET": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


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
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    os.environ[AUTOSCALING] = "1" if config.autoscaling else "0"
    if not verbose:
        _silence_libraries()
        # Ray Data makes Ray's core warn, on the driver's terminal, at the start of every actor pool.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with nullcontext() if verbose else _without(_LEVEL_LINE):
        _start(config, verbose)
    try:
        yield
    finally:
        ray.shutdown()


def _start(config: ClusterConfig, verbose: bool) -> None:
    import ray

    address = config.address or os.environ.get("RAY_ADDRESS")
    os.environ[OWN_RAY] = "0" if address else "1"
    level = logging.INFO if verbose else logging.ERROR
    if address:
        try:
            ray.init(address=address, logging_level=level, log_to_driver=verbose)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"Ray at {address} does not answer ({type(error).__name__}); check cluster.address or RAY_ADDRESS, "
                "and RAY_AUTH_MODE=token where the head asks for it"
            ) from None
    else:
        _check_memory(config)
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
    hold `part`: Ray's core says which level it was given before that level counts."""
    sys.stderr.flush()
    before = os.dup(_STDERR)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        try:
            yield
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
    for name in (
        "ray",
        "ray.data",
        "ray.train",
        "ray.serve",
        "vllm",
        "transformers",
        "deepspeed",
        "DeepSpeed",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
