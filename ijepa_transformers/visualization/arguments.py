# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa visualize`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..arguments import DatasetArguments, argument, parse_arguments, require, require_text


PROGRAM = "ijepa visualize"
LEAST = {
    **{"num_images": 2, "bank_size": 2, "map_images": 3, "batch_size": 1, "seed": 0},
    **{"decoder_images": 2, "decoder_steps": 1},
}


@dataclass
class VisualizationArguments(DatasetArguments):
    """Every argument of `ijepa visualize`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    model: str = argument("", "model directory or Hub name: a pretraining directory, or one I-JEPA encoder")
    output: str = argument("", "the HTML file to write")
    split: str = argument("train", "split to show; best one that the model was not trained on")
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory is shown; the paper evaluates the target"
    )
    num_images: int = argument(8, "images that are shown")
    bank_size: int = argument(512, "images whose patches are searched for the one most like a guess")
    map_images: int = argument(1000, "images on the map")
    batch_size: int = argument(32, "images per forward pass")
    seed: int = argument(0, "seed of the choice of images, of the masks and of the random encoder")
    runs: list[str] = argument([], "further runs as NAME=DIR, whose curves are drawn beside the model's own")
    decoder: bool = argument(
        False,
        "also trains a small decoder from features to pixels, on images of the split train, and shows the guesses of"
        " the predictor as pixels; the decoder is kept beside the model",
    )
    decoder_images: int = argument(1000, "images that the decoder is trained on")
    decoder_steps: int = argument(1000, "training steps of the decoder")
    pictures_dir: str | None = argument(None, "directory to which every picture is also written as a PNG file")

    def __post_init__(self):
        for name in ("model", "data", "output"):
            require(getattr(self, name), f"{name} is missing.")
        require_text(self, "output", "pictures_dir")
        for name, least in LEAST.items():
            require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}.")
        for run in self.runs:
            name, _, directory = run.partition("=")
            require(name and directory, f"runs must be NAME=DIR, got {run!r}.")
        names = [self.own_name, *(run.partition("=")[0] for run in self.runs)]
        require(len(set(names)) == len(names), f"every run needs a name of its own, got {', '.join(names)}.")

    @property
    def own_name(self) -> str:
        """What the page calls the model: the last part of its name."""
        return Path(self.model).name or self.model

    @property
    def pool_size(self) -> int:
        """Images that are read."""
        return max(self.num_images, self.bank_size, self.map_images)


def parse_visualization_arguments(argv: Sequence[str] | None = None) -> VisualizationArguments:
    """The arguments of `ijepa visualize`; see `parse_arguments`."""
    groups = [VisualizationArguments]
    return parse_arguments(
        argv, groups, VisualizationArguments, PROGRAM, "Writes an HTML page that shows what an I-JEPA has learned."
    )
