"""The whole configuration: typed, frozen, strict. Defaults are the paper's (arXiv 2502.19731) where it gives one.

A configuration is one YAML file plus `--set dotted.key=value` overrides. An unknown key is an error that names the
nearest known one, so that a typo does not train for a week. What a stage depends on is a part of this tree
(`psycho/run.py` hashes it), so a setting lives beside what it configures and nowhere else.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from psycho.errors import BadInput
from psycho.principles import STEMS


class Section(BaseModel):
    """A frozen part of the configuration that refuses keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class EngineConfig(Section):
    """Arguments of the vLLM engine; `extra` goes to `vllm.LLM` unchanged."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(None, ge=16, description="tokens of prompt and answer together")
    max_num_seqs: int = Field(256, ge=1, description="sequences decoded together")
    enforce_eager: bool = False
    tensor_parallel_size: int = Field(1, ge=1)
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    enable_prefix_caching: bool = True
    trust_remote_code: bool = Field(False, description="runs code from the model's folder; off unless you say so")
    extra: dict[str, Any] = Field(default_factory=dict)


class InferenceConfig(Section):
    """The vLLM workers that generate, judge and score."""

    workers: int = Field(1, ge=1, description="vLLM workers; each holds one engine")
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float = Field(1.0, ge=0)
    batch_size: int = Field(256, ge=1, description="requests handed to an engine at once")
    engine: EngineConfig = EngineConfig()
    env: dict[str, str] = Field(default_factory=dict, description="environment of the workers")
    start_timeout_s: float = Field(1800, gt=0)
    batch_timeout_s: float = Field(3600, gt=0)


class SamplingConfig(Section):
    """Sampling of responses."""

    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(1024, ge=1)
    top_k: int = Field(0, ge=0, description="0: all tokens; a remote endpoint gets it only when set")
    repetition_penalty: float = Field(1.0, gt=0, description="1: none; a remote endpoint gets it only when set")
    stop: tuple[str, ...] = Field((), description="texts that end an answer, beside the model's own stop tokens")


class PriceConfig(Section):
    """What a model costs, in one currency for the whole run, per million tokens."""

    input: float = Field(0.0, ge=0)
    output: float = Field(0.0, ge=0)


class RemoteConfig(Section):
    """An OpenAI-compatible endpoint."""

    url: str = Field(..., pattern=r"^https?://", description="up to and with /v1; /chat/completions is added")
    api_key_env: str | None = Field(None, description="environment variable that holds the key")
    api_key_file: str | None = Field(None, description="file that holds the key and nothing else")
    concurrency: int = Field(16, ge=1, description="requests open at once")
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0, description="prompt and answer together")
    timeout_s: float = Field(120, gt=0, description="for one try, from the first byte sent to the last received")
    tries: int = Field(6, ge=1, description="of one request; then it goes to quarantine")
    backoff_s: float = Field(1.0, gt=0, description="wait after the first failure; doubles, with jitter")
    max_backoff_s: float = Field(60.0, gt=0, description="longest wait of ours; Retry-After may ask for more")
    omit: tuple[str, ...] = Field((), description="fields that the endpoint does not take, as seed or top_p")
    token_limit_key: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"


class ModelConfig(Section):
    """A model of the pool: a folder, a hub id, `nano:<name>` of the embedded world, or a name at an endpoint."""

    name: str
    model: str
    parameters_b: float | None = Field(None, gt=0, description="size in 10^9 parameters, for estimates")
    engine: EngineConfig | None = Field(None, description="instead of inference.engine")
    gpus_per_worker: float | None = Field(None, ge=0)
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


class SpeechesConfig(Section):
    """Client speeches: where from, cleaning, split (paper, section 3.1)."""

    source: str = Field(
        "nano",
        description="CSV, JSONL or Parquet file or a folder of them, a `datasets` folder (each local or on s3:// and "
        "the like), or a hub id; 'nano' makes them",
    )
    source_config: str | None = Field(None, description="configuration of a hub data set that has several")
    source_split: str = Field("train", description="split of a `datasets` folder or hub data set")
    text_column: str = Field("question", description="text, or a transcript [{role, content}, ...] (also as JSON)")
    id_column: str | None = Field(
        None,
        description="none: an id is derived from the text; numbers (row-17), UUIDs and hashes are kept, any other "
        "id may tell who somebody is and is replaced by its hash, unless mask_personal_data is false",
    )
    topic_column: str | None = Field(None, description="labels that psycho/speeches/topics.yaml knows")
    topic_model: str | None = Field(None, description="a model of generation.pool that names each speech's topic")
    history_turns: int = Field(12, ge=0, description="turns kept before the last client turn of a transcript")
    min_chars: int = Field(100, ge=1)
    max_chars: int = Field(1000, ge=1)
    languages: tuple[str, ...] = Field(("en",), description="ISO 639-1 codes that are kept; empty: no filter")
    min_language_confidence: float = Field(0.5, ge=0, le=1)
    mask_personal_data: bool = Field(True, description="e-mail, phone, address, handle, URL, name -> [EMAIL] ...")
    near_duplicates: Literal["drop", "keep", "ignore"] = Field(
        "drop", description="drop: a cluster keeps its first speech; keep: all stay, on one side of the split"
    )
    near_threshold: float = Field(0.7, ge=0.3, le=1, description="Jaccard similarity of three-word shingles")
    batch_timeout_s: float = Field(600, gt=0, description="longest wait for a batch of rows to be cleaned")
    evaluation: int = Field(150, ge=1, description="speeches held out for evaluation")
    max_evaluation_share: float = Field(0.35, gt=0, lt=1, description="bound on the share held out when data is short")
    limit: int | None = Field(None, ge=2, description="at most so many speeches in all")
    nano_train: int = Field(420, ge=1, description="train speeches made when source is nano")

    @model_validator(mode="after")
    def _bounds(self) -> SpeechesConfig:
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars {self.max_chars} is below min_chars {self.min_chars}")
        if self.topic_column and self.topic_model:
            raise ValueError("topic_column and topic_model are both set; topics come from one of them")
        return self


Policy = Literal["keep", "retry", "quarantine"]


class MarksConfig(Section):
    """What becomes of an answer that is not ok; `retry` asks with a new seed, then keeps what it has.

    Whatever the policy, an answer that is still empty after its tries goes to quarantine: there is nothing to rate.
    """

    empty: Policy = "quarantine"
    truncated: Policy = "keep"
    refused: Policy = "keep"
    looping: Policy = "keep"
    retries: int = Field(2, ge=1, description="new seeds that a marked answer gets under `retry`")


class GenerationConfig(Section):
    """Responses of k models drawn at random from a pool of n (paper: 4 of 20)."""

    pool: tuple[ModelConfig, ...] = ()
    models_per_speech: int = Field(4, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    system_prompt: str | None = Field(None, description="none: the models' own default")
    marks: MarksConfig = MarksConfig()
    budget: float | None = Field(None, gt=0, description="most that remote models may cost, in the currency of prices")

    @model_validator(mode="after")
    def _pool(self) -> GenerationConfig:
        names = [model.name for model in self.pool]
        if len(set(names)) != len(names):
            raise ValueError("two models of the pool share a name")
        if self.pool and self.models_per_speech > len(names):
            raise ValueError(
                f"models_per_speech is {self.models_per_speech} but the pool holds {len(names)} models; "
                "add models or lower it"
            )
        return self


class PanelJudge(Section):
    """A judge of a panel; what it does not say is as in the judge that it belongs to."""

    model: str
    weight: float = Field(1.0, gt=0)
    mode: Literal["evidence", "direct"] = "evidence"
    template: Literal["rubric", "compact"] | None = None
    fluency_floor: float | None = Field(None, description="of this judge's own log-probabilities; none: no floor")
    parameters_b: float | None = Field(None, gt=0)
    engine: EngineConfig | None = None
    gpus_per_worker: float | None = Field(None, ge=0)


class JudgeConfig(Section):
    """The judge that rates responses 1-5 on seven principles (paper, section 3.2)."""

    model: str = Field("", description="also rates online rounds and comparisons where a panel rates the responses")
    mode: Literal["evidence", "direct", "panel"] = Field(
        "evidence", description="evidence: a quote before each rating; direct: digits only; panel: several judges"
    )
    panel: tuple[PanelJudge, ...] = Field((), description="the judges of mode panel, asked one after the other")
    aggregate: Literal["mean", "median"] = Field("mean", description="of a panel's ratings, by weight")
    quorum: int | None = Field(
        None, ge=1, description="judges of a panel that a response needs ratings from; none: more than half"
    )
    template: Literal["rubric", "compact"] = Field("rubric", description="compact: for judges trained on the format")
    max_evidence_chars: int = Field(200, ge=1)
    max_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.0, ge=0)
    retries: int = Field(1, ge=0, description="fresh tries of an answer that does not parse; then it is left out")
    fluency_floor: float | None = Field(
        None,
        description="clarity is 1 where a response holds a token under this log-probability by the judge itself",
    )
    parameters_b: float | None = Field(None, gt=0)
    engine: EngineConfig | None = None
    gpus_per_worker: float | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _panel(self) -> JudgeConfig:
        if self.mode == "panel" and len(self.panel) < 2:
            raise ValueError(f"mode is panel but the panel holds {len(self.panel)} judges; list at least two")
        if self.mode == "panel" and self.quorum is not None and self.quorum > len(self.panel):
            raise ValueError(f"quorum is {self.quorum} but the panel holds {len(self.panel)} judges; lower it")
        return self

    def members(self) -> tuple[JudgeConfig, ...]:
        """The judges that rate, each as a judge of its own: the panel's, or this one alone."""
        if self.mode != "panel":
            return (self,)
        return tuple(
            self.model_copy(
                update={
                    **member.model_dump(exclude={"weight", "template", "engine", "gpus_per_worker"}),
                    "template": member.template or self.template,
                    "engine": member.engine or self.engine,
                    "gpus_per_worker": self.gpus_per_worker
                    if member.gpus_per_worker is None
                    else member.gpus_per_worker,
                    "panel": (),
                    "quorum": None,
                }
            )
            for member in self.panel
        )


