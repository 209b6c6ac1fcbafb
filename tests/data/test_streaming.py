# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Laws of streaming. All shards are made on the spot; remote ones are in memory or on a server of our own."""

import functools
import gzip
import http.server
import io
import itertools
import json
import os
import pickle
import tarfile
import threading
from collections import Counter
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
from datasets.packaged_modules.parquet.parquet import Parquet
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from ijepa_transformers.data import notices, remote
from ijepa_transformers.data import shards as shards_of_data
from ijepa_transformers.data.datasets import MAX_SUBSTITUTES, RandomCrops
from ijepa_transformers.data.decoding import BadImageError, decode_image
from ijepa_transformers.data.remote import have_changed
from ijepa_transformers.data.shards import ImageStream, count_images, open_stream
from ijepa_transformers.data.streaming import (
    LanePositions,
    Position,
    StreamingBatches,
    _lane_shards,
    choose_lanes,
    merge_positions,
    read_lane,
)
from ijepa_transformers.masking import MaskingCollator, MultiBlockMasking


ROWS = (11, 7, 13, 5, 9, 8)  # images of each shard, unequal on purpose: 53
ALL_IMAGES = {(shard, row) for shard, count in enumerate(ROWS) for row in range(count)}


def png(shard, row):
    """A tiny picture that differs from all others in its pixels."""
    pixels = np.random.default_rng([shard, row]).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def contents(shard, row, bad):
    return b"no image" if (shard, row) in bad else png(shard, row)


def parquet_bytes(shard, num_rows, bad=(), names=True):
    rows = [
        {"bytes": contents(shard, row, bad), "path": f"{shard}-{row}.png" if names else None}
        for row in range(num_rows)
    ]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    table = datasets.Dataset.from_dict({"image": rows, "caption": ["words"] * num_rows}, features=features)
    file = io.BytesIO()
    table.to_parquet(file, batch_size=4)  # several row groups in each file
    return file.getvalue()


