# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Converts a checkpoint of Meta's released I-JEPA code (`*.pth.tar`) to a directory of this package:

    python conversion/convert_meta_checkpoint.py --checkpoint IN1K-vit.h.14-300e.pth.tar --output ijepa_vith14

It also rewrites a directory that the script of Transformers converted, with present names and image processor:

    python conversion/convert_meta_checkpoint.py --from_directory ijepa_vith14_1k --output ijepa_vith14_context

The directory opens in `transformers.AutoModel` (as the target encoder, with or without this package) and in
`IJepaForPretraining`. Every key of the file is accounted for, or nothing is written. docs/convert.md tells more.
"""

import argparse
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import load_file, save_file

from ..configuration_ijepa import IJEPA_SIZES, IJepaConfig
from ..data.transforms import build_image_processor
from ..model_card import USAGE, in_markdown, in_quotes, write_card
from ..modeling_ijepa import IJepaForPretraining
from ..optimization import parameter_groups
from .command_line import run, written_aside
from .directory import convert_directory
from .key_mapping import NETWORKS, from_meta
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


HEADS_BY_WIDTH = {size["hidden_size"]: size["num_attention_heads"] for size in IJEPA_SIZES.values()}
NETWORKS_OF = {"both": tuple(NETWORKS), "target": ("target_encoder",), "context": ("encoder",)}


# Reading the file
def load_checkpoint(file: Path) -> dict:
    """A file of `torch.save`, memory-mapped, without running any code of it.

    Raises:
        ValueError: if the file is missing, no checkpoint, cut short, damaged, or asks for code.
    """
    _refuse_damaged(file)
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{file} was refused because loading it would run code{_wanted_code(file)}.") from None
    except Exception as error:  # torch lets broken content raise anything from AssertionError to struct.error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} is not a checkpoint of torch.save ({reason}).") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{file} holds a {type(checkpoint).__name__}, not a checkpoint of I-JEPA.")
    return checkpoint


def _refuse_damaged(file: Path):
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    if not zipfile.is_zipfile(file):
        with open(file, "rb") as stream:
            began_well = stream.read(4) == b"PK\x03\x04"
        problem = "is cut short: its end is missing" if began_well else "is not a checkpoint of torch.save"
        raise ValueError(f"{file} ({file.stat().st_size:,} bytes) {problem}.")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # reads all, and compares with the checksums that torch.save wrote
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from None
    if damaged:
        raise ValueError(f"{file} is damaged: the checksum of its part {damaged!r} is wrong.")


def _wanted_code(file: Path) -> str:
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # the pickle is too broken to be read; that it is refused is what counts
        names = []
    return f" ({', '.join(sorted(names))})" if names else ""


def read_networks(checkpoint: Mapping, needed: tuple[str, ...]) -> dict[str, StateDict]:
    """The state dicts of all networks in a checkpoint, without the "module." of distributed training.

    Raises:
        ValueError: if a needed network is missing, a top-level key is unknown, or a value is not a floating tensor.
    """
    unknown = sorted(set(map(str, checkpoint)) - {*NETWORKS, *FACTS, "opt"})
    if unknown:
        raise ValueError(f"The checkpoint has the surplus top-level key {unknown[0]!r}; Meta's have no such key.")
    missing = [network for network in needed if network not in checkpoint]
    if missing:
        raise ValueError(f"The checkpoint lacks {missing[0]!r}; it has {', '.join(sorted(checkpoint)) or 'nothing'}.")
    return {network: _plain_state_dict(network, checkpoint[network]) for network in NETWORKS if network in checkpoint}


def _plain_state_dict(network: str, state_dict: Mapping) -> StateDict:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{network!r} is a {type(state_dict).__name__}, not a state dict.")
    for key, value in state_dict.items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(
                f"{network}.{key.removeprefix('module.')} is {kind}, not a tensor of floating-point numbers."
            )
    plain = {key.removeprefix("module."): value.detach() for key, value in state_dict.items()}
    if len(plain) < len(state_dict):
        raise ValueError(f"{network!r} has keys both with and without 'module.'.")
    return plain


# The architecture, from shapes
def infer_config(
    networks: dict[str, StateDict], num_attention_heads: int | None = None, image_size: list[int] | None = None
) -> IJepaConfig:
    """The configuration of a checkpoint.

    Args:
        networks: of `read_networks`.
        num_attention_heads: needed for widths that were not published; shapes do not show it.
        image_size: one number, or height and width, in pixels; by default a square grid of patches.

    Raises:
        ValueError: if the shapes do not make an I-JEPA, or the heads or the image size cannot be known.
    """
    name = "target_encoder" if "target_encoder" in networks else "encoder"
    width, num_channels, *patch_size = _shape(networks, name, "patch_embed.proj.weight", 4)
    num_patches = _shape(networks, name, "pos_embed", 3)[1]
    return IJepaConfig(
        hidden_size=width,
        num_hidden_layers=_depth(networks, name, "blocks"),
        num_attention_heads=_heads(width, num_attention_heads),
        intermediate_size=_shape(networks, name, "blocks.0.mlp.fc1.weight", 2)[0],
        image_size=_image_size(num_patches, patch_size, image_size),
        patch_size=_one_if_equal(patch_size),
        num_channels=num_channels,
        **(_predictor_fields(networks) if "predictor" in networks else {}),
    )


def _predictor_fields(networks) -> dict[str, int]:
    return {
        "predictor_hidden_size": _shape(networks, "predictor", "predictor_embed.weight", 2)[0],
        "predictor_num_hidden_layers": _depth(networks, "predictor", "predictor_blocks"),
        "predictor_intermediate_size": _shape(networks, "predictor", "predictor_blocks.0.mlp.fc1.weight", 2)[0],
    }


def _shape(networks, network: str, key: str, num_dimensions: int) -> torch.Size:
    if key not in networks[network]:
        raise ValueError(f"{network!r} lacks the key {key!r}.")
    shape = networks[network][key].shape
    if len(shape) != num_dimensions:
        raise ValueError(f"{network}.{key} has shape {tuple(shape)}, expected {num_dimensions} dimensions.")
    return shape


def _depth(networks, network: str, blocks: str) -> int:
    return len({key.split(".")[1] for key in networks[network] if key.startswith(f"{blocks}.")})


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
            raise ValueError(f"{num_patches} patches are no square grid: give --image_size HEIGHT WIDTH.")
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


def convert_optimizer(optimizer: Mapping, expected: Shapes) -> StateDict:
    """Meta's AdamW state as `<our parameter name>.<step, exp_avg or exp_avg_sq>`; stacked moments are split in three.

    Args:
        optimizer: the checkpoint's `opt`, of `torch.optim.AdamW.state_dict`.
        expected: of `expected_shapes`.

    Raises:
        ValueError: if the groups or the state of a parameter are not those of Meta's optimizer for this architecture.
    """
    if not _is_optimizer_state(optimizer):
        raise ValueError("'opt' is not the state of an optimizer: it needs 'state' and 'param_groups'.")
    order, state = optimizer_order(expected), dict(optimizer["state"])
    found, needed = [len(group["params"]) for group in optimizer["param_groups"]], list(map(len, order))
    if found != needed:
        raise ValueError(f"'opt' has groups of {found} parameters; this architecture has groups of {needed}.")
    moments = {}
    for names, group in zip(order, optimizer["param_groups"], strict=True):
        for (network, key), index in zip(names, group["params"], strict=True):
            if key not in POSITION_TABLES:
                moments.update(_convert_moments(network, key, state.pop(index, {}), expected[network][key]))
    if state:
        raise ValueError(f"'opt' has a surplus state for its parameter {next(iter(state))}.")
    return moments


def _is_optimizer_state(optimizer) -> bool:
    if not isinstance(optimizer, Mapping) or not isinstance(optimizer.get("state"), Mapping):
        return False
    groups = optimizer.get("param_groups")
    return isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)


def _convert_moments(network: str, key: str, state: Mapping, shape: torch.Size) -> StateDict:
    if not isinstance(state, Mapping) or set(state) != set(MOMENTS):
        raise ValueError(f"'opt' holds {sorted(state)} for {network}.{key}, expected {sorted(MOMENTS)}.")
    moments = {}
    for name in MOMENTS:
        value = state[name]
        if name == "step" and isinstance(value, int | float):  # as old versions of torch saved it
            value = torch.tensor(float(value))
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} of {network}.{key} in 'opt' is a {type(value).__name__}, not a tensor.")
        if value.shape != (torch.Size() if name == "step" else shape):
            raise ValueError(f"{name} of {network}.{key} in 'opt' has shape {tuple(value.shape)}, not {tuple(shape)}.")
        for our_key, part in from_meta(network, {key: value if name != "step" else value.expand(3)}).items():
            moments[f"{our_key}.{name}"] = part if name != "step" else part[0].clone()
    return moments


def load_meta_optimizer(model: IJepaForPretraining, directory: str | os.PathLike) -> dict:
    """The optimizer state that a directory of `--with_optimizer` carries, so that Meta's run continues where it was:

        model = IJepaForPretraining.from_pretrained(directory)
        optimizer = torch.optim.AdamW(parameter_groups(model))
        optimizer.load_state_dict(load_meta_optimizer(model, directory))

    Args:
        model: the directory's own model, not yet wrapped for distributed training.
        directory: written by this script.

    Returns:
        a state dict for `torch.optim.AdamW(parameter_groups(model))`: the moments, and learning rate, betas, epsilon
        and weight decay of the checkpoint's last step (`Schedules.apply` sets the next step's).

    Raises:
        ValueError: if the directory carries no optimizer state, or that of another architecture.
    """
    directory = Path(directory)
    if not (directory / OPTIMIZER_FILE).is_file():
        raise ValueError(f"{directory} carries no optimizer state; convert the checkpoint with --with_optimizer.")
    moments, names = load_file(directory / OPTIMIZER_FILE), optimized_names(model)
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


# The report
def print_report(checkpoint: Mapping, networks, encoder: str, config: IJepaConfig, with_optimizer: bool) -> None:
    """Tells where every key of the checkpoint goes; layers are told together."""
    print(
        f"encoder: {config.num_hidden_layers} layers of {config.hidden_size}, {config.num_attention_heads} heads,"
        f" MLP {config.intermediate_size}; images of {config.image_size} pixels, {config.num_channels} channels,"
        f" patches of {config.patch_size}, grid {config.grid_size}"
    )
    for network, state_dict in networks.items():
        if network not in NETWORKS_OF[encoder]:
            print(f"{network}: {len(state_dict)} keys left out (--encoder {encoder})")
            continue
        print(f"{network}: {len(state_dict)} keys, {sum(v.numel() for v in state_dict.values()):,} numbers")
        for line in _report_lines(network, state_dict, _prefix(network, encoder)):
            print(f"    {line}")
    optimizer = OPTIMIZER_FILE if with_optimizer else "left out (--with_optimizer takes it along)"
    for key in (key for key in checkpoint if key not in networks):
        print(f"{key} -> {optimizer if key == 'opt' else FACTS_FILE}")


def _report_lines(network: str, state_dict: StateDict, prefix: str) -> list[str]:
    together: dict[str, list[str]] = {}
    for key in state_dict:
        together.setdefault(re.sub(r"blocks\.\d+\.", "blocks.N.", key), []).append(key)
    lines = []
    for name, keys in together.items():
        ours = from_meta(network, {name.replace(".N.", ".0."): state_dict[keys[0]]})
        ours = [re.sub(r"layers\.0\.", "layers.N.", prefix + _unprefixed(network, our_name)) for our_name in ours]
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
`{file}` by [ijepa-transformers](https://pypi.org/project/ijepa-transformers/) without changing a number.

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


def write_readme(directory: Path, name: str, file: str, encoder: str, config: IJepaConfig) -> None:
    """The directory's README.md, with the licence of the weights."""
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction",
        license="cc-by-nc-4.0",
        tags=["ijepa", "self-supervised-learning"],
    )
    body = CARD.format(
        name=in_markdown(name),
        file=in_markdown(file),
        contents=CONTENTS[encoder],
        heads=config.num_attention_heads,
        epsilon=config.layer_norm_eps,
        usage=USAGE.format(name=in_quotes(name)),
    )
    write_card(directory, data, body)


