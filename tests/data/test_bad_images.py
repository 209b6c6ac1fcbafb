# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""An image that cannot be read is replaced, counted once and listed; a run with too many of them stops."""

import json
import os

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from ijepa_transformers.data import datasets as data_datasets
from ijepa_transformers.data.bad_images import BadImageLog, bad_indices
from ijepa_transformers.data.datasets import (
    PretrainingImages,
)
from ijepa_transformers.data.decoding import BadImageError
from ijepa_transformers.data.order import PretrainingBatchSampler
from ijepa_transformers.data.sources import image_name, load_image_dataset
from tests.data.images import encoded, images_dataset, photo, photos
from tests.data.nasty_images import ACCEPTED, REFUSED
from tests.runs import pretrain, rows


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_bad_images_are_replaced_by_the_next_readable_one_and_reported():
    dataset = photos(6, bad=(1, 5, 0))
    images = PretrainingImages(dataset, 16)
    sample = images[(0, 0, 0, 5)]  # 5 and 0 are bad, 1 too
    assert sample["index"] == 5 and sample["num_bad"] == 3
    # The crop has the seed of the requested index, so that the substitute's own turn shows another crop.
    readable = PretrainingImages(images_dataset([dataset[2]["image"]["bytes"]] * 6), 16)
    assert torch.equal(sample["pixel_values"], readable[(0, 0, 0, 5)]["pixel_values"])
    batch = next(iter(DataLoader(images, batch_sampler=PretrainingBatchSampler(6, 6, 1, 0))))
    assert bad_indices(batch, num_images=6) == [0, 1, 5]
    with pytest.raises(BadImageError, match=r"3 images in a row from image 1 on .* the last one is 0\.png"):
        PretrainingImages(photos(3, bad=(0, 1, 2)), 16)[(0, 0, 0, 1)]


def test_each_bad_image_is_counted_once_also_across_a_resumed_run(tmp_path):
    path, dataset = tmp_path / "bad_images.jsonl", photos(10, bad=(2, 3, 7))
    log = BadImageLog(path, 2, dataset)
    assert log.add([]) == 0 and not path.exists()
    assert log.add([3, 2, 3]) == 2 and log.add([2]) == 2
    first = json.loads(path.read_text().splitlines()[0])
    assert first == {"index": 2, "name": "2.png", "reason": "this is not an image that PIL knows"}
    with open(path, "a") as file:
        file.write('{"index": 7, "na')  # the run was killed here
    resumed = BadImageLog(path, 0.2, dataset)
    assert resumed.add([3]) == 2
    with pytest.raises(BadImageError, match=r"3 of 10 images cannot be read, more than the limit of 2; .*jsonl"):
        resumed.add([7])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [2, 3, 7]
    with pytest.raises(BadImageError, match="more than the limit of 2"):
        BadImageLog(path, 2, dataset)
    for limit in (-1, 1.0):
        with pytest.raises(ValueError, match=f"got {limit}"):
            BadImageLog(path, limit, dataset)


# Folders of nasty files


def nasty_folder(folder):
    """Writes sound and bad images under hostile names; returns the names of the bad ones, as they are listed."""
    folder.mkdir()
    for number, (make, *_) in enumerate(ACCEPTED.values()):
        (folder / f"{number:02}_unusual.jpg").write_bytes(make())
    bad = [write_bad(folder, f"{number:02}_bad.jpg", make()) for number, (make, _) in enumerate(REFUSED.values())]
    for name in (
        "new\nline.png",
        '"quoted".png',
        "<script>alert(1)<script>.png",
        "x" * 250 + ".png",
    ):
        bad.append(write_bad(folder, name, b"no image"))
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").write_bytes(encoded(photo()))
    (folder / "folder.jpg" / "circle").symlink_to(folder)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(photo()))
    (folder / os.fsdecode(b"bad caf\xe9.png")).write_bytes(b"no image")
    uri = "file://" + str(folder) + "/bad%20caf%E9.png"
    return {*bad, *(str(folder / f"{name}.jpg") for name in ("dangling", "circle", "pipe")), uri}


def write_bad(folder, name, content):
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_a_run_on_a_folder_of_nasty_files_trains_on_and_lists_exactly_the_bad_ones(tmp_path):
    folder = tmp_path / "photographs"
    bad = nasty_folder(folder)
    for number in range(-len(load_image_dataset(folder)) % 8):  # whole batches, so that an epoch meets every image
        (folder / f"{number:02}_good.jpg").write_bytes(encoded(photo(seed=number), "JPEG"))
    num_steps = len(load_image_dataset(folder)) // 8
    weights = pretrain(
        tmp_path / "run", data=folder, num_channels=3, max_bad_images=len(bad), max_steps=num_steps, save_steps=100
    )
    assert all(value.isfinite().all() for value in weights.values())
    records = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert all(set(record) == {"index", "name", "reason"} and record["reason"] for record in records)
    assert sorted(record["name"] for record in records) == sorted(bad)
    assert rows(tmp_path / "run")[-1]["bad_images"] == len(bad)


def test_every_nasty_file_is_decoded_or_listed_once(tmp_path):
    bad = nasty_folder(tmp_path / "photographs")
    dataset = load_image_dataset(tmp_path / "photographs")
    log = BadImageLog(tmp_path / "bad.jsonl", 500, dataset)
    images = data_datasets.ProcessedImages(dataset, None, 3)
    images.prepare = lambda array: array
    log.add(index for index in range(len(dataset)) if isinstance(images[index], str))
    log.add(range(0))
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().split("\n")[:-1]]
    assert {record["name"] for record in records} == bad and len(records) == len(bad)
    good = {image_name(dataset, index) for index in range(len(dataset))} - bad
    assert "file://" + str(tmp_path) + "/photographs/caf%E9.png" in good  # decoded, whatever bytes its name has
    assert not any("circle/" in name for name in good)
    assert BadImageLog(tmp_path / "bad.jsonl", 500, dataset).indices == log.indices


def test_a_file_that_vanishes_after_the_listing_is_a_bad_image(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo()))
    dataset = load_image_dataset(tmp_path)
    (tmp_path / "0.png").unlink()
    log = BadImageLog(tmp_path / "bad.jsonl", 1, dataset)
    log.add([0])
    assert "FileNotFoundError" in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


def test_bad_rows_of_parquet_are_counted_like_bad_files(tmp_path):
    contents = [encoded(photo(seed=number)) for number in range(21)] + [b"", b"no image", encoded(photo())[:-50]]
    table = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in contents]})
    (tmp_path / "shards").mkdir()
    table.to_parquet(tmp_path / "shards" / "train.parquet")
    pretrain(tmp_path / "run", data=tmp_path / "shards", num_channels=3, max_bad_images=3, max_steps=3)
    records = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert [record["name"] for record in sorted(records, key=lambda record: record["index"])] == [
        "image 21",
        "image 22",
        "image 23",
    ]
