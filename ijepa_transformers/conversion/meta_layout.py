# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The layout of Meta's checkpoints: keys, shapes and the order of the optimizer's parameters."""

from collections.abc import Mapping
from typing import Any

import torch

from ..configuration_ijepa import IJepaConfig
from ..modeling_ijepa import IJepaForPretraining
from .key_mapping import NETWORKS, to_meta


FACTS = ("scaler", "epoch", "loss", "batch_size", "world_size", "lr")  # what a checkpoint tells about its run
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter
POSITION_TABLES = ("pos_embed", "predictor_pos_embed")  # Meta: parameters without gradient; here: buffers
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in which models can be opened
OPTIMIZER_FILE, FACTS_FILE = "optimizer.safetensors", "meta_checkpoint.json"
StateDict = dict[str, torch.Tensor]
Shapes = dict[str, dict[str, torch.Size]]  # network -> Meta's key -> shape


def expected_shapes(config: IJepaConfig) -> Shapes:
    """What each of Meta's state dicts must hold for this architecture, in the order of Meta's modules."""
    with torch.device("meta"):
        weights = IJepaForPretraining(config).state_dict()
    return {network: {k: tensor.shape for k, tensor in to_meta(network, weights).items()} for network in NETWORKS}


def check_keys(network: str, state_dict: StateDict, expected: Mapping[str, torch.Size]) -> None:
    """Compares a state dict of Meta's with the architecture.

    Raises:
        ValueError: if keys are missing or surplus, or a tensor has another shape than the architecture needs.
    """
    missing = [key for key in expected if key not in state_dict]
    surplus = [key for key in state_dict if key not in expected]
    if missing or surplus:
        faults = [f"{verb} {_list(keys)}" for verb, keys in (("lacks", missing), ("has the surplus", surplus)) if keys]
        raise ValueError(f"{network!r} {' and '.join(faults)}.")
    for key, shape in expected.items():
        if state_dict[key].shape != shape:
            raise ValueError(f"{network}.{key} has shape {tuple(state_dict[key].shape)}, expected {tuple(shape)}.")


def _list(keys: list[str]) -> str:
    shown = ", ".join(map(repr, keys[:3]))
    return f"key {shown}" if len(keys) == 1 else f"{len(keys)} keys {shown}{' ...' if len(keys) > 3 else ''}"


def optimizer_order(expected: Shapes) -> list[list[tuple[str, str]]]:
    """(network, Meta's key) of the parameters in each of the four groups of Meta's optimizer.

    The groups are those of `optimization.parameter_groups` in the same order, with two differences. Queries, keys and
    values are one tensor. The position tables belong to the decayed groups; they have no gradient, so AdamW keeps no
    state for them.
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


def problem_of(value: Any) -> str | None:
    """Why a value is no plain tensor of numbers that a model can have. None if it is one."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        return f"{kind}, not a tensor of floating-point numbers"
    if value.is_nested:
        return "a nested tensor, not a plain one"
    if value.layout != torch.strided:
        return f"a tensor of the layout {value.layout}, not a plain one"
    if not value.numel():
        return f"a tensor of shape {tuple(value.shape)}, which holds no numbers"
    if value.is_meta:
        return "a tensor on the device 'meta', which has no numbers"
    if value.dtype not in DTYPES:
        return f"of {value.dtype}, in which models cannot be opened; convert it to torch.float32 first"
    return None