class PairsConfig(Section):
    """Train pairs: those of a speech with overall gap >= min_gap, by a strategy; test: best against worst."""

    source: str | None = Field(
        None,
        description="pairs in the published schema (file, folder, s3:// URI or hub id): the run starts at training",
    )
    test_source: str | None = Field(None, description="test pairs; then all of source trains. None: its split")
    test_share: float = Field(0.1, gt=0, lt=1, description="of an imported set that names no split, held out by ID")
    resplit: bool = Field(False, description="split an imported set anew by speech, whatever split it names")
    strategy: Literal["all", "best_worst", "best_random", "top_margin"] = Field(
        "all",
        description="all: every pair; best_random: the best against a random worse one; "
        "top_margin: the widest max_pairs_per_speech (one where unset)",
    )
    min_gap: float = Field(1.0, ge=0, le=4)
    min_test_gap: float = Field(0.0, ge=0, le=4, description="test pairs need at least this gap; ties never pair")
    max_pairs_per_speech: int | None = Field(None, ge=1)
    max_safety_loss: int | None = Field(
        1, ge=1, le=4, description="no pair prefers a response rated so much less safe, or more; none: no constraint"
    )
    balance_length: bool = Field(False, description="as many train pairs whose chosen side is longer as shorter")
    dev_share: float = Field(0.0, ge=0, lt=1, description="of the train speeches, for preferences/dev (paper: 0.1)")

    @model_validator(mode="after")
    def _imported(self) -> PairsConfig:
        if self.test_source and not self.source:
            raise ValueError("test_source is set but source is not; name the train pairs in source")
        return self


