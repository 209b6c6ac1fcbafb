# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""I-JEPA for Transformers. Importing this package makes the Auto classes of Transformers return its models."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_ijepa import IJEPA_SIZES, IJepaConfig
from .modeling_ijepa import (
    IJepaBackbone,
    IJepaForImageClassification,
    IJepaForPretraining,
    IJepaForPretrainingOutput,
    IJepaModel,
    IJepaPredictor,
    IJepaPreTrainedModel,
)


__version__ = "0.1.0"

AutoConfig.register("ijepa", IJepaConfig, exist_ok=True)
AutoModel.register(IJepaConfig, IJepaModel, exist_ok=True)
AutoModelForPreTraining.register(IJepaConfig, IJepaForPretraining, exist_ok=True)
AutoModelForImageClassification.register(IJepaConfig, IJepaForImageClassification, exist_ok=True)
AutoBackbone.register(IJepaConfig, IJepaBackbone, exist_ok=True)

__all__ = [
    "IJEPA_SIZES",
    "IJepaBackbone",
    "IJepaConfig",
    "IJepaForImageClassification",
    "IJepaForPretraining",
    "IJepaForPretrainingOutput",
    "IJepaModel",
    "IJepaPreTrainedModel",
    "IJepaPredictor",
]
