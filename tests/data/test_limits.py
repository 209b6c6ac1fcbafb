# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Files that cost much for their size are bad images, and are refused before a library reads them."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.data import limits
from ijepa_transformers.data.decoding import BadImageError, decode_image
from tests.data.images import photo_pixels
from tests.data.nasty_images import encoded


def jpeg(pixels=None, **options):
    return encoded(photo_pixels() if pixels is None else pixels, "JPEG", **options)


def more_scans(content, count):
    begin, end = content.rfind(b"\xff\xda"), content.rfind(b"\xff\xd9")
    return content[:end] + content[begin:end] * count + content[end:]


def behind_start(content, inserted):
    return content[:2] + inserted + content[2:]


def segment(marker, content):
    return bytes((0xFF, marker)) + struct.pack(">H", len(content) + 2) + content


def tags(entries, tail=b"", order="<"):
    """The bytes of a TIFF header with (tag, type, count, value or offset) entries."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return head + b"".join(struct.pack(order + "HHII", *entry) for entry in entries) + bytes(4) + tail


def long_resolution(count, order="<"):
    plain = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 200)]
    return tags(
        [*plain, (277, 3, 1, 1), (278, 4, 1, 4), (279, 4, 1, 16), (282, 5, count, 220)], bytes(8 * count + 99), order
    )


def tiff_with_exif(count, tag):
    plain = [(256, 4, 1, 4), (257, 4, 1, 4), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 200), (277, 3, 1, 1)]
    plain += [(278, 4, 1, 4), (279, 4, 1, 16), (tag, 4, 1, 300)]
    exif = struct.pack("<HHHIII", 1, 37386, 5, count, 320, 0)
    return tags(plain).ljust(300, b"\0") + exif.ljust(20, b"\0") + bytes(8 * count)


def same_bytes_again(count, size):
    """EXIF data whose tags all have the same `size` bytes as their content."""
    return tags([(40000 + number, 7, size, 8) for number in range(count)], bytes(size))


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_with(chunks):
    content = encoded(photo_pixels(), "PNG")
    return content[:33] + chunks + content[33:]


def gif_with(extension):
    content = encoded(Image.new("P", (9, 9)), "GIF")
    place = 13 + (3 << (content[10] & 7) + 1)
    return content[:place] + extension + content[place:]


def bmp_of_runs(size):
    header = struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 8, 1, size, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + size, 0, 0, 1078) + header + bytes(1024) + bytes(size)


def exif_segments(content):
    parts = [content[start : start + 60_000] for start in range(0, len(content), 60_000)]
    return b"".join(segment(0xE1, b"Exif\0\0" + part) for part in parts)


COSTLY = {
    "scans of a progressive JPEG": (lambda: more_scans(jpeg(progressive=True), 60), "more than 32 scans"),
    "scans of a plain JPEG": (lambda: more_scans(jpeg(), 60), "more than 32 scans"),
    "scans behind a comment that has an end marker": (
        lambda: more_scans(jpeg().replace(b"\xff\xda", segment(0xFE, b"\xff\xd9") + b"\xff\xda"), 60),
        "more than 32 scans",
    ),
    "scans of a large JPEG": (
        lambda: more_scans(jpeg(np.zeros((300, 400), np.uint8), progressive=True), 20),
        "more than 20 scans",
        {"MAX_SCANNED_PIXELS": 20 * 300 * 400},
    ),
    "segments of a JPEG": (lambda: behind_start(jpeg(), segment(0xFE, b"") * 5000), "more than 4,096 segments"),
    "rubbish between segments": (lambda: behind_start(jpeg(), b"x" * 70_000), "between the segments"),
    "fill bytes between segments": (lambda: behind_start(jpeg(), b"\xff" * 70_000), "between the segments"),
    "EXIF tags with the same content": (
        lambda: behind_start(jpeg(), exif_segments(same_bytes_again(500, 9000))),
        "tags have more content than the file",
    ),
    "EXIF in a TIFF": (lambda: tiff_with_exif(70_000, 34665), "the tag 37386 has 70,000 numbers"),
    "GPS in a TIFF": (lambda: tiff_with_exif(70_000, 34853), "the tag 37386 has 70,000 numbers"),
    "EXIF over many segments": (
        lambda: behind_start(jpeg(), exif_segments(b"II*\0" + bytes(2**22))),
        "more than 4,194,304 bytes of EXIF data",
    ),
    "EXIF over two segments": (
        lambda: behind_start(jpeg(), exif_segments(tags([(282, 5, 70_000, 30)], bytes(560_100)))),
        "the tag 282 has 70,000 numbers",
    ),
    "index of a JPEG of several images": (
        lambda: behind_start(jpeg(), segment(0xE2, b"MPF\0" + same_bytes_again(500, 9000))),
        "tags have more content than the file",
    ),
    "fractions in a TIFF": (lambda: long_resolution(70_000), "the tag 282 has 70,000 numbers, more than 65,536"),
    "fractions in a big-endian TIFF": (lambda: long_resolution(70_000, ">"), "the tag 282 has 70,000 numbers"),
    "tags of a TIFF with the same content": (lambda: same_bytes_again(100, 5000), "more content than the file"),
    "chunks of a PNG": (
        lambda: png_with(chunk(b"tEXt", b"") * 1000),
        "more than 1,000 chunks",
        {"MAX_CHUNKS": 1000},
    ),
    "EXIF in a PNG": (
        lambda: png_with(chunk(b"eXIf", same_bytes_again(500, 9000))),
        "tags have more content than the file",
    ),
    "comment of a GIF": (lambda: gif_with(b"!\xfe" + b"\1x" * 5000 + b"\0"), "more than 4,096 blocks"),
    "comments of a GIF": (lambda: gif_with(b"!\xfe\1x\0" * 5000), "more than 4,096 blocks"),
    "rubbish in a GIF": (lambda: gif_with(b"x" * 5000), "more than 4,096 blocks"),
    "comment of a PNM": (lambda: b"P5\n#" + b"x" * 70_000 + b"\n4 4 255\n" + bytes(16), "not within its first 65,536"),
    "spaces in a PNM": (lambda: b"P6" + b" " * 70_000 + b"4 4 255\n" + bytes(48), "not within its first 65,536"),
    "numbers of a plain PNM": (
        lambda: b"P2 30 30 255\n" + b"1 " * 900,
        "PNM in plain text of 1,813 bytes",
        {"MAX_SLOW_BYTES": 1000},
    ),
    "PNM of 12 bits": (
        lambda: b"P5 30 30 4095\n" + bytes(1800),
        "the largest value 4095 and 900 values",
        {"MAX_SLOW_SAMPLES": 800},
    ),
    "runs of a BMP": (lambda: bmp_of_runs(2**11), "run-length encoded BMP of 3,126 bytes", {"MAX_SLOW_BYTES": 2**11}),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_file_that_costs_much_is_a_bad_image(name, monkeypatch):
    make, reason, *lower = COSTLY[name]
    for constant, value in dict(*lower).items():
        monkeypatch.setattr(limits, constant, value)
    with pytest.raises(BadImageError) as caught:
        decode_image({"bytes": make(), "path": "photo.jpg"})
    assert reason in str(caught.value) and str(caught.value).startswith("photo.jpg: ")


ORDINARY = {
    "progressive JPEG": lambda: jpeg(progressive=True),
    "progressive JPEG with restart markers": lambda: jpeg(progressive=True, restart_marker_rows=1),
    "scans behind the end": lambda: jpeg() + b"\xff\xda" * 100,
    "scans in a comment": lambda: behind_start(jpeg(), segment(0xFE, b"\xff\xda" * 100)),
    "JPEG with many segments": lambda: behind_start(jpeg(), segment(0xFE, b"x" * 999) * 3000),
    "fill bytes": lambda: behind_start(jpeg(), b"\xff" * 99),
    "PNG with many chunks": lambda: png_with(b"".join(chunk(b"tEXt", b"k%d\0v" % number) for number in range(1000))),
    "GIF with a comment": lambda: gif_with(b"!\xfe" + (b"\xff" + b"x" * 255) * 40 + b"\0"),
    "PNM with a comment": lambda: b"P5\n# by hand\n4 4\n255\n" + bytes(16),
    "PNM without maxval": lambda: b"P4\n8 8\n" + bytes(8),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_files_of_these_kinds_are_decoded(name):
    assert decode_image({"bytes": ORDINARY[name](), "path": None}, 3).ndim == 3


def test_costly_exif_of_other_formats_is_ignored():
    file = io.BytesIO()
    Image.fromarray(photo_pixels()).save(file, "WEBP", exif=same_bytes_again(500, 9000))
    assert decode_image({"bytes": file.getvalue(), "path": None}).shape == (30, 40, 3)
    with Image.open(io.BytesIO(file.getvalue())) as image:
        assert not limits.exif_is_cheap(image)


def test_a_file_of_the_kernel_is_not_waited_for():
    with pytest.raises(BadImageError, match="/proc/self/status: ValueError: the file is empty"):
        decode_image({"bytes": None, "path": "/proc/self/status"})
