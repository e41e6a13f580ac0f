"""Cleaning batches on all CPUs of the cluster, in order, with a few in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from psycho.config import SpeechesConfig
from psycho.errors import WaitTimedOut
from psycho.speeches.clean import Cleaned, clean_batch
from psycho.speeches.prepare import Batches

_LEAST_IN_FLIGHT = 8  # a cluster that grows may show no CPU yet


def clean_on_ray(batches: Batches, config: SpeechesConfig, seed: int) -> Iterator[Cleaned]:
    """`clean_batch` of each batch, in order; Ray tries a batch again when its worker dies.

    Raises:
        WaitTimedOut: a batch took longer than `speeches.batch_timeout_s`.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(clean_batch)
    settings = ray.put(config)
    window = max(_LEAST_IN_FLIGHT, 3 * int(ray.cluster_resources().get("CPU", 0)))
    pending: deque[Any] = deque()
    for batch in batches:
        pending.append(task.remote(batch, settings, seed))
        if len(pending) >= window:
            yield _result(pending.popleft(), config.batch_timeout_s)
    while pending:
        yield _result(pending.popleft(), config.batch_timeout_s)


def _result(reference: Any, timeout_s: float) -> Cleaned:
    import ray

    try:
        cleaned: Cleaned = ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise WaitTimedOut("a batch of speeches to be cleaned", timeout_s, "speeches.batch_timeout_s") from None
    return cleaned
