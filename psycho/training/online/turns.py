"""Turns on the GPUs that engines and training share (`online.placement: colocate`); elsewhere nothing happens here.

The engines sleep while the policy trains. They wake in two steps, so that the new weights arrive before the cache takes
the rest of the memory. How much of the first GPU is in use after each step is noted: an engine that does not give its
memory back shows there, before it is the reason of a failure.
"""

from __future__ import annotations

from typing import Any

import torch

from psycho.config import Config
from psycho.training.online.engines import Engines
from psycho.training.online.ranks import on_first, together


class Turns:
    """Every rank calls each method; rank 0 talks to the engines while the others wait."""

    def __init__(self, config: Config, engines: Engines) -> None:
        self._on, self._level = config.online.placement == "colocate", config.online.sleep_level
        self._engines = engines
        self.gpu_gib: dict[str, float] = {}

    def rest(self) -> None:
        """The engines give their memory to the training."""
        if self._on:
            self._note("sampling")
            on_first("engines going to sleep", lambda: self._engines.sleep(self._level))
            self._note("asleep")

    def wake_weights(self) -> None:
        """Room for new weights in the engines that sample."""
        if self._on:
            self._note("trained")
            _give_back()
            on_first("engines waking", lambda: self._engines.rollout.wake(["weights"]))

    def wake(self) -> None:
        """All of the engines."""
        if self._on:
            _give_back()
            on_first("engines waking", self._engines.wake)
            self._note("awake")

    def facts(self) -> dict[str, Any]:
        """For the round's report."""
        return {"gpu_gib": dict(self.gpu_gib)} if self.gpu_gib else {}

    def _note(self, step: str) -> None:
        self.gpu_gib[step] = round(used_gib(), 3)


def _give_back() -> None:
    """What the training holds on the GPUs and does not use, which the engines could not have; collective."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    together()  # rank 0 wakes the engines of all GPUs


def used_gib() -> float:
    """Memory in use on this rank's GPU, by whomever."""
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30
