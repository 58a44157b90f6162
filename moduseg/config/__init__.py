"""The configuration: where the YAML files are, what they may hold, how they become objects."""

from __future__ import annotations

from moduseg.config.files import UNREADABLE, compose, compose_hydra, config_dir, from_hydra
from moduseg.config.schemas import (
    BackgroundConfig,
    BankConfig,
    Config,
    EvaluationConfig,
    OutliersConfig,
    PseudoMasksConfig,
    PurifyConfig,
    RayConfig,
    RetrievalConfig,
    RuntimeConfig,
    ShardConfig,
    StudentConfig,
)

__all__ = [
    "UNREADABLE",
    "BackgroundConfig",
    "BankConfig",
    "Config",
    "EvaluationConfig",
    "OutliersConfig",
    "PseudoMasksConfig",
    "PurifyConfig",
    "RayConfig",
    "RetrievalConfig",
    "RuntimeConfig",
    "ShardConfig",
    "StudentConfig",
    "compose",
    "compose_hydra",
    "config_dir",
    "from_hydra",
]
