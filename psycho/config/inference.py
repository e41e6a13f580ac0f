"""Settings of the engines, of sampling, and of the models that are asked, here or behind an endpoint."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from psycho.config.section import Section

ENGINE_ROUNDING = frozenset(
    {"max_num_seqs", "enforce_eager", "tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching"}
)
"""Settings of an engine that change nothing but the rounding: what one has answered stands after they were changed."""

SIZE = "size in 10^9 parameters, for estimates; none: by its name (8B) or its folder's weights"
"""What every setting of a model's size says."""

ENVIRONMENT = "environment of the workers; null: as this command has it, which keeps secrets out of files and commands"
"""What every setting of an environment says."""


class EngineConfig(Section):
    """Arguments of the vLLM engine; `extra` goes to `vllm.LLM` unchanged."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of weights and computation; auto: vLLM's choice by the model's own"
    )
    max_model_len: int | None = Field(None, ge=16, description="tokens of prompt and answer together")
    max_num_seqs: int = Field(256, ge=1, description="sequences decoded together")
    enforce_eager: bool = Field(False, description="no compiling and no CUDA graphs: starts sooner, decodes slower")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that one engine is split over; 1: not split")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of a GPU's memory that the engine takes, whatever it needs"
    )
    enable_prefix_caching: bool = Field(
        True, description="what prompts begin with alike is computed once; not in a reward model's engine"
    )
    trust_remote_code: bool = Field(False, description="runs code from the model's folder; off unless you say so")
    extra: dict[str, Any] = Field(
        default_factory=dict, description="vLLM's own arguments by its names, but for those that are settings here"
    )

    @model_validator(mode="after")
    def _once(self) -> EngineConfig:
        twice = sorted(self.extra.keys() & type(self).model_fields.keys())
        if twice:
            raise ValueError(f"extra.{twice[0]} is a setting of its own; set {twice[0]} beside extra")
        return self


class InferenceConfig(Section):
    """The vLLM workers that generate, judge and score."""

    workers: int = Field(1, ge=1, description="vLLM workers; each holds one engine")
    cpus_per_worker: float = Field(1.0, ge=0, description="CPUs that each asks Ray for, which only counts them")
    gpus_per_worker: float = Field(
        1.0, ge=0, description="GPUs that each asks Ray for; below 1: it shares one; 0: none, as on CPUs"
    )
    batch_size: int = Field(256, ge=1, description="requests handed to a worker together; it has several such batches")
    engine: EngineConfig = EngineConfig()
    env: dict[str, str | None] = Field(default_factory=dict, repr=False, description=ENVIRONMENT)
    start_timeout_s: float = Field(
        1800, gt=0, description="longest wait for the first answers; models are fetched and engines started meanwhile"
    )
    batch_timeout_s: float = Field(
        3600,
        gt=0,
        description="longest wait for the next answers; workers that stay (evaluation, online DPO) have both together",
    )


class SamplingConfig(Section):
    """Sampling of responses."""

    temperature: float = Field(1.0, ge=0, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest tokens that make up this share; 1: all")
    max_tokens: int = Field(1024, ge=1, description="of an answer, reasoning included; at these it is cut off")
    top_k: int = Field(0, ge=0, description="0: all tokens; a remote endpoint gets it only when set")
    repetition_penalty: float = Field(1.0, gt=0, description="1: none; a remote endpoint gets it only when set")
    stop: tuple[str, ...] = Field((), description="texts that end an answer, beside the model's own stop tokens")


class PriceConfig(Section):
    """What a model costs, in one currency for the whole run, per million tokens."""

    input: float = Field(0.0, ge=0, description="of a million prompt tokens")
    output: float = Field(0.0, ge=0, description="of a million tokens of answers")


class RemoteConfig(Section):
    """An OpenAI-compatible endpoint."""

    url: str = Field(..., pattern=r"^https?://", description="up to and with /v1; /chat/completions is added")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    api_key_file: str | None = Field(None, description="file that holds the key and nothing else")
    concurrency: int = Field(16, ge=1, description="requests open at once")
    requests_per_minute: float | None = Field(None, gt=0, description="evenly spread, each try one; none: no limit")
    tokens_per_minute: float | None = Field(None, gt=0, description="prompt and answer together; none: no limit")
    timeout_s: float = Field(120, gt=0, description="for one try, from the first byte sent to the last received")
    tries: int = Field(6, ge=1, description="of one request; then it goes to quarantine")
    backoff_s: float = Field(1.0, gt=0, description="wait after the first failure; doubles, with jitter")
    max_backoff_s: float = Field(60.0, gt=0, description="longest wait of ours; Retry-After may ask for more")
    omit: tuple[str, ...] = Field((), description="fields that the endpoint does not take, as seed or top_p")
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="field of the request that says sampling.max_tokens, as the endpoint calls it"
    )


class ModelConfig(Section):
    """A model of the pool: a folder, GGUF file, hub id, fetched:smollm2 or nano:<name>, or a name at an endpoint."""

    name: str = Field(..., description="of this entry alone; stands in the data for who answered")
    model: str = Field(
        ...,
        description="folder, GGUF file, hub id (owner/name@revision), fetched:smollm2 or nano:<name>; with remote, its "
        "name there",
    )
    parameters_b: float | None = Field(None, gt=0, description=SIZE)
    engine: EngineConfig | None = Field(None, description="instead of inference.engine")
    gpus_per_worker: float | None = Field(None, ge=0, description="none: inference.gpus_per_worker")
    weight: float = Field(1.0, gt=0, description="how often it is drawn, next to the others' weights")
    sampling: SamplingConfig | None = Field(None, description="instead of generation.sampling")
    system_prompt: str | None = Field(None, description="instead of generation.system_prompt; '' for none")
    template_variables: dict[str, Any] = Field(
        default_factory=dict, description="of the chat template, as enable_thinking: false"
    )
    price: PriceConfig = PriceConfig()
    remote: RemoteConfig | None = Field(None, description="where `model` is served; none: vLLM on this cluster")

    @model_validator(mode="after")
    def _place(self) -> ModelConfig:
        if self.remote and (self.engine or self.gpus_per_worker):
            raise ValueError(f"model {self.name} is remote; engine and gpus_per_worker are for local models")
        return self
