# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""PyTorch data sets over opened images: for pretraining, evaluation and fine-tuning.

Shape legend: `pixel_values` of a sample is a uint8 tensor (C, H, W). It is normalised later, on the device.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image

from .decoding import BadImageError, OpenedImage, decode_image, name_in_messages, read_image, to_array
from .order import AUGMENTATION_STREAM, CROP_STREAM, MIX_STREAM, random_stream, seeded_torch
from .transforms import (
    EVALUATION_RESIZE_RATIO,
    default_image_statistics,
    height_and_width,
    normalize_pixel_values,
    random_resized_crop,
    reduced_random_resized_crop,
    resize_center_crop,
)


MAX_SUBSTITUTES = 100  # unreadable images in a row that a sample may skip before the run stops


# Samples
class PretrainingImages(torch.utils.data.Dataset):
    """Random crops for pretraining, addressed by the keys of `PretrainingBatchSampler`.

    An image that cannot be read is replaced by the next one that can, so that all batches keep their size; `num_bad`
    says how many were skipped. The bad images of a sample are `index`, `index` + 1, ..., `index` + `num_bad` - 1,
    modulo the size of the data set (see `bad_indices`).

    Args:
        dataset: of `load_image_dataset`.
        image_size: of the samples.
        num_channels: 1 or 3.
        crop_scale, crop_ratio, horizontal_flip, interpolation: as in `random_resized_crop`; the published recipe by
            default.
        fast_large_photos: decode a JPEG two, four or eight times smaller where its crop stays at least as large as
            the sample. Faster on photos of some megapixels, but the pixels differ a little (docs/loading.md).
        seed: of the crops, which are a pure function of (seed, epoch, index).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | tuple[int, int],
        *,
        num_channels: int = 3,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = False,
        interpolation: str = "bilinear",
        fast_large_photos: bool = False,
        seed: int = 0,
    ):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be a range inside (0, 1], got {crop_scale!r}")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise ValueError(f"crop_ratio must be a range of positive numbers, got {crop_ratio!r}")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")
        default_image_statistics(num_channels)  # raises for other numbers of channels
        self.dataset = dataset
        self.image_size = height_and_width(image_size)
        self.num_channels = num_channels
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.horizontal_flip = horizontal_flip
        self.interpolation = interpolation
        self.fast_large_photos = fast_large_photos
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict[str, torch.Tensor | int]:
        """key (step, slot_block, epoch, index) -> `pixel_values` uint8 (C, H, W) and the ints `step`, `slot_block`,
        `index`, `num_bad`."""
        step, slot_block, epoch, index = key
        pixel_values, num_bad = self._first_readable(epoch, index)
        return {
            "pixel_values": pixel_values,
            "step": step,
            "slot_block": slot_block,
            "index": index,
            "num_bad": num_bad,
        }

    def read_crop(self, value, name: str, epoch: int, *identity: int) -> torch.Tensor:
        """The crop in an epoch of an image that is still encoded, uint8 (C, H, W).

        Args:
            value, name: as in `decode_image`.
            epoch: in which it is seen.
            identity: its index, or shard and row.

        Raises:
            BadImageError: as `decode_image`.
        """
        image = OpenedImage(value, name)
        if not (self.fast_large_photos and image.reducible):
            return self.crop(image.decode(self.num_channels), epoch, *identity)
        return reduced_random_resized_crop(
            image,
            self.num_channels,
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            self.crop_generator(epoch, *identity),
            self.horizontal_flip,
            self.interpolation,
        )

    def crop(self, image: Image.Image | np.ndarray, epoch: int, *identity: int) -> torch.Tensor:
        """The crop in an epoch of a decoded image, uint8 (C, H, W)."""
        return random_resized_crop(
            image,
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            self.crop_generator(epoch, *identity),
            horizontal_flip=self.horizontal_flip,
            interpolation=self.interpolation,
        )

    def crop_generator(self, epoch: int, *identity: int) -> np.random.Generator:
        """The random numbers of the crop of one image in an epoch."""
        return np.random.Generator(random_stream(self.seed, CROP_STREAM, epoch, *identity))

    def _first_readable(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        for num_bad in range(min(MAX_SUBSTITUTES, len(self))):
            substitute = (index + num_bad) % len(self)
            value = self.dataset[substitute]["image"]
            try:
                # The requested index seeds the crop of a substitute too: it is seen again under its own index.
                return self.read_crop(value, name_in_messages(value, substitute), epoch, index), num_bad
            except BadImageError as error:
                last = error
        raise BadImageError(
            f"{num_bad + 1} images in a row from image {index} on cannot be read; the last one is {last}"
        )


class EvaluationImages(torch.utils.data.Dataset):
    """Evaluation views: `pixel_values` uint8 (C, H, W) of `resize_center_crop` and, if there are labels, `labels`.

    A file that cannot be read raises a BadImageError with its name: leaving it out, or putting another in its place,
    would change the published number without a word.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | tuple[int, int],
        num_channels: int = 3,
        resize_ratio: float = EVALUATION_RESIZE_RATIO,
    ):
        default_image_statistics(num_channels)  # raises for other numbers of channels
        self.dataset = dataset
        self.image_size = height_and_width(image_size)
        self.num_channels = num_channels
        self.resize_ratio = resize_ratio

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = read_image(row["image"], index, self.num_channels)
        labels = {"labels": row["label"]} if "label" in row else {}
        return {"pixel_values": resize_center_crop(image, self.image_size, self.resize_ratio), **labels}


