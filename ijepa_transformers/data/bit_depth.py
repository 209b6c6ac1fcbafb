# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What is white in the 16-bit images of a data set: one setting for all, checked on a sample before a run begins.

Cameras write 10, 12 or 14 bits into files of 16, and satellites write reflectances from 0 to 3000. Read as 16 bits,
such images are nearly black.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import BaseImageProcessor

from .decoding import BadImageError, ImageValue, OpenedImage
from .samples import FAR_BELOW_FULL_RANGE, FULL_RANGE, advice


SAMPLE_SIZE = 64
_SETTING = "sixteen_bit_max"  # the flag, the recipe key, and the key in preprocessor_config.json
_MANY = 0.05  # of the values


def to_stderr(sentence: str) -> None:
    """Tells the user, without mixing with results on stdout."""
    print(sentence, file=sys.stderr)


@dataclass
class DepthSample:
    """The values of the 16-bit images in a sample.

    Args:
        source: the data set, for messages.
        counts: how often each value is there, (65536,).
        num_images: of 16 bits.
        num_looked_at: of any kind.
        errors: of those that cannot be read as images of the model's channels.
    """

    source: str
    counts: np.ndarray = field(default_factory=lambda: np.zeros(FULL_RANGE + 1, np.int64))
    num_images: int = 0
    num_looked_at: int = 0
    errors: list[BadImageError] = field(default_factory=list)

    @property
    def largest(self) -> int:
        """The largest value; 0 if there is no image of 16 bits."""
        return int(np.flatnonzero(self.counts).max(initial=0))

    def share_above(self, white: int) -> float:
        """The share of the values that are larger than `white`."""
        return float(self.counts[white + 1 :].sum() / max(1, self.counts.sum()))


def look(images: Iterable[ImageValue], num_channels: int, source: str) -> DepthSample:
    """Collects the values of the 16-bit images among some images. Images that cannot be read are left to the run."""
    sample = DepthSample(source)
    for value in images:
        sample.num_looked_at += 1
        try:
            opened = OpenedImage(value)
            samples = opened.samples(num_channels)
            if samples is not None and samples.needs_setting:
                samples.largest()  # raises if there is no known range
                sample.counts += np.bincount(samples.colours.ravel(), minlength=FULL_RANGE + 1)
                sample.num_images += 1
        except BadImageError as error:
            sample.errors.append(error)
        except ValueError as error:  # values without a known range
            sample.errors.append(BadImageError(opened.name, f"ValueError: {error}"))
    return sample


def look_at_dataset(dataset: datasets.Dataset, num_channels: int, source: str) -> DepthSample:
    """`look` at up to 64 images, evenly spread over the data set."""
    return look(_spread(dataset), num_channels, source)


def _spread(dataset: datasets.Dataset) -> Iterator[ImageValue]:
    for index in np.unique(np.linspace(0, len(dataset) - 1, SAMPLE_SIZE).round().astype(int)).tolist():
        yield dataset[index]["image"]


def white_of(
    sample: DepthSample, asked: int | None, inherited: int | None = None, tell: Callable[[str], None] = to_stderr
) -> int | None:
    """The value of white in the 16-bit images of a data set, or None if the sample has no such image.

    Args:
        asked: what the user set.
        inherited: what the model was trained with.
        tell: is told if many values are above what was asked for.

    Raises:
        ValueError: if nothing was asked for, and the values do not suit the model or, without a model's setting, the
            whole range.
    """
    if asked is not None or not sample.num_images:
        if asked is not None and sample.share_above(asked):
            share = 100 * sample.share_above(asked)
            tell(
                f"The 16-bit images of {sample.source!r} go up to {sample.largest:,}: {share:.2g} % of the values are "
                f"above {_SETTING} {asked} and become white."
            )
        return asked if asked is not None else inherited
    if inherited is not None:
        _check_inherited(sample, inherited)
        return inherited
    if sample.largest < FAR_BELOW_FULL_RANGE:
        raise ValueError(f"{sample.source!r}: {advice(sample.largest, f'--{_SETTING}')}.")
    return FULL_RANGE


def _check_inherited(sample: DepthSample, inherited: int) -> None:
    if sample.largest < inherited // 2:
        problem = f"use at most {sample.largest:,}"
    elif sample.share_above(inherited) > _MANY:
        problem = f"go up to {sample.largest:,}, {100 * sample.share_above(inherited):.2g} % of the values above white"
    else:
        return
    raise ValueError(
        f"The 16-bit images of {sample.source!r} {problem}, but the model was trained with {_SETTING} {inherited}: "
        f"set --{_SETTING} to the white of these images, or to {inherited} if this is meant."
    )


def settle(
    processor: BaseImageProcessor,
    sample: DepthSample,
    asked: int | None,
    tell: Callable[[str], None] = to_stderr,
) -> None:
    """Sets `sixteen_bit_max` of an image processor, which its directory keeps.

    Raises:
        ValueError: as `white_of`, or if no image of the sample can be opened.
    """
    if sample.errors and len(sample.errors) == sample.num_looked_at:
        raise ValueError(
            f"No image of {sample.source!r} can be read, of {sample.num_looked_at} looked at. The first is "
            f"{sample.errors[0]}"
        )
    white = white_of(sample, asked, setting_of(processor), tell)
    if white is not None:
        setattr(processor, _SETTING, white)


def setting_of(processor: BaseImageProcessor) -> int | None:
    """`sixteen_bit_max` of the images that a model was trained on; None if it is unknown."""
    value = getattr(processor, _SETTING, None)
    return value if isinstance(value, int) else None
