# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a sample and a batch hold, in pretraining, evaluation and fine-tuning."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from ijepa_transformers.data import decoding
from ijepa_transformers.data.datasets import (
    EvaluationImages,
    FineTuningCollator,
    FineTuningImages,
    LabelledImages,
    PretrainingImages,
    RandomCrops,
)
from ijepa_transformers.data.decoding import BadImageError, decode_image
from ijepa_transformers.data.order import PretrainingBatchSampler
from ijepa_transformers.data.sources import load_image_dataset
from ijepa_transformers.data.transforms import (
    build_image_processor,
    default_image_statistics,
    normalize_pixel_values,
    random_resized_crop,
    sample_crop,
)
from ijepa_transformers.pretraining.arguments import PretrainingArguments
from tests.data.images import encoded, images_dataset, labelled, photo_pixels, photos


# Pretraining


def test_crops_are_the_same_in_every_version():
    """These numbers are part of a run: if they change, no earlier run can be resumed."""
    images = RandomCrops(224, seed=7)
    boxes = [
        sample_crop(375, 500, 1.0, (0.3, 1.0), (3 / 4, 4 / 3), images.crop_generator(epoch, index))
        for epoch, index in ((0, 0), (0, 1), (3, 1234567))
    ]
    assert boxes == [(101, 108, 247, 304), (19, 153, 321, 322), (11, 23, 357, 346)]


def test_a_sample_is_a_function_of_seed_epoch_and_index():
    images = PretrainingImages(photos(5), 16, seed=1)
    first = images[(0, 0, 2, 3)]["pixel_values"]
    assert torch.equal(first, images[(9, 7, 2, 3)]["pixel_values"])  # not of the step or the slot
    assert torch.equal(first, PretrainingImages(photos(5), 16, seed=1)[(0, 0, 2, 3)]["pixel_values"])
    assert not torch.equal(first, images[(0, 0, 3, 3)]["pixel_values"])
    assert not torch.equal(first, PretrainingImages(photos(5), 16, seed=2)[(0, 0, 2, 3)]["pixel_values"])


