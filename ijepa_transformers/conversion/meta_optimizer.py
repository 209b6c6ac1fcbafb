# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The state of AdamW in Meta's layout and in ours, in both directions.

Ours is a state dict of moments: `<parameter name>.<step, exp_avg or exp_avg_sq>`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..modeling_ijepa import IJepaForPretraining
from ..optimization import parameter_groups
from .key_mapping import from_meta, to_meta
from .meta_layout import (
    FACTS_FILE,
    MOMENTS,
    OPTIMIZER_FILE,
    POSITION_TABLES,
    Shapes,
    StateDict,
    optimizer_order,
    problem_of,
)


def convert_optimizer(optimizer: Any, expected: Shapes) -> StateDict:
    """Meta's AdamW state as our moments. Those of queries, keys and values are split.

    Args:
        optimizer: the checkpoint's `opt`, which must be a `torch.optim.AdamW.state_dict`.
        expected: from `expected_shapes`.

    Raises:
        ValueError: if the groups or the state of a parameter do not fit Meta's optimizer for this architecture.
    """
    if not _is_optimizer_state(optimizer):
        raise ValueError("'opt' is not the state of an optimizer: it needs 'state' and 'param_groups'.")
    order, state = optimizer_order(expected), dict(optimizer["state"])
    found, needed = [len(group["params"]) for group in optimizer["param_groups"]], list(map(len, order))
    if found != needed:
        raise ValueError(f"'opt' has groups of {found} parameters; this architecture has groups of {needed}.")
    moments: StateDict = {}
    for names, group in zip(order, optimizer["param_groups"], strict=True):
        for (network, key), index in zip(names, group["params"], strict=True):
            if key not in POSITION_TABLES:
                moments.update(_convert_moments(network, key, state.pop(index, {}), expected[network][key]))
    if state:
        raise ValueError(f"'opt' has a surplus state for its parameter {next(iter(state))}.")
    return moments


def _is_optimizer_state(optimizer: Any) -> bool:
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        return False
    groups = optimizer.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


def _convert_moments(network: str, key: str, state: Any, shape: torch.Size) -> StateDict:
    if not isinstance(state, Mapping) or set(state) != set(MOMENTS):
        raise ValueError(f"'opt' holds {sorted(state)} for {network}.{key}, expected {sorted(MOMENTS)}.")
    moments = {}
    for name in MOMENTS:
        value = state[name]
        if name == "step" and isinstance(value, int | float):  # as old versions of torch saved it
            value = torch.tensor(float(value))
        if problem := problem_of(value):
            raise ValueError(f"{name} of {network}.{key} in 'opt' is {problem}.")
        if value.shape != (torch.Size() if name == "step" else shape):
            raise ValueError(f"{name} of {network}.{key} in 'opt' has shape {tuple(value.shape)}, not {tuple(shape)}.")
        for our_key, part in from_meta(network, {key: value if name != "step" else value.expand(3)}).items():
            moments[f"{our_key}.{name}"] = part if name != "step" else part[0].clone()
    return moments


def load_meta_optimizer(model: IJepaForPretraining, directory: str | os.PathLike) -> dict:
    """The optimizer state of a directory converted with `--with_optimizer`. With it Meta's run can be continued:

        model = IJepaForPretraining.from_pretrained(directory)
        optimizer = torch.optim.AdamW(parameter_groups(model))
        optimizer.load_state_dict(load_meta_optimizer(model, directory))

    Args:
        model: the directory's own model, not yet wrapped for distributed training.
        directory: written by `convert`.

    Returns:
        a state dict for `torch.optim.AdamW(parameter_groups(model))`: the moments, and learning rate, betas, epsilon
        and weight decay of the checkpoint's last step (`Schedules.apply` sets those of the next step).

    Raises:
        ValueError: if the directory has no optimizer state, or that of another architecture.
    """
    directory = Path(directory)
    if not (directory / OPTIMIZER_FILE).is_file():
        raise ValueError(f"{directory} carries no optimizer state; convert the checkpoint with --with_optimizer.")
    moments, names = load_file(directory / OPTIMIZER_FILE), _optimized_names(model)
    shapes = {name: model.get_parameter(name).shape for name in names}
    needed = {f"{name}.{moment}": shape for name, shape in shapes.items() for moment in MOMENTS[1:]}
    if {key: value.shape for key, value in moments.items() if not key.endswith(".step")} != needed:
        raise ValueError(f"{directory / OPTIMIZER_FILE} belongs to a model of another architecture.")
    state = torch.optim.AdamW(parameter_groups(model)).state_dict()
    state["state"] = {i: {moment: moments[f"{name}.{moment}"] for moment in MOMENTS} for i, name in enumerate(names)}
    saved_groups = json.loads((directory / FACTS_FILE).read_text())["optimizer_groups"]
    for group, saved in zip(state["param_groups"], saved_groups, strict=True):
        group.update({key: saved[key] for key in ("lr", "eps", "weight_decay")}, betas=tuple(saved["betas"]))
    return state


def _optimized_names(model: torch.nn.Module) -> list[str]:
    """Names of the trained parameters in the order in which an optimizer gets them from `parameter_groups`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in parameter_groups(model) for parameter in group["params"]]


def meta_optimizer(moments: StateDict, optimizer_groups: Sequence[Mapping], expected: Shapes) -> dict[str, Any]:
    """The inverse of `convert_optimizer`: the state of parameter numbers, and groups of parameter numbers.

    Raises:
        ValueError: if moments are missing, or the settings are not those of four groups.
    """
    order = optimizer_order(expected)
    if len(optimizer_groups) != len(order):
        found = len(optimizer_groups)
        raise ValueError(f"The optimizer has moments, but settings of {found} groups; Meta's has {len(order)} groups.")
    state, groups, first = {}, [], 0
    for names, settings in zip(order, optimizer_groups, strict=True):
        numbers = list(range(first, first + len(names)))
        first += len(names)
        groups.append({**settings, "betas": tuple(settings["betas"]), "params": numbers})
        for number, (network, key) in zip(numbers, names, strict=True):
            if key not in POSITION_TABLES:
                state[number] = _meta_moments(moments, network, key, expected[network][key])
    return {"state": state, "param_groups": groups}


def _meta_moments(moments: StateDict, network: str, key: str, shape: torch.Size) -> StateDict:
    names = list(from_meta(network, {key: torch.empty(shape, device="meta")}))  # one, or query, key and value
    absent = [name for name in names if f"{name}.exp_avg" not in moments]
    if absent:
        raise ValueError(f"The optimizer has no state for {absent[0]!r}.")
    stacked = {m: to_meta(network, {name: moments[f"{name}.{m}"] for name in names})[key] for m in MOMENTS[1:]}
    return {"step": moments[f"{names[0]}.step"], **stacked}


def optimizer_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[StateDict, list[dict]]:
    """The moments of `torch.optim.AdamW(parameter_groups(model))` and the settings of Meta's four groups.

    `meta_checkpoint` takes both. With them Meta's code can continue a run of ours.
    """
    state_dict = optimizer.state_dict()
    moments = {
        f"{name}.{moment}": state_dict["state"][number][moment]
        for number, name in enumerate(_optimized_names(model))
        if number in state_dict["state"]
        for moment in MOMENTS
    }
    groups = []
    for group in state_dict["param_groups"]:
        settings = {key: value for key, value in group.items() if key not in ("params", "name", "decayed")}
        groups.append(settings if group["decayed"] else {"WD_exclude": True, **settings})
    return moments, groups