def save_tensors(tensors: StateDict, file: Path) -> None:
    """Writes a safetensors file from memory-mapped tensors: only non-contiguous and doubly used ones are copied."""
    starts, separate = set(), {}
    for key, tensor in tensors.items():
        tensor = tensor.contiguous()
        separate[key] = tensor.clone() if tensor.data_ptr() in starts else tensor
        starts.add(tensor.data_ptr())
    save_file(separate, file, metadata={"format": "pt"})


def write_model(directory: Path, networks: dict[str, StateDict], encoder: str, config: IJepaConfig) -> None:
    """Weights, configuration and image processor."""
    weights = {
        _prefix(network, encoder) + _unprefixed(network, key): tensor
        for network in NETWORKS_OF[encoder]
        for key, tensor in from_meta(network, networks[network]).items()
    }
    directory.mkdir()
    save_tensors(weights, directory / "model.safetensors")
    config.architectures = ["IJepaForPretraining" if encoder == "both" else "IJepaModel"]
    config.dtype = next(iter(weights.values())).dtype
    config.save_pretrained(directory)
    build_image_processor(config.image_height_and_width, config.num_channels).save_pretrained(directory)


def write_facts(directory: Path, checkpoint: Mapping) -> None:
    """What the checkpoint tells about its run, and its optimizer's settings, for the way back and for resuming."""
    facts = {key: checkpoint[key] for key in FACTS if key in checkpoint}
    if isinstance(checkpoint.get("opt"), Mapping):
        groups = checkpoint["opt"].get("param_groups", [])
        facts["optimizer_groups"] = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    (directory / FACTS_FILE).write_text(json.dumps(facts, indent=2, default=_plain_number))


