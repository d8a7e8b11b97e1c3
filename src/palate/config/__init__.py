"""Configuration: frozen records of numbers, names and paths; a method has one flat class of these parts."""

from palate.config.base import EMBEDDED, Config, ModelName, Names, Numbers, Source, split_commas
from palate.config.judge import JudgeConfig, RewardConfig, judge_block
from palate.config.parts import (
    BatchConfig,
    DataConfig,
    KLConfig,
    LearnerConfig,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    Rollouts,
    RunConfig,
    Sampling,
    check_warmup,
    tokens_per_pass,
)

__all__ = [
    "EMBEDDED",
    "BatchConfig",
    "Config",
    "DataConfig",
    "JudgeConfig",
    "KLConfig",
    "LearnerConfig",
    "MethodConfig",
    "ModelConfig",
    "ModelName",
    "Names",
    "Numbers",
    "OptimConfig",
    "RewardConfig",
    "Rollouts",
    "RunConfig",
    "Sampling",
    "Source",
    "check_warmup",
    "judge_block",
    "split_commas",
    "tokens_per_pass",
]
