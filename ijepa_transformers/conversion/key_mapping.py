# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Renames the weights of Meta's released checkpoints to ours and back. One table serves both directions.

A checkpoint of Meta's holds three state dicts: `encoder` (trained, sees the context), `target_encoder` (its moving
average) and `predictor`. Each of their tensors is one of ours, except for queries, keys and values. Meta stacks them
in this order along the first dimension of one `qkv` tensor. In the tables "N" stands for a layer number.
"""

import re

import torch


NETWORKS = {"encoder": "context_encoder.", "target_encoder": "ijepa.", "predictor": "predictor."}
LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "norm1": ("layernorm_before",),
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": ("attention.o_proj",),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
}
ENCODER_NAMES = {
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.N": "layers.N",
    "norm": "layernorm",
}
PREDICTOR_NAMES = {
    "predictor_pos_embed": "position_embeddings",
    "mask_token": "mask_token",
    "predictor_embed": "input_projection",
    "predictor_blocks.N": "layers.N",
    "predictor_norm": "layernorm",
    "predictor_proj": "output_projection",
}


def _names_of(network: str) -> dict[str, tuple[str, ...]]:
    """Meta's name -> our name, or our three names for queries, keys and values. Without ".weight" and ".bias"."""
    table: dict[str, tuple[str, ...]] = {}
    for meta_name, our_name in (PREDICTOR_NAMES if network == "predictor" else ENCODER_NAMES).items():
        if not meta_name.endswith(".N"):
            table[meta_name] = (our_name,)
            continue
        for meta_part, our_parts in LAYER_NAMES.items():
            table[f"{meta_name}.{meta_part}"] = tuple(f"{our_name}.{part}" for part in our_parts)
    return table


def _split_key(key: str) -> tuple[str, str, str]:
    """A key as (name with "N" for the layer number, layer number or "", ".weight" or ".bias" or "")."""
    kind = next((ending for ending in (".weight", ".bias") if key.endswith(ending)), "")
    name = key.removesuffix(kind)
    number = re.search(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".N.", name, count=1), number.group(1) if number else "", kind


def from_meta(network: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One of Meta's state dicts under our names, with the prefix of the network.

    Distributed training puts "module." before a key. It is dropped.

    Args:
        network: a key of `NETWORKS`.

    Raises:
        ValueError: if a key is not in the table.
    """
    table, converted = _names_of(network), {}
    for key, tensor in state_dict.items():
        name, number, kind = _split_key(key.removeprefix("module."))
        if name not in table:
            raise ValueError(f"{key!r} is not a key of Meta's I-JEPA {network}.")
        for our_name, part in zip(table[name], tensor.chunk(len(table[name])), strict=True):
            converted[NETWORKS[network] + our_name.replace("N", number) + kind] = part
    return converted


def to_meta(network: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `from_meta`: the keys of one network in our state dict, under Meta's names.

    Queries, keys and values are copied. The other tensors are the same objects.

    Raises:
        ValueError: if a key is not in the table, or not all of query, key and value are there.
    """
    prefix, table = NETWORKS[network], {}
    for meta_name, our_names in _names_of(network).items():
        for position, our_name in enumerate(our_names):
            table[our_name] = (meta_name, position, len(our_names))
    parts: dict[str, list[torch.Tensor | None]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):
            continue
        name, number, kind = _split_key(key.removeprefix(prefix))
        if name not in table:
            raise ValueError(f"{key!r} is not a key of this package's I-JEPA {network}.")
        meta_name, position, count = table[name]
        parts.setdefault(meta_name.replace("N", number) + kind, [None] * count)[position] = tensor
    return {key: _stack(network, key, found) for key, found in parts.items()}


def _stack(network: str, key: str, found: list[torch.Tensor | None]) -> torch.Tensor:
    parts = [part for part in found if part is not None]
    if len(parts) < len(found):
        raise ValueError(f"Queries, keys and values for {key!r} of the {network} are not all there.")
    return parts[0] if len(parts) == 1 else torch.cat(parts)
