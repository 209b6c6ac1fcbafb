# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What is white in the 16-bit images of a data set: one setting for all, checked on a sample before a run begins.

Cameras write 10, 12 or 14 bits into files of 16, and satellites write reflectances from 0 to 3000. Read as 16 bits,
such images are nearly black.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import datasets
import numpy as np
from transformers import BaseImageProcessor

from . import notices
from .decoding import BadImageError, ImageValue, OpenedImage
from .notices import counted
from .samples import FAR_BELOW_FULL_RANGE, FULL_RANGE, advice


SAMPLE_SIZE = 64
_SETTING = "sixteen_bit_max"  # the flag, the recipe key, and the key in preprocessor_config.json
_MANY = 0.05  # of the values
_HOT = 0.001  # of the values of an image may be hot pixels
_BETWEEN = 0.01  # so many times as many as marks of missing pixels may lie between these and the other values
_NARROW = 16  # images that use less than this part of the range are nearly one grey


@dataclass
class DepthSample:
    """The values of the 16-bit images in a sample.

    Args:
        source: the data set, for messages.
        counts: how often each value is there, (65536,).
        brightest: of each 16-bit image the largest value, hot pixels and marks of missing pixels left out.
        marks: values that were taken for marks of missing pixels.
        num_looked_at: of any kind.
        num_animations: of these, how many have several frames.
        errors: of those that cannot be read as images of the model's channels.
    """

    source: str
    counts: np.ndarray = field(default_factory=lambda: np.zeros(FULL_RANGE + 1, np.int64))
    brightest: list[int] = field(default_factory=list)
    marks: set[int] = field(default_factory=set)
    num_looked_at: int = 0
    num_animations: int = 0
    errors: list[BadImageError] = field(default_factory=list)

    @property
    def num_images(self) -> int:
        """How many images have 16 bits."""
        return len(self.brightest)

    @property
    def largest(self) -> int:
        """The largest value; 0 if there is no image of 16 bits."""
        return int(np.flatnonzero(self.counts).max(initial=0))

    def share_above(self, white: int) -> float:
        """The share of the values that are larger than `white`."""
        return float(self.counts[white + 1 :].sum() / max(1, self.counts.sum()))

    def add(self, colours: np.ndarray) -> None:
        """Counts the values of a 16-bit image."""
        counts = np.bincount(colours.ravel(), minlength=FULL_RANGE + 1)
        self.counts += counts
        mark = _mark_of_missing_pixels(counts)
        if mark is not None:
            self.marks.add(mark)
            counts = counts[:mark]
        self.brightest.append(_quantile(counts, 1 - _HOT) or int(np.flatnonzero(counts).max(initial=0)))

    def range_of_most(self) -> tuple[int, int]:
        """The values between which nearly all pixels of all images lie."""
        return _quantile(self.counts, _HOT), _quantile(self.counts, 1 - _HOT)

    def dark(self, white: int) -> list[int]:
        """The largest values of the images that stay far below white: all of them if all stay below half of it, else
        those that stay below a quarter. Black images tell nothing, unless all are black.
        """
        told = [value for value in self.brightest if value] or self.brightest
        limit = (white + 1) // (2 if max(told) < (white + 1) // 2 else 4)
        return [value for value in told if value < limit]

    def is_mostly_dark(self, white: int) -> bool:
        """Whether at least half of the images that are not black are dark."""
        return bool(self.dark(white)) and 2 * len(self.dark(white)) >= sum(value > 0 for value in self.brightest)

    def count_dark(self, white: int) -> str:
        """How many images are dark, for messages: "3 of 4 ", or nothing for all that are not black."""
        dark = self.dark(white)
        return f"{len(dark):,} of {self.num_images:,} " if max(self.brightest) > max(dark) else ""


def _quantile(counts: np.ndarray, share: float) -> int:
    """The least value that this share of the pixels does not exceed."""
    return int(np.searchsorted(counts.cumsum(), share * counts.sum()))


def _mark_of_missing_pixels(counts: np.ndarray) -> int | None:
    """The largest value of an image if it stands alone far above all others, as 65,535 for what a satellite missed."""
    largest = int(np.flatnonzero(counts).max(initial=0))
    far_below = (largest + 1) // 4
    others = counts[:largest]
    stands_alone = counts[far_below:largest].sum() <= counts[largest] * _BETWEEN
    is_minor = _HOT * counts.sum() < counts[largest] <= others.sum()
    if largest < FAR_BELOW_FULL_RANGE or not (stands_alone and is_minor):
        return None
    return largest if 0 < _quantile(others, 1 - _HOT) < far_below else None


