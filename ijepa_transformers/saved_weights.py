# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Weights of a model directory that cannot be right, although Transformers opens them."""

import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import safe_open
from transformers import PreTrainedModel

from .modeling_ijepa import weight_files


_NOT_FLOATING = ("I", "U", "BOOL", "C")  # beginnings of the names of types in safetensors
_LAYER = re.compile(r"(?:ijepa\.|context_encoder\.|predictor\.)?(?:layers|encoder\.layer)\.\d+\.")


def require_finite(model: torch.nn.Module, source: str) -> None:
    """Raises ValueError if weights of the model of `source` are NaN or infinite."""
    for name, value in model.state_dict().items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"The model {source!r} cannot be used: its weight {name} holds NaN or infinity.")


def refuse_surplus_layers(model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises ValueError if the weights of an I-JEPA have more layers than its configuration."""
    if model.config.model_type != "ijepa":
        return  # of other models one may open a part
    surplus = sorted(key for key in report["unexpected_keys"] if _LAYER.match(key))
    if surplus:
        raise ValueError(
            f"config.json is not that of its weights, which have more layers: {surplus[0]!r} and {len(surplus) - 1:,}"
            " other weights are left over."
        )


def refuse_integer_weights(
    model: PreTrainedModel, report: dict[str, Any], source: str, stem: str = "model|pretraining"
) -> None:
    """Raises ValueError if a saved weight holds integers or booleans where the model has floating-point numbers.

    Transformers casts them in silence. Names in the file may be earlier ones, so only their last parts are compared.
    Quantized models, of which Transformers knows the scales, may hold integers.

    Args:
        report: of `from_pretrained`. Weights that the model does not use may be of any type.
        stem: of the files, as in `weight_files`.
    """
    if getattr(model.config, "quantization_config", None) is not None:
        return
    config_file = try_to_load_from_cache(source, "config.json") if not os.path.isdir(source) else None
    directory = Path(config_file).parent if isinstance(config_file, str) else Path(source)
    of_floats = {name.split(".")[-1] for name, value in model.state_dict().items() if value.is_floating_point()}
    for path in weight_files(directory, stem=stem):
        with safe_open(path, "pt") as file:
            for name in sorted(set(file.keys()) - set(report["unexpected_keys"])):
                is_weight = name.split(".")[-1] in of_floats
                if is_weight and file.get_slice(name).get_dtype().startswith(_NOT_FLOATING):
                    raise ValueError(
                        f"{path.name} holds {name!r} as {file.get_tensor(name).dtype}, and the model needs"
                        " floating-point numbers."
                    )
