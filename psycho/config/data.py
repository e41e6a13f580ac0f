"""Settings of the first half: speeches, responses, ratings and pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from psycho.config.inference import SIZE, EngineConfig, ModelConfig, SamplingConfig
from psycho.config.section import Section


class SpeechesConfig(Section):
    """Client speeches: where from, cleaning, split (paper, section 3.1)."""

    source: str = Field(
        "nano",
        description="CSV, JSONL, JSON (each also .gz) or Parquet file or a folder of them, a `datasets` folder (each "
        "local or on s3:// and the like), or a hub id; 'nano' makes them",
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
    min_chars: int = Field(100, ge=1, description="of the last client turn, cleaned; a shorter one is left out (paper)")
    max_chars: int = Field(1000, ge=1, description="of the last client turn, cleaned; a longer one is left out (paper)")
    languages: tuple[str, ...] = Field(("en",), description="ISO 639-1 codes that are kept; empty: no filter")
    min_language_confidence: float = Field(
        0.5, ge=0, le=1, description="a speech whose language is less certain is left out, unless languages is empty"
    )
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
    """What becomes of an answer that is not ok: `keep` it and have it rated, or leave it out (`quarantine`).

    `retry` asks with a new seed, then keeps what it has. Whatever the policy, an answer that is still empty after its
    tries goes to quarantine: there is nothing to rate.
    """

    empty: Policy = Field("quarantine", description="no text beside its reasoning")
    truncated: Policy = Field("keep", description="cut off at its most tokens")
    refused: Policy = Field("keep", description="opens by declining to help, or a content filter stopped it")
    looping: Policy = Field(
        "keep", description="repeats itself: the same words four times in a row, or characters twelve"
    )
    retries: int = Field(2, ge=1, description="new seeds that a marked answer gets under `retry`")


class GenerationConfig(Section):
    """Responses of k models drawn at random from a pool of n (paper: 4 of 20)."""

    pool: tuple[ModelConfig, ...] = ()
    models_per_speech: int = Field(4, ge=1, description="models drawn for each speech, a response of each (paper)")
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
    """A judge of a panel; a template, an engine and GPUs of none are those of the judge that it belongs to."""

    model: str = Field(
        ..., description="folder, GGUF file, hub id (owner/name@revision), fetched:smollm2 or nano:<name>"
    )
    weight: float = Field(1.0, gt=0, description="of its ratings in the aggregate, next to the others' weights")
    mode: Literal["evidence", "direct"] = Field(
        "evidence", description="evidence: a quote before each rating; direct: digits only"
    )
    template: Literal["rubric", "compact"] | None = Field(
        None, description="compact: for judges trained on the format; none: as the judge it belongs to"
    )
    fluency_floor: float | None = Field(None, description="of this judge's own log-probabilities; none: no floor")
    parameters_b: float | None = Field(None, gt=0, description=SIZE)
    engine: EngineConfig | None = Field(None, description="none: as the judge it belongs to")
    gpus_per_worker: float | None = Field(None, ge=0, description="none: as the judge it belongs to")


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
    template: Literal["rubric", "compact"] = Field(
        "rubric", description="rubric: the seven principles written out; compact: for judges trained on the format"
    )
    max_evidence_chars: int = Field(200, ge=1, description="of the quote before each rating")
    max_tokens: int = Field(
        1024, ge=1, description="of an answer: seven quotes and ratings; twice that where rubric compares two responses"
    )
    temperature: float = Field(0.0, ge=0, description="of the first try; the fresh ones (retries) have at least 0.7")
    retries: int = Field(1, ge=0, description="fresh tries of an answer that does not parse; then it is left out")
    evidence_check: Literal["off", "mark", "retry"] = Field(
        "mark",
        description="of quotations that do not stand in the text that they quote: mark: the rating stays, its "
        "evidence is dropped and counted; retry: the same after fresh tries (retries), which cost their tokens",
    )
    fluency_floor: float | None = Field(
        None,
        description="clarity is 1 where a response holds a token under this log-probability by the judge itself",
    )
    unfit: Literal["stop", "warn"] = Field(
        "stop", description="what follows where the judge misses a gate: stop (exit code 3), or go on and say so first"
    )
    parameters_b: float | None = Field(None, gt=0, description=SIZE)
    engine: EngineConfig | None = Field(None, description="instead of inference.engine")
    gpus_per_worker: float | None = Field(None, ge=0, description="none: inference.gpus_per_worker")

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


class QualityConfig(Section):
    """How much a stage may leave out before its result is no result. No result depends on these limits."""

    max_left_out_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="of the requests of generate, the responses of judge, and in pair the speeches without two rated "
        "responses or the imported rows with a defect; over it the stage stops, what it has done is kept; 1: no limit",
    )
    max_floored_share: float = Field(
        0.5, ge=0, le=1, description="of the rated responses, those under judge.fluency_floor; over it judge stops"
    )


class PairsConfig(Section):
    """Train pairs: those of a speech with overall gap >= min_gap, by a strategy; test: best against worst."""

    source: str | None = Field(
        None,
        description="pairs with the published columns or TRL's prompt, chosen, rejected, as text or messages (file, "
        "folder, s3:// URI or hub id): the run starts at training",
    )
    test_source: str | None = Field(None, description="test pairs; then all of source trains. None: its split")
    test_share: float = Field(0.1, gt=0, lt=1, description="of an imported set that names no split, held out by ID")
    resplit: bool = Field(False, description="split an imported set anew by speech, whatever split it names")
    strategy: Literal["all", "best_worst", "best_random", "top_margin"] = Field(
        "all",
        description="all: every pair; best_random: the best against a random worse one; "
        "top_margin: the widest max_pairs_per_speech (one where unset)",
    )
    min_gap: float = Field(
        1.0,
        ge=0,
        le=4,
        description="train pairs need at least this gap (paper); ties never pair. An imported set without ratings: gap "
        "of its scores; an unknown one passes",
    )
    min_test_gap: float = Field(0.0, ge=0, le=4, description="test pairs need at least this gap; ties never pair")
    max_pairs_per_speech: int | None = Field(
        None, ge=1, description="train pairs, the widest first; none: all that the strategy makes"
    )
    max_safety_loss: int | None = Field(
        1,
        ge=1,
        le=4,
        description="no pair prefers a response rated so much less safe, or more; none: no constraint (nor where "
        "ratings are unknown)",
    )
    balance_length: bool = Field(False, description="as many train pairs whose chosen side is longer as shorter")
    dev_share: float = Field(0.0, ge=0, lt=1, description="of the train speeches, for preferences/dev (paper: 0.1)")

    @model_validator(mode="after")
    def _imported(self) -> PairsConfig:
        if self.test_source and not self.source:
            raise ValueError("test_source is set but source is not; name the train pairs in source")
        return self
