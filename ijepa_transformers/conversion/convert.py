# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts a checkpoint of Meta's released I-JEPA code (`*.pth.tar`) to a directory of this package:

    python conversion/convert_meta_checkpoint.py --checkpoint IN1K-vit.h.14-300e.pth.tar --output ijepa_vith14

It also rewrites a directory that the script of Transformers converted, with current names and image processor:

    python conversion/convert_meta_checkpoint.py --from_directory ijepa_vith14_1k --output ijepa_vith14_context

The directory opens in `transformers.AutoModel` (as the target encoder, with or without this package) and in
`IJepaForPretraining`. If a key of the file is not known, nothing is written. docs/convert.md tells more.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Mapping, Sequence, Set
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save_file

from ..configuration_ijepa import IJEPA_SIZES, IJepaConfig
from ..data.transforms import build_image_processor
from ..display import show, show_facts
from ..model_card import USAGE, in_code, in_markdown, in_quotes, write_card
from ..modeling_ijepa import OTHER_NETWORKS, write_pretraining_index
from .arguments import CONVERT, parse_convert_arguments
from .command_line import run, show_written, written_aside
from .directory import convert_directory
from .key_mapping import NETWORKS, from_meta
from .meta_file import check_finite, load_checkpoint, read_networks
from .meta_layout import FACTS, FACTS_FILE, OPTIMIZER_FILE, StateDict, check_keys, expected_shapes
from .meta_optimizer import convert_optimizer


MAX_DEPTH = 1000  # the deepest published encoder has 40 blocks
Networks = Mapping[str, StateDict]  # a key of NETWORKS -> its tensors
HEADS_BY_WIDTH = {size["hidden_size"]: size["num_attention_heads"] for size in IJEPA_SIZES.values()}
NETWORKS_OF = {"both": tuple(NETWORKS), "target": ("target_encoder",), "context": ("encoder",)}


def _infer_config(
    networks: Networks, num_attention_heads: int | None = None, image_size: list[int] | None = None
) -> IJepaConfig:
    """The configuration of a checkpoint, from the shapes of its tensors.

    Args:
        networks: from `read_networks`.
        num_attention_heads: needed for widths that were not published, because shapes do not show it.
        image_size: one number, or height and width, in pixels. By default the grid of patches is a square.

    Raises:
        ValueError: if the shapes are not those of an I-JEPA, or do not tell the heads or the image size.
    """
    name = "target_encoder" if "target_encoder" in networks else "encoder"
    width, num_channels, *patch_size = _shape(networks, name, "patch_embed.proj.weight", 4)
    num_patches = _shape(networks, name, "pos_embed", 3)[1]
    fields: dict[str, Any] = _predictor_fields(networks) if "predictor" in networks else {}
    return IJepaConfig(
        hidden_size=width,
        num_hidden_layers=_depth(networks, name, "blocks"),
        num_attention_heads=_heads(width, num_attention_heads),
        intermediate_size=_shape(networks, name, "blocks.0.mlp.fc1.weight", 2)[0],
        image_size=_image_size(num_patches, patch_size, image_size),
        patch_size=_one_if_equal(patch_size),
        num_channels=num_channels,
        **fields,
    )


def _predictor_fields(networks: Networks) -> dict[str, Any]:
    return {
        "predictor_hidden_size": _shape(networks, "predictor", "predictor_embed.weight", 2)[0],
        "predictor_num_hidden_layers": _depth(networks, "predictor", "predictor_blocks"),
        "predictor_intermediate_size": _shape(networks, "predictor", "predictor_blocks.0.mlp.fc1.weight", 2)[0],
    }


def _shape(networks: Networks, network: str, key: str, num_dimensions: int) -> torch.Size:
    if key not in networks[network]:
        raise ValueError(f"{network!r} lacks the key {key!r}.")
    shape = networks[network][key].shape
    if len(shape) != num_dimensions:
        raise ValueError(f"{network}.{key} has shape {tuple(shape)}, expected {num_dimensions} dimensions.")
    return shape


