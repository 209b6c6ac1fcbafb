# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""PyTorch data sets over opened images: for pretraining, evaluation and fine-tuning.

Shape legend: `pixel_values` of a sample is a uint8 tensor (C, H, W), which is normalised later, on the device. In
`ProcessedImages` and `LabelledImages` it is the float tensor of the image processor.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import datasets
import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor
from typing_extensions import Unpack

from .bit_depth import setting_of
from .decoding import (
    BadImageError,
    ImageValue,
    OpenedImage,
    check_channels,
    decode_image,
    name_in_messages,
    read_image,
    to_array,
)
from .image_cache import DecodedImages
from .order import AUGMENTATION_STREAM, CROP_STREAM, MIX_STREAM, random_stream, seeded_torch
from .transforms import (
    EVALUATION_RESIZE_RATIO,
    height_and_width,
    normalize_pixel_values,
    random_resized_crop,
    reduced_random_resized_crop,
    resize_center_crop,
)


MAX_SUBSTITUTES = 100  # unreadable images in a row that a sample may skip before the run stops


class CropSettings(TypedDict, total=False):
    """The keyword arguments of `RandomCrops` but the seed."""

    num_channels: int
    sixteen_bit_max: int | None
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    horizontal_flip: bool
    interpolation: str
    fast_large_photos: bool