@dataclass
class ProcessedImages(torch.utils.data.Dataset):
    """What the model takes of each image: (channels, height, width), or the reason why the image cannot be read."""

    dataset: datasets.Dataset
    processor: object
    num_channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return self.prepare(decode_image(self.dataset[index]["image"], self.num_channels))
        except BadImageError as error:
            return error.reason

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """A decoded image (height, width, channels) through the image processor."""
        return self.processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]


class LabelledImages(ProcessedImages):
    """What the model takes of each image, `pixel_values` float (channels, height, width), and its `labels`.

    A file that cannot be read raises a BadImageError with its name, as in `EvaluationImages`.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = read_image(row["image"], index, self.num_channels)
        return {"pixel_values": self.prepare(to_array(image)), "labels": row["label"]}


class FineTuningImages(PretrainingImages):
    """Random crops with labels, addressed by the keys (epoch, index) of `EpochSampler`.

    An image that cannot be read raises a BadImageError with its name: a substitute would bring its own label, and a
    small labelled set has no images to lose without a word.

    Args:
        dataset, image_size, num_channels, crop_scale, crop_ratio, horizontal_flip, interpolation, seed: as in
            `PretrainingImages`.
        augment: what happens to a crop, uint8 (C, H, W) to uint8 (C, H, W), such as torchvision's RandAugment. Its
            randomness, taken from torch's global generator, is a pure function of (seed, epoch, index) as well.
    """

    def __init__(self, dataset: datasets.Dataset, image_size, *, augment: Callable | None = None, **settings):
        super().__init__(dataset, image_size, **settings)
        self.augment = augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        """`pixel_values` uint8 (C, H, W) and the ints `labels`, `epoch` and `index`."""
        epoch, index = key
        row = self.dataset[index]
        pixel_values = self.read_crop(row["image"], name_in_messages(row["image"], index), epoch, index)
        if self.augment is not None:
            with seeded_torch(self.seed, AUGMENTATION_STREAM, epoch, index):
                pixel_values = self.augment(pixel_values)
        return {"pixel_values": pixel_values, "labels": row["label"], "epoch": epoch, "index": index}


@dataclass
class FineTuningCollator:
    """Batches for a classifier: normalised images and their labels, mixed with one another while training.

    Samples of `FineTuningImages` are normalised and, if there are `mixers`, mixed by one of them, drawn at random for
    each batch; the labels become (B, classes) shares then. Samples of `LabelledImages` are never mixed. The randomness
    is a pure function of the seed and of the samples' keys, so it outlives interruptions and any number of workers.

    Args:
        image_mean, image_std: as in `normalize_pixel_values`.
        mixers: such as torchvision's MixUp and CutMix: (images (B, C, H, W), labels (B,)) to both, mixed.
        seed: of the mixing.
    """

    image_mean: Sequence[float]
    image_std: Sequence[float]
    mixers: Sequence[Callable] = ()
    seed: int = 0

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values` float (B, C, H, W) and `labels` int (B,), or float (B, classes) if mixed."""
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.tensor([sample["labels"] for sample in samples])
        if "epoch" in samples[0]:
            pixel_values = normalize_pixel_values(pixel_values, self.image_mean, self.image_std)
            if self.mixers:
                pixel_values, labels = self._mix(pixel_values, labels, samples)
        return {"pixel_values": pixel_values, "labels": labels}

    def _mix(self, pixel_values, labels, samples):
        keys = (samples[0]["epoch"], *(sample["index"] for sample in samples))
        with seeded_torch(self.seed, MIX_STREAM, *keys):
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            return mixer(pixel_values, labels)
