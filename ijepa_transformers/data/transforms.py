# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Crops, resizing and normalisation of decoded images.

Shape legend: H rows, W columns, C channels. A box is (top, left, height, width), in pixels. `size` is one number for a
square or (height, width), in pixels.
"""

import functools
import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from transformers import BitImageProcessorPil

from .decoding import OpenedImage, check_channels, to_array


EVALUATION_RESIZE_RATIO = 256 / 224  # shorter side over crop, the usual ImageNet protocol
_REDUCTIONS = (8, 4, 2)  # by which libjpeg can divide the sides while it decodes
_Box: TypeAlias = tuple[int, int, int, int]


def random_resized_crop(
    image: Image.Image | np.ndarray,
    size: int | Sequence[int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
    *,
    horizontal_flip: bool = False,
    interpolation: str = "bilinear",
) -> torch.Tensor:
    """The only augmentation of I-JEPA (appendix A.1): a random part of the image, resized with antialiasing.

    Args:
        image: uint8 (H, W, C), or a PIL image of mode L or RGB.
        size: of the result. If it is not square, `ratio` is relative to its width / height, so that the content is
            stretched by at most `ratio`.
        scale: smallest and largest part of the image's area.
        ratio: smallest and largest width / height of the crop, log-uniform in between.
        generator: of all random numbers.
        horizontal_flip: mirror half of the results. The paper does not. The crops are the same with and without.
        interpolation: "bilinear" (as published) or "bicubic".

    Returns:
        uint8 (C, height, width).
    """
    array = to_array(image)
    height, width = height_and_width(size)
    box = sample_crop(array.shape[0], array.shape[1], width / height, scale, ratio, generator)
    return _flipped_at_random(_resize_box(array, box, (height, width), interpolation), horizontal_flip, generator)


def reduced_random_resized_crop(
    image: OpenedImage,
    num_channels: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
    horizontal_flip: bool,
    interpolation: str,
) -> torch.Tensor:
    """`random_resized_crop` of a `reducible` image, which is decoded smaller if the crop allows it.

    The crop is the same part of the image. If both of its sides are at least two, four or eight times as long as those
    of the result, libjpeg divides the sides of the image by that number while it decodes. The pixels then differ a
    little (docs/speed.md has figures). Otherwise they are the same.
    """
    box = sample_crop(*image.height_and_width, size[1] / size[0], scale, ratio, generator)
    reduction = next((n for n in _REDUCTIONS if box[2] >= n * size[0] and box[3] >= n * size[1]), 1)
    array = image.decode(num_channels, reduction)
    if reduction == 1:
        resized = _resize_box(array, box, size, interpolation)
    else:
        resized = _resize_fractional_box(array, image.reduced_box(box, reduction), size, interpolation)
    return _flipped_at_random(resized, horizontal_flip, generator)


def _resize_box(array: np.ndarray, box: _Box, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """A box of (H, W, C), resized with antialiasing to (C, *size)."""
    top, left, height, width = box
    # Copied, because torch does not accept views that are reversed or read-only.
    crop = torch.from_numpy(array[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    # On uint8 the result differs from PIL's by at most one grey level and takes about a quarter of the time.
    return torch.nn.functional.interpolate(crop[None], size, mode=interpolation, antialias=True)[0]


def _resize_fractional_box(
    array: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> torch.Tensor:
    """As `_resize_box`, with PIL, for a box whose edges lie between pixels."""
    top, left, height, width = box
    first_row, first_column = int(top), int(left)
    array = array[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    top, left = top - first_row, left - first_column
    box = (left, top, left + width, top + height)
    return _resize_with_pil(array, size, Image.Resampling[interpolation.upper()], box).permute(2, 0, 1)


def _resize_with_pil(
    array: np.ndarray,
    size: tuple[int, int],
    resample: Image.Resampling,
    box: tuple[float, float, float, float] | None = None,
) -> torch.Tensor:
    """(H, W, C) resized to (*size, C). PIL has images of 1 and 3 channels; others are resized channel by channel."""
    is_colour = array.shape[2] == 3
    parts = [array] if is_colour else [array[:, :, place] for place in range(array.shape[2])]
    images = [Image.fromarray(np.ascontiguousarray(part)).resize(size[::-1], resample, box) for part in parts]
    return torch.from_numpy(np.concatenate([to_array(image) for image in images], axis=2))


def _flipped_at_random(image: torch.Tensor, horizontal_flip: bool, generator: np.random.Generator) -> torch.Tensor:
    if horizontal_flip and generator.random() < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def sample_crop(
    height: int,
    width: int,
    target_ratio: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> _Box:
    """Draws the box of a crop. After ten draws that do not fit, the largest box that fits is taken from the centre.

    Args:
        height, width: of the image, in pixels.
        target_ratio: width / height of the result; `ratio` is relative to it.
        scale, ratio, generator: as in `random_resized_crop`.
    """
    # Only Generator.random() is used: its numbers have never changed between NumPy versions, unlike integers().
    for _ in range(10):
        area, shape, vertical, horizontal = generator.random(4)
        crop_area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        crop_ratio = target_ratio * ratio[0] * (ratio[1] / ratio[0]) ** shape
        crop_height, crop_width = round(math.sqrt(crop_area / crop_ratio)), round(math.sqrt(crop_area * crop_ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = int(vertical * (height - crop_height + 1)), int(horizontal * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_ratio = min(max(width / height, target_ratio * ratio[0]), target_ratio * ratio[1])
    crop_height = max(1, min(height, round(width / crop_ratio)))
    crop_width = max(1, min(width, round(height * crop_ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_center_crop(
    image: Image.Image | np.ndarray, size: int | Sequence[int], resize_ratio: float = EVALUATION_RESIZE_RATIO
) -> torch.Tensor:
    """The evaluation view: bicubic resize, then centre crop. `build_image_processor` gives the same pixels.

    For a square size the shorter side becomes resize_ratio x size. For another size the whole image becomes
    resize_ratio x (height, width), which stretches the content of an image with other proportions than `size`. Stock
    image processors offer nothing else.

    Args:
        image: uint8 (H, W, C), or a PIL image of mode L or RGB.
        size: of the result.
        resize_ratio: 1 or more; 1 keeps small images whole (CIFAR and digits).

    Returns:
        uint8 (C, height, width).

    Raises:
        ValueError: if `resize_ratio` is below 1, or the size is not positive.
    """
    array = to_array(image)
    height, width = height_and_width(size)
    resized_size = _resized_size(array.shape[0], array.shape[1], size, resize_ratio)
    resized = _resize_with_pil(array, resized_size, Image.Resampling.BICUBIC)
    top, left = (resized_size[0] - height) // 2, (resized_size[1] - width) // 2
    return resized[top : top + height, left : left + width].permute(2, 0, 1).contiguous()


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """A size as (height, width), both positive. One number is a square."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    return height, width


