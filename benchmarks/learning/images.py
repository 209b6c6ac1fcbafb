# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Labelled images in memory, and random crops of whole batches on the device.

All methods of a comparison get the same bytes. Images are decoded once, made square and shrunk to `stored_size`, and
kept as bytes (N, channels, stored_size, stored_size) in a file beside the results. A crop is cut and resized by
`grid_sample`, so it costs the same on a CPU and little on a GPU.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import affine_grid, grid_sample, interpolate

from ijepa_transformers.data.decoding import read_image
from ijepa_transformers.data.labels import labels_of
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.data.transforms import default_image_statistics, resize_center_crop


BLOCKS = 10  # of ten parts of the training images, one is held out to choose settings by


@dataclass(frozen=True)
class LabelledImages:
    """Bytes (N, channels, side, side) and classes (N,), 0 to the number of classes - 1."""

    pixels: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: torch.Tensor) -> "LabelledImages":
        return LabelledImages(self.pixels[indices], self.labels[indices])

    def to(self, device: str) -> "LabelledImages":
        return LabelledImages(self.pixels.to(device), self.labels.to(device))


def load_split(source: str, split: str, stored_size: int, num_channels: int, cache: Path) -> LabelledImages:
    """The labelled images of a split, from the cache if they were read before.

    Args:
        source, split: as in `ijepa pretrain`; "validation" and "test" stand for each other.
        stored_size: height and width of the stored images. The centre square of each image is shrunk to it.
        cache: directory of the files with decoded images. Keep it outside the repository.

    Raises:
        ValueError: if the split has no labels.
    """
    key = hashlib.sha256(f"{Path(source).resolve()} {split} {stored_size} {num_channels}".encode()).hexdigest()[:16]
    path = cache / f"{Path(source).name}-{split}-{stored_size}-{key}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # another run may be writing the same
        torch.save(_read_split(source, split, stored_size, num_channels), partial)
        partial.rename(path)
    return LabelledImages(*torch.load(path, weights_only=True))


def _read_split(source: str, split: str, stored_size: int, num_channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = load_image_dataset(source, split=split)
    if "label" not in dataset.column_names:
        raise ValueError(f"a comparison needs labels, but the {split!r} split of {source} has none.")
    labels = torch.as_tensor(labels_of(dataset))
    kept = (labels >= 0).nonzero().flatten().tolist()  # -1 means unlabelled
    pixels = torch.empty(len(kept), num_channels, stored_size, stored_size, dtype=torch.uint8)
    for place, index in enumerate(kept):
        array = read_image(dataset[index]["image"], index, num_channels)
        pixels[place] = resize_center_crop(array, stored_size, 1.0)
    return pixels, labels[kept]


def load_parts(
    source: str, part: str, stored_size: int, num_channels: int, cache: Path, block: int = 1
) -> tuple[LabelledImages, LabelledImages]:
    """Images to train on, and images to judge by.

    Args:
        part: "selection": nine tenths of the training split, and its other tenth. Settings are chosen here, and the
            test images are not opened. "final": the whole training split, and the test images. Tables are made here.
        block: the held-out tenth consists of blocks of so many neighbours of the listing. 1: of random images. Take
            larger blocks where neighbours show the same thing.
    """
    train = load_split(source, "train", stored_size, num_channels, cache)
    if part == "final":
        return train, load_split(source, test_split(source), stored_size, num_channels, cache)
    held_out = held_out_images(len(train), block)
    return train.select(~held_out), train.select(held_out)


def test_split(source: str) -> str:
    """The first of "validation" and "test" that the source has."""
    try:
        load_image_dataset(source, split="validation")
    except ValueError:
        return "test"
    return "validation"


def held_out_images(num_images: int, block: int) -> torch.Tensor:
    """(num_images,) bool: the tenth of the training images that settings are chosen by."""
    if block > 1:
        return torch.arange(num_images) // block % BLOCKS == BLOCKS - 1
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(num_images, dtype=torch.bool)
    chosen[order[: num_images // BLOCKS]] = True
    return chosen


def shrink(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Bytes (B, channels, side, side) as floats (B, channels, size, size), from 0 to 255."""
    if pixels.shape[-1] == size:
        return pixels.float()
    return interpolate(pixels.float(), size=(size, size), mode="bicubic", antialias=True).clamp_(0, 255)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Floats from 0 to 255, normalised with the usual mean and deviation of each channel."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in default_image_statistics(pixels.shape[1]))
    return (pixels / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


@dataclass(frozen=True)
class Crops:
    """Random crops of whole batches.

    Args:
        size: height and width of a crop, pixels.
        scale: smallest and largest area of a crop as a share of the image. (1, 1): the whole image, no crop.
        ratio: smallest and largest width / height.
        flip: whether half of the crops are mirrored.
    """

    size: int
    scale: tuple[float, float] = (1.0, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False

    def __call__(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Bytes (B, channels, side, side) to normalised floats (B, channels, size, size)."""
        if self.scale[0] == 1.0:
            shrunk = normalize(shrink(pixels, self.size))
            return torch.where(self._mirrored(pixels, generator), shrunk.flip(-1), shrunk) if self.flip else shrunk
        places = affine_grid(self._boxes(pixels, generator), [len(pixels), 1, self.size, self.size], False)
        return normalize(grid_sample(pixels.float(), places, padding_mode="reflection", align_corners=False))

    def _mirrored(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        draws = torch.rand(len(pixels), 1, 1, 1, device=pixels.device, generator=generator)
        return draws < 0.5

    def _boxes(self, pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(B, 2, 3): the affine maps from a crop to its place in the image, both from -1 to 1."""
        draws = torch.rand(5, len(pixels), device=pixels.device, generator=generator)
        area = self.scale[0] + draws[0] * (self.scale[1] - self.scale[0])
        low, high = (torch.tensor(value).log().item() for value in self.ratio)
        ratio = (low + draws[1] * (high - low)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        boxes = torch.zeros(len(pixels), 2, 3, device=pixels.device)
        boxes[:, 0, 0] = torch.where(draws[4] < 0.5, -width, width) if self.flip else width
        boxes[:, 1, 1] = height
        boxes[:, 0, 2] = (2 * draws[2] - 1) * (1 - width)
        boxes[:, 1, 2] = (2 * draws[3] - 1) * (1 - height)
        return boxes