def test_workers_change_nothing():
    images = PretrainingImages(photos(20, bad=(4,)), (16, 24))
    sampler = PretrainingBatchSampler(20, 4, total_steps=7, seed=0)
    alone, helped = (list(DataLoader(images, batch_sampler=sampler, num_workers=count)) for count in (0, 2))
    assert len(alone) == len(helped) == 7
    for one, other in zip(alone, helped, strict=True):
        assert one.keys() == other.keys() == {"pixel_values", "step", "slot_block", "index", "num_bad"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert alone[0]["pixel_values"].shape == (4, 3, 16, 24) and alone[0]["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_sample_is_the_crop_of_the_decoded_image(num_channels):
    dataset = images_dataset([encoded(photo_pixels(41, 57), file_format) for file_format in ("PNG", "JPEG")])
    images = PretrainingImages(dataset, (16, 24), num_channels=num_channels, seed=5)
    for index in range(2):
        image = decode_image(dataset[index]["image"], num_channels)
        rng = images.crop_generator(2, index)
        expected = random_resized_crop(image, (16, 24), (0.3, 1.0), (3 / 4, 4 / 3), rng)
        found = images[(0, 0, 2, index)]["pixel_values"]
        assert torch.equal(found, expected) and found.is_contiguous()


def test_settings_that_make_no_sense_are_refused():
    for change in (
        {"crop_scale": (0.5, 0.3)},
        {"crop_ratio": (0, 1)},
        {"interpolation": "cubic"},
        {"num_channels": 17},
    ):
        with pytest.raises(ValueError, match="must be"):
            PretrainingImages(photos(1), 16, **change)


# Large photos


def detailed(height, width):
    """A picture with details of all sizes down to a few pixels."""
    layers = [photo_pixels(height, width)]
    for side in (64, 16, 5):
        noise = np.random.default_rng(side).integers(0, 256, (height // side, width // side, 3), dtype=np.uint8)
        layers.append(np.array(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)))
    return np.mean(layers, axis=0).astype(np.uint8)


def fast_and_exact(content, size=32, **settings):
    """The pairs of crops with and without `fast_large_photos`, as ints."""
    dataset = images_dataset([content])
    fast, exact = (PretrainingImages(dataset, size, fast_large_photos=on, **settings) for on in (True, False))
    for epoch in range(4):
        pair = (images[(0, 0, epoch, 0)]["pixel_values"] for images in (fast, exact))
        yield tuple(crop.int() for crop in pair)


@pytest.mark.parametrize("decoder", ["simplejpeg", "PIL"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("settings", [{}, {"num_channels": 1, "horizontal_flip": True, "interpolation": "bicubic"}])
def test_large_photos_decoded_smaller_give_nearly_the_same_crops(monkeypatch, decoder, orientation, settings):
    """The sides are not multiples of eight, so a rotated image would show a wrong place of the crop."""
    if decoder == "PIL":
        monkeypatch.setattr(decoding, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    exif = Image.Exif()
    exif[0x0112] = orientation
    for fast, exact in fast_and_exact(encoded(detailed(257, 395), "JPEG", quality=95, exif=exif), **settings):
        difference = (fast - exact).abs().float()
        assert 0 < difference.mean() < 1 and difference.max() <= 8


@pytest.mark.parametrize(("size", "reduction"), [(32, 4), (15, 8), (100, 2), (130, 1), ((32, 100), 2)])
def test_photos_are_decoded_no_smaller_than_their_crop_needs(monkeypatch, size, reduction):
    simplejpeg = pytest.importorskip("simplejpeg")
    factors, decode = [], simplejpeg.decode_jpeg

    def decode_jpeg(content, colorspace, min_factor=1, **options):
        array = decode(content, colorspace, min_factor=min_factor, **options)
        assert array.shape[:2] == (-(-257 // min_factor), -(-395 // min_factor))
        factors.append(min_factor)
        return array

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    dataset = images_dataset([encoded(detailed(257, 395), "JPEG")])
    images = PretrainingImages(dataset, size, crop_scale=(0.5, 0.5), crop_ratio=(1.0, 1.0), fast_large_photos=True)
    assert images[(0, 0, 0, 0)]["pixel_values"].shape[1:] == images.image_size
    assert factors == [reduction]


def test_small_photos_and_other_formats_are_decoded_exactly_with_fast_large_photos():
    for content in (encoded(detailed(60, 62), "JPEG"), encoded(detailed(257, 395), "PNG")):
        for fast, exact in fast_and_exact(content):
            assert torch.equal(fast, exact)


def test_large_photos_are_decoded_exactly_unless_asked():
    assert not PretrainingImages(photos(1), 16).fast_large_photos
    assert not PretrainingArguments(data="digits", output_dir="here", max_steps=1).fast_large_photos


def test_a_large_photo_that_is_cut_off_is_a_bad_image_also_when_decoded_smaller():
    whole = encoded(detailed(257, 395), "JPEG")
    images = PretrainingImages(images_dataset([whole[:-2], whole]), 32, fast_large_photos=True)
    assert images[(0, 0, 0, 0)]["num_bad"] == 1


# Evaluation


def test_evaluation_never_skips_an_image():
    images = EvaluationImages(photos(4, bad=(2,)), 16)
    assert images[1].keys() == {"pixel_values"}
    with pytest.raises(BadImageError, match=r"2\.png: this is not an image") as caught:
        images[2]
    with pytest.raises(BadImageError, match=r"2\.png: this is not an image"):  # also out of a DataLoader's worker
        ExceptionWrapper((type(caught.value), caught.value, caught.tb)).reraise()


def test_evaluation_keeps_labels_beside_their_images():
    batch = next(iter(DataLoader(EvaluationImages(load_image_dataset("digits"), 16, 1, 1.0), batch_size=8)))
    assert batch["pixel_values"].shape == (8, 1, 16, 16) and batch["labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


# Fine-tuning


def noise(image):
    """An augmentation with random numbers from torch's global generator, like those of torchvision."""
    return torch.randint(256, image.shape, dtype=torch.uint8)


def test_crops_and_augmentation_are_a_function_of_seed_epoch_and_index():
    dataset = labelled([encoded(photo_pixels(20, 24, seed=i)) for i in range(3)], labels=[4, 5, 6])
    images = {augment: FineTuningImages(dataset, 16, augment=augment, seed=1) for augment in (None, noise)}
    for augment, one in images.items():
        first = one[(2, 1)]["pixel_values"]
        torch.rand(1)
        assert torch.equal(first, one[(2, 1)]["pixel_values"]) and first.dtype == torch.uint8
        other = FineTuningImages(dataset, 16, augment=augment, seed=2)
        for different in (one[(1, 1)], one[(2, 0)], other[(2, 1)]):
            assert not torch.equal(first, different["pixel_values"])
    sample = images[None][(2, 1)]
    assert (sample["labels"], sample["epoch"], sample["index"]) == (5, 2, 1)
    pretraining = PretrainingImages(dataset, 16, seed=1)[(0, 0, 2, 1)]
    assert torch.equal(sample["pixel_values"], pretraining["pixel_values"])


def test_augmentation_leaves_the_global_generator_as_it_was():
    images = FineTuningImages(labelled([encoded(photo_pixels())]), 16, augment=noise)
    before = torch.get_rng_state()
    images[(0, 0)]
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unreadable_labelled_image_is_an_error_with_its_name():
    dataset = labelled([encoded(photo_pixels()), b"not an image"])
    processor = build_image_processor(16)
    for images, key in ((FineTuningImages(dataset, 16), (0, 1)), (LabelledImages(dataset, processor, 3), 1)):
        with pytest.raises(BadImageError, match=r"1\.png: this is not an image"):
            images[key]


def test_labelled_images_are_what_the_processor_makes_of_them():
    dataset = labelled([encoded(photo_pixels(30, 40))], labels=[3])
    sample = LabelledImages(dataset, build_image_processor(16), 3)[0]
    expected = build_image_processor(16)(Image.fromarray(photo_pixels(30, 40)), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(sample["pixel_values"], expected) and sample["labels"] == 3


def roll_mixer(images, labels):
    """Like those of torchvision: mixes each image with the next one, by a share from torch's global generator."""
    share = torch.rand(())
    one_hot = torch.nn.functional.one_hot(labels, 8).float()
    return [share * values + (1 - share) * values.roll(1, 0) for values in (images, one_hot)]


def flip_mixer(images, labels):
    return images.flip(0), torch.nn.functional.one_hot(labels, 8).flip(0).float()


def test_batches_are_normalised_and_mixed_by_their_keys_in_training_only():
    dataset = labelled([encoded(photo_pixels(20, 24, seed=i)) for i in range(4)])
    training, evaluation = FineTuningImages(dataset, 16), LabelledImages(dataset, build_image_processor(16), 3)
    mean, std = default_image_statistics(3)
    plain, mixing = FineTuningCollator(mean, std), FineTuningCollator(mean, std, [roll_mixer, flip_mixer], seed=3)
    samples = [training[(0, index)] for index in range(4)]
    batch = plain(samples)
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    assert torch.equal(batch["pixel_values"], normalize_pixel_values(pixels, mean, std))
    assert torch.equal(batch["labels"], torch.arange(4)) and set(batch) == {"pixel_values", "labels"}
    before = torch.get_rng_state()
    mixed = mixing(samples)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert torch.equal(mixing(samples)["pixel_values"], mixed["pixel_values"]) and mixed["labels"].shape == (4, 8)
    kinds, shares = set(), set()
    for epoch in range(20):
        labels = mixing([training[(epoch, index)] for index in range(4)])["labels"]
        kinds.add(bool((labels == 1).any()))
        shares.add(labels.max().item())
    assert kinds == {True, False} and len(shares) > 3
    assert not torch.equal(FineTuningCollator(mean, std, [roll_mixer], 4)(samples)["labels"], mixed["labels"])
    judged = [evaluation[index] for index in range(4)]
    batch = mixing(judged)
    assert torch.equal(batch["labels"], torch.arange(4))
    assert torch.equal(batch["pixel_values"], torch.stack([sample["pixel_values"] for sample in judged]))


@pytest.mark.parametrize("num_channels", [1, 3])
def test_randaugment_takes_these_crops(num_channels):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    dataset = labelled([encoded(photo_pixels(20, 24))])
    images = FineTuningImages(dataset, 16, num_channels=num_channels, augment=v2.RandAugment(magnitude=9))
    plain = FineTuningImages(dataset, 16, num_channels=num_channels)
    crops = [images[(epoch, 0)]["pixel_values"] for epoch in range(30)]
    assert all(crop.shape == (num_channels, 16, 16) and crop.dtype == torch.uint8 for crop in crops)
    changed = [not torch.equal(crop, plain[(epoch, 0)]["pixel_values"]) for epoch, crop in enumerate(crops)]
    assert sum(changed) > 15