def _plain_number(value):
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    raise ValueError(f"The checkpoint's settings hold a {type(value).__name__}, which JSON cannot.")


# The conversion
def convert(
    checkpoint_file: str | os.PathLike,
    output: str | os.PathLike,
    encoder: str = "both",
    num_attention_heads: int | None = None,
    image_size: list[int] | None = None,
    with_optimizer: bool = False,
) -> None:
    """Converts a file of Meta's to a directory; the arguments are those of the command line.

    Raises:
        ValueError: with one sentence, if anything does not fit; then nothing is left at `output`.
    """
    if with_optimizer and encoder != "both":
        raise ValueError(f"--with_optimizer needs all three networks, not --encoder {encoder}.")
    file, output = Path(checkpoint_file), Path(output)
    with written_aside(output) as directory:
        checkpoint = load_checkpoint(file)
        networks = read_networks(checkpoint, NETWORKS_OF[encoder])
        config = infer_config(networks, num_attention_heads, image_size)
        expected = expected_shapes(config)
        for network in NETWORKS_OF[encoder]:
            check_keys(network, networks[network], expected[network])
        moments = convert_optimizer(checkpoint.get("opt"), expected) if with_optimizer else {}
        print_report(checkpoint, networks, encoder, config, with_optimizer)
        write_model(directory, networks, encoder, config)
        write_readme(directory, output.name, file.name, encoder, config)
        write_facts(directory, checkpoint)
        if with_optimizer:
            save_tensors(moments, directory / OPTIMIZER_FILE)
    print(f"wrote {output}")