def _evaluation_box(size: int | Sequence[int], resize_ratio: float) -> tuple[int, int]:
    if resize_ratio < 1:
        raise ValueError(f"resize_ratio must be 1 or more, got {resize_ratio!r}: the crop would leave the image")
    height, width = height_and_width(size)
    return round(resize_ratio * height), round(resize_ratio * width)


def _resized_size(height: int, width: int, size: int | Sequence[int], resize_ratio: float) -> tuple[int, int]:
    box_height, box_width = _evaluation_box(size, resize_ratio)
    if box_height != box_width:
        return box_height, box_width
    # Rounded down as `transformers` does, so that both give the same pixels.
    if height <= width:
        return box_height, int(box_height * width / height)
    return int(box_height * height / width), box_height


def default_image_statistics(num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in 0..1: those of ImageNet, and for one channel those of its luma.

    Raises:
        ValueError: for another number of channels than 1 or 3, which has no usual statistics.
    """
    statistics = {3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), 1: ([0.459], [0.226])}
    if num_channels not in statistics:
        raise ValueError(
            f"images of {num_channels} channels have no usual mean and standard deviation: measure them with ijepa "
            "stats, and set image_mean and image_std"
        )
    return statistics[num_channels]


def normalize_pixel_values(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> torch.Tensor:
    """(uint8 / 255 - mean) / std as float32, on the tensor's device.

    Args:
        pixel_values: uint8 (..., C, H, W).
        image_mean, image_std: one number per channel, for pixels in 0..1.

    Raises:
        TypeError: if the pixels are not uint8.
        ValueError: if the numbers of channels differ.
    """
    if pixel_values.dtype != torch.uint8:
        raise TypeError(f"pixel_values must be uint8 in 0..255, got {pixel_values.dtype}: normalised already?")
    if not len(image_mean) == len(image_std) == pixel_values.shape[-3]:
        raise ValueError(f"mean {image_mean} and std {image_std} do not fit {pixel_values.shape[-3]} channels")
    mean, std = (_in_grey_levels(tuple(values), pixel_values.device) for values in (image_mean, image_std))
    return (pixel_values.float() - mean) / std


@functools.cache  # so that the numbers are copied to the device once, and not in every step
def _in_grey_levels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers for pixels in 0..1, scaled to pixels in 0..255: (C, 1, 1)."""
    return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def build_image_processor(
    image_size: int | Sequence[int],
    num_channels: int = 3,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    resize_ratio: float = EVALUATION_RESIZE_RATIO,
    sixteen_bit_max: int | None = None,
) -> BitImageProcessorPil:
    """A stock image processor that gives the same as `resize_center_crop` and `normalize_pixel_values`.

    `save_pretrained` writes a `preprocessor_config.json` that does not mention PIL, and `AutoImageProcessor` opens it
    with or without torchvision. But transformers 5.17 does not export AutoImageProcessor if torchvision is missing;
    then `BitImageProcessorPil.from_pretrained` opens the file. The class is BiT's because its fields are these steps
    (DINOv2 uses it too); `ViTImageProcessor` has no centre crop of its own.

    The stock class differs from `decode_image` in three points. It does not rotate a PIL image by its EXIF
    orientation. For num_channels 3 it clips 16-bit images. For num_channels 1 it takes PIL images of mode L, or arrays
    (H, W, 1) or (1, H, W). It then raises a ValueError about the mean for images in colour, because it can convert to
    RGB but not to grey; call `image.convert("L")` first.

    Args:
        image_size: of the result, in pixels.
        num_channels: from 1 to 16.
        image_mean, image_std: for pixels in 0..1; for 1 or 3 channels by default those of `default_image_statistics`.
        resize_ratio: as in `resize_center_crop`.
        sixteen_bit_max: of the images that the model is trained on, as in `decode_image`. The processor only keeps it.

    Raises:
        ValueError: if a value is out of range.
    """
    check_channels(num_channels)
    if image_mean is None or image_std is None:
        mean, std = default_image_statistics(num_channels)
        image_mean, image_std = image_mean or mean, image_std or std
    height, width = height_and_width(image_size)
    box_height, box_width = _evaluation_box(image_size, resize_ratio)
    is_square = box_height == box_width
    return BitImageProcessorPil(
        size={"shortest_edge": box_height} if is_square else {"height": box_height, "width": box_width},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        do_convert_rgb=num_channels == 3,
        image_mean=list(image_mean),
        image_std=list(image_std),
        **({} if sixteen_bit_max is None else {"sixteen_bit_max": sixteen_bit_max}),
    )