class RandomCrops:
    """Random crops of images: a pure function of (seed, epoch, the image's identity).

    Args:
        image_size: of the crops, in pixels.
        num_channels, sixteen_bit_max: as in `decode_image`.
        crop_scale, crop_ratio, horizontal_flip, interpolation: as in `random_resized_crop`; the defaults are those of
            the published recipe.
        fast_large_photos: decode a JPEG two, four or eight times smaller if the crop is still at least as large as the
            sample. This is faster for photos of some megapixels, but the pixels differ a little (docs/speed.md).
        seed: of the crops.

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        image_size: int | Sequence[int],
        *,
        num_channels: int = 3,
        sixteen_bit_max: int | None = None,
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
        check_channels(num_channels)
        self.image_size = height_and_width(image_size)
        self.num_channels = num_channels
        self.sixteen_bit_max = sixteen_bit_max
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.horizontal_flip = horizontal_flip
        self.interpolation = interpolation
        self.fast_large_photos = fast_large_photos
        self.seed = seed

    def read_crop(self, value: ImageValue, name: str, epoch: int, *identity: int) -> torch.Tensor:
        """The crop of an encoded image in an epoch, uint8 (C, H, W).

        Args:
            value, name: as in `decode_image`.
            epoch: the epoch in which the image is seen.
            identity: the index of the image, or its shard and row.

        Raises:
            BadImageError: as `decode_image`.
        """
        image = OpenedImage(value, name)
        if not (self.fast_large_photos and image.reducible):
            return self.crop(image.decode(self.num_channels, sixteen_bit_max=self.sixteen_bit_max), epoch, *identity)
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
        """The crop of a decoded image in an epoch, uint8 (C, H, W)."""
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


class PretrainingImages(RandomCrops, torch.utils.data.Dataset):
    """Random crops for pretraining, addressed by the keys of `PretrainingBatchSampler`.

    An image that cannot be read is replaced by the next readable one, so that all batches keep their size; `num_bad`
    says how many were skipped. The bad images of a sample are `index`, `index` + 1, ..., `index` + `num_bad` - 1,
    modulo the size of the data set (see `bad_indices`).

    Args:
        dataset: of `load_image_dataset`.
        image_size: of the samples.
        seed: of the crops, which are a pure function of (seed, epoch, index).
        cache: keeps the decoded images. The crops are the same with and without. Not with `fast_large_photos`.
        settings: as in `RandomCrops`.

    Raises:
        ValueError: for a cache and `fast_large_photos` together.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | Sequence[int],
        *,
        seed: int = 0,
        cache: DecodedImages | None = None,
        **settings: Unpack[CropSettings],
    ):
        super().__init__(image_size, seed=seed, **settings)
        if cache is not None and self.fast_large_photos:
            raise ValueError("fast_large_photos decodes each photo for its crop, so decoded images cannot be kept.")
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict[str, torch.Tensor | int]:
        """key (step, slot_block, epoch, index) -> `pixel_values` uint8 (C, H, W) and the ints `step`, `slot_block`,
        `index`, `num_bad`.

        Raises:
            BadImageError: if MAX_SUBSTITUTES images in a row, or all images, cannot be read.
        """
        step, slot_block, epoch, index = key
        pixel_values, num_bad = self._first_readable(epoch, index)
        return {
            "pixel_values": pixel_values,
            "step": step,
            "slot_block": slot_block,
            "index": index,
            "num_bad": num_bad,
        }

    def _first_readable(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        for num_bad in range(min(MAX_SUBSTITUTES, len(self))):
            substitute = (index + num_bad) % len(self)
            try:
                # The crop of a substitute has the seed of `index`, so that its own turn shows another crop.
                return self._crop_of(substitute, epoch, index), num_bad
            except BadImageError as error:
                last = error
        raise BadImageError(
            f"{num_bad + 1} images in a row from image {index} on cannot be read; the last one is {last}"
        )

    def _crop_of(self, place: int, epoch: int, index: int) -> torch.Tensor:
        """A crop of the image at `place`, with the random numbers of `index`."""
        if self.cache is not None:
            return self.crop(self.cache.get(place, functools.partial(self._decode, place)), epoch, index)
        value = self.dataset[place]["image"]
        return self.read_crop(value, name_in_messages(value, place), epoch, index)

    def _decode(self, place: int) -> np.ndarray:
        return read_image(self.dataset[place]["image"], place, self.num_channels, self.sixteen_bit_max)


class EvaluationImages(torch.utils.data.Dataset):
    """Evaluation views: `pixel_values` uint8 (C, H, W) of `resize_center_crop` and, if there are labels, `labels`.

    An image that cannot be read raises a BadImageError with its name. Skipping or replacing it would silently change
    the published number.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | Sequence[int],
        num_channels: int = 3,
        resize_ratio: float = EVALUATION_RESIZE_RATIO,
        sixteen_bit_max: int | None = None,
    ):
        check_channels(num_channels)
        self.dataset = dataset
        self.image_size = height_and_width(image_size)
        self.num_channels = num_channels
        self.resize_ratio = resize_ratio
        self.sixteen_bit_max = sixteen_bit_max

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = read_image(row["image"], index, self.num_channels, self.sixteen_bit_max)
        labels = {"labels": row["label"]} if "label" in row else {}
        return {"pixel_values": resize_center_crop(image, self.image_size, self.resize_ratio), **labels}


def prepare_image(processor: BaseImageProcessor, image: np.ndarray, **options: Any) -> torch.Tensor:
    """A decoded image (height, width, channels) through an image processor: float (channels, height, width).

    Image processors that use PIL know images of 1 and 3 channels. Channels of other images go through it one by one.
    `options` are those of the processor, such as `do_resize`.
    """
    options |= {"input_data_format": "channels_last", "return_tensors": "pt"}
    if image.shape[2] in (1, 3):
        return processor(image, **options)["pixel_values"][0]
    planes = []
    for place in range(image.shape[2]):
        statistics = {name: [getattr(processor, name)[place]] for name in _statistics(processor, image.shape[2])}
        planes.append(processor(image[..., place : place + 1], **statistics, **options)["pixel_values"][0])
    return torch.cat(planes)


def _statistics(processor: BaseImageProcessor, num_channels: int) -> list[str]:
    """The names of the settings with a number for each channel.

    Raises:
        ValueError: if the processor has another number of them.
    """
    names = ["image_mean", "image_std"] if getattr(processor, "do_normalize", None) else []
    for name in names:
        values = getattr(processor, name)
        if not isinstance(values, Sequence) or len(values) != num_channels:
            raise ValueError(f"{name} of the image processor is {values}, but the images have {num_channels} channels")
    return names


@dataclass
class _ProcessorImages(torch.utils.data.Dataset):
    dataset: datasets.Dataset
    processor: BaseImageProcessor
    num_channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """As `prepare_image`."""
        return prepare_image(self.processor, image)


class ProcessedImages(_ProcessorImages):
    """Each image as the model takes it, float (channels, height, width), or the reason why it cannot be read.

    Args:
        dataset: of `load_image_dataset`.
        processor: of the model.
        num_channels: of the model.

    A `sixteen_bit_max` of the processor is that of the images.
    """

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            value, white = self.dataset[index]["image"], setting_of(self.processor)
            return self.prepare(decode_image(value, self.num_channels, sixteen_bit_max=white))
        except BadImageError as error:
            return error.reason


class LabelledImages(_ProcessorImages):
    """Each image as the model takes it, `pixel_values` float (channels, height, width), with its `labels`.

    An image that cannot be read raises a BadImageError with its name, as in `EvaluationImages`. Arguments are those of
    `ProcessedImages`.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = read_image(row["image"], index, self.num_channels, setting_of(self.processor))
        return {"pixel_values": self.prepare(to_array(image)), "labels": row["label"]}


class FineTuningImages(RandomCrops, torch.utils.data.Dataset):
    """Random crops with labels, addressed by the keys (epoch, index) of `EpochSampler`.

    An image that cannot be read raises a BadImageError with its name. It is not replaced: another image would bring
    another label, and a small labelled set should not lose images silently.

    Args:
        dataset: of `load_image_dataset`, with labels.
        image_size: of the samples.
        augment: applied to a crop, uint8 (C, H, W) to uint8 (C, H, W), such as torchvision's RandAugment. It must draw
            its random numbers from torch's global generator; they are a pure function of (seed, epoch, index) too.
        seed: of crops and augmentation.
        settings: as in `RandomCrops`.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | Sequence[int],
        *,
        augment: Callable[[torch.Tensor], torch.Tensor] | None = None,
        seed: int = 0,
        **settings: Unpack[CropSettings],
    ):
        super().__init__(image_size, seed=seed, **settings)
        self.dataset = dataset
        self.augment = augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        """`pixel_values` uint8 (C, H, W) and the ints `labels`, `epoch` and `index`."""
        epoch, index = key
        row = self.dataset[index]
        pixel_values = self.read_crop(row["image"], name_in_messages(row["image"], index), epoch, index)
        if self.augment is not None:
            with seeded_torch(self.seed, AUGMENTATION_STREAM, epoch, index):
                pixel_values = self.augment(pixel_values)
        return {"pixel_values": pixel_values, "labels": row["label"], "epoch": epoch, "index": index}


# Mixes images (B, C, H, W) with one another, and labels (B,) into shares (B, classes).
Mixer = Callable[[torch.Tensor, torch.Tensor], Sequence[torch.Tensor]]


@dataclass
class FineTuningCollator:
    """Batches for a classifier: normalised images and their labels, mixed with one another in training.

    Samples of `FineTuningImages` are normalised. If there are `mixers`, one of them is drawn at random for each batch
    and mixes it; the labels then become (B, classes) shares. Samples of `LabelledImages` are never mixed. The random
    numbers are a pure function of the seed and the samples' keys, so interruptions and workers do not change them.

    Args:
        image_mean, image_std: as in `normalize_pixel_values`.
        mixers: such as torchvision's MixUp and CutMix.
        seed: of the mixing.
        num_classes: if the labels of a sample are a list of classes.
    """

    image_mean: Sequence[float]
    image_std: Sequence[float]
    mixers: Sequence[Mixer] = ()
    seed: int = 0
    num_classes: int | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` float (B, C, H, W) and `labels` int (B,), or float (B, classes) if mixed or lists."""
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = self._labels([sample["labels"] for sample in samples])
        if "epoch" in samples[0]:
            pixel_values = normalize_pixel_values(pixel_values, self.image_mean, self.image_std)
            if self.mixers:
                pixel_values, labels = self._mix(pixel_values, labels, samples)
        return {"pixel_values": pixel_values, "labels": labels}

    def _labels(self, labels: list[Any]) -> torch.Tensor:
        """Class ids (B,), or 0 and 1 (B, classes) where the labels are lists of ids."""
        if self.num_classes is None:
            return torch.tensor(labels)
        rows = torch.zeros(len(labels), self.num_classes)
        for row, ids in zip(rows, labels, strict=True):
            row[ids] = 1
        return rows

    def _mix(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, samples: list[dict[str, Any]]
    ) -> Sequence[torch.Tensor]:
        keys = (samples[0]["epoch"], *(sample["index"] for sample in samples))
        with seeded_torch(self.seed, MIX_STREAM, *keys):
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            return mixer(pixel_values, labels)