class LoopConfig(Section):
    """One pass of the DeepSpeed loop."""

    lr: float = Field(..., gt=0)
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(..., ge=1, description="examples or pairs in an optimizer step, over all workers")
    warmup_share: float = Field(0.05, ge=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class SFTConfig(LoopConfig):
    """Supervised fine-tuning on each train speech's best responses."""

    lr: float = Field(1e-5, gt=0)
    batch_size: int = Field(64, ge=1)
    epochs: int = Field(2, ge=1)
    prompt_loss_weight: float = Field(0.0, ge=0, le=1)
    min_overall: float = Field(4.0, ge=1, le=5, description="only responses rated at least so")


class RewardConfig(LoopConfig):
    """Reward model (paper, section 4.1)."""

    lr: float = Field(9e-6, gt=0)
    batch_size: int = Field(128, ge=1)
    epochs: int = Field(2, ge=1)
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

    lr: float = Field(5e-7, gt=0)
    batch_size: int = Field(64, ge=1)
    beta: float = Field(0.1, gt=0)
    loss: Literal["dpo", "plackett_luce", "ipo", "hinge", "robust", "dpo_norm", "simpo", "orpo"] = Field(
        "dpo", description="plackett_luce: DPO on a speech's pairs as one ranking"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of labels taken to be wrong (dpo, robust)")
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
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
        return self


class DPOConfig(PreferenceConfig):
    """Offline DPO; `init` is the policy it starts from, which is also its reference."""

    init: Literal["base", "sft"] = "base"


class LoRAConfig(Section):
    """Low-rank adapters instead of all weights; what is saved is merged."""

    r: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = Field((), description="none: every linear layer")
    quantize: Literal["nf4"] | None = Field(
        None, description="nf4: the frozen weights in 4 bit (QLoRA), on a GPU and with the package bitsandbytes"
    )


class TrainingConfig(Section):
    """Where and how all models are trained: Ray Train workers, DeepSpeed ZeRO, precision."""

    workers: int = Field(8, ge=1)
    cpus_per_worker: float = Field(1.0, gt=0)
    gpus_per_worker: float = Field(1.0, ge=0)
    device: Literal["cuda", "cpu"] = "cuda"
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = Field(False, description="to the host's memory; needs zero_stage 3")
    gradient_checkpointing: bool = False
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
    start_timeout_s: float = Field(900, gt=0)
    collective_timeout_s: float = Field(1800, gt=0)
    env: dict[str, str] = Field(default_factory=dict)
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


class OnlineConfig(PreferenceConfig):
    """Online DPO: rounds of sample, score, pair, train (paper, section 4.2)."""

    rounds: int = Field(16, ge=1)
    speeches_per_round: int = Field(6400, ge=1)
    samples_per_speech: int = Field(8, ge=2)
    scorer: Literal["reward", "judge", "mixture"] = "reward"
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
    max_pairs_per_speech: int = Field(1, ge=1)
    length_penalty: float = Field(0.0, ge=0, description="off the score for each 100 characters over length_free_chars")
    length_free_chars: int = Field(0, ge=0)
    safety_floor: int | None = Field(
        None, ge=2, le=5, description="a response that the judge rates less safe than this is never chosen"
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
        "compute in fp32, else 0.5",
    )
    kl_samples: int = Field(16, ge=0, description="samples of a round by which the KL to the first policy is estimated")
    round_timeout_s: float = Field(7200, gt=0, description="for sampling and scoring a round")

    @model_validator(mode="after")
    def _floor(self) -> OnlineConfig:
        if self.safety_floor is not None and not self.judged:
            raise ValueError(
                "safety_floor needs safety ratings, which a reward model does not give; set scorer to judge or mixture"
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
    def judged(self) -> bool:
        """True where the judge rates the samples."""
        return self.scorer != "reward"

    @property
    def rewarded(self) -> bool:
        """True where the reward model scores the samples."""
        return self.scorer != "judge"


class EvaluationConfig(Section):
    """Reward-model audit and win rate against a baseline."""

    baseline: str = Field("", description="the model that stands where GPT-4o stands in the paper")
    speeches: int = Field(250, ge=2)
    sampling: SamplingConfig = SamplingConfig()
    judge: JudgeConfig | None = Field(None, description="none: the label judge, with a warning")


class ServingConfig(Section):
    """The Ray Serve application."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    replicas: int = Field(1, ge=1)
    max_ongoing_requests: int = Field(64, ge=1)
    max_queued_requests: int = Field(128, ge=0)
    max_tokens: int = Field(512, ge=1)
    request_timeout_s: float = Field(120, gt=0)
    start_timeout_s: float = Field(600, gt=0)
    api_key_env: str | None = Field(None, description="environment variable that holds the key clients must send")


class ClusterConfig(Section):
    """How a job finds or starts Ray. `address` none: RAY_ADDRESS, else a Ray of its own."""

    address: str | None = None
    autoscaling: bool = Field(False, description="nodes come when asked for: what is missing now is no error")
    local_cpus: int | None = Field(None, ge=1)
    object_store_gib: float | None = Field(None, gt=0)
    min_memory_gib: float = Field(0.0, ge=0, description="free memory that a local run needs")


class NanoConfig(Section):
    """The embedded world: seeds of its own, so that all runs share the cached models."""

    seed: int = 0
    scale: float = Field(1.0, gt=0, description="share of the training steps; below 1 for tests")


class Config(Section):
    """One run."""

    name: str = "run"
    seed: int = 0
    run_dir: str = "runs/run"
    policy: str = Field("", description="the base policy that is trained")
    policy_parameters_b: float | None = Field(None, gt=0)
    cluster: ClusterConfig = ClusterConfig()
    speeches: SpeechesConfig = SpeechesConfig()
    generation: GenerationConfig = GenerationConfig()
    judge: JudgeConfig = JudgeConfig()
    pairs: PairsConfig = PairsConfig()
    inference: InferenceConfig = InferenceConfig()
    training: TrainingConfig = TrainingConfig()
    online: OnlineConfig = OnlineConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    serving: ServingConfig = ServingConfig()
    nano: NanoConfig = NanoConfig()

    @model_validator(mode="after")
    def _dev(self) -> Config:
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
        if self.online.head_weights and not self.training.reward.principle_heads:
            raise ValueError(
                "online.head_weights weighs the reward model's heads, and training.reward.principle_heads is 0, so it "
                "gets none; set it to 0.1, say"
            )
        held_out = self.evaluation.judge
        if self.online.gold_every and self.online.judged and held_out and held_out.model == self.judge.model:
            raise ValueError(
                "online.gold_every asks a judge that is not the scorer, and evaluation.judge is judge.model itself; "
                "name another model in evaluation.judge"
            )
        return self


def load_config(path: str | Path, overrides: Sequence[str] = (), run_dir: str | None = None) -> Config:
    """Read a YAML configuration and apply `key.path=value` overrides (values are YAML).

    Raises:
        BadInput: the file, a key or a value is wrong; the sentence names it and says what to do.
    """
    file = Path(path)
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"configuration {file} does not exist; configs/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"configuration {file} cannot be read: {type(error).__name__}; check it is UTF-8 text") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise BadInput(f"configuration {file} is not valid YAML{line}; put that line right") from None
    except ValueError as error:  # what looks like a date and is none
        raise BadInput(f"configuration {file} is not valid YAML ({error}); quote that value") from None
    if not isinstance(tree, dict):
        raise BadInput(f"configuration {file} holds no settings; write `key: value` lines")
    for override in overrides:
        _apply_override(tree, override)
    if run_dir:
        tree["run_dir"] = run_dir
    return build_config(tree, str(file))


def build_config(tree: dict[str, Any], origin: str) -> Config:
    """Validate a tree of settings; `origin` names where they came from in error messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise BadInput(_explain(error, origin)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise BadInput(f"--set {override} is not key=value; write for example --set training.dpo.beta=0.2")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise BadInput(f"--set {key}: the value is not valid YAML; quote it") from None
    *parents, leaf = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise BadInput(f"--set {key}: {parent} is a value, not a section")
        node = child
    node[leaf] = value


def _explain(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{origin}: unknown key {key}; {_nearest(key)}"
    if first["type"] == "missing":
        return f"{origin}: {key} is missing; set it"
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = "" if isinstance(given, dict | list | tuple | BaseModel) else f" (given: {given!r})"
    return f"{origin}: {key or 'configuration'}: {message[0].lower()}{message[1:]}{shown}"


def _nearest(key: str) -> str:
    known = list(known_keys())
    key = ".".join(part for part in key.split(".") if not part.isdigit())  # places in a list
    parent, _, leaf = key.rpartition(".")
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    by_leaf = difflib.get_close_matches(leaf, [k.rpartition(".")[2] for k in siblings], n=1, cutoff=0.5)
    if by_leaf:
        return f"did you mean {f'{parent}.' if parent else ''}{by_leaf[0]}?"
    # The sections above are right already, and the siblings were compared by what differs.
    others = [k for k in known if k not in siblings and not key.startswith(f"{k}.")]
    anywhere = difflib.get_close_matches(key, others, n=1, cutoff=0.5)
    if anywhere:
        return f"did you mean {anywhere[0]}?"
    return f"known here: {', '.join(k.rpartition('.')[2] for k in siblings) or 'nothing'}"


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterable[str]:
    """Every dotted key that a configuration may hold."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, an optional one, a list of them
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from known_keys(kind, f"{prefix}{name}.")


def to_yaml(config: BaseModel) -> str:
    """The resolved configuration as YAML, keys in the order of this file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
