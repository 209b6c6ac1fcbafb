# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Whether images are those of an earlier run is told by their names and sizes, or by their bytes."""

import os

import pytest

from ijepa_transformers.data import contents
from ijepa_transformers.data.contents import ContentDigests, contents_digest, image_fingerprints, status_digest
from ijepa_transformers.data.sources import load_image_dataset
from tests.data.images import encoded, images_dataset, photo


@pytest.fixture
def folder(tmp_path):
    """Six images of different sizes; the last has a name that is not UTF-8."""
    (tmp_path / "images/cat").mkdir(parents=True)
    for number in range(5):
        (tmp_path / f"images/cat/{number}.png").write_bytes(encoded(photo(seed=number)))
    (tmp_path / "images" / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(photo(seed=9)))
    return tmp_path / "images"


def fingerprints(folder):
    return image_fingerprints(load_image_dataset(folder), str(folder)).tolist()


def replace(path, content):
    """Other content of the same size, name and times."""
    assert len(content) == path.stat().st_size
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    return bytes(content)


def test_fingerprints_change_with_name_and_size(folder):
    before = fingerprints(folder)
    assert len(set(before)) == 6
    moved = folder.rename(folder.with_name("moved"))
    assert fingerprints(moved) == before
    (moved / "cat/1.png").rename(moved / "cat/11.png")
    (moved / "cat/3.png").write_bytes(b"short")
    after = fingerprints(moved)
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, True, False, True, False, True]


def test_fingerprints_of_few_bytes_change_with_the_content(folder, monkeypatch):
    before = fingerprints(folder)
    path = folder / "cat/0.png"
    replace(path, flipped(path))
    assert [old == new for old, new in zip(before, fingerprints(folder), strict=True)].count(False) == 1
    monkeypatch.setattr("ijepa_transformers.data.contents._FEW_BYTES", 0)
    of_sizes = fingerprints(folder)
    replace(path, flipped(path))
    assert fingerprints(folder) == of_sizes


def test_fingerprints_of_images_in_a_table_are_their_sizes():
    one, two = (images_dataset([encoded(photo(seed=1)), content]) for content in (b"ab", b"abc"))
    first, second = (image_fingerprints(each, "digits").tolist() for each in (one, two))
    assert first[0] == second[0] and first[1] != second[1]


def test_the_digest_of_contents_sees_bytes_and_order_but_no_names(folder):
    dataset = load_image_dataset(folder)
    before = contents_digest(dataset, range(6))
    assert contents_digest(dataset, [0, 1, 2, 3, 5, 4]) != before
    (folder / "cat/4.png").rename(folder / "cat/44.png")
    assert contents_digest(load_image_dataset(folder), range(6)) == before
    replace(folder / "cat/0.png", flipped(folder / "cat/0.png"))
    assert contents_digest(load_image_dataset(folder), range(6)) != before


def test_what_is_no_regular_file_is_not_waited_for(folder):
    (folder / "cat/0.png").unlink()
    os.mkfifo(folder / "cat/0.png")
    (folder / "cat/1.png").unlink()
    (folder / "cat/1.png").symlink_to("/dev/zero")
    dataset = load_image_dataset(folder)
    (folder / "cat/2.png").unlink()
    assert contents_digest(dataset, range(6)) == contents_digest(dataset, range(6))


def test_files_are_read_again_only_if_they_may_have_changed(folder, tmp_path, monkeypatch):
    read = []
    original = contents.contents_digest
    monkeypatch.setattr(contents, "contents_digest", lambda *given: read.append(given[1]) or original(*given))

    def digest():
        digests = ContentDigests(tmp_path / "known.json")
        found = digests.digest(load_image_dataset(folder), range(6))
        digests.save()
        return found

    first = digest()
    assert digest() == first == (first[0], False) and len(read) == 1
    replace(folder / "cat/2.png", flipped(folder / "cat/2.png"))
    second = digest()
    assert second[1] and second[0] != first[0] and len(read) == 2
    os.utime(folder / "cat/2.png")
    assert digest() == (second[0], False) and len(read) == 3
    (tmp_path / "known.json").write_text('{"half": [')
    assert digest() == (second[0], False)


def test_images_in_memory_are_always_read(tmp_path):
    dataset = images_dataset([b"a", b"b"])
    assert status_digest(dataset, range(2)) is None
    digests = ContentDigests(tmp_path / "known.json")
    assert digests.digest(dataset, range(2)) == (digests.digest(dataset, range(2))[0], False) and not digests.known