def tar_bytes(shard, num_rows, bad=()):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for row in range(num_rows):
            for extension, content in (("png", contents(shard, row, bad)), ("txt", b"words")):
                member = tarfile.TarInfo(f"{shard}-{row}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


MAKERS = {"parquet": parquet_bytes, "tar": tar_bytes}


def write_shards(folder, kind="parquet", rows=ROWS, **options):
    folder.mkdir(parents=True, exist_ok=True)
    for shard, num_rows in enumerate(rows):
        (folder / f"{shard:03}.{kind}").write_bytes(MAKERS[kind](shard, num_rows, **options))
    return folder


@pytest.fixture(params=["parquet", "tar"])
def shards(request, tmp_path):
    return write_shards(tmp_path / "shards", request.param)


def batches_of(stream, **settings):
    defaults = {"collate_fn": default_collate, "batch_size": 3, "total_steps": 20, "lanes": 4, "shuffle_buffer": 5}
    return StreamingBatches(stream, 4, **{**defaults, **settings})


def loaded(batches, num_workers):
    """All batches."""
    iterator = iter(DataLoader(batches, batch_size=None, num_workers=num_workers))
    try:
        return list(iterator)
    finally:
        if (
            num_workers
        ):  # torch ends workers after an error only when Python's collector comes, and then in ten seconds
            iterator._shutdown_workers()


def run(stream, world_size=1, num_workers=0, accumulated=4, **settings):
    """(step, slot block) -> batch, of all processes; `accumulated` micro-batches make a step, however they are cut."""
    found = {}
    for rank in range(world_size):
        accumulation_steps = accumulated // world_size
        batches = batches_of(
            stream, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps, **settings
        )
        for number, batch in enumerate(loaded(batches, num_workers)):
            step, micro_step = divmod(number, accumulation_steps)
            found[batches.start_step + step, micro_step * world_size + rank] = batch
    return found


def identities(batch):
    return list(zip(batch["shard"].tolist(), batch["row"].tolist(), strict=True))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for place, batch in expected.items():
        assert found[place].keys() == batch.keys()
        for key, value in batch.items():
            same = torch.equal(found[place][key], value) if torch.is_tensor(value) else found[place][key] == value
            assert same, (place, key)


def lane_images(stream, lane, lanes, count, seed=0, shuffle_buffer=5):
    return list(itertools.islice(read_lane(stream, lane, lanes, seed, shuffle_buffer, Position()), count))


# Order


@pytest.mark.parametrize("lanes", [1, 2, 4, 6])
def test_every_image_is_in_one_lane_once_per_epoch(shards, lanes):
    stream = open_stream(shards)
    seen = Counter()
    for lane in range(lanes):
        images = itertools.takewhile(lambda image: image.epoch < 3, read_lane(stream, lane, lanes, 0, 5, Position()))
        seen.update((image.epoch, image.shard, image.row) for image in images)
    assert seen == {(epoch, *identity): 1 for epoch in range(3) for identity in ALL_IMAGES}


def test_batches_hold_the_images_of_their_lane_in_its_order(shards):
    stream = open_stream(shards)
    found = run(stream)
    for lane in range(4):
        batches = [batch for batch in found.values() if batch["lane"] == lane]
        assert len(batches) == 20
        expected = [(image.shard, image.row) for image in lane_images(stream, lane, 4, 60)]
        assert [identity for batch in batches for identity in identities(batch)] == expected
    assert all(batch["lane"] == (4 * step + block) % 4 for (step, block), batch in found.items())


def test_two_processes_never_share_an_image_in_an_epoch(shards):
    stream = open_stream(shards)
    seen = [set(), set()]
    for rank in range(2):
        for batch in batches_of(stream, rank=rank, world_size=2, batch_size=1, lanes=2, total_steps=60):
            if batch["position"][0] == 0:
                seen[rank].update(identities(batch))
    assert seen[0] and seen[1] and not seen[0] & seen[1]


def test_lanes_take_turns_with_the_longer_parts():
    for lanes in (1, 4, 5):
        counts = [[len(_lane_shards(7, lane, lanes, 0, epoch)) for epoch in range(lanes)] for lane in range(lanes)]
        assert {sum(count) for count in counts} == {7}
        assert all(max(count) - min(count) <= 1 for count in counts)


def test_order_differs_between_epochs_and_seeds_and_from_the_files(shards):
    stream = open_stream(shards)
    images = lane_images(stream, 0, 1, 2 * len(ALL_IMAGES))
    first, second = images[: len(ALL_IMAGES)], images[len(ALL_IMAGES) :]
    other = lane_images(stream, 0, 1, len(ALL_IMAGES), seed=1)
    orders = [[(image.shard, image.row) for image in part] for part in (first, second, other)]
    orders.append(sorted(ALL_IMAGES))
    assert all(sorted(order) == sorted(ALL_IMAGES) for order in orders)
    assert all(one != two for one, two in itertools.combinations(orders, 2))
    assert any(image.row > following.row for image, following in itertools.pairwise(first[:5]))  # inside a block too


def test_every_block_has_an_order_of_its_own(tmp_path):
    stream = open_stream(write_shards(tmp_path / "shards", rows=(40, 40)))
    orders = set()
    for lane in range(2):
        rows = [image.row for image in lane_images(stream, lane, 2, 80, shuffle_buffer=8)]  # two epochs of five blocks
        blocks = [rows[start : start + 8] for start in range(0, 80, 8)]
        assert all(max(block) - min(block) == 7 for block in blocks)
        orders |= {tuple(row - min(block) for row in block) for block in blocks}
    assert len(orders) == 20


def test_the_crop_of_an_image_depends_on_the_epoch_only(shards):
    stream = open_stream(shards)
    crops = {}
    for settings in ({"shuffle_buffer": 5}, {"shuffle_buffer": 8, "lanes": 2, "world_size": 2}):
        for batch in batches_of(stream, batch_size=1, total_steps=200, **settings):
            crops.setdefault((batch["position"][0], *identities(batch)[0]), []).append(batch["pixel_values"])
    both = [key for key in crops if len(crops[key]) == 2 and (key[0] + 1, *key[1:]) in crops]
    # After the last image of a lane's epoch, the position may already be in the next epoch.
    same = [torch.equal(*crops[key]) for key in both]
    changed = [not torch.equal(crops[key][0], crops[(key[0] + 1, *key[1:])][0]) for key in both]
    assert len(both) > 10 and all(same) and np.mean(changed) > 0.8


# The same batches on any machine, and after an interruption


def test_batches_do_not_depend_on_processes_and_workers(shards):
    stream = open_stream(shards)
    masking = MultiBlockMasking(grid_size=(8, 8), num_targets=2, min_patches=4)
    settings = {"total_steps": 12, "collate_fn": MaskingCollator(masking, 0)}
    expected = run(stream, **settings)
    assert len(expected) == 48 and "context_indices" in expected[0, 0]
    assert_same(run(stream, num_workers=2, **settings), expected)
    assert_same(run(stream, world_size=2, **settings), expected)
    assert_same(run(stream, world_size=2, num_workers=2, **settings), expected)
    assert_same(run(stream, world_size=4, **settings), expected)
    odd = {"accumulated": 1, "total_steps": 13}  # one worker has a batch more than the other
    assert_same(run(stream, num_workers=2, **odd), run(stream, **odd))


def positions_after(stream, step, world_size, num_workers=0, **settings):
    """The positions in a checkpoint after `step` steps: of the batches of all processes, through JSON."""
    states = []
    for rank in range(world_size):
        accumulation_steps = 4 // world_size
        batches = batches_of(
            stream, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps, **settings
        )
        positions = LanePositions(batches.settings, batches.start)
        loader = iter(DataLoader(batches, batch_size=None, num_workers=num_workers))
        for batch in itertools.islice(loader, (step - batches.start_step) * accumulation_steps):
            positions.update(batch)
        states.append(json.loads(json.dumps(positions.state_dict())))
    return LanePositions.from_state_dict(merge_positions(states))


@pytest.mark.parametrize("step", [0, 1, 2, 5, 6, 11, 17])
def test_a_resumed_run_goes_on_exactly(shards, step):
    stream = open_stream(shards)
    expected = {place: batch for place, batch in run(stream).items() if place[0] >= step}
    for before, after in ((1, 1), (1, 2), (2, 1), (4, 2)):
        start = positions_after(stream, step, world_size=before)
        assert_same(run(stream, world_size=after, start_step=step, start=start), expected)


def test_a_run_may_be_resumed_again_and_with_other_workers(shards):
    stream = open_stream(shards)
    expected = {place: batch for place, batch in run(stream).items() if place[0] >= 13}
    start = positions_after(stream, 6, world_size=2, num_workers=2)  # workers have prepared more than was used
    start = positions_after(stream, 13, world_size=2, num_workers=1, start_step=6, start=start)
    assert_same(run(stream, start_step=13, start=start), expected)
    assert_same(run(stream, num_workers=1, start_step=13, start=start), expected)


def test_blocks_longer_than_an_epoch_and_of_one_image_resume_too(shards):
    stream = open_stream(shards)
    for shuffle_buffer in (1, 1000):
        expected = run(stream, shuffle_buffer=shuffle_buffer)
        expected = {place: batch for place, batch in expected.items() if place[0] >= 7}
        start = positions_after(stream, 7, world_size=1, shuffle_buffer=shuffle_buffer)
        assert_same(run(stream, start_step=7, start=start, shuffle_buffer=shuffle_buffer), expected)


def test_resuming_skips_blocks_that_were_used_up_and_parquet_row_groups_before(tmp_path, monkeypatch):
    stream = open_stream(write_shards(tmp_path / "shards", rows=(40,)))
    read = []
    parts = ImageStream._parts
    monkeypatch.setattr(ImageStream, "_parts", lambda *args: (read.append(part[1]) or part for part in parts(*args)))
    images = lane_images(stream, 0, 1, 10)
    assert images[-1].after == Position(0, 2, 0, 10, 0) and read == [0]
    again = list(itertools.islice(read_lane(stream, 0, 1, 0, 5, images[-1].after), 5))
    assert read == [0, 8, 12]  # row groups of four
    assert [image.row for image in again] == [image.row for image in lane_images(stream, 0, 1, 15)[10:]]


def test_changed_settings_are_refused_on_resuming(shards, tmp_path):
    stream = open_stream(shards)
    start = positions_after(stream, 3, world_size=2)
    for change, name in (
        ({"batch_size": 4}, "images per process and pass changed from 3 to 4"),
        ({"seed": 1}, "seed changed from 0 to 1"),
        ({"lanes": 2}, "lanes changed from 4 to 2"),
        ({"shuffle_buffer": 6}, "shuffle_buffer changed from 5 to 6"),
        ({"accumulation_steps": 2}, "passes per optimizer step over all processes changed from 4 to 2"),
    ):
        with pytest.raises(ValueError, match=name):
            batches_of(stream, **{"accumulation_steps": 4, "start_step": 3, "start": start, **change})
    kind = next(shards.iterdir()).suffix[1:]
    more = open_stream(write_shards(tmp_path / "more", kind, (*ROWS, 4)))
    with pytest.raises(ValueError, match="shards changed from 6 to 7"):
        batches_of(more, accumulation_steps=4, start_step=3, start=start)
    next(shards.iterdir()).rename(shards / f"renamed.{kind}")
    with pytest.raises(ValueError, match="names of the shards changed"):
        batches_of(open_stream(shards), accumulation_steps=4, start_step=3, start=start)


def test_other_contents_under_the_same_names_are_refused(tmp_path):
    folder = write_shards(tmp_path / "shards", "tar", (4, 5, 4, 5))
    start = positions_after(open_stream(folder), 3, world_size=1)
    first, second, *_ = sorted(folder.iterdir())
    whole = first.read_bytes()
    first.write_bytes(whole[:600] + bytes((whole[600] ^ 1,)) + whole[601:])
    with pytest.raises(ValueError, match="sizes or contents of the shards have changed"):
        batches_of(open_stream(folder), accumulation_steps=4, start_step=3, start=start)
    first.write_bytes(whole)
    batches_of(open_stream(folder), accumulation_steps=4, start_step=3, start=start)
    del start.settings["contents"]  # as of checkpoints of before
    second.write_bytes(whole)
    batches_of(open_stream(folder), accumulation_steps=4, start_step=3, start=start)


def test_links_in_a_streamed_tar_are_told_once(capfd):
    """`datasets` leaves them out without a word."""
    fsspec.filesystem("memory").pipe("linked.tar", tar_with_links())
    opened = open_stream("memory://linked.tar")
    for stream in (opened, pickle.loads(pickle.dumps(opened))):
        assert [value["path"] for _, value in stream.rows(0)] == ["0.png", "1.png"]
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("note: 'a.png' in 'memory:///linked.tar' is a link to '0.png'.")


def tar_with_links():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, target in (("0.png", None), ("a.png", "0.png"), ("b.png", "/data/1.png"), ("1.png", None)):
            header = tarfile.TarInfo(name)
            if target:
                header.type, header.linkname = tarfile.SYMTYPE, target
            header.size = 0 if target else len(png(0, 0))
            tar.addfile(header, None if target else io.BytesIO(png(0, 0)))
    return file.getvalue()


def test_positions_of_some_processes_only_are_refused(shards):
    stream = open_stream(shards)
    batches = batches_of(stream, world_size=2)
    positions = LanePositions(batches.settings)
    for batch in itertools.islice(batches, 6):
        positions.update(batch)
    with pytest.raises(ValueError, match=r"lanes \[1, 3\] are missing"):
        batches_of(stream, world_size=2, start_step=6, start=positions)
    with pytest.raises(ValueError, match=r"lanes \[0, 1, 2, 3\] are missing"):
        batches_of(stream, world_size=2, start_step=6)
    with pytest.raises(ValueError, match="different settings"):
        merge_positions([positions.state_dict(), LanePositions({"seed": 1}).state_dict()])


def test_a_run_resumes_from_a_moved_folder(shards, tmp_path):
    start = positions_after(open_stream(shards), 5, world_size=1)
    expected = {place: batch for place, batch in run(open_stream(shards)).items() if place[0] >= 5}
    moved = shards.rename(tmp_path / "elsewhere")
    assert_same(run(open_stream(moved), start_step=5, start=start), expected)


def test_a_run_resumes_with_newly_signed_urls():
    one, two = (ImageStream("a", [f"https://host/a.tar?token={token}"], None, "image", "tar") for token in "ab")
    assert one.fingerprint == two.fingerprint


def test_changed_shards_are_noticed_where_the_checkpoint_needs_more_images(tmp_path):
    folder = write_shards(tmp_path / "shards", "tar", (9,))
    position = lane_images(open_stream(folder), 0, 1, 9, shuffle_buffer=100)[7].after
    write_shards(folder, "tar", (4,))
    with pytest.raises(ValueError, match="fewer images than when the checkpoint was written"):
        next(read_lane(open_stream(folder), 0, 1, 0, 100, position))


# Lanes


def test_lanes_of_a_fresh_run():
    assert choose_lanes(100, 8, 4) == (32, 4)
    assert choose_lanes(100, 8, 0) == (8, 0)
    assert choose_lanes(20, 8, 4) == (16, 2)
    assert choose_lanes(8, 8, 4) == (8, 1)
    with pytest.raises(ValueError, match="7 shards cannot be streamed to 8 processes"):
        choose_lanes(7, 8, 4)


def test_lanes_of_a_resumed_run():
    assert choose_lanes(100, 8, 4, lanes=32) == (32, 4)
    assert choose_lanes(100, 8, 3, lanes=32) == (32, 2)
    assert choose_lanes(100, 4, 100, lanes=32) == (32, 8)
    assert choose_lanes(100, 1, 0, lanes=32) == (32, 0)
    assert choose_lanes(100, 32, 5, lanes=32) == (32, 1)
    with pytest.raises(ValueError, match=r"12 lanes, which 5 processes .* among 1, 2, 3, 4, 6, 12"):
        choose_lanes(100, 5, 4, lanes=12)


def test_every_result_of_choose_lanes_works():
    for num_shards, world_size, num_workers in itertools.product(range(1, 9), (1, 2, 3), range(5)):
        if num_shards >= world_size:
            lanes, workers = choose_lanes(num_shards, world_size, num_workers)
            assert lanes <= num_shards and workers <= num_workers and lanes % (world_size * max(workers, 1)) == 0


def test_workers_that_cannot_share_the_lanes_are_refused(shards):
    with pytest.raises(ValueError, match="1 processes x 2 workers cannot share 3 lanes evenly"):
        loaded(batches_of(open_stream(shards), lanes=3), num_workers=2)


def test_values_out_of_range_are_refused(shards):
    stream = open_stream(shards)
    for settings, words in (
        ({"batch_size": 0}, "must be positive"),
        ({"shuffle_buffer": 0}, "must be positive"),
        ({"rank": 1}, "rank below world_size"),
        ({"start_step": 21}, r"start_step must be in 0\.\.total_steps"),
        ({"lanes": 7}, r"lanes must be in 1\.\.6"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
    ):
        with pytest.raises(ValueError, match=words):
            batches_of(stream, **settings)


def test_the_number_of_batches_is_known(shards):
    batches = batches_of(open_stream(shards), total_steps=7, accumulation_steps=2)
    assert len(batches) == 14 == len(DataLoader(batches, batch_size=None)) == len(list(batches))


# Opening


def test_no_image_is_decoded_at_the_start_and_only_what_is_needed_later(shards, monkeypatch):
    decoded, opened = [], []
    decode, rows = RandomCrops.read_crop, ImageStream.rows
    monkeypatch.setattr(RandomCrops, "read_crop", lambda *args: decoded.append(1) or decode(*args))
    monkeypatch.setattr(ImageStream, "rows", lambda *args: opened.append(args[1]) or rows(*args))
    monkeypatch.setattr(Image, "open", functools.partial(_counted, Image.open, decoded))
    batches = batches_of(open_stream(shards), lanes=2)
    assert not decoded and not opened
    batch = next(iter(batches))
    assert len(decoded) == 2 * 3  # read_crop, and Image.open in it
    assert len(opened) == 1 and len(identities(batch)) == 3


def test_large_photos_are_decoded_smaller_only_where_asked(tmp_path):
    files = []
    for seed in range(4):
        noise = Image.fromarray(np.random.default_rng(seed).integers(64, 192, (20, 30, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((300, 200), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        files.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": files}, features=features).to_parquet(tmp_path / "train.parquet")
    settings = {"collate_fn": default_collate, "batch_size": 3, "total_steps": 1, "lanes": 1}
    fast, exact = (
        next(iter(StreamingBatches(open_stream(tmp_path), 32, fast_large_photos=on, **settings)))["pixel_values"]
        for on in (True, False)
    )
    difference = (fast.int() - exact.int()).abs().float()
    assert 0 < difference.mean() < 2 and difference.max() <= 16


def _counted(function, calls, *args, **options):
    calls.append(1)
    return function(*args, **options)


def test_other_columns_of_parquet_are_not_read(tmp_path, monkeypatch):
    read = set()
    tables = Parquet._generate_tables
    monkeypatch.setattr(
        Parquet,
        "_generate_tables",
        lambda *args, **options: (
            read.update(table.column_names) or (key, table) for key, table in tables(*args, **options)
        ),
    )
    lane_images(open_stream(write_shards(tmp_path / "shards")), 0, 1, 20)
    assert read == {"image"}


def test_splits_files_globs_and_columns(tmp_path):
    write_shards(tmp_path / "data/train", rows=(3, 4))
    write_shards(tmp_path / "data/validation", rows=(2,))
    assert count_images(open_stream(tmp_path / "data")) == 7
    assert count_images(open_stream(tmp_path / "data", split="val")) == 2
    assert open_stream(str(tmp_path / "data/**/*.parquet")).num_shards == 3
    assert open_stream(tmp_path / "data/train/001.parquet").names == [str(tmp_path / "data/train/001.parquet")]
    with pytest.raises(ValueError, match="has no split 'test'; it has 'train', 'validation'"):
        open_stream(tmp_path / "data", split="test")
    with pytest.raises(ValueError, match="'caption2' is not a column of images"):
        open_stream(tmp_path / "data", image_column="caption2")
    with pytest.raises(ValueError, match="config_name is for Hub data sets only"):
        open_stream(tmp_path / "data", config_name="small")


def test_a_column_of_plain_bytes_is_found(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"] * 5, "picture": [png(0, row) for row in range(5)]}).to_parquet(
        tmp_path / "a.parquet"
    )
    stream = open_stream(tmp_path / "a.parquet")
    assert stream.column == "picture"
    assert next(iter(batches_of(stream, lanes=1)))["pixel_values"].shape == (3, 3, 4, 4)


def test_arrow_files_stream_too(tmp_path):
    rows = [{"bytes": png(0, row), "path": None} for row in range(9)]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="is a save_to_disk folder"):
        open_stream(tmp_path / "saved")
    stream = open_stream(str(tmp_path / "saved/*.arrow"))
    assert sorted(image.row for image in lane_images(stream, 0, 1, 9)) == list(range(9))
    assert count_images(stream) is None


def test_counting_reads_footers_of_parquet_only(tmp_path):
    stream = open_stream(write_shards(tmp_path / "parquet"))
    assert count_images(stream) == sum(ROWS)
    assert count_images(open_stream(write_shards(tmp_path / "tar", "tar"))) is None
    (tmp_path / "parquet/002.parquet").write_bytes(b"nothing")
    with pytest.raises(OSError, match=r"the footer of .*002\.parquet"):
        count_images(stream)


def test_single_images_are_refused_with_advice(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(0, 0))
    for source in (tmp_path / "images", tmp_path / "images/a.png", "digits"):
        with pytest.raises(ValueError, match="holds single images; leave streaming off, or pack the images"):
            open_stream(source)
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        open_stream(tmp_path / "absent.parquet")
    with pytest.raises(ValueError, match=r"name the files, such as 's3://bucket/images/\*\*/\*.parquet'"):
        open_stream("s3://bucket/images/")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"the parquet files of .* cannot be read"):
        open_stream(tmp_path / "broken.parquet")


def test_a_compressed_tar_is_refused_before_it_is_unpacked(tmp_path):
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_bytes(0, 3)))
    with pytest.raises(ValueError, match=r"a.tar' is compressed \(gzip\): unpack it first"):
        open_stream(tmp_path / "a.tar")


def test_a_stream_survives_pickling(shards):
    """If workers are not forked, the stream is pickled and sent to them."""
    batches = batches_of(open_stream(shards))
    assert_same(dict(enumerate(pickle.loads(pickle.dumps(batches)))), dict(enumerate(batches)))


# Remote


class Opened(Exception):
    pass


@pytest.mark.parametrize(
    ("source", "builder", "files"),
    [
        ("hf://datasets/user/name/**/*.parquet", "parquet", ["hf://datasets/user/name/**/*.parquet"]),
        ("s3://bucket/train-0000?.tar", "webdataset", ["s3://bucket/train-0000?.tar"]),
        ("gs://bucket/a.arrow", "arrow", ["gs://bucket/a.arrow"]),
        ("https://host/a.tar?token=1.5", "webdataset", ["https://host/a.tar?token=1.5"]),
        (
            "https://host/{0..1}/{098..100}.tar",
            "webdataset",
            [f"https://host/{folder}/{number}.tar" for folder in (0, 1) for number in ("098", "099", "100")],
        ),
    ],
)
def test_urls_go_to_datasets_as_they_are(source, builder, files, monkeypatch):
    called = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **arguments: called.append(arguments) or 1 / 0)
    monkeypatch.setattr(shards_of_data, "why_no_answer", lambda url: None)
    with pytest.raises(ValueError, match="cannot be opened for streaming: ZeroDivisionError"):
        open_stream(source)
    web = {"storage_options": {"https": remote.web_options(source)}} if source.startswith("https") else {}
    assert called == [{"path": builder, "data_files": {"train": files}, **web}]


def test_hub_names_go_to_datasets_as_they_are(monkeypatch):
    called = []
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda **arguments: called.append(arguments) or 1 / 0)
    with pytest.raises(ValueError, match="'user/name' cannot be opened for streaming"):
        open_stream("user/name", config_name="small")
    assert called == [{"path": "user/name", "name": "small"}]


