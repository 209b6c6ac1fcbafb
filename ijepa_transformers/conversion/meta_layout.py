# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The layout of Meta's checkpoints: keys, shapes and the order of the optimizer's parameters."""

from collections.abc import Mapping

import torch

from ..configuration_ijepa import IJepaConfig
from ..modeling_ijepa import IJepaForPretraining
from ..optimization import parameter_groups
from .key_mapping import NETWORKS, to_meta


FACTS = ("scaler", "epoch", "loss", "batch_size", "world_size", "lr")  # what a checkpoint says about its run
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter
POSITION_TABLES = ("pos_embed", "predictor_pos_embed")  # parameters without gradient for Meta, buffers here
OPTIMIZER_FILE, FACTS_FILE = "optimizer.safetensors", "meta_checkpoint.json"
StateDict = dict[str, torch.Tensor]
Shapes = dict[str, dict[str, torch.Size]]  # network -> Meta's key -> shape


# The check of every key
def expected_shapes(config: IJepaConfig) -> Shapes:
    """What each of Meta's state dicts must hold for this architecture, in the order of Meta's modules."""
    with torch.device("meta"):
        weights = IJepaForPretraining(config).state_dict()
    return {network: {k: tensor.shape for k, tensor in to_meta(network, weights).items()} for network in NETWORKS}


def check_keys(network: str, state_dict: StateDict, expected: Mapping[str, torch.Size]) -> None:
    """
    Raises:
        ValueError: if keys are missing or surplus, or a tensor has another shape than the architecture asks for.
    """
    missing = [key for key in expected if key not in state_dict]
    surplus = [key for key in state_dict if key not in expected]
    if missing or surplus:
        faults = [f"{word} {_some(keys)}" for word, keys in (("lacks", missing), ("has the surplus", surplus)) if keys]
        raise ValueError(f"{network!r} {' and '.join(faults)}.")
    for key, shape in expected.items():
        if state_dict[key].shape != shape:
            raise ValueError(f"{network}.{key} has shape {tuple(state_dict[key].shape)}, expected {tuple(shape)}.")


def _some(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return f"key {shown}" if len(keys) == 1 else f"{len(keys)} keys {shown}{' ...' if len(keys) > 3 else ''}"


# The optimizer
def optimizer_order(expected: Shapes) -> list[list[tuple[str, str]]]:
    """(network, Meta's key) of the parameters in each of the four groups of Meta's optimizer.

    The groups are those of `optimization.parameter_groups`, in the same order, but for two things: queries, keys and
    values are one tensor, and the position tables belong to the decayed groups (without gradient, so AdamW keeps
    nothing for them).
    """
    return [
        [
            (network, key)
            for key, shape in expected[network].items()
            if decayed == (len(shape) > 1 and not key.endswith(".bias"))
        ]
        for decayed in (True, False)
        for network in ("encoder", "predictor")
    ]


def optimized_names(model: torch.nn.Module) -> list[str]:
    """Names of the trained parameters in the order in which `parameter_groups` hands them to an optimizer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in parameter_groups(model) for parameter in group["params"]]
