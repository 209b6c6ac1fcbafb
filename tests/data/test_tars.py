# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Which images a tar has, whatever they are called, and which tars are refused."""

import bz2
import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from ijepa_transformers.arguments import DatasetArguments
from ijepa_transformers.data.decoding import decode_image
from ijepa_transformers.data.labels import labels_of
from ijepa_transformers.data.shards import open_stream
from ijepa_transformers.data.sources import load_image_dataset, open_split
from tests.data.images import encoded, names, photo_pixels


PICTURE = encoded(photo_pixels(8, 8))


def tar_of(*members, end=1024):
    """A tar of (name, content), of names of the same picture, or of headers."""
    file = io.BytesIO()
    for member in members:
        if isinstance(member, tarfile.TarInfo):
            file.write(member.tobuf(tarfile.GNU_FORMAT))
            continue
        name, content = member if isinstance(member, tuple) else (member, PICTURE)
        header = tarfile.TarInfo(name)
        header.size = len(content)
        file.write(header.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    return file.getvalue() + bytes(end)


def link(name, target, kind=tarfile.SYMTYPE):
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header


GREY = encoded(photo_pixels(8, 8)[..., 0])
NUMBERED = [f"{number:03}.png" for number in range(4)]


@pytest.fixture
def opened(tmp_path):
    def open_tar(content, **options):
        (tmp_path / "x.tar").write_bytes(content)
        return load_image_dataset(tmp_path / "x.tar", **options)

    return open_tar


@pytest.mark.parametrize(
    "members",
    [
        ["0.jpg", "1.png", "2.jpg", "3.png"],
        ["0.jpg", "1.JPG", "2.jpeg"],
        [*(f"{number}.jpg" for number in range(12)), "12.png"],
        [f"photo.v{number}.final.png" for number in range(5)],
        ["a/1.png", "b/1.png", "c.d/e.f.png"],
        ["1.png", "notes.txt", "2.png"],
    ],
)
def test_every_image_is_there_whatever_its_name(opened, members):
    dataset = opened(tar_of(*members))
    assert names(dataset) == [name.rpartition("/")[2] for name in members if name != "notes.txt"]
    assert decode_image(dataset[0]["image"]).shape == (8, 8, 3)


def test_links_to_files_of_the_tar_are_read(opened, tmp_path):
    links = [link("a/1.png", "../0.png"), link("2.png", "./0.png", tarfile.LNKTYPE), link("a/3.png", "1.png")]
    content = tar_of("0.png", *links, link("4.cls", "0.cls"), ("0.cls", b"3"), "4.png")
    dataset = opened(content)
    assert names(dataset) == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert all(decode_image(row["image"]).shape == (8, 8, 3) for row in dataset)
    with pytest.raises(ValueError, match=r"cannot be streamed, because 'a/1.png' in it is a link to '../0.png'"):
        open_stream(tmp_path / "x.tar")


def test_links_that_lead_nowhere_are_told(opened, capsys):
    circle = [link("2.png", "3.png"), link("3.png", "2.png")]
    assert names(opened(tar_of("0.png", link("1.png", "/data/1.png"), *circle, link("docs", "/docs")))) == ["0.png"]
    assert "note: 3 links are left out of" in (said := capsys.readouterr().err) and "'1.png' to '/data/1.png'" in said


def test_a_name_that_is_not_unicode_is_escaped(opened):
    assert names(opened(tar_of("caf\udce9.png"))) == ["caf\\xe9.png"]


def test_hidden_files_are_no_images(opened):
    assert names(opened(tar_of("a/1.png", ("a/._1.png", b"of macOS")))) == ["1.png"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["0.jpg", "1.png"], "names in it differ behind their first dot: 'jpg', 'png'"),
        ([*(f"{number}.jpg" for number in range(12)), "12.JPG"], "behind their first dot: 'jpg', 'JPG'"),
        ([f"photo.v{number}.png" for number in range(3)], "'v0.png', 'v1.png', 'v2.png'. Leave streaming off"),
        ([], "is empty: it holds no files"),
        ([("a.txt", b"a"), ("b.json", b"{}")], "x.tar' holds no images; the extensions of its files are json, txt"),
        (["0.png", ("0.cls", b"cat")], "because a .cls beside an image cannot be read .*'cat'.*Leave streaming off"),
        (["0.png", ("0.json", b"{bad")], "because a .json beside an image cannot be read .*Leave streaming off"),
    ],
)
def test_a_local_tar_that_cannot_be_streamed_is_refused_at_the_start(tmp_path, members, message):
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    with pytest.raises(ValueError, match=message):
        open_stream(tmp_path / "x.tar")


