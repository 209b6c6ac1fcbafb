# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The images of a visualization report: reading them, and choosing those that are shown."""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import datasets
import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d
from transformers import BitImageProcessorPil

from ..arguments import require
from ..configuration_ijepa import IJepaConfig
from ..data.bit_depth import look_at_dataset, settle
from ..data.datasets import ProcessedImages
from ..data.labels import labels_of
from ..data.notices import counted
from ..data.sources import open_split
from ..data.transforms import normalize_pixel_values
from ..encoders import load_processor
from .arguments import VisualizationArguments


TRAIN = "train"  # the split whose images a decoder is trained on
HELD_OUT_EVERY = 5  # about every fifth image of it is not used for that


@dataclass
class Pool:
    """The images that were read, in the form that the networks see."""

    images: torch.Tensor  # (K, channels, height, width), uint8
    rows: list[int]  # (K,), their places in the split
    labels: np.ndarray | None  # (K,), -1 where an image has none
    class_names: list[str] | None
    num_bad: int
    image_mean: Sequence[float]
    image_std: Sequence[float]

    @cached_property
    def pictures(self) -> torch.Tensor:
        """The images as pictures, (K, 1 or 3, height, width), uint8: the mean of bands in grey."""
        if self.images.shape[1] in (1, 3):
            return self.images
        return self.images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)

    def pixel_values(self, rows: slice | list[int]) -> torch.Tensor:
        return normalize_pixel_values(self.images[rows], self.image_mean, self.image_std)

    def beginning_with(self, chosen: Sequence[int]) -> "Pool":
        """The same images, the chosen ones first."""
        others = sorted(set(range(len(self.rows))).difference(chosen))
        order = [*chosen, *others]
        labels = None if self.labels is None else self.labels[order]
        return dataclasses.replace(
            self, images=self.images[order], rows=[self.rows[place] for place in order], labels=labels
        )


def load_pool(arguments: VisualizationArguments, config: IJepaConfig) -> Pool:
    """Reads the images of the page in a random order. The shown ones come first. Unreadable ones are counted.

    Raises:
        ValueError: fewer than two images can be read, or the image processor does not fit the model.
    """
    dataset = open_split(arguments, arguments.split)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    pool = read_pool(arguments, config, dataset, order, arguments.pool_size)
    candidates = list(range(len(pool.rows)))
    if arguments.decoder:  # its pictures show images that it was not trained on
        candidates = [place for place in candidates if is_held_out(arguments.split, pool.rows[place])] or candidates
    return pool.beginning_with(choose_images(pool.pictures, candidates, arguments.num_images))


def is_held_out(split: str, row: int) -> bool:
    """Whether an image is not used to train a decoder. This depends on nothing but its place in its split."""
    return split != TRAIN or zlib.crc32(str(row).encode()) % HELD_OUT_EVERY == 0


def read_pool(
    arguments: VisualizationArguments, config: IJepaConfig, dataset: datasets.Dataset, order: Iterable[int], limit: int
) -> Pool:
    """Reads up to `limit` images of a data set, in the given order of its rows.

    Raises:
        ValueError: fewer than two images can be read, or the image processor does not fit the model.
    """
    # Its class may vary, its statistics do not.
    processor = cast(BitImageProcessorPil, load_processor(arguments.model))
    settle(processor, look_at_dataset(dataset, config.num_channels, arguments.data), arguments.sixteen_bit_max)
    has_statistics = getattr(processor, "do_normalize", True)
    mean = processor.image_mean if has_statistics else [0.0] * config.num_channels
    std = processor.image_std if has_statistics else [1.0] * config.num_channels
    rows, pixels, num_bad = _read_images(ProcessedImages(dataset, processor, config.num_channels), order, limit)
    require(
        len(rows) >= 2, f"{arguments.data!r} has {counted(len(rows), 'readable image')}, but pictures need at least 2."
    )
    images = torch.stack([_to_uint8(pixel_values, mean, std) for pixel_values in pixels])
    size = tuple(images.shape[-2:])
    require(
        size == config.image_height_and_width,
        f"The image processor gives {size} pixels, but the model takes {config.image_height_and_width}.",
    )
    labels, class_names = None, None
    if "label" in dataset.column_names:
        labels, class_names = labels_of(dataset.select(rows)), dataset.features["label"].names
        labels = labels if (labels >= 0).any() else None  # the page explains colours only if an image has a label
    return Pool(images, rows, labels, class_names, num_bad, mean, std)


def _read_images(
    images: ProcessedImages, order: Iterable[int], limit: int
) -> tuple[list[int], list[torch.Tensor], int]:
    """The rows and the pixels of up to `limit` readable images, and the number of unreadable ones before them."""
    rows: list[int] = []
    pixels: list[torch.Tensor] = []
    num_bad = 0
    for row in order:
        image = images[row]
        if isinstance(image, str):
            num_bad += 1
            continue
        rows.append(row)
        pixels.append(image)
        if len(rows) == limit:
            break
    return rows, pixels, num_bad


def _to_uint8(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Undoes the normalisation, (channels, height, width)."""
    means, stds = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (255 * (pixel_values * stds + means)).round().clamp(0, 255).to(torch.uint8)


COARSE_SIDE, THUMBNAIL_SIDE = 32, 8  # pixels: detail finer than COARSE_SIDE is noise to a reader
IMAGES_AT_ONCE = 64  # whole float images of all candidates would fill the memory


def choose_images(pictures: torch.Tensor, candidates: Sequence[int], number: int) -> list[int]:
    """Numbers of images with much detail that differ from each other.

    Of the half with most detail (mean step between neighbouring pixels of a coarse copy), the first is the one with
    most detail. Each further one differs most from those before it (by a thumbnail).

    Args:
        pictures: (K, channels, H, W).
        candidates: numbers of images that may be chosen.
        number: of images to choose; all candidates are chosen if there are fewer.
    """
    size = min(COARSE_SIDE, pictures.shape[-2]), min(COARSE_SIDE, pictures.shape[-1])
    groups = torch.as_tensor(candidates).split(IMAGES_AT_ONCE)
    coarse = torch.cat([adaptive_avg_pool2d(pictures[group].float(), size) for group in groups])
    detail = sum((coarse.diff(dim=axis).abs().flatten(1).mean(dim=1) for axis in (2, 3)), torch.zeros(len(coarse)))
    kept = detail.argsort(descending=True, stable=True)[: max(number, len(coarse) // 2)]
    thumbnails = adaptive_avg_pool2d(coarse[kept], THUMBNAIL_SIDE).flatten(1)
    chosen = [0]
    distance = torch.cdist(thumbnails, thumbnails[:1])[:, 0]
    while len(chosen) < min(number, len(kept)):
        distance[chosen] = -1
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, torch.cdist(thumbnails, thumbnails[chosen[-1:]])[:, 0])
    return [candidates[int(kept[place])] for place in chosen]
