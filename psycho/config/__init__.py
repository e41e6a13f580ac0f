"""The whole configuration: typed, frozen, strict. Defaults are the paper's (arXiv 2502.19731) where it gives one.

A configuration is one YAML file plus `--set dotted.key=value` overrides. An unknown key is an error that names the
nearest known one, so that a typo does not train for a week. What a stage depends on is a part of this tree
(`psycho/run.py` hashes it), so a setting lives beside what it configures and nowhere else.
"""

from psycho.config.data import (
    GenerationConfig,
    JudgeConfig,
    MarksConfig,
    PairsConfig,
    PanelJudge,
    Policy,
    QualityConfig,
    SpeechesConfig,
)
from psycho.config.inference import (
    ENGINE_ROUNDING,
    EngineConfig,
    InferenceConfig,
    ModelConfig,
    PriceConfig,
    RemoteConfig,
    SamplingConfig,
)
from psycho.config.load import DEFAULT_CONFIG, build_config, known_keys, load_config, to_yaml
from psycho.config.online import OnlineConfig
from psycho.config.section import Section
from psycho.config.training import (
    TRAINING_ROUNDING,
    DPOConfig,
    LoopConfig,
    LoRAConfig,
    PreferenceConfig,
    RewardConfig,
    SFTConfig,
    TrainingConfig,
)
from psycho.config.whole import NO_HELD_OUT, ClusterConfig, Config, EvaluationConfig, NanoConfig, ServingConfig

__all__ = [
    "DEFAULT_CONFIG",
    "ENGINE_ROUNDING",
    "NO_HELD_OUT",
    "TRAINING_ROUNDING",
    "ClusterConfig",
    "Config",
    "DPOConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "InferenceConfig",
    "JudgeConfig",
    "LoRAConfig",
    "LoopConfig",
    "MarksConfig",
    "ModelConfig",
    "NanoConfig",
    "OnlineConfig",
    "PairsConfig",
    "PanelJudge",
    "Policy",
    "PreferenceConfig",
    "PriceConfig",
    "QualityConfig",
    "RemoteConfig",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "ServingConfig",
    "SpeechesConfig",
    "TrainingConfig",
    "build_config",
    "known_keys",
    "load_config",
    "to_yaml",
]
