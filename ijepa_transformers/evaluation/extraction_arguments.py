# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa extract`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..arguments import (
    DatasetArguments,
    argument,
    arguments_from_keywords,
    parse_arguments,
    require,
    require_numbers,
    require_workers,
)


PROGRAM = "ijepa extract"
# Values of `features`, with the output of the model, which is also the name of the column or tensor.
OUTPUTS = {"pooled": "pooler_output", "patch": "last_hidden_state"}


@dataclass
class FeatureExtractionArguments(DatasetArguments):
    """Every argument of `ijepa extract`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    model: str = argument("", "model directory or Hub name: of this package, or another image encoder of Transformers")
    output_dir: str = argument("", "directory the features are written to")
    split: str = argument("train", "split to read; a folder without splits is 'train'")
    encoder: str = argument(
        "target",
        "which encoder of a pretraining directory; the paper evaluates the target",
        ("target", "context"),
    )
    features: list[str] = argument(
        ["pooled"], "pooled (one vector per image), patch (one vector per patch), or both", tuple(OUTPUTS)
    )
    format: str = argument("parquet", "kind of file", ("parquet", "safetensors"))
    dtype: str = argument(
        "fp32", "precision of weights and computation; Parquet stores float32 either way", ("fp32", "bf16")
    )
    batch_size: int = argument(64, "images per process and forward pass")
    shard_size: int = argument(
        1024, "images per file: so many are computed again after a kill, and memory has to hold their features"
    )
    torch_compile: bool = argument(
        False,
        "compile the encoder for images of one size: the first batch takes some ten seconds longer, all others less"
        " time",
    )
    num_workers: int = argument(2, "processes that load images, per process of the command; 0: it loads them itself")

    def __post_init__(self):
        for name in ("model", "data", "output_dir", "features"):
            require(getattr(self, name), f"{name} is missing.")
        require_numbers(self, "batch_size", "shard_size", least=1)
        require_workers(self)
        self.features = sorted(set(self.features), reverse=True)  # pooled comes first

    @property
    def outputs(self) -> list[str]:
        """The model's outputs that are written."""
        return [OUTPUTS[name] for name in self.features]


GROUPS = (FeatureExtractionArguments,)


def parse_extraction_arguments(argv: Sequence[str] | None = None) -> FeatureExtractionArguments:
    """The arguments of `ijepa extract`; see `parse_arguments`."""
    description = "Writes the features of images to Parquet or safetensors files."
    return parse_arguments(argv, GROUPS, FeatureExtractionArguments, PROGRAM, description)


def extraction_arguments(**keywords: Any) -> FeatureExtractionArguments:
    """The arguments of `extract_features(...)`; see `arguments_from_keywords`."""
    return arguments_from_keywords(keywords, GROUPS, FeatureExtractionArguments, "extract_features")