def _depth(networks: Networks, network: str, blocks: str) -> int:
    """The number of blocks. Keys that no block has do not count; `check_keys` refuses them.

    Raises:
        ValueError: if there are too many to be an I-JEPA, because to build such a model would take hours; or if a
            number is left out.
    """
    first_keys: dict[str, str] = {}  # by the number of the block
    for key in networks[network]:
        found = re.fullmatch(rf"{blocks}\.(\d+)\.(norm1|attn\.qkv|norm2)\.weight", key)
        if found:
            first_keys.setdefault(found.group(1), key)
    depth = len(first_keys)
    if depth > MAX_DEPTH:
        raise ValueError(f"{network!r} has {depth:,} blocks, more than {MAX_DEPTH:,}.")
    for number in range(depth):
        if str(number) not in first_keys:
            beyond = next(key for place, key in first_keys.items() if place not in map(str, range(depth)))
            raise ValueError(f"{network!r} has the key {beyond!r}, but no block {number}.")
    return depth


def _heads(width: int, given: int | None) -> int:
    if given is None and width not in HEADS_BY_WIDTH:
        raise ValueError(
            f"Shapes do not show the number of attention heads, and an encoder of width {width} was not published:"
            " give --num_attention_heads."
        )
    return HEADS_BY_WIDTH[width] if given is None else given


def _image_size(num_patches: int, patch_size: list[int], given: list[int] | None) -> int | list[int]:
    if given is None:
        side = math.isqrt(num_patches)
        if side * side != num_patches:
            raise ValueError(f"{num_patches} patches do not form a square: give --image_size HEIGHT WIDTH.")
        return _one_if_equal([side * pixels for pixels in patch_size])
    height, width = given if len(given) == 2 else given * 2
    grid = height // patch_size[0], width // patch_size[1]
    if grid[0] * grid[1] != num_patches:
        raise ValueError(
            f"Images of {height} x {width} pixels have a grid of {grid[0]} x {grid[1]} patches, but the checkpoint has"
            f" {num_patches} patches."
        )
    return _one_if_equal([height, width])


