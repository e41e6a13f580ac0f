"""What a vLLM engine is made with: its arguments by kind of model, and the calls of ours that its own workers know."""

from __future__ import annotations

from typing import Any

from psycho.config import EngineConfig


class WeightReload:
    """Mixed into vLLM's own worker (`worker_extension_cls`), beside the model's weights."""

    def take_weights(self, folder: str) -> None:
        """New weights in place."""
        self.reload_weights(weights_path=folder)  # type: ignore[attr-defined]
        self.renew_head()

    def renew_head(self) -> None:
        """The output head's packed copy after new weights.

        On a CPU vLLM 0.29 multiplies by a packed copy of the output head. Where the head is tied to the embedding no
        weight of its own is loaded, so that new weights alone would leave the former model's head in the copy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
                module.quant_method.process_weights_after_loading(module)


def engine_arguments(engine: EngineConfig, runner: str, seed: int) -> dict[str, Any]:
    """Arguments of vLLM's engine for a policy or judge (`generate`) or a reward model (`pooling`)."""
    import torch

    arguments: dict[str, Any] = {
        "dtype": engine.dtype,
        "max_num_seqs": engine.max_num_seqs,
        "enforce_eager": engine.enforce_eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "gpu_memory_utilization": engine.gpu_memory_utilization,
        "trust_remote_code": engine.trust_remote_code,
        "seed": seed,
        "disable_log_stats": True,
    }
    if not torch.cuda.is_available():
        # A prompt prefilled in two parts rewinds its request's generator, which a CPU generator cannot do.
        arguments["enable_chunked_prefill"] = False
    if engine.max_model_len is not None:
        arguments["max_model_len"] = engine.max_model_len
    if runner == "pooling":
        from vllm.config import PoolerConfig

        # As in `labels`: what is asked for here must be what the requests ask for.
        arguments |= {"runner": "pooling", "pooler_config": PoolerConfig(use_activation=False)}
    else:
        arguments["enable_prefix_caching"] = engine.enable_prefix_caching
    return arguments | engine.extra
