# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""I-JEPA for Transformers. Importing this package makes the Auto classes of Transformers return its models.

The names below are imported when they are first used, so that the package itself is imported at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .auto_classes import register_now_or_later


if TYPE_CHECKING:
    from .configuration_ijepa import IJEPA_SIZES, IJepaConfig
    from .evaluation.command import probe
    from .evaluation.extraction import extract_features
    from .evaluation.statistics import image_statistics
    from .finetuning.command import finetune
    from .modeling_ijepa import (
        IJepaBackbone,
        IJepaForImageClassification,
        IJepaForPretraining,
        IJepaForPretrainingOutput,
        IJepaModel,
        IJepaPredictor,
        IJepaPreTrainedModel,
    )
    from .pretraining.command import pretrain
    from .retrieval.command import search
    from .trainer import PretrainingCollator, TargetEncoderCallback


__version__ = "0.1.0"

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
    "PretrainingCollator",
    "TargetEncoderCallback",
    "extract_features",
    "finetune",
    "image_statistics",
    "pretrain",
    "probe",
    "search",
]

# The modules of the names above that are not in modeling_ijepa.
_HOMES = {
    "PretrainingCollator": "trainer",
    "TargetEncoderCallback": "trainer",
    "IJEPA_SIZES": "configuration_ijepa",
    "IJepaConfig": "configuration_ijepa",
    "extract_features": "evaluation.extraction",
    "finetune": "finetuning.command",
    "image_statistics": "evaluation.statistics",
    "pretrain": "pretraining.command",
    "probe": "evaluation.command",
    "search": "retrieval.command",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOMES.get(name, 'modeling_ijepa')}", __name__)
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_now_or_later()