def look(images: Iterable[ImageValue], num_channels: int, source: str) -> DepthSample:
    """Collects the values of the 16-bit images among some images. Images that cannot be read are left to the run."""
    sample = DepthSample(source)
    notices.expect_first(notices.WHITE)
    for value in images:
        sample.num_looked_at += 1
        try:
            opened = OpenedImage(value)
            sample.num_animations += opened.is_animation
            samples = opened.samples(num_channels)
            if samples is not None and samples.needs_setting:
                samples.largest()  # raises if there is no known range
                sample.add(samples.colours)
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
    sample: DepthSample, asked: int | None, inherited: int | None = None, tell: Callable[[str], None] = notices.tell
) -> int | None:
    """The value of white in the 16-bit images of a data set, or None if the sample has no such image.

    Args:
        asked: what the user set.
        inherited: what the model was trained with.
        tell: is told if values are above what was asked for, or if some images are dark or have fewer bits.

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
        if asked is not None:
            _tell_of_fewer_bits(sample, asked, tell)
        return asked if asked is not None else inherited
    if inherited is not None:
        _check_inherited(sample, inherited)
        _tell_of_dark(sample, inherited, tell)
        return inherited
    if sample.is_mostly_dark(FULL_RANGE):
        some, largest = sample.count_dark(FULL_RANGE), max(sample.dark(FULL_RANGE))
        raise ValueError(f"{sample.source!r}: {some}{advice(largest, f'--{_SETTING}')}.{_told_marks(sample)}")
    _tell_of_dark(sample, FULL_RANGE, tell)
    return FULL_RANGE


def _told_marks(sample: DepthSample) -> str:
    marks = " and ".join(f"{mark:,}" for mark in sorted(sample.marks)[:3])
    return f" {marks} was taken for the mark of missing pixels." if marks else ""


def _tell_of_narrow(sample: DepthSample, white: int, tell: Callable[[str], None]) -> None:
    """Tells of images whose values lie close together and far from 0, as those with an offset."""
    least, most = sample.range_of_most()
    if least > 0 and most - least < (white + 1) // _NARROW:
        tell(
            f"Nearly all values of the 16-bit images of {sample.source!r} lie from {least:,} to {most:,}, so they are"
            " nearly one grey: subtract what they have in common, and store them again."
        )


def _tell_of_dark(sample: DepthSample, white: int, tell: Callable[[str], None]) -> None:
    dark = sample.dark(white)
    if dark:
        tell(
            f"{len(dark):,} of {sample.num_images:,} 16-bit images of {sample.source!r} use at most {max(dark):,} and "
            f"are dark, because {_SETTING} is {white}."
        )
    else:
        _tell_of_fewer_bits(sample, white, tell)


def _tell_of_fewer_bits(sample: DepthSample, white: int, tell: Callable[[str], None]) -> None:
    """Tells of images whose largest value is just that of fewer bits, such as 32,767 of 15. Else a value as exact as
    this is rare."""
    whites = [value for value in sample.brightest if 255 <= value < white and not value & (value + 1)]
    if whites:
        tell(
            f"{len(whites):,} of {sample.num_images:,} 16-bit images of {sample.source!r} end at exactly "
            f"{max(whites):,}, as images of {max(whites).bit_length()} bits do. They are dark, because {_SETTING} is "
            f"{white} for all."
        )


def _check_inherited(sample: DepthSample, inherited: int) -> None:
    if sample.is_mostly_dark(inherited):
        some = sample.count_dark(inherited).strip()
        problem = f"use at most {max(sample.dark(inherited)):,}" + (f" in {some}" if some else "")
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
    tell: Callable[[str], None] = notices.tell,
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
    if sample.num_animations:
        tell(
            f"{sample.num_animations} of {counted(sample.num_looked_at, 'image')} looked at in {sample.source!r} have"
            " several frames; only the first one is read."
        )
    white = white_of(sample, asked, setting_of(processor), tell)
    if white is not None:
        setattr(processor, _SETTING, white)
        if sample.num_images:
            _tell_of_narrow(sample, white, tell)


def setting_of(processor: BaseImageProcessor) -> int | None:
    """`sixteen_bit_max` of the images that a model was trained on; None if it is unknown.

    Raises:
        ValueError: if it cannot be right.
    """
    value = getattr(processor, _SETTING, None)
    if value is not None and (type(value) is not int or not 1 <= value <= FULL_RANGE):
        raise ValueError(
            f"{_SETTING} in the preprocessor_config.json of the model must be a whole number from 1 to {FULL_RANGE},"
            f" got {value!r}."
        )
    return value