FILE_OPTIONS = {"encoder", "num_attention_heads", "image_size", "with_optimizer"}
DIRECTORY_OPTIONS = {"keep_image_processor", "layer_norm_eps"}


def convert_source(
    output: str, checkpoint_file: str | None = None, from_directory: str | None = None, **options: object
) -> None:
    """Converts the file or the directory that the command line names.

    Raises:
        ValueError: if an option belongs to the other kind of source, and as `convert` and `convert_directory` do.
    """
    is_file = from_directory is None
    foreign = sorted(options.keys() - (FILE_OPTIONS if is_file else DIRECTORY_OPTIONS))
    if foreign:
        flags = ("--checkpoint", "--from_directory") if is_file else ("--from_directory", "--checkpoint")
        raise ValueError(f"--{foreign[0]} goes with {flags[1]}, not with {flags[0]}.")
    if is_file:
        convert(checkpoint_file, output, **options)
    else:
        convert_directory(from_directory, output, **options)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # an option that is not given is absent, see `convert_source`
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", dest="checkpoint_file", help="Meta's .pth.tar file")
    source.add_argument("--from_directory", help="directory that the script of Transformers converted")
    parser.add_argument("--output", required=True, help="directory to write; must not exist or be empty")
    file = parser.add_argument_group("with --checkpoint")
    file.add_argument("--encoder", choices=NETWORKS_OF, help="both encoders and predictor (the default), or one")
    file.add_argument("--num_attention_heads", type=int, help="for widths that were not published")
    file.add_argument("--image_size", type=int, nargs="+", help="pixels, or height and width; a square by default")
    file.add_argument("--with_optimizer", action="store_true", help="take AdamW's moments along")
    directory = parser.add_argument_group("with --from_directory")
    directory.add_argument(
        "--keep_image_processor",
        action="store_true",
        help="for weights that were fine-tuned with the image processor beside them",
    )
    directory.add_argument("--layer_norm_eps", type=float, help="write this epsilon instead of the directory's")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run(convert_source, build_parser(), argv)
