"""What DeepSpeed is told: ZeRO, offload, precision and the optimizer of one loop."""

from __future__ import annotations

from typing import Any

from torch.utils.cpp_extension import CUDA_HOME

from psycho.config import LoopConfig, TrainingConfig


def deepspeed_config(settings: LoopConfig, training: TrainingConfig) -> dict[str, Any]:
    """DeepSpeed's configuration for one loop."""
    zero: dict[str, Any] = {"stage": training.zero_stage}
    if training.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": training.device == "cuda"}
    if training.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": training.device == "cuda"}
    if training.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    # DeepSpeed's own fused Adam is for GPUs, and compiled with CUDA's toolkit; torch's is as fast and needs none.
    adam = {"lr": settings.lr, "weight_decay": settings.weight_decay, "betas": [0.9, 0.95]}
    if training.device == "cpu":
        adam["torch_adam"] = True
    elif not training.offload_optimizer and CUDA_HOME is None:
        adam |= {"torch_adam": True, "fused": True}
    return {
        # The loop itself says where a step ends and by what the loss is divided (`Trainer._step`). Two, because with
        # one DeepSpeed overwrites gradients where it should add them.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": training.precision == "bf16"},
        "optimizer": {"type": "AdamW", "params": adam},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