def test_several_images_of_a_sample_are_columns(opened):
    content = tar_of(*(f"{number}.{side}.png" for number in range(3) for side in ("left", "right")))
    assert names(opened(content, image_column="right.png")) == [f"{number}.right.png" for number in range(3)]
    with pytest.raises(ValueError, match=r"several image columns \['left.png', 'right.png'\]"):
        opened(content)


def test_labels_lie_beside_the_images(opened):
    numbers = [(f"{number}.cls", str(number % 2).encode()) for number in range(4)]
    dataset = opened(tar_of(*(part for name in numbers for part in (name[0][0] + ".png", name))))
    assert labels_of(dataset).tolist() == [0, 1, 0, 1]
    described = [("a.v1.json", json.dumps({"label": "cat"}).encode()), ("a.v2.json", b'{"label": "dog", "x": 1}')]
    dataset = opened(tar_of("a.v1.png", described[0], "a.v2.jpg", described[1]))
    assert dataset.features["label"].names == ["cat", "dog"] and labels_of(dataset).tolist() == [0, 1]


def cut(place):
    return tar_of(*NUMBERED)[:place]


def with_size(size):
    """The tar, with another size in the header of its second member, and with the right checksum."""
    content = bytearray(tar_of(*NUMBERED))
    header = memoryview(content)[SIZE : SIZE + 512]
    header[124:136] = size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(content)


SIZE = 512 + -(-len(PICTURE) // 512) * 512  # of a member


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar_of(*NUMBERED, end=0), "x.tar' is cut off: it has no end mark, and its last whole member is '003.png'"),
        (cut(2 * SIZE), "x.tar' is cut off: it has no end mark, and its last whole member is '001.png'"),
        (cut(2 * SIZE + 200), "x.tar' is cut off"),
        (cut(2 * SIZE + 600), "x.tar' is cut off or damaged: unexpected end of data"),
        (cut(2 * SIZE) + b"x" * 512 + cut(SIZE) + bytes(1024), "x.tar' is damaged behind '001.png'"),
        (tar_of(*NUMBERED) + tar_of("9.png"), "x.tar' goes on behind its end mark"),
        (with_size(b"\xff" * 12), "x.tar' is cut off or damaged"),
        (with_size(b"\xff" * 10 + b"\xfc\x00"), "x.tar' is cut off or damaged"),
        (tar_of(), "x.tar' is empty"),
        (b"", "x.tar' is cut off"),
        (b"no tar at all" * 99, "x.tar' is cut off or damaged"),
        (tar_of("a.txt", "b.npz"), "holds no images; the extensions of its files are npz, txt"),
        (gzip.compress(tar_of(*NUMBERED)), r"x.tar' is compressed \(gzip\): unpack it first"),
        (bz2.compress(tar_of(*NUMBERED)), r"x.tar' is compressed \(bzip2\)"),
    ],
)
def test_a_tar_that_is_not_whole_is_refused(opened, content, message):
    with pytest.raises(ValueError, match=message):
        opened(content)


