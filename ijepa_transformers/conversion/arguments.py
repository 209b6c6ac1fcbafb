# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa convert`, `ijepa export` and `ijepa onnx`."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arguments import CommandParser, require
from ..display import ONNX_PACKAGES
from ..files import check_output_directory


CONVERT, EXPORT, ONNX = "ijepa convert", "ijepa export", "ijepa onnx"
OPSETS = range(18, 24)  # 18 is the first that torch writes, 23 the last that every supported onnxruntime reads

CONVERT_HELP = """\
Converts a checkpoint of Meta's released I-JEPA code (*.pth.tar) to a directory of this package:

    ijepa convert --checkpoint IN1K-vit.h.14-300e.pth.tar --output ijepa_vith14

It also rewrites a copy from the Hub, which a script of Transformers converted. The output has the present names of the
weights and the right image processor:

    ijepa convert --from_directory ijepa_vith14_1k --output ijepa_vith14_context

The directory opens in transformers.AutoModel (as the target encoder, with or without this package) and in
IJepaForPretraining. Every key of the file is accounted for, or nothing is written. docs/convert.md tells more.
"""
EXPORT_HELP = """\
Writes a pretraining directory of this package in the layout of Meta's released I-JEPA code:

    ijepa export --model ijepa_vith14 --output ijepa_vith14.pth.tar

A directory that `ijepa convert --with_optimizer` wrote gives back the content of the original file, bit for bit. What
a directory does not know is None in the file. Only `epoch` is 0: with it Meta's code starts its schedules afresh from
these weights. A directory that this package trained knows only the weights.
"""


def _parser(program: str, description: str, **options: Any) -> CommandParser:
    return CommandParser(
        prog=program, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )


def parse_convert_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `ijepa convert`. An option that is not given is absent, see `convert_source`."""
    parser = _parser(CONVERT, CONVERT_HELP, argument_default=argparse.SUPPRESS)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", dest="checkpoint_file", type=os.path.expanduser, help="Meta's .pth.tar file")
    source.add_argument(
        "--from_directory", type=os.path.expanduser, help="copy from the Hub, which a script of Transformers converted"
    )
    parser.add_argument(
        "--output", required=True, type=os.path.expanduser, help="directory to write; it must be new or empty"
    )
    file = parser.add_argument_group("with --checkpoint")
    networks = ("both", "target", "context")
    file.add_argument(
        "--encoder", choices=networks, help="both encoders and the predictor, or one encoder (default: both)"
    )
    file.add_argument(
        "--num_attention_heads", type=int, help="heads of the encoder, for widths that were not published"
    )
    file.add_argument(
        "--image_size",
        type=int,
        nargs="+",
        help="pixels of an image: one number, or height and width (default: a square)",
    )
    file.add_argument("--with_optimizer", action="store_true", help="also convert AdamW's moments")
    file.add_argument(
        "--verbose",
        nargs="?",
        const="true",
        choices=("true", "false"),
        help="show where every key goes (default: false)",
    )
    directory = parser.add_argument_group("with --from_directory")
    directory.add_argument(
        "--keep_image_processor",
        action="store_true",
        help="keep the image processor as it is, for weights that were fine-tuned with it",
    )
    directory.add_argument(
        "--layer_norm_eps", type=float, help="epsilon of the layer norms (default: that of the directory)"
    )
    return parser.parse_args(argv)


def parse_export_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `ijepa export`."""
    parser = _parser(EXPORT, EXPORT_HELP)
    parser.add_argument(
        "--model",
        required=True,
        type=os.path.expanduser,
        help="pretraining directory: both encoders and the predictor",
    )
    parser.add_argument("--output", required=True, type=os.path.expanduser, help="file to write; it must not exist")
    parser.add_argument(
        "--no_module_prefix", dest="module_prefix", action="store_false", help="leave out 'module.' before each key"
    )
    return parser.parse_args(argv)


def parse_onnx_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments of `ijepa onnx`. Exits with status 2 if the export cannot succeed."""
    parser = _parser(ONNX, "Writes an I-JEPA encoder or classifier as ONNX.")
    parser.add_argument("--model", required=True, type=os.path.expanduser, help="model directory or Hub name")
    parser.add_argument("--output", required=True, type=os.path.expanduser, help="the .onnx file to write")
    parser.add_argument("--free_resolution", action="store_true", help="the file takes images of any height and width")
    parser.add_argument("--opset", type=int, default=18, help="version of the ONNX operators, 18 to 23 (default: 18)")
    arguments = parser.parse_args(argv)
    try:
        check_onnx_arguments(arguments)
    except ValueError as error:
        parser.error(str(error))
    return arguments


def check_onnx_arguments(arguments: argparse.Namespace) -> None:
    """Raises ValueError if the export cannot succeed, before anything is loaded or written."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    require(not missing, f'{", ".join(missing)} not found; run: pip install "ijepa-transformers[onnx]"')
    opset, output = arguments.opset, Path(arguments.output)
    require(opset in OPSETS, f"--opset must be one of {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    require(arguments.output.strip(), "--output must not be empty")
    require(output.parent.is_dir(), f"there is no folder {str(output.parent)!r} to write {output.name!r} to")
    check_output_directory(output.parent, f"--output {arguments.output!r}: the folder")
    taken = [str(path) for path in (output, output.with_name(f"{output.name}.data")) if os.path.lexists(path)]
    require(not taken, f"{''.join(taken[:1])!r} exists already; remove it or choose another --output")
