"""Settings of the trainings: what each optimizes, and how they share the devices."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from psycho.config.inference import ENVIRONMENT
from psycho.config.section import Section


class LoopConfig(Section):
    """One pass of the DeepSpeed loop."""

    lr: float = Field(..., gt=0, description="learning rate at its peak, after the warm-up")
    epochs: int = Field(1, ge=1, description="passes over the pairs; online over those of each round")
    batch_size: int = Field(..., ge=1, description="examples or pairs in an optimizer step, over all workers")
    warmup_share: float = Field(
        0.05, ge=0, lt=1, description="share of the steps (online: of a round's) in which the rate rises to lr"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine",
        description="learning rate after the warm-up; cosine, linear: falls to 0 by the end (online: of each round); "
        "constant: stays at lr",
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; 0: none")
    max_grad_norm: float = Field(1.0, gt=0, description="a step's gradient is shortened to at most this norm")


class SFTConfig(LoopConfig):
    """Supervised fine-tuning on each train speech's best responses."""

    lr: float = Field(1e-5, gt=0, description="learning rate at its peak, after the warm-up")
    batch_size: int = Field(64, ge=1, description="examples in an optimizer step, over all workers")
    epochs: int = Field(2, ge=1, description="passes over the examples")
    prompt_loss_weight: float = Field(
        0.0, ge=0, le=1, description="of the prompt's tokens, next to 1 of the answer's; 0: only answers are learned"
    )
    min_overall: float = Field(
        4.0, ge=1, le=5, description="only responses rated at least so; those without ratings pass"
    )


class RewardConfig(LoopConfig):
    """Reward model (paper, section 4.1)."""

    lr: float = Field(9e-6, gt=0, description="learning rate at its peak, after the warm-up (paper)")
    batch_size: int = Field(128, ge=1, description="pairs in an optimizer step, over all workers (paper)")
    epochs: int = Field(2, ge=1, description="passes over the pairs (paper)")
    init: str = Field("policy", description="policy: the base policy; or a model of its own")
    loss: Literal["bradley_terry", "plackett_luce"] = Field(
        "bradley_terry",
        description="plackett_luce: a speech's pairs as one ranking (pairs.min_gap 0: of all that differ)",
    )
    average: Literal["pairs", "speeches"] = Field(
        "pairs", description="the loss is the mean over pairs; speeches: each counts one, whatever its number of pairs"
    )
    margin_per_gap: float = Field(0.0, ge=0, description="the margin asked for is this times the pair's gap")
    centring: float = Field(0.0, ge=0, description="weight of (r_c + r_r)^2, which keeps rewards around zero")
    principle_heads: float = Field(0.0, ge=0, description="weight of learning the seven ratings beside; 0: no heads")


class PreferenceConfig(LoopConfig):
    """What offline and online DPO share (Rafailov et al. 2023; paper, section 4.2)."""

    lr: float = Field(5e-7, gt=0, description="learning rate at its peak, after the warm-up (paper, online)")
    batch_size: int = Field(64, ge=1, description="pairs in an optimizer step, over all workers (paper, online)")
    beta: float = Field(
        0.1,
        gt=0,
        description="the lower, the farther the policy may go from the reference (paper); ipo: the margin aimed at is "
        "1/(2 beta); simpo: times log-probabilities; orpo: weight of the odds ratio",
    )
    loss: Literal["dpo", "plackett_luce", "ipo", "hinge", "robust", "dpo_norm", "simpo", "orpo"] = Field(
        "dpo", description="plackett_luce: DPO on a speech's pairs as one ranking"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong (dpo, robust, simpo)"
    )
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl",
        description="distance to the reference (Wang et al. 2023); reverse_kl: DPO's own; forward_kl; js: "
        "Jensen-Shannon; alpha: by f_alpha; simpo and orpo have none",
    )
    f_alpha: float = Field(0.5, gt=0, description="of the alpha divergence; 1 is reverse_kl")
    simpo_gamma: float = Field(0.5, ge=0, description="SimPO's target margin")
    ld_alpha: float = Field(1.0, ge=0, le=1, description="weight of tokens beyond the length both sides share")
    nll_weight: float = Field(0.0, ge=0, description="weight of the chosen response's negative log-likelihood")

    @model_validator(mode="after")
    def _rankings(self) -> PreferenceConfig:
        pairwise = {"label_smoothing": self.label_smoothing > 0, "ld_alpha": self.ld_alpha < 1}
        given = [name for name, there in pairwise.items() if there]
        if self.loss == "plackett_luce" and given:
            raise ValueError(f"{given[0]} is about pairs and loss plackett_luce about rankings; leave one of them out")
        if self.label_smoothing and self.loss not in ("dpo", "robust", "simpo"):
            raise ValueError(f"label_smoothing is of the losses dpo, robust and simpo, not of {self.loss}; set it to 0")
        if self.f_divergence != "reverse_kl" and not self.needs_reference:
            raise ValueError(
                f"f_divergence is the distance to a reference, and loss {self.loss} has none; leave it out"
            )
        return self

    @property
    def needs_reference(self) -> bool:
        """True where the loss compares with a reference policy."""
        return self.loss not in ("simpo", "orpo")


