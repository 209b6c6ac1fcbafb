# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The one table of names between Meta's released checkpoints and this package, read in both directions.

A checkpoint of Meta's holds three state dicts: `encoder` (trained, sees the context), `target_encoder` (its moving
average) and `predictor`. Names correspond one to one, but for queries, keys and values: Meta stacks their weights in
this order along the first dimension of one `qkv` tensor. "N" stands for a layer number.
"""

import re

import torch


NETWORKS = {"encoder": "context_encoder.", "target_encoder": "ijepa.", "predictor": "predictor."}
LAYER_NAMES = {
    "norm1": "layernorm_before",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
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


def names_of(network: str) -> dict[str, str | tuple[str, str, str]]:
    """Meta name -> our name (or the three it is split into), "N" for layer numbers, without .weight and .bias."""
    table = {}
    for meta_name, our_name in (PREDICTOR_NAMES if network == "predictor" else ENCODER_NAMES).items():
        if not meta_name.endswith(".N"):
            table[meta_name] = our_name
            continue
        for meta_part, our_part in LAYER_NAMES.items():
            split = isinstance(our_part, tuple)
            table[f"{meta_name}.{meta_part}"] = (
                tuple(f"{our_name}.{part}" for part in our_part) if split else f"{our_name}.{our_part}"
            )
    return table


def _take_apart(key: str) -> tuple[str, str, str]:
    """A key as (name with "N" for the layer number, layer number or "", ".weight" or ".bias" or "")."""
    name, kind = re.fullmatch(r"(.*?)(\.weight|\.bias)?", key).groups(default="")
    number = re.search(r"\.(\d+)\.", name)
    return re.sub(r"\.\d+\.", ".N.", name, count=1), number.group(1) if number else "", kind


def from_meta(network: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One of Meta's state dicts under our names, with the network's prefix (a key of `NETWORKS`).

    A leading "module." of a key, left by distributed training, is dropped.

    Raises:
        ValueError: if a key is not in the table.
    """
    table, converted = names_of(network), {}
    for key, tensor in state_dict.items():
        name, number, kind = _take_apart(key.removeprefix("module."))
        if name not in table:
            raise ValueError(f"{key!r} is not a key of Meta's I-JEPA {network}.")
        names = table[name] if isinstance(table[name], tuple) else (table[name],)
        for our_name, part in zip(names, tensor.chunk(len(names)), strict=True):
            converted[NETWORKS[network] + our_name.replace("N", number) + kind] = part
    return converted


def to_meta(network: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `from_meta`: one network of our state dict (keys with its prefix) under Meta's names.

    Only queries, keys and values are copied; the other tensors are handed through.

    Raises:
        ValueError: if a key is not in the table, or a query, key or value lacks the other two.
    """
    prefix, table = NETWORKS[network], {}
    for meta_name, our_names in names_of(network).items():
        our_names = our_names if isinstance(our_names, tuple) else (our_names,)
        for position, our_name in enumerate(our_names):
            table[our_name] = (meta_name, position, len(our_names))
    parts: dict[str, list[torch.Tensor | None]] = {}
    for key, tensor in state_dict.items():
        if not key.startswith(prefix):
            continue
        name, number, kind = _take_apart(key.removeprefix(prefix))
        if name not in table:
            raise ValueError(f"{key!r} is not a key of this package's I-JEPA {network}.")
        meta_name, position, count = table[name]
        parts.setdefault(meta_name.replace("N", number) + kind, [None] * count)[position] = tensor
    return {key: _stacked(network, key, pieces) for key, pieces in parts.items()}


def _stacked(network: str, key: str, pieces: list[torch.Tensor | None]) -> torch.Tensor:
    if any(piece is None for piece in pieces):
        raise ValueError(f"Queries, keys and values for {key!r} of the {network} are not all there.")
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