def as_hub_name(monkeypatch, folder):
    """Lets `datasets` open a folder as it opens a repository: it finds the builder and the splits itself."""
    build = datasets.load_dataset_builder
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda path, name=None: build(str(folder), name))


def test_a_repository_of_shards_streams_and_knows_its_size(tmp_path, monkeypatch):
    write_shards(tmp_path / "data/train", rows=(3, 4))
    write_shards(tmp_path / "data/validation", rows=(2,))
    as_hub_name(monkeypatch, tmp_path)
    stream = open_stream("user/name")
    assert (stream.kind, stream.num_shards, stream.known_images, count_images(stream)) == ("parquet", 2, None, 7)
    assert sorted((image.shard, image.row) for image in lane_images(stream, 0, 1, 7))[-1] == (1, 3)
    assert open_stream("user/name", split="val").num_shards == 1
    splits = "[{name: train, num_bytes: 1, num_examples: 7}, {name: validation, num_bytes: 1, num_examples: 2}]"
    (tmp_path / "README.md").write_text(f"---\ndataset_info:\n  splits: {splits}\n---\n")
    assert (
        open_stream("user/name", split="val").known_images == 2 == count_images(open_stream("user/name", split="val"))
    )


def test_a_repository_of_images_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(0, 0))
    as_hub_name(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="'user/name' cannot be streamed: its files are not"):
        open_stream("user/name")


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_in_memory_give_the_batches_of_files(tmp_path, kind):
    folder = write_shards(tmp_path / "shards", kind)
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/{kind}/{file.name}", file.read_bytes())
    try:
        stream = open_stream(f"memory://{kind}/*.{kind}")
        assert [name.rsplit("/")[-1] for name in stream.names] == sorted(file.name for file in folder.iterdir())
        assert_same(run(stream), run(open_stream(folder)))
        assert count_images(stream) == (sum(ROWS) if kind == "parquet" else None)
    finally:
        memory.rm(f"/{kind}", recursive=True)


