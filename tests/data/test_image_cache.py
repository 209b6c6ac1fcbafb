# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decoded images in memory: same pixels, decoded once for all processes, never more than there is room for."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ijepa_transformers.data import image_cache
from ijepa_transformers.data.datasets import PretrainingImages
from ijepa_transformers.data.decoding import BadImageError
from ijepa_transformers.data.image_cache import DecodedImages, decoded_size, free_memory
from ijepa_transformers.data.order import PretrainingBatchSampler
from ijepa_transformers.pretraining.arguments import PretrainingArguments
from tests.data.images import photos
from tests.runs import TINY, assert_equal_weights, pretrain


pytestmark = pytest.mark.skipif(
    not image_cache.can_share(num_workers=1), reason="memory is shared with forked processes only"
)


def refuse():
    raise AssertionError("decoded again")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_from_memory_are_those_of_decoded_images(num_workers):
    dataset = photos(10, bad=(4,))
    cache = DecodedImages(10, 10 * 20 * 24 * 3)
    sampler = PretrainingBatchSampler(10, 2, total_steps=15, seed=0)  # three epochs
    plain, kept = (
        list(DataLoader(PretrainingImages(dataset, 16, cache=memory), batch_sampler=sampler, num_workers=num_workers))
        for memory in (None, cache)
    )
    for ours, theirs in zip(kept, plain, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert cache.num_kept == 9  # in this process, whoever decoded them
    assert cache.get(3, refuse).shape == (20, 24, 3)


def test_what_has_no_room_is_decoded_each_time():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    cache = DecodedImages(3, 40)
    for index in (0, 1):
        assert np.array_equal(cache.get(index, lambda: image), image)
    assert cache.num_kept == 1 and cache.get(0, refuse) is not image
    with pytest.raises(AssertionError, match="decoded again"):
        cache.get(1, refuse)
    small = cache.get(2, lambda: image[:1, :1])  # there is room for a smaller one
    assert np.array_equal(cache.get(2, refuse), small) and cache.num_kept == 2


def test_a_kept_image_cannot_be_changed():
    cache = DecodedImages(1, 100)
    cache.get(0, lambda: np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match="read-only"):
        cache.get(0, refuse)[0] = 1


def test_an_image_that_cannot_be_read_is_tried_again():
    cache = DecodedImages(1, 100)

    def fail():
        raise BadImageError("a.jpg", "broken")

    for _ in range(2):
        with pytest.raises(BadImageError):
            cache.get(0, fail)
    assert cache.num_kept == 0


def test_the_size_of_a_data_set_is_estimated_without_bad_images():
    assert decoded_size(photos(40), 3) == 40 * 20 * 24 * 3
    assert decoded_size(photos(40), 1) == 40 * 20 * 24
    assert decoded_size(photos(2, bad=(0,)), 3) == 20 * 24 * 3


def test_free_memory_is_that_of_the_container(tmp_path):
    everything = free_memory([])
    assert everything > 2**20
    limit, used = tmp_path / "limit", tmp_path / "used"
    used.write_text("1000")
    for text, expected in (("5000\n", 4000), ("500", 0)):
        limit.write_text(text)
        assert free_memory([(str(limit), str(used))]) == expected
    limit.write_text("max")
    assert free_memory([(str(limit), str(used))]) > 2**20


@pytest.fixture
def folder(tmp_path):
    """Ten images, which a run of 6 steps of 8 reads five times."""
    (tmp_path / "photos").mkdir()
    for number, row in enumerate(photos(10)):
        (tmp_path / "photos" / f"{number}.png").write_bytes(row["image"]["bytes"])
    return tmp_path / "photos"


def test_a_run_keeps_images_by_itself_and_ends_with_the_same_weights(folder, tmp_path, capsys):
    kept = pretrain(tmp_path / "kept", data=folder, num_workers=1)
    out = capsys.readouterr().out
    assert 0 < out.index("\noutput ") < out.index("Decoded images are kept in memory") < out.index("\nstep 2 of")
    plain = pretrain(tmp_path / "plain", data=folder, cache_images="none")
    assert "kept in memory" not in capsys.readouterr().out
    assert_equal_weights(kept, plain)


def test_images_that_are_too_many_or_seen_once_are_kept_only_if_asked(folder, tmp_path, capsys, monkeypatch):
    pretrain(tmp_path / "once", data=folder, max_steps=1, warmup_steps=0)
    monkeypatch.setattr("ijepa_transformers.pretraining.batches.free_memory", lambda: 1000)
    pretrain(tmp_path / "auto", data=folder)
    assert "kept in memory" not in capsys.readouterr().out
    pretrain(tmp_path / "ram", data=folder, cache_images="ram")
    assert "kept in memory" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["streaming", "fast_large_photos"])
def test_ram_is_refused_where_no_image_is_kept(name):
    with pytest.raises(ValueError, match=f"cache_images ram cannot be combined with {name}"):
        PretrainingArguments(**TINY, output_dir="out", cache_images="ram", **{name: True})
