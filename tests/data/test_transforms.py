# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Crops, the evaluation view, the image processor that equals it, and normalisation."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # 5.17 hides it without torchvision

from ijepa_transformers.data.transforms import (
    build_image_processor,
    default_image_statistics,
    normalize_pixel_values,
    random_resized_crop,
    resize_center_crop,
    sample_crop,
)
from tests.data.images import photo_pixels


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("target_ratio", [1.0, 2.0])
def test_crops_cover_scale_ratio_and_place_evenly(target_ratio):
    rng = generator()
    boxes = np.array([sample_crop(900, 1000, target_ratio, (0.1, 0.3), (3 / 4, 4 / 3), rng) for _ in range(4000)])
    top, left, height, width = boxes.T
    area = height * width / 900_000
    assert 0.098 < area.min() < 0.102 and 0.298 < area.max() < 0.302 and abs(area.mean() - 0.2) < 0.004
    log_ratio = np.log(width / height / target_ratio)
    assert abs(log_ratio.min() - np.log(3 / 4)) < 0.01 and abs(log_ratio.max() - np.log(4 / 3)) < 0.01
    assert abs(log_ratio.mean()) < 0.01
    assert (top >= 0).all() and (top + height <= 900).all() and (left + width <= 1000).all()
    assert abs((top / (900 - height)).mean() - 0.5) < 0.02 and abs((left / (1000 - width)).mean() - 0.5) < 0.02


def test_images_that_fit_no_crop_give_their_centre():
    assert sample_crop(10, 1000, 1.0, (0.9, 1.0), (3 / 4, 4 / 3), generator()) == (0, 493, 10, 13)
    assert sample_crop(1000, 10, 1.0, (0.9, 1.0), (3 / 4, 4 / 3), generator()) == (493, 0, 13, 10)
    assert sample_crop(1, 1, 1.0, (0.3, 1.0), (3 / 4, 4 / 3), generator()) == (0, 0, 1, 1)


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_random_crop_is_pils_crop_and_resize_up_to_rounding(num_channels, interpolation):
    image = Image.fromarray(photo_pixels(150, 200)).convert("L" if num_channels == 1 else "RGB")
    for seed in range(10):
        top, left, height, width = sample_crop(150, 200, 2.0, (0.3, 1.0), (3 / 4, 4 / 3), generator(seed))
        crop = image.crop((left, top, left + width, top + height))
        expected = np.array(crop.resize((64, 32), Image.Resampling[interpolation.upper()])).reshape(32, 64, -1)
        found = random_resized_crop(
            image, (32, 64), (0.3, 1.0), (3 / 4, 4 / 3), generator(seed), interpolation=interpolation
        )
        assert found.dtype == torch.uint8 and found.shape == (num_channels, 32, 64) and found.is_contiguous()
        difference = np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected)
        assert difference.max() <= (1 if interpolation == "bilinear" else 2) and difference.mean() < 0.1


def test_the_flip_mirrors_half_of_the_same_crops():
    plain, flipped = (
        [
            random_resized_crop(photo_pixels(), 16, (0.3, 1.0), (3 / 4, 4 / 3), generator(seed), horizontal_flip=flip)
            for seed in range(200)
        ]
        for flip in (False, True)
    )
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)]
    assert sum(mirrored) + sum(same) == 200 and 70 < sum(mirrored) < 130


def test_evaluation_takes_the_centre_of_a_resize_that_leaves_a_margin():
    assert torch.equal(
        resize_center_crop(photo_pixels(32, 32), 32, 1.0), torch.from_numpy(photo_pixels(32, 32)).permute(2, 0, 1)
    )
    whole = resize_center_crop(photo_pixels(100, 300), (256, 256), 1.0)
    assert torch.equal(resize_center_crop(photo_pixels(100, 300), 224), whole[:, 16:240, 16:240])
    with pytest.raises(ValueError, match=r"resize_ratio must be 1 or more, got 0\.9"):
        resize_center_crop(photo_pixels(), 224, 0.9)


@pytest.mark.parametrize("size", [32, 224, (32, 64), (48, 40)])
@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("shape", [(75, 101), (101, 75), (8, 8)])
def test_the_saved_image_processor_does_what_evaluation_does(tmp_path, size, num_channels, shape):
    build_image_processor(size, num_channels).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(photo_pixels(*shape)).convert("L" if num_channels == 1 else "RGB")
    mean, std = default_image_statistics(num_channels)
    ours = normalize_pixel_values(resize_center_crop(image, size)[None], mean, std)
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    grey_levels = 255 * (ours - theirs).abs() * torch.tensor(std).view(-1, 1, 1)
    # The PIL backend gives the same pixels; torchvision's bicubic rounds some of them differently.
    assert grey_levels.max() < (2.01 if processor.backend == "torchvision" else 0.001)
    assert grey_levels.mean() < 0.2


def test_the_saved_image_processor_is_portable(tmp_path):
    build_image_processor(224).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "BitImageProcessor"
    assert saved["size"] == {"shortest_edge": 256} and saved["crop_size"] == {"height": 224, "width": 224}
    assert saved["do_center_crop"] and saved["do_convert_rgb"] and saved["resample"] == Image.Resampling.BICUBIC
    assert saved["image_mean"] == [0.485, 0.456, 0.406]


def test_the_gray_image_processor_refuses_colour_instead_of_mixing_it_up():
    with pytest.raises(ValueError, match="mean must have 3 elements"):
        build_image_processor(32, 1)(Image.fromarray(photo_pixels()))


def test_normalisation_is_the_textbook_one_and_happens_once():
    pixel_values = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    mean, std = default_image_statistics(3)
    expected = (pixel_values / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalize_pixel_values(pixel_values, mean, std), expected)
    with pytest.raises(TypeError, match=r"must be uint8 in 0\.\.255, got torch\.float32"):
        normalize_pixel_values(expected, mean, std)
    with pytest.raises(ValueError, match="do not fit 3 channels"):
        normalize_pixel_values(pixel_values, [0.5], [0.5])
