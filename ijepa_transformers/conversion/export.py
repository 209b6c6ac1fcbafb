# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes a pretraining directory of this package in the layout of Meta's released I-JEPA code:

    python conversion/export_meta_checkpoint.py --model ijepa_vith14 --output ijepa_vith14.pth.tar

A directory that `convert_meta_checkpoint.py --with_optimizer` wrote gives back the content of the original file, bit
for bit. What a directory does not know is None in the file, but `epoch`, which is 0: with it Meta's code starts its
schedules afresh from these weights. A directory of this package's own training knows the weights alone.
"""

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..configuration_ijepa import IJepaConfig
from .command_line import run, written_aside
from .key_mapping import NETWORKS, from_meta, to_meta
from .meta_layout import (
    FACTS,
    FACTS_FILE,
    MOMENTS,
    OPTIMIZER_FILE,
    POSITION_TABLES,
    Shapes,
    StateDict,
    check_keys,
    expected_shapes,
    optimized_names,
    optimizer_order,
)


def meta_checkpoint(
    weights: StateDict,
    config: IJepaConfig,
    moments: StateDict | None = None,
    optimizer_groups: list[dict] | None = None,
    facts: Mapping[str, object] | None = None,
    module_prefix: bool = True,
) -> dict:
    """
    What Meta's code would have saved.

    Args:
        weights: state dict of an `IJepaForPretraining`.
        moments: AdamW's state under the names of `optimizer_moments`; the file's `opt` is None without.
        optimizer_groups: settings of Meta's four groups, needed with `moments`.
        facts: values for `epoch`, `loss`, `scaler`, `batch_size`, `world_size`, `lr`.
        module_prefix: whether keys start with "module.", as distributed training left them.

    Raises:
        ValueError: if weights or moments are not all those of the architecture.
    """
    facts = {**dict.fromkeys(FACTS), "epoch": 0, **(facts or {})}
    _refuse_other_models(weights, config)
    expected, prefix = expected_shapes(config), "module." if module_prefix else ""
    checkpoint = {}
    for network in ("encoder", "predictor", "target_encoder"):
        state_dict = to_meta(network, weights)
        check_keys(network, state_dict, expected[network])
        checkpoint[network] = {prefix + key: state_dict[key] for key in expected[network]}
    checkpoint["opt"] = None if moments is None else _meta_optimizer(moments, optimizer_groups, expected)
    return {**checkpoint, **{key: facts[key] for key in FACTS}}


def _refuse_other_models(weights: StateDict, config: IJepaConfig):
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
        raise ValueError(f"Meta's layer norms use {IJepaConfig.layer_norm_eps}, this model's {config.layer_norm_eps}.")


def _meta_optimizer(moments: StateDict, optimizer_groups: list[dict], expected: Shapes) -> dict:
    """`convert_optimizer` undone: state by number, and the groups with the numbers of their parameters."""
    state, groups, first = {}, [], 0
    for names, settings in zip(optimizer_order(expected), optimizer_groups, strict=True):
        numbers = list(range(first, first + len(names)))
        first += len(names)
        groups.append({**settings, "betas": tuple(settings["betas"]), "params": numbers})
        for number, (network, key) in zip(numbers, names, strict=True):
            if key not in POSITION_TABLES:
                state[number] = _meta_moments(moments, network, key, expected[network][key])
    return {"state": state, "param_groups": groups}


def _meta_moments(moments: StateDict, network: str, key: str, shape: torch.Size) -> StateDict:
    names = list(from_meta(network, {key: torch.empty(shape, device="meta")}))  # three for queries, keys and values
    absent = [name for name in names if f"{name}.exp_avg" not in moments]
    if absent:
        raise ValueError(f"The optimizer has no state for {absent[0]!r}.")
    stacked = {m: to_meta(network, {name: moments[f"{name}.{m}"] for name in names})[key] for m in MOMENTS[1:]}
    return {"step": moments[f"{names[0]}.step"], **stacked}


def optimizer_moments(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[StateDict, list[dict]]:
    """The state of `torch.optim.AdamW(parameter_groups(model))` as `<parameter name>.<step, exp_avg, exp_avg_sq>`, and
    the settings of Meta's four groups: what `meta_checkpoint` takes, for a run that Meta's code shall continue."""
    state_dict = optimizer.state_dict()
    moments = {
        f"{name}.{moment}": state_dict["state"][number][moment]
        for number, name in enumerate(optimized_names(model))
        if number in state_dict["state"]
        for moment in MOMENTS
    }
    groups = []
    for group in state_dict["param_groups"]:
        settings = {key: value for key, value in group.items() if key not in ("params", "name", "decayed")}
        groups.append(settings if group["decayed"] else {"WD_exclude": True, **settings})
    return moments, groups


def read_weights(directory: Path) -> StateDict:
    """Every tensor of a saved model, memory-mapped, whether in one file or several.

    Raises:
        ValueError: if there are no safetensors weights and configuration, or they are damaged.
    """
    names, index = ["model.safetensors"], directory / "model.safetensors.index.json"
    if not (directory / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    for name in ("config.json", *names):
        if not (directory / name).is_file():
            raise ValueError(f"{directory} holds no {name}.")
    weights = {}
    for name in names:
        try:
            weights.update(load_file(directory / name))
        except SafetensorError as error:
            raise ValueError(f"{directory / name} is damaged: {error}.") from None
    return weights


def export(model: str | os.PathLike, output: str | os.PathLike, module_prefix: bool = True) -> None:
    """Writes the directory `model` to the file `output`.

    Raises:
        ValueError: with one sentence, if the directory is not a pretraining model; then nothing is left at `output`.
    """
    directory, output = Path(model), Path(output)
    weights = read_weights(directory)
    facts_file, optimizer_file = directory / FACTS_FILE, directory / OPTIMIZER_FILE
    facts = json.loads(facts_file.read_text()) if facts_file.is_file() else {}
    groups = facts.pop("optimizer_groups", None)
    moments = load_file(optimizer_file) if optimizer_file.is_file() else None
    with written_aside(output) as unfinished:
        config = IJepaConfig.from_pretrained(directory)
        checkpoint = meta_checkpoint(weights, config, moments, groups, facts, module_prefix)
        torch.save(checkpoint, unfinished)
    unknown = [key for key in ("opt", *FACTS) if checkpoint[key] is None and key not in facts]
    print(f"wrote {output}" + (f"; not known, hence None: {', '.join(unknown)}" if unknown else ""))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of an IJepaForPretraining")
    parser.add_argument("--output", required=True, help="file to write; must not exist")
    parser.add_argument(
        "--no_module_prefix", dest="module_prefix", action="store_false", help="keys without 'module.' in front"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run(export, build_parser(), argv)
