"""Which Adam DeepSpeed is told to use: one that this machine has."""

from __future__ import annotations

from typing import Any

import pytest

from psycho.config import DPOConfig, TrainingConfig
from psycho.training import engine

OWN = {"lr", "weight_decay", "betas"}


@pytest.mark.parametrize(
    ("device", "toolkit", "offload", "said"),
    [
        ("cpu", None, False, {"torch_adam": True}),
        ("cuda", "/somewhere", False, {}),
        ("cuda", None, False, {"torch_adam": True, "fused": True}),
        ("cuda", None, True, {}),  # DeepSpeed's for the host
    ],
)
def test_adam_is_compiled_only_where_it_can_be(
    device: str, toolkit: str | None, offload: bool, said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CUDA_HOME", toolkit)
    training = TrainingConfig(device=device, precision="fp32", offload_optimizer=offload)  # type: ignore[arg-type]
    found = engine.deepspeed_config(DPOConfig(), training)["optimizer"]["params"]
    assert {name: value for name, value in found.items() if name not in OWN} == said
