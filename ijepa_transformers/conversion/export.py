# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes a pretraining directory of this package in the layout of Meta's released I-JEPA code:

    python conversion/export_meta_checkpoint.py --model ijepa_vith14 --output ijepa_vith14.pth.tar

A directory that `convert_meta_checkpoint.py --with_optimizer` wrote gives back the content of the original file, bit
for bit. A directory of this package's own training has weights only. What is not known is None in the file, except
`epoch`: it is 0, so that Meta's code starts its schedules from the beginning.
"""

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_ijepa import IJepaConfig
from ..display import show_end, show_facts
from ..encoders import opening
from ..files import read_json_object
from ..modeling_ijepa import PRETRAINING_INDEX
from .arguments import EXPORT, parse_export_arguments
from .command_line import run, written_aside
from .key_mapping import NETWORKS, to_meta
from .meta_file import check_finite
from .meta_layout import FACTS, FACTS_FILE, OPTIMIZER_FILE, StateDict, check_keys, expected_shapes
from .meta_optimizer import meta_optimizer


def meta_checkpoint(
    weights: StateDict,
    config: IJepaConfig,
    moments: StateDict | None = None,
    optimizer_groups: Sequence[Mapping] | None = None,
    facts: Mapping[str, object] | None = None,
    module_prefix: bool = True,
) -> dict[str, Any]:
    """The checkpoint that Meta's code would have saved.

    Args:
        weights: state dict of an `IJepaForPretraining`.
        moments: AdamW's state, from `optimizer_moments`. Without it the file's `opt` is None.
        optimizer_groups: settings of Meta's four groups, needed with `moments`.
        facts: values for `epoch`, `loss`, `scaler`, `batch_size`, `world_size`, `lr`.
        module_prefix: whether keys start with "module.", as they do after distributed training.

    Raises:
        ValueError: if weights or moments do not fit the architecture.
    """
    facts = {**dict.fromkeys(FACTS), "epoch": 0, **(facts or {})}
    _refuse_other_models(weights, config)
    expected, prefix = expected_shapes(config), "module." if module_prefix else ""
    checkpoint: dict[str, Any] = {}
    for network in ("encoder", "predictor", "target_encoder"):
        state_dict = to_meta(network, weights)
        check_keys(network, state_dict, expected[network])
        checkpoint[network] = {prefix + key: state_dict[key] for key in expected[network]}
    checkpoint["opt"] = None if moments is None else meta_optimizer(moments, optimizer_groups or [], expected)
    return {**checkpoint, **{key: facts[key] for key in FACTS}}


def _refuse_other_models(weights: StateDict, config: IJepaConfig) -> None:
    """Raises ValueError for models that Meta's code does not know."""
    surplus = [key for key in weights if not key.startswith(tuple(NETWORKS.values()))]
    absent = [prefix for prefix in NETWORKS.values() if not any(key.startswith(prefix) for key in weights)]
    if absent:
        raise ValueError(
            f"The model has no {absent[0].rstrip('.')}; Meta's layout needs both encoders and a predictor."
        )
    if surplus:
        raise ValueError(f"The model has {surplus[0]!r}, which has no place in Meta's layout.")
    if config.predictor_num_attention_heads != config.num_attention_heads:
        raise ValueError(
            f"Meta's predictor has as many heads as the encoder, here {config.predictor_num_attention_heads} and"
            f" {config.num_attention_heads}."
        )
    if config.layer_norm_eps != IJepaConfig.layer_norm_eps:
        raise ValueError(f"Meta's layer norms use {IJepaConfig.layer_norm_eps}, this model {config.layer_norm_eps}.")


def _read_weights(directory: Path) -> StateDict:
    """Every tensor of a saved model, memory-mapped, from one file or several.

    Raises:
        ValueError: if weights or configuration are missing or damaged.
    """
    names = ["model.safetensors"]
    for index in (directory / PRETRAINING_INDEX, directory / "model.safetensors.index.json"):
        if index.is_file():
            names = _files_of(index)
            break
    for name in ("config.json", *names):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}.")
    weights: StateDict = {}
    for name in names:
        weights.update(_load_tensors(directory / name))
    return weights


def _files_of(index: Path) -> list[str]:
    """The names of the files with weights. Raises ValueError if the index is damaged."""
    places = read_json_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is damaged: it does not say in which file the weights are.")
    return sorted(set(places.values()))


def _load_tensors(file: Path) -> StateDict:
    """The tensors of a file, memory-mapped. Raises ValueError if it is damaged."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}.") from None


def export(model: str | os.PathLike, output: str | os.PathLike, module_prefix: bool = True) -> None:
    """Writes the directory `model` to the file `output`.

    Raises:
        ValueError: if the directory is not a complete pretraining model. Then nothing is written.
    """
    directory, output = Path(model), Path(output)
    weights = _read_weights(directory)
    facts_file, optimizer_file = directory / FACTS_FILE, directory / OPTIMIZER_FILE
    facts = read_json_object(facts_file) if facts_file.is_file() else {}
    groups = facts.pop("optimizer_groups", None)
    moments = _load_tensors(optimizer_file) if optimizer_file.is_file() else None
    check_finite(str(directory), {**weights, **(moments or {})})
    with written_aside(output) as unfinished:
        with opening(f"The configuration of {directory}"):
            config = IJepaConfig.from_pretrained(directory)
        optimizer = "weights and the moments of AdamW" if moments else "weights"
        show_facts({"model": f"{directory}, {optimizer}", "output": output})
        checkpoint = meta_checkpoint(weights, config, moments, groups, facts, module_prefix)
        with open(unfinished, "wb") as file:  # given a name, torch refuses one without an ending
            torch.save(checkpoint, file)
    unknown = [key for key in ("opt", *FACTS) if checkpoint[key] is None and key not in facts]
    show_facts({"not known": f"{', '.join(unknown)}: None in the file"} if unknown else {})
    show_end({"checkpoint": output})


def execute(arguments: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments."""
    run(export, arguments, EXPORT)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_export_arguments(argv))