def test_a_member_that_is_too_large_is_refused_before_it_is_read(opened, monkeypatch):
    monkeypatch.setattr("ijepa_transformers.data.tars.MAX_FILE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"'big.png' in .*x.tar' has 1,001 bytes, more than 1,000"):
        opened(tar_of("1.png", ("big.png", bytes(1001))))


def test_a_later_tar_with_other_endings_is_told_where_it_is_read(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_of(*NUMBERED))
    (tmp_path / "1.tar").write_bytes(tar_of("4.png", "5.JPG"))
    stream = open_stream(tmp_path)
    assert len(list(stream.rows(0))) == 4
    with pytest.raises(OSError, match=r"1\.tar.*differ behind their first dot: 'png', 'JPG'"):
        list(stream.rows(1))
    (tmp_path / "2.tar").write_bytes(tar_of("4.jpg", "5.jpg"))
    stream = open_stream(tmp_path)
    with pytest.raises(OSError, match=r"2\.tar.* it has a sample without a member that ends in 'png'"):
        list(stream.rows(2))


def test_a_distant_tar_with_several_endings_is_told_instead_of_the_message_of_datasets(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar_of("0.png", "1.JPG"))
    with pytest.raises(ValueError, match="differ behind their first dot: 'png', 'JPG'"):
        open_stream(f"file://{tmp_path / 'x.tar'}")


def test_several_images_in_each_sample_may_be_streamed(tmp_path):
    pairs = [f"{number:03}.{side}.png" for number in range(4) for side in ("left", "right")]
    (tmp_path / "x.tar").write_bytes(tar_of(*pairs))
    assert len(list(open_stream(tmp_path / "x.tar", image_column="left.png").rows(0))) == 4
    with pytest.raises(ValueError, match="several image columns"):
        open_stream(tmp_path / "x.tar")


def test_a_changed_tar_is_converted_again(opened):
    first, second = (encoded(np.full((8, 8, 3), value, np.uint8)) for value in (10, 20))
    for content, value in ((first, 10), (second, 20)):
        assert decode_image(opened(tar_of(("1.png", content)))[0]["image"])[0, 0, 0] == value


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (["train/1.png", "val/2.png"], "has the folders 'train' and 'val', and a tar file is one split"),
        (["images/1.png", ("masks/1.png", GREY)], "the images in 'masks' look like masks .* take the masks out"),
        (["1.png", ("1_mask.png", GREY)], r"'1_mask\.png' looks like a mask of '1\.png'"),
    ],
)
def test_splits_and_masks_in_a_tar_are_refused(opened, tmp_path, contents, message):
    with pytest.raises(ValueError, match=message):
        opened(tar_of(*contents))
    with pytest.raises(ValueError, match=message):
        open_stream(tmp_path / "x.tar")


def test_a_sparse_member_is_refused(opened):
    header = tarfile.TarInfo("1.png")
    header.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(ValueError, match=r"'1\.png' in '.*' is stored as a sparse file: pack it without tar -S"):
        opened(tar_of(header))


def test_names_that_are_there_twice_are_told(opened, capsys):
    assert len(opened(tar_of("1.png", "2.png", "1.png"))) == 3
    assert "1 name is in '" in capsys.readouterr().err


def test_classes_of_several_types_are_names_and_broken_json_is_told(opened, capsys):
    members = [("1.png", PICTURE), ("1.cls", b"3"), ("2.png", PICTURE), ("2.cls", b"cat"), ("2.json", b"{x")]
    dataset = opened(tar_of(*members))
    assert dataset.features["label"].names == ["3", "cat"] and labels_of(dataset).tolist() == [0, 1]
    assert "1 .json file of '" in capsys.readouterr().err


def test_where_labels_of_a_tar_are_read_from_is_said(opened, tmp_path):
    opened(tar_of("cat/1.png", "dog/2.png"))
    with pytest.raises(ValueError, match=r"in a tar they are read from a \.cls or a \.json .* not from folders"):
        open_split(DatasetArguments(str(tmp_path / "x.tar")), "train", labels="required")
