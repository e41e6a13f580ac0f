"""Settings of online DPO."""

from __future__ import annotations

import difflib
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from psycho.config.inference import EngineConfig, SamplingConfig
from psycho.config.training import PreferenceConfig
from psycho.principles import MAX_RATING, MIN_RATING, STEMS


class OnlineConfig(PreferenceConfig):
    """Online DPO: rounds of sample, score, pair, train (paper, section 4.2)."""

    rounds: int = Field(16, ge=1, description="at most; patience may end it earlier (paper: 1,600 steps in all)")
    speeches_per_round: int = Field(
        6400, ge=1, description="train speeches, drawn anew each round; all where they are fewer (paper)"
    )
    samples_per_speech: int = Field(8, ge=2, description="responses of the policy to each speech of a round (paper)")
    scorer: Literal["reward", "judge", "mixture"] = Field(
        "reward",
        description="reward: the reward model's logit (paper); judge: the judge's overall rating; mixture: the sum of "
        "both by their weights",
    )
    reward_weight: float = Field(1.0, gt=0, description="of the reward model's logit in scorer mixture")
    judge_weight: float = Field(1.0, gt=0, description="of the judge's overall rating in scorer mixture")
    head_weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="of the reward model's heads, by principle (safety: 0.5), whose ratings are added to the reward; "
        "needs training.reward.principle_heads",
    )
    strategy: Literal["best_worst", "all", "best_random", "top_margin"] = Field(
        "best_worst", description="best_worst: also the second best against the second worst, and so on; else as pairs"
    )
    min_gap: float = Field(0.0, ge=0, description="in the scorer's units; a tie never pairs")
    max_pairs_per_speech: int | None = Field(
        1, ge=1, description="none: all that the strategy makes, as under strategy all where this is not given"
    )
    length_penalty: float = Field(0.0, ge=0, description="off the score for each 100 characters over length_free_chars")
    length_free_chars: int = Field(0, ge=0, description="characters of a response that length_penalty leaves alone")
    safety_floor: int | None = Field(
        None,
        ge=2,
        le=5,
        description="a response that the judge, or without one the reward model's head of safety, rates less safe than "
        "this is never chosen",
    )
    reference: Literal["each_round", "fixed"] = Field(
        "each_round", description="each_round: the policy that a round starts from; fixed: the one that the job does"
    )
    staleness: Literal[0, 1] = Field(0, description="1: the next round is sampled while this one trains")
    patience: int | None = Field(
        None, ge=1, description="rounds without a better dev score before the end; needs pairs.dev_share"
    )
    gold_every: int | None = Field(
        None,
        ge=1,
        description="rounds between ratings of dev answers by a judge that is not the scorer: evaluation.judge, or in "
        "the nano world the truth; needs pairs.dev_share",
    )
    sampling: SamplingConfig = SamplingConfig()
    scorer_workers: int | None = Field(
        None,
        ge=1,
        description="vLLM workers that score; none: inference.workers, or, where the judge's weights can take turns "
        "with the policy's in one engine, those that sample",
    )
    scorer_gpus_per_worker: float | None = Field(None, ge=0, description="of the reward model; none: as inference")
    scorer_engine: EngineConfig | None = Field(None, description="of the reward model; none: inference.engine")
    placement: Literal["separate", "colocate"] = Field(
        "separate",
        description="colocate: engines and training take turns on the same GPUs, and the engines sleep meanwhile",
    )
    transport: Literal["auto", "disk", "nccl", "ipc"] = Field(
        "auto",
        description="new weights into the engines; auto: from GPU to GPU where each side has whole ones (nccl) or "
        "where they are colocated (ipc), else by the folder on disk",
    )
    sync_bucket_mib: int = Field(1024, ge=1, description="weights sent at once; at least the largest tensor is")
    sleep_level: Literal[1, 2] = Field(
        2, description="of engines that sleep; 1: keep their weights in the host's memory, 2: let go of them"
    )
    probes: int = Field(8, ge=1, description="texts whose log-probabilities must be the trainer's after every sync")
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        description="largest difference of a probe token's log-probability; none: 1e-4 where trainer and engine "
        "compute in fp32 on a CPU, 0.02 where they do on a GPU, else 0.5",
    )
    kl_samples: int = Field(16, ge=0, description="samples of a round by which the KL to the first policy is estimated")
    round_timeout_s: float = Field(7200, gt=0, description="for sampling and scoring a round")

    @model_validator(mode="before")
    @classmethod
    def _every_pair(cls, given: Any) -> Any:
        """Strategy all with the limit that is there for the others would make the one widest pair."""
        if isinstance(given, dict) and given.get("strategy") == "all":
            return {"max_pairs_per_speech": None} | given
        return given

    @model_validator(mode="after")
    def _gap(self) -> OnlineConfig:
        widest = MAX_RATING - MIN_RATING
        if self.scorer == "judge" and not self.length_penalty and self.min_gap > widest:
            raise ValueError(
                f"min_gap {self.min_gap:g} is over {widest}, the widest gap of the ratings that scorer judge goes by, "
                "so that there would be no pair; lower it"
            )
        return self

    @model_validator(mode="after")
    def _heads(self) -> OnlineConfig:
        for stem in self.head_weights:
            if stem not in STEMS:
                near = difflib.get_close_matches(stem, STEMS, 1, 0.0)[0]
                raise ValueError(f"head_weights names {stem}, which is no principle; did you mean {near}?")
        if self.head_weights and not self.rewarded:
            raise ValueError(
                "head_weights weighs heads of the reward model, which scorer judge does not ask; set scorer to reward "
                "or mixture"
            )
        return self

    @property
    def heads(self) -> bool:
        """True where the reward model's heads of the principles are asked."""
        return bool(self.head_weights) or (self.safety_floor is not None and not self.judged)

    @property
    def judged(self) -> bool:
        """True where the judge rates the samples."""
        return self.scorer != "reward"

    @property
    def rewarded(self) -> bool:
        """True where the reward model scores the samples."""
        return self.scorer != "judge"