@pytest.fixture
def server(tmp_path):
    """URL of a web server for `tmp_path`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path))
    ) as instance:
        threading.Thread(target=instance.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{instance.server_port}"
        instance.shutdown()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_web_server_gives_the_batches_of_files_and_its_losses_are_named(shards, server, num_workers):
    kind = next(shards.iterdir()).suffix
    stream = open_stream(f"{server}/shards/{{000..005}}{kind}")
    settings = {"total_steps": 4, "num_workers": num_workers}
    assert_same(run(stream, **settings), run(open_stream(shards), **settings))
    (shards / f"003{kind}").unlink()
    with pytest.raises(OSError, match=rf"the shard '{server}/shards/003\{kind}' cannot be read from row 0 on"):
        run(stream, **{**settings, "total_steps": 20})


def test_what_the_server_answers_is_named(server):
    with pytest.raises(ValueError, match=f"the server answers 404 .* for '{server}/none.tar'") as told:
        open_stream(f"{server}/none.tar")
    assert "\n" not in str(told.value)


def test_a_server_without_sizes_is_named(monkeypatch):
    def open_nothing(**arguments):
        raise ValueError("Cannot seek streaming HTTP file")

    monkeypatch.setattr(datasets, "load_dataset_builder", open_nothing)
    monkeypatch.setattr(shards_of_data, "why_no_answer", lambda url: None)
    with pytest.raises(ValueError, match="the server does not tell the size of the file"):
        open_stream("https://host/a.parquet")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://host/{3..0}.tar", r"the range \{3\.\.0\} goes down, so it names no file; write \{0\.\.3\}"),
        ("https://host/{000..999}-{0..99999}.tar", "names 100,000,000 files, more than 1,000,000"),
    ],
)
def test_a_range_without_files_or_with_too_many_is_refused(url, message):
    with pytest.raises(ValueError, match=message):
        open_stream(url)


def test_other_shards_behind_the_same_urls_are_refused(tmp_path, server, monkeypatch, capsys):
    """Another time of change alone may mean that the same files were uploaded again. So it is told."""
    monkeypatch.setattr(notices, "_told", set())
    folder = write_shards(tmp_path / "shards", "tar", (4, 5, 4, 5))
    urls = f"{server}/shards/{{000..003}}.tar"
    start = positions_after(open_stream(urls), 3, world_size=1)
    first = min(folder.iterdir())
    options = {"accumulation_steps": 4, "start_step": 3, "start": start}
    batches_of(open_stream(urls), **options)
    batches_of(open_stream(f"{urls}?token=new"), **options)
    seconds = first.stat().st_mtime
    os.utime(first, (seconds, seconds + 5))  # Last-Modified has whole seconds
    batches_of(open_stream(f"{server}/./shards/{{000..003}}.tar"), **options)  # another time says nothing elsewhere
    assert "other ETags or times of change" not in capsys.readouterr().err
    batches_of(open_stream(urls), **options)
    assert capsys.readouterr().err.count("the server gives other ETags or times of change") == 1
    batches_of(open_stream(folder), **options)
    (folder / "001.tar").write_bytes(tar_bytes(1, 30))
    with pytest.raises(ValueError, match="sizes or contents of the shards have changed"):
        batches_of(open_stream(urls), **options)


def test_a_server_that_gives_no_answer_is_told_of_and_is_no_change(shards, server, monkeypatch, capsys):
    monkeypatch.setattr(notices, "_told", set())
    monkeypatch.setattr(remote, "_WAITS", (0, 0))
    kind = next(shards.iterdir()).suffix
    whole = open_stream(f"{server}/shards/{{000..005}}{kind}").contents
    stream = open_stream(f"{server}/shards/{{000..005}}{kind}")
    (shards / f"003{kind}").unlink()
    assert whole and stream.contents == "" and not have_changed(whole, stream.contents)
    message = f"There is no answer about the shard '{server}/shards/003{kind}', so a resume cannot notice"
    assert capsys.readouterr().err.count(message) == 1


# Bad images and bad shards


def test_bad_images_are_left_out_and_reported_each_time(tmp_path):
    bad = {(0, 0), (0, 1), (2, 12), (3, 4)}
    for kind in ("parquet", "tar"):
        stream = open_stream(write_shards(tmp_path / kind, kind, bad=bad))
        found = list(batches_of(stream, batch_size=1, lanes=1, total_steps=2 * (len(ALL_IMAGES) - len(bad)) + 1))
        met = [(image.shard, image.row) for image in lane_images(stream, 0, 1, 3 * len(ALL_IMAGES))]
        used = [identities(batch)[0] for batch in found]
        assert used == [identity for identity in met if identity not in bad][: len(used)]
        records = [record for batch in found for record in batch["bad_images"]]
        names = [f"{shard}-{row}.png" for shard, row in met if (shard, row) in bad]
        assert [record["name"] for record in records] == names[: len(records)] and len(records) >= 2 * len(bad)
        with pytest.raises(BadImageError) as error:
            decode_image({"bytes": b"no image", "path": "a.png"})
        assert {record["reason"] for record in records} == {error.value.reason}


def test_a_bad_image_without_a_name_is_called_by_its_shard_and_row(tmp_path):
    stream = open_stream(write_shards(tmp_path / "shards", rows=(6,), bad={(0, 4)}, names=False))
    records = [record for batch in batches_of(stream, lanes=1, total_steps=2) for record in batch["bad_images"]]
    assert records[0]["name"] == f"{tmp_path / 'shards/000.parquet'} row 4"


def test_bad_images_survive_workers_and_resuming(tmp_path):
    stream = open_stream(write_shards(tmp_path / "shards", bad={(0, 3), (1, 1), (4, 8)}))
    expected = run(stream)
    assert sum(len(batch["bad_images"]) for batch in expected.values()) > 3
    assert_same(run(stream, world_size=2, num_workers=2), expected)
    start = positions_after(stream, 9, world_size=2)
    expected = {place: batch for place, batch in expected.items() if place[0] >= 9}
    assert_same(run(stream, start_step=9, start=start), expected)


def test_too_many_bad_images_in_a_row_stop_the_run(tmp_path):
    stream = open_stream(write_shards(tmp_path / "shards", rows=(3, 2), bad=ALL_IMAGES))
    with pytest.raises(BadImageError, match=f"{MAX_SUBSTITUTES} images in a row cannot be read; the last one is"):
        next(iter(batches_of(stream, lanes=2)))


def test_shards_without_any_image_stop_the_run_and_a_few_do_not(tmp_path):
    stream = open_stream(write_shards(tmp_path / "empty", rows=(0, 0)))
    with pytest.raises(ValueError, match="holds no images in any shard of lane 1 for 20 epochs"):
        next(read_lane(stream, 1, 2, 0, 5, Position()))
    stream = open_stream(write_shards(tmp_path / "some", rows=(4, 0)))
    assert {image.shard for image in lane_images(stream, 0, 2, 30)} == {0}


def test_fewer_images_than_a_batch_go_on_in_the_next_epoch(tmp_path):
    stream = open_stream(write_shards(tmp_path / "shards", rows=(2,)))
    batches = list(batches_of(stream, lanes=1, batch_size=5, total_steps=2))
    rows = torch.cat([batch["row"] for batch in batches]).tolist()
    assert [sorted(rows[start : start + 2]) for start in range(0, 10, 2)] == [[0, 1]] * 5
    assert batches[-1]["position"][0] == 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_shard_that_vanishes_or_breaks_is_named(shards, num_workers):
    stream = open_stream(shards)
    victim = Path(stream.names[2])
    whole = victim.read_bytes()
    for damage in (victim.unlink, functools.partial(victim.write_bytes, whole[: len(whole) // 2])):
        damage()
        with pytest.raises(OSError, match=f"the shard '{victim}' cannot be read from row"):
            run(stream, num_workers=num_workers)
