# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes the encoder or the classifier of a model directory as an ONNX file, and checks it against PyTorch:

    python conversion/export_onnx.py --model DIR --output encoder.onnx
    python conversion/export_onnx.py --model DIR --output encoder.onnx --free_resolution

A directory saved from `IJepaForImageClassification` gives the output `logits` (B, num_labels). Every other one gives
`last_hidden_state` (B, N, D) and `pooler_output` (B, D) of its encoder. For a pretraining directory this is the target
encoder. The input is `pixel_values` (B, channels, height, width), float32, as the image processor makes it. Models
above 2 GB get a second file, `encoder.onnx.data`, which must stay beside the first.

Needs the packages onnx, onnxscript and onnxruntime: pip install "ijepa-transformers[onnx]".
"""

import argparse
import logging
import os
import shlex
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..display import in_python, show_end, show_facts, show_section
from ..encoders import load_classifier, load_config, load_encoder
from ..failures import FAILED, REFUSED, end, failures_told
from ..files import disk_errors_of, files_below, sync_to_disk
from ..locks import alone_with
from ..saved_weights import require_finite
from .arguments import ONNX, parse_onnx_arguments


OUTPUTS = ("logits", "last_hidden_state", "pooler_output")
# Largest allowed difference to PyTorch in float32, as a share of the largest absolute value of the output. Measured:
# 1e-6 for ViT-B/16 (docs/features.md).
TOLERANCE = 1e-4


class ExportError(Exception):
    """The ONNX file does not compute what the model computes. The message shows the difference."""


class PlainOutputs(torch.nn.Module):
    """A model that takes one tensor and returns tensors only: (B, channels, height, width) -> a tuple of `names`."""

    def __init__(self, model: PreTrainedModel, free_resolution: bool):
        super().__init__()
        is_classifier = hasattr(model, "classifier")
        self.model, self.free_resolution = model, free_resolution
        self.names = [name for name in OUTPUTS if (name == "logits") == is_classifier]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values, interpolate_pos_encoding=self.free_resolution)
        return tuple(outputs[name] for name in self.names)


def _load_model(source: str) -> PreTrainedModel:
    """The classifier of a directory, or else its encoder, in float32 and evaluation mode.

    Raises:
        ValueError: if the source cannot be opened, is no I-JEPA model, or holds NaN or infinity.
    """
    config = load_config(source)
    if config.model_type != "ijepa":
        raise ValueError(f"{source!r} cannot be exported: its model_type is {config.model_type!r}, not 'ijepa'")
    is_classifier = any(name.endswith("ForImageClassification") for name in config.architectures or ())
    model = load_classifier(source, config) if is_classifier else load_encoder(source, "target", torch.float32)
    require_finite(model, source)
    return model.eval()


def _example_sizes(model: PreTrainedModel, free_resolution: bool) -> list[tuple[int, int]]:
    """Heights and widths to verify with. The model is traced with the first one.

    With free resolution: a wide image, a tall one that is no multiple of the patch size, and the model's own size.
    """
    height, width = model.config.image_height_and_width
    if not free_resolution:
        return [(height, width)]
    patch_height, patch_width = model.config.patch_height_and_width
    return [
        (height + patch_height, width + 3 * patch_width),
        (2 * height + patch_height // 2, width + patch_width),
        (height, width),
    ]


def _random_images(model: PreTrainedModel, batch_size: int, size: tuple[int, int]) -> torch.Tensor:
    """Normal noise (B, channels, height, width), the same in every run."""
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randn(batch_size, model.config.num_channels, *size, generator=generator)


def _write_onnx(model: PreTrainedModel, path: Path, free_resolution: bool, opset: int) -> None:
    """Traces the model with `torch.export` and saves it. Batch size and, if free, height and width are dynamic."""
    network = PlainOutputs(model, free_resolution).eval()
    dynamic_axes = {0: "batch", **({2: "height", 3: "width"} if free_resolution else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about the inside of torch
        program = torch.onnx.export(
            network,
            (_random_images(model, 2, _example_sizes(model, free_resolution)[0]),),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            input_names=["pixel_values"],
            output_names=network.names,
            dynamic_shapes={"pixel_values": dynamic_axes},
        )
    cast(torch.onnx.ONNXProgram, program).save(path)  # dynamo=True always gives a program


@torch.no_grad()
def _largest_differences(model: PreTrainedModel, path: Path, free_resolution: bool) -> dict[str, tuple[float, float]]:
    """Compares onnxruntime on the CPU with PyTorch, for 1 and 5 images of each of `_example_sizes`.

    Returns:
        output -> its largest absolute difference and its largest absolute value.
    """
    import onnxruntime  # an optional dependency

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    network = PlainOutputs(model, free_resolution).eval()
    found = dict.fromkeys(network.names, (0.0, 0.0))
    for size in _example_sizes(model, free_resolution):
        for batch_size in (1, 5):
            pixel_values = _random_images(model, batch_size, size)
            theirs = session.run(network.names, {"pixel_values": pixel_values.numpy()})
            for name, ours, other in zip(network.names, network(pixel_values), theirs, strict=True):
                if other.shape != tuple(ours.shape):
                    raise ExportError(f"{name} has shape {other.shape} instead of {tuple(ours.shape)}.")
                difference = (ours - torch.from_numpy(other)).abs().max().item()
                worst, largest = np.maximum(found[name], (difference, ours.abs().max().item()))  # NaN stays NaN
                found[name] = float(worst), float(largest)
    return found


def _verify(model: PreTrainedModel, path: Path, free_resolution: bool) -> dict[str, tuple[float, float]]:
    """The `_largest_differences`.

    Raises:
        ExportError: if a difference is above `TOLERANCE`.
    """
    differences = _largest_differences(model, path, free_resolution)
    for name, (difference, magnitude) in differences.items():
        if not difference <= TOLERANCE * magnitude:  # this form also refuses NaN
            raise ExportError(
                f"{name} differs by {difference:.3g} from PyTorch, more than {TOLERANCE:g} of its magnitude"
                f" {magnitude:.3g}; no file was written."
            )
    return differences


def export(
    model: PreTrainedModel, output: Path, free_resolution: bool = False, opset: int = 18
) -> dict[str, tuple[float, float]]:
    """Writes the model beside `output`, verifies it there, and moves it to `output`.

    Args:
        free_resolution: whether the file takes images of any height and width.
        opset: version of the ONNX operators, one of `OPSETS`.

    Returns:
        output -> its largest absolute difference to PyTorch and its largest absolute value.

    Raises:
        ExportError: if the file does not compute what the model computes. Then nothing is written.
        ValueError: if another command is writing to `output`.
    """
    with alone_with(output), disk_errors_of(output):
        aside = output.with_name(f".tmp-{output.name}")
        shutil.rmtree(aside, ignore_errors=True)  # an earlier command was killed
        aside.mkdir()
        try:
            _write_onnx(model, aside / output.name, free_resolution, opset)
            differences = _verify(model, aside / output.name, free_resolution)
            files = files_below(aside)[::-1]  # the weights (.onnx.data) before the file that needs them
            for file in files:
                sync_to_disk(file)
            for file in files:
                os.replace(file, output.parent / file.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return differences


def execute(arguments: argparse.Namespace, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments."""
    disable_progress_bar()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is missing
    output = Path(arguments.output)
    with failures_told(ONNX, REFUSED):
        model = _load_model(arguments.model)
        sizes = "any height and width" if arguments.free_resolution else "images of the model's size"
        show_facts(
            {
                "model": f"{arguments.model}, {type(model).__name__}, {model.num_parameters():,} parameters",
                "file": f"ONNX operators of version {arguments.opset}, {sizes}",
                "output": output,
            }
        )
        try:
            differences = export(model, output, arguments.free_resolution, arguments.opset)
        except ExportError as error:
            end(ONNX, error, str(error), FAILED)
    found = [
        f"{name}: largest difference to PyTorch {difference:.2g}, of values up to {magnitude:.3g}"
        for name, (difference, magnitude) in differences.items()
    ]
    show_section("Compared with PyTorch", "\n".join(found))
    session = f'onnxruntime.InferenceSession({in_python(output)}, providers=["CPUExecutionProvider"])'
    code = f"import onnxruntime; print(*{session}.get_outputs())"
    show_end({"ONNX file": output}, [shlex.join(["python", "-c", code])])


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_onnx_arguments(argv))