def _one_if_equal(pair: list[int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def _print_report(
    checkpoint: Mapping, networks: Networks, encoder: str, config: IJepaConfig, with_optimizer: bool, verbose: bool
) -> None:
    """Prints what the checkpoint holds. With `verbose` also where every key goes; equal keys of all layers share a
    line."""
    facts = {
        "encoder": f"{config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads,"
        f" MLP {config.intermediate_size}",
        "images": f"{config.image_size} pixels, {config.num_channels} channels, patches of {config.patch_size}, grid"
        f" {config.grid_size}",
    }
    if "opt" in checkpoint:
        facts["optimizer"] = OPTIMIZER_FILE if with_optimizer else "left out (--with_optimizer includes it)"
    others = [key for key in checkpoint if key not in (*networks, "opt")]
    show_facts(facts | ({"other keys": f"{', '.join(others)}: in {FACTS_FILE}"} if others else {}))
    for network, state_dict in networks.items():
        if network not in NETWORKS_OF[encoder]:
            show(f"{network}: {len(state_dict)} keys left out (--encoder {encoder})")
            continue
        show(f"{network}: {len(state_dict)} keys, {sum(v.numel() for v in state_dict.values()):,} numbers")
        for line in _report_lines(network, state_dict, _prefix(network, encoder)) if verbose else []:
            show(f"    {line}")


def _report_lines(network: str, state_dict: StateDict, prefix: str) -> list[str]:
    keys_by_name: dict[str, list[str]] = {}
    for key in state_dict:
        keys_by_name.setdefault(re.sub(r"blocks\.\d+\.", "blocks.N.", key), []).append(key)
    lines = []
    for name, keys in keys_by_name.items():
        our_names = from_meta(network, {name.replace(".N.", ".0."): state_dict[keys[0]]})
        ours = [re.sub(r"layers\.0\.", "layers.N.", prefix + _unprefixed(network, our_name)) for our_name in our_names]
        times = f" ({len(keys)} times)" if "N" in name else ""
        lines.append(f"{name} {tuple(state_dict[keys[0]].shape)}{times} -> {', '.join(ours)}")
    return lines


def _unprefixed(network: str, key: str) -> str:
    return key.removeprefix(NETWORKS[network])


def _prefix(network: str, encoder: str) -> str:
    return NETWORKS[network] if encoder == "both" else ""


CARD = """\
# {name}

Weights of I-JEPA ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)) trained by Meta AI, converted from
{file} by [ijepa-transformers](https://pypi.org/project/ijepa-transformers/) without changing a number.

**Licence.** The weights are Meta's, under
[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): not for commercial use, and the attribution must stay.
The code that converted them is Apache-2.0.

## What is inside

{contents}

There is no class token: an image's feature is the mean over its patch tokens. The heads of attention
({heads}) and the epsilon of the layer norms ({epsilon}) cannot be read off the weights; they are the published ones or
were given to the converter.

{usage}

## Difference to other converted copies

Copies of these checkpoints that were converted with the script of Transformers hold the *context* encoder, while the
paper evaluates the *target* encoder, and their image processor normalises with mean and standard deviation 0.5 and
squashes images to a square. This directory's processor does what the weights were trained and evaluated with: ImageNet
statistics, shorter side resized (bicubic) to 256/224 of the image size, centre crop. Features of the two kinds of copy
therefore differ, and numbers measured with one do not hold for the other.
"""
CONTENTS = {
    "both": """\
- `ijepa`: the target encoder, the moving average that the paper evaluates. It is what `AutoModel` opens.
- `context_encoder`: the encoder that was trained by gradient.
- `predictor`: together with both encoders for `ijepa_transformers.IJepaForPretraining`, to continue pretraining.""",
    "target": "The **target** encoder alone, the moving average that the paper evaluates.",
    "context": """\
The **context** encoder alone, the one that was trained by gradient. The paper evaluates the other one, the target
encoder: convert with `--encoder target` or `both` to get it.""",
}


def _write_readme(directory: Path, name: str, file: str, encoder: str, config: IJepaConfig) -> None:
    """Writes README.md with the licence of the weights."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license="cc-by-nc-4.0",
        tags=["ijepa", "self-supervised-learning"],
    )
    body = CARD.format(
        name=in_markdown(name),
        file=in_code(file),
        contents=CONTENTS[encoder],
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        usage=USAGE.format(name=in_quotes(name)),
    )
    write_card(directory, data, body)


def _save_tensors(tensors: StateDict, file: Path) -> None:
    """Writes memory-mapped tensors as a safetensors file. Copies only those that are not contiguous or overlap."""
    separate, end = {key: tensor.contiguous() for key, tensor in tensors.items()}, 0
    for key, tensor in sorted(separate.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            separate[key] = tensor.clone()
        end = max(end, tensor.data_ptr() + tensor.nbytes)
    save_file(separate, file, metadata={"format": "pt"})


def _write_model(directory: Path, networks: Networks, encoder: str, config: IJepaConfig) -> None:
    """Writes weights, configuration and image processor."""
    weights = {
        _prefix(network, encoder) + _unprefixed(network, key): tensor
        for network in NETWORKS_OF[encoder]
        for key, tensor in from_meta(network, networks[network]).items()
    }
    directory.mkdir()
    target = {key: value for key, value in weights.items() if encoder != "both" or key.startswith("ijepa.")}
    _save_tensors(target, directory / "model.safetensors")
    if encoder == "both":
        _save_tensors({key: weights[key] for key in weights.keys() - target.keys()}, directory / OTHER_NETWORKS)
        write_pretraining_index(directory)
    config.architectures = ["IJepaForPretraining" if encoder == "both" else "IJepaModel"]
    config.dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))  # no number is rounded
    config.save_pretrained(directory)
    build_image_processor(config.image_height_and_width, config.num_channels).save_pretrained(directory)


def _write_facts(directory: Path, checkpoint: Mapping) -> None:
    """Writes what the checkpoint tells about its run and its optimizer. `export` and `load_meta_optimizer` need it."""
    facts = {key: checkpoint[key] for key in FACTS if key in checkpoint}
    groups = checkpoint["opt"].get("param_groups") if isinstance(checkpoint.get("opt"), Mapping) else None
    if isinstance(groups, list) and all(isinstance(group, Mapping) for group in groups):
        facts["optimizer_groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    try:
        text = json.dumps(facts, indent=2, default=_plain_number)
    except (TypeError, ValueError, RecursionError) as error:  # a key that is no string, a list that holds itself
        raise ValueError(f"The checkpoint's settings cannot be written as JSON: {error}.") from None
    (directory / FACTS_FILE).write_text(text)


def _plain_number(value: object) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.layout == torch.strided and not value.is_meta:
        return value.item()
    raise TypeError(f"they hold a {type(value).__name__}")


def convert(
    checkpoint_file: str | os.PathLike,
    output: str | os.PathLike,
    encoder: str = "both",
    num_attention_heads: int | None = None,
    image_size: list[int] | None = None,
    with_optimizer: bool = False,
    verbose: str = "false",
) -> None:
    """Converts a file of Meta's to a directory. The arguments are those of the command line.

    Raises:
        ValueError: if the file is not a complete checkpoint of I-JEPA. Then nothing is written.
    """
    if with_optimizer and encoder != "both":
        raise ValueError(f"--with_optimizer needs all three networks, not --encoder {encoder}.")
    file, output = Path(checkpoint_file), Path(output)
    with written_aside(output) as directory:
        checkpoint = load_checkpoint(file)
        networks = read_networks(checkpoint, NETWORKS_OF[encoder])
        config = _infer_config(networks, num_attention_heads, image_size)
        expected = expected_shapes(config)
        for network in NETWORKS_OF[encoder]:
            check_keys(network, networks[network], expected[network])
            check_finite(network, networks[network])
        moments = convert_optimizer(checkpoint.get("opt"), expected) if with_optimizer else {}
        check_finite("opt", moments)
        show_facts({"source": file, "output": output})
        _print_report(checkpoint, networks, encoder, config, with_optimizer, verbose == "true")
        _write_model(directory, networks, encoder, config)
        _write_readme(directory, output.absolute().name, file.name, encoder, config)
        _write_facts(directory, checkpoint)
        if with_optimizer:
            _save_tensors(moments, directory / OPTIMIZER_FILE)
    show_written(output)


FILE_OPTIONS = {"encoder", "num_attention_heads", "image_size", "with_optimizer", "verbose"}
DIRECTORY_OPTIONS = {"keep_image_processor", "layer_norm_eps"}


def convert_source(
    output: str, checkpoint_file: str | None = None, from_directory: str | None = None, **options: Any
) -> None:
    """Converts the file or the directory that the command line names. One of the two is given.

    Raises:
        ValueError: if an option belongs to the other kind of source, and as `convert` and `convert_directory` do.
    """
    if checkpoint_file is not None:
        _refuse_options(options.keys() - FILE_OPTIONS, "--checkpoint", "--from_directory")
        convert(checkpoint_file, output, **options)
    elif from_directory is not None:
        _refuse_options(options.keys() - DIRECTORY_OPTIONS, "--from_directory", "--checkpoint")
        convert_directory(from_directory, output, **options)
    else:
        raise ValueError("Give --checkpoint or --from_directory.")


def _refuse_options(options: Set[str], given: str, other: str) -> None:
    if options:
        raise ValueError(f"--{min(options)} goes with {other}, not with {given}.")


def execute(arguments: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments."""
    run(convert_source, arguments, CONVERT)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_convert_arguments(argv))
