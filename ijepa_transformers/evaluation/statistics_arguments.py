# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa stats`."""

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
    require_text,
    require_workers,
)


PROGRAM = "ijepa stats"
MAX_CHANNELS = 16  # data.decoding has it too, whose import is slow


@dataclass
class StatisticsArguments(DatasetArguments):
    """Every argument of `ijepa stats`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    split: str = argument("train", "split to measure; a folder without splits is 'train'")
    num_channels: int = argument(3, "channels to read: 3 for colour, 1 for grey, up to 16 for bands")
    max_images: int = argument(10_000, "measure a random sample of so many images, or all if there are fewer")
    num_workers: int = argument(2, "processes that load images; 0: the command loads them itself")

    def __post_init__(self):
        require(self.data, "data is missing.")
        require_text(self, "split")
        require_numbers(self, "num_channels", least=1, most=MAX_CHANNELS)
        require_numbers(self, "max_images", least=1)
        require_workers(self)


GROUPS = (StatisticsArguments,)


def parse_statistics_arguments(argv: Sequence[str] | None = None) -> StatisticsArguments:
    """The arguments of `ijepa stats`; see `parse_arguments`."""
    description = "Measures mean and standard deviation of each channel, and prints them as lines of a recipe."
    return parse_arguments(argv, GROUPS, StatisticsArguments, PROGRAM, description)


def statistics_arguments(**keywords: Any) -> StatisticsArguments:
    """The arguments of `image_statistics(...)`; see `arguments_from_keywords`."""
    return arguments_from_keywords(keywords, GROUPS, StatisticsArguments, "image_statistics")
