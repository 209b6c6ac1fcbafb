# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa stats`: mean and standard deviation of each channel of a data set, as lines of a recipe.

Every image counts the same, whatever its size is, because a crop of each has the same size in training. Pixels lie in
0..1, as `image_mean` and `image_std` of a recipe do.

Shape legend: N images, C channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader

from ..arguments import require
from ..data.bit_depth import look_at_dataset, white_of
from ..data.decoding import BadImageError, read_image
from ..data.notices import counted, tell
from ..data.order import epoch_order
from ..data.sources import open_split
from ..data.workers import prepare_worker
from ..display import (
    SECONDS_BETWEEN_LINES,
    Progress,
    command,
    data_flags,
    on_standard_error,
    show_end,
    show_facts,
)
from ..failures import REFUSED, failures_told
from .statistics_arguments import PROGRAM, StatisticsArguments, parse_statistics_arguments, statistics_arguments


_RECIPE = "small_images"  # runs on any machine
_ROWS_AT_A_TIME = 256  # whose numbers are kept as float64


class _Moments(torch.utils.data.Dataset):
    """Mean and mean square of each channel of an image, (2, C) in 0..1, or the error of one that cannot be read."""

    def __init__(self, dataset: datasets.Dataset, num_channels: int, sixteen_bit_max: int | None):
        self.dataset, self.num_channels, self.sixteen_bit_max = dataset, num_channels, sixteen_bit_max

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray | BadImageError:
        try:
            image = read_image(self.dataset[index]["image"], index, self.num_channels, self.sixteen_bit_max)
        except BadImageError as error:
            return error
        sums = np.zeros((2, self.num_channels))
        for start in range(0, len(image), _ROWS_AT_A_TIME):
            part = image[start : start + _ROWS_AT_A_TIME] / 255
            sums += part.sum(axis=(0, 1)), np.square(part).sum(axis=(0, 1))
        return sums / (image.shape[0] * image.shape[1])


def measure(arguments: StatisticsArguments, shown: bool = False) -> dict[str, Any]:
    """`num_channels`, `image_mean` and `image_std` of a split, and `sixteen_bit_max` if it has images of 16 bits.

    Images that cannot be read are left out, and their number goes to stderr. So does what is uncommon.

    Args:
        shown: whether to show the head and a bar.

    Raises:
        ValueError: if the data cannot be opened, no image can be read, or nothing says what is white in images of 16
            bits.
    """
    dataset = open_split(arguments, arguments.split)
    sample = look_at_dataset(dataset, arguments.num_channels, arguments.data)
    white = white_of(sample, arguments.sixteen_bit_max)
    total = len(dataset)
    if total > arguments.max_images:
        dataset = dataset.select(np.sort(epoch_order(total, 0, epoch=0)[: arguments.max_images]))
    if shown:
        _show_head(arguments, len(dataset), total)
    results = list(_results(_Moments(dataset, arguments.num_channels, white), arguments.num_workers, shown))
    bad = [result for result in results if isinstance(result, BadImageError)]
    moments = [result for result in results if not isinstance(result, BadImageError)]
    require(moments, f"No image of {arguments.data!r} can be read; the first one is {bad[0] if bad else ''}")
    if not shown:  # the head has said so
        tell(f"measured on {len(moments):,} of {counted(total, 'image')}")
    if bad:
        tell(f"{counted(len(bad), 'image')} of those looked at cannot be read; the first is {bad[0]}")
    means, squares = np.mean(moments, axis=0)
    deviations = np.sqrt(np.maximum(squares - np.square(means), 0))
    return {
        "num_channels": arguments.num_channels,
        **({} if white is None else {"sixteen_bit_max": white}),
        "image_mean": _rounded(means),
        "image_std": _rounded(_without_zeros(deviations)),
    }


def _show_head(arguments: StatisticsArguments, num_measured: int, num_images: int) -> None:
    measured = "all of them" if num_measured == num_images else f"a random sample of {num_measured:,}"
    show_facts(
        {
            "data": f"{arguments.data}, split {arguments.split!r}: {counted(num_images, 'image')}",
            "measured": f"{measured}, {counted(arguments.num_channels, 'channel')}",
        }
    )


def _results(images: _Moments, num_workers: int, shown: bool) -> Iterator[np.ndarray | BadImageError]:
    """The result of each image, in order."""
    loader = DataLoader(
        images, batch_size=None, num_workers=num_workers, collate_fn=_unchanged, worker_init_fn=prepare_worker
    )
    wait = SECONDS_BETWEEN_LINES
    with Progress(len(images), "image", shown=shown, seconds_between_lines=wait, leave=False) as progress:
        for result in loader:
            progress.update()
            yield result


def _unchanged(result: Any) -> Any:
    return result


def _without_zeros(deviations: np.ndarray) -> np.ndarray:
    """Deviations (C,) by which one can divide."""
    constant = np.flatnonzero(deviations < 1e-6)
    if len(constant):
        channels = ", ".join(map(str, constant + 1))
        tell(f"channel {channels} has one value everywhere: its standard deviation is given as 1")
    return np.where(deviations < 1e-6, 1.0, deviations)


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def execute(arguments: StatisticsArguments, argv: Sequence[str] = ()) -> None:
    """Runs the command with its parsed arguments. Exits as a command does."""
    datasets.disable_progress_bars()
    with failures_told(PROGRAM, REFUSED), on_standard_error():
        statistics = measure(arguments, shown=True)
    print(yaml.safe_dump(statistics, sort_keys=False, default_flow_style=None, width=1000), end="", flush=True)
    with on_standard_error():
        show_end({}, [next_command(arguments, statistics)])


def next_command(arguments: StatisticsArguments, statistics: Mapping[str, Any]) -> str:
    """The command that pretrains on the measured images, with what was measured."""
    data = {**data_flags(arguments), "train_split": arguments.split}
    return command("pretrain", recipe=_RECIPE, **data, **statistics, output_dir="out")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_statistics_arguments(argv))


def image_statistics(**keywords: Any) -> dict[str, Any]:
    """Mean and standard deviation of each channel of a data set: `ijepa stats` as a function.

    Args:
        keywords: the flags of `ijepa stats --help` by name, `recipe` among them.

    Returns:
        As `measure`, for `pretrain(**image_statistics(data=...), ...)`.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: with one sentence, where the command would end with an error.
    """
    return measure(statistics_arguments(**keywords))