class DPOConfig(PreferenceConfig):
    """Offline DPO; `init` is the policy it starts from, which is also its reference."""

    init: Literal["base", "sft"] = Field("base", description="base: the policy (paper); sft: what SFT made of it")


class LoRAConfig(Section):
    """Low-rank adapters instead of all weights; what is saved is merged."""

    r: int = Field(16, ge=1, description="rank of each adapter")
    alpha: int = Field(32, ge=1, description="what an adapter adds is times alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's inputs that are 0 in a training step")
    target_modules: tuple[str, ...] = Field((), description="none: every linear layer")
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4: the frozen weights in 4 bit (QLoRA), on a GPU and with the package bitsandbytes"
    )


TRAINING_ROUNDING = frozenset({
    "workers", "zero_stage", "offload_optimizer", "offload_parameters", "gradient_checkpointing", "gpus_per_worker",
    "env", "checkpoint_every_steps", "max_failures", "start_timeout_s", "collective_timeout_s", "cpus_per_worker",
    "threads_per_worker", "peak_tflops", "sequence_parallel", "bin_tokens",
})  # fmt: skip
"""Settings of training that change nothing but the rounding: an interrupted one goes on after they were changed.

Bins under a group's size split it, which makes other steps: from then on it starts anew.
"""


class TrainingConfig(Section):
    """Where and how all models are trained: Ray Train workers, DeepSpeed ZeRO, precision."""

    workers: int = Field(8, ge=1, description="Ray Train workers; each is a rank of DeepSpeed")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each asks Ray for, which only counts them")
    gpus_per_worker: float = Field(
        1.0, ge=0, description="GPUs that each asks Ray for; below 1: it shares one; 0: none, with device cpu"
    )
    device: Literal["cuda", "cpu"] = Field("cuda", description="where workers compute; cuda: with NCCL; cpu: with gloo")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: weights and gradients in 16 bits, the optimizer in fp32; fp32: all of it"
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        2, description="what workers divide; 0: nothing, 1: the optimizer's states, 2: gradients too, 3: weights too"
    )
    offload_optimizer: bool = Field(False, description="its states to the host's memory")
    offload_parameters: bool = Field(False, description="to the host's memory; needs zero_stage 3")
    gradient_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass: less memory, more time"
    )
    bin_tokens: int = Field(16384, ge=32, description="tokens a worker handles at once; at least twice max_length")
    sequence_parallel: int = Field(
        1, ge=1, description="workers that share the tokens of each bin (Ulysses), for transcripts too long for one"
    )
    checkpoint_every_steps: int | None = Field(100, ge=1, description="an interrupted training goes on from the last")
    max_failures: int = Field(0, ge=0, description="worker failures (a spot node that goes) after which it goes on")
    keep: Literal["last", "best"] = Field("last", description="best: lowest loss on the dev pairs (pairs.dev_share)")
    peak_tflops: float | None = Field(None, gt=0, description="of a worker's device, for the statistic mfu")
    packing: bool = Field(True, description="encode a prompt once for all its responses; off: a padded row each")
    lora: LoRAConfig | None = Field(None, description="none: all weights are trained")
    threads_per_worker: int | None = Field(None, ge=1, description="CPU threads of torch")
    max_length: int = Field(2048, ge=16, description="tokens of prompt and response")
    start_timeout_s: float = Field(900, gt=0, description="longest wait for the workers to start")
    collective_timeout_s: float = Field(
        1800,
        gt=0,
        description="longest wait of a worker for the others; online DPO raises it to what a round of samples may take",
    )
    env: dict[str, str | None] = Field(default_factory=dict, repr=False, description=ENVIRONMENT)
    sft: SFTConfig = SFTConfig()
    reward: RewardConfig = RewardConfig()
    dpo: DPOConfig = DPOConfig()

    @model_validator(mode="after")
    def _room(self) -> TrainingConfig:
        if self.bin_tokens < 2 * self.max_length:
            raise ValueError(
                f"bin_tokens {self.bin_tokens} is under twice max_length {self.max_length}, so a pair may not fit; "
                "raise it or lower max_length"
            )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3; set it or switch offload_parameters off")
        if self.workers % self.sequence_parallel:
            raise ValueError(
                f"sequence_parallel {self.sequence_parallel} does not divide the {self.workers} workers; change one"
            )
        if self.sequence_parallel > 1 and not self.packing:
            raise ValueError("sequence_parallel needs packing; switch it on or set sequence_parallel to 1")
        if self.lora and self.lora.quantize and self.device == "cpu":
            raise ValueError("lora.quantize needs a GPU, and device is cpu; set lora.quantize to null")
        if self.lora and self.lora.quantize and self.zero_stage == 3:
            raise ValueError(
                "lora.quantize does not go with zero_stage 3, which cuts weights that are in 4 bit; set zero_stage to 2"
            )
        return self
