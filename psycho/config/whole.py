"""Settings of the evaluation, the service, the cluster and the nano world, and all settings together."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from psycho.config.data import GenerationConfig, JudgeConfig, PairsConfig, QualityConfig, SpeechesConfig
from psycho.config.inference import SIZE, InferenceConfig, SamplingConfig
from psycho.config.online import OnlineConfig
from psycho.config.section import Section
from psycho.config.training import TrainingConfig

NO_HELD_OUT = (
    "online.gold_every needs a judge that is not the scorer; name its model in evaluation.judge.model, or unset "
    "online.gold_every"
)


class EvaluationConfig(Section):
    """Reward-model audit and win rate against a baseline."""

    baseline: str = Field("", description="the model that stands where GPT-4o stands in the paper")
    speeches: int = Field(250, ge=2, description="held-out speeches that every policy and the baseline answer, at most")
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig | None = Field(None, description="none: the label judge, with a warning")

    @model_validator(mode="after")
    def _one_judge(self) -> EvaluationConfig:
        if self.judge and self.judge.mode == "panel":
            raise ValueError("evaluation.judge compares alone, and its mode is panel; name one judge, mode evidence")
        return self


class ServingConfig(Section):
    """The Ray Serve application."""

    policy: Literal["best", "sft", "dpo", "online"] = Field(
        "best",
        description="best: by the run's evaluation, the furthest trained where it sets none apart or was not done",
    )
    host: str = Field("127.0.0.1", description="address to listen at; 0.0.0.0: all of the machine's")
    port: int = Field(8000, ge=1, le=65535, description="port to listen at")
    replicas: int = Field(1, ge=1, description="engines of the policy; the reward model has one")
    max_ongoing_requests: int = Field(64, ge=1, description="requests that an engine answers at once")
    max_queued_requests: int = Field(
        128, ge=0, description="requests that wait beside those, of chats and of scores each; more are refused (429)"
    )
    max_tokens: int = Field(512, ge=1, description="of an answer; a request may ask for fewer")
    request_timeout_s: float = Field(120, gt=0, description="for a whole answer, its wait included; then 504")
    start_timeout_s: float = Field(600, gt=0, description="longest wait for the engines to be up and healthy")
    api_key_env: str | None = Field(None, description="environment variable that holds the key clients must send")


class ClusterConfig(Section):
    """How a job finds or starts Ray."""

    address: str | None = Field(None, description="of the cluster to join; none: RAY_ADDRESS, else a Ray of its own")
    autoscaling: bool = Field(False, description="nodes come when asked for: what is missing now is no error")
    local_cpus: int | None = Field(
        None, ge=1, description="CPUs that a Ray of its own counts on, whatever there are; none: the machine's"
    )
    object_store_gib: float | None = Field(
        None, gt=0, description="shared memory of a Ray of its own; none: what Ray takes by itself"
    )
    min_memory_gib: float = Field(0.0, ge=0, description="free memory that a local run needs")


class NanoConfig(Section):
    """The embedded world; the settings beside `models` are of `psycho nano --rebuild` alone."""

    models: str | None = Field(
        None, description="folder of nano models that `psycho nano --rebuild` made; none: those that ship"
    )
    seed: int = Field(0, description="of a rebuild: of the first weights and of what is learned from")
    precision: Literal["bf16", "fp32"] = Field("fp32", description="of a rebuild, as training.precision")
    jitter: float = Field(
        0.0, ge=0, description="of a rebuild: noise on the first weights, as the rounding of another machine is"
    )
    scale: float = Field(1.0, gt=0, description="of a rebuild: share of the training steps; below 1 for tests")


class Config(Section):
    """One run."""

    name: str = Field("run", description="in the plan, the report and model cards")
    seed: int = Field(0, description="of all that is drawn: splits, models, samples, pairs, the order of training")
    run_dir: str = Field("runs/run", description="folder of all results, here or on s3:// and the like")
    policy: str = Field("", description="the base policy that is trained; a model as in generation.pool.model")
    policy_parameters_b: float | None = Field(None, gt=0, description=SIZE)
    cluster: ClusterConfig = ClusterConfig()
    speeches: SpeechesConfig = SpeechesConfig()
    generation: GenerationConfig = GenerationConfig()
    judge: JudgeConfig = JudgeConfig()
    pairs: PairsConfig = PairsConfig()
    quality: QualityConfig = QualityConfig()
    inference: InferenceConfig = InferenceConfig()
    training: TrainingConfig = TrainingConfig()
    online: OnlineConfig = OnlineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    nano: NanoConfig = NanoConfig()

    @model_validator(mode="after")
    def _dev(self) -> Config:
        if self.training.keep == "best" and not self.pairs.dev_share:
            raise ValueError(
                "training.keep best chooses by dev pairs, and pairs.dev_share is 0; set it to 0.1, say, or "
                "training.keep to last"
            )
        if self.online.patience is not None and not self.pairs.dev_share:
            raise ValueError("online.patience watches a dev score, and pairs.dev_share is 0; set it to 0.1, say")
        lora = self.training.lora
        if self.online.reference == "fixed" and (self.training.sequence_parallel > 1 or (lora and lora.quantize)):
            setting = "lora.quantize" if lora and lora.quantize else "sequence_parallel"
            raise ValueError(
                f"online.reference fixed keeps a copy of the first policy, which training.{setting} is not made for; "
                "set online.reference to each_round"
            )
        if self.online.gold_every is not None and not self.pairs.dev_share:
            raise ValueError("online.gold_every rates answers to dev speeches, and pairs.dev_share is 0; set it to 0.1")
        if self.online.heads and not self.training.reward.principle_heads:
            setting = "head_weights" if self.online.head_weights else "safety_floor"
            raise ValueError(
                f"online.{setting} asks the reward model's heads, and training.reward.principle_heads is 0, so it "
                f"gets none; set it to 0.1, say, or leave online.{setting} out"
            )
        held_out = self.evaluation.judge
        if self.online.gold_every and not held_out and not self.may_know_truth:
            raise ValueError(NO_HELD_OUT)
        if self.online.gold_every and self.online.judged and held_out and held_out.model == self.judge.model:
            raise ValueError(
                "online.gold_every asks a judge that is not the scorer, and evaluation.judge is judge.model itself; "
                "name another model in evaluation.judge"
            )
        return self

    @property
    def may_know_truth(self) -> bool:
        """True where speeches may be of the nano world, whose truth is known: it makes them, or its models train."""
        return (self.speeches.source == "nano" and not self.pairs.source) or self.policy.startswith("nano:")
