# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Refuses files that would cost minutes or gigabytes, by their raw headers, before any library reads them.

The size of a file and its pixels are limited elsewhere. What is limited here is work that does not depend on them:
scans of a JPEG, arrays in tags, comments, chunks, and formats whose decoder is slow.
"""

import re
import struct
from collections.abc import Callable

from PIL import Image


MAX_JPEG_SCANS = 32  # libjpeg itself writes 10 for colours and 18 for CMYK
MAX_SCANNED_PIXELS = 20 * 2**27  # pixels x scans of a JPEG
MAX_SEGMENTS = 4096  # of a JPEG before its first scan, or boxes of JPEG 2000, or entries of a list of tags
MAX_LISTS = 16  # of tags in a TIFF: that of the image, EXIF, GPS
MAX_EXIF_BYTES = 2**22  # of a JPEG; one segment has at most 65,533
MAX_SKIPPED_BYTES = 2**16  # between the segments of a JPEG, or in the header of a PNM
MAX_FRACTIONS = 2**16  # in one tag of a TIFF or of EXIF data
MAX_NUMBERS = 2**22  # likewise, of another type: one for each strip or tile of the largest image
MAX_CHUNKS = 2**18  # of a PNG
MAX_BLOCKS = 4096  # of the comments and other extensions of a GIF
MAX_TILES = 2**14  # of JPEG 2000
MAX_JPEG_2000_BYTES = 2**26  # of one file: its decoder reads about 3 MB a second
MAX_SLOW_BYTES = 2**23  # of a file that PIL decodes in Python: plain PNM and run-length encoded BMP
MAX_SLOW_SAMPLES = 2**22  # of a PNM whose largest value is neither 255 nor 65535, likewise
_EXIF, _MPF = b"Exif\0\0", b"MPF\0"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of a JPEG that hold the size
_BARE = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))  # markers without a length
_END, _SCAN, _APP1, _APP2 = 0xD9, 0xDA, 0xE1, 0xE2
_FILL = re.compile(rb"\xff*")
_NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_TIFF_HEADER = re.compile(rb"II[*+]\0|MM\0[*+]")
_BYTES_OF_TYPE = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}
_TAGS_OF_LISTS = (34665, 34853, 40965)  # EXIF, GPS, interoperability
_TEXTS, _FRACTIONS = (1, 2, 6, 7), (5, 10)
_PNM_HEADER = re.compile(rb"P([1-6y])((?:(?:\s|#[^\r\n]*[\r\n])+\d{1,10}){2,3})\s")


def check_cost(encoded: bytes) -> None:
    """Raises ValueError if a file is of a kind that takes long to open or to decode for its size."""
    for start, check in _CHECKS.items():
        if encoded.startswith(start):
            check(encoded)
            return
    if encoded[4:8] == b"ftyp":  # AVIF, HEIC
        for found in _TIFF_HEADER.finditer(encoded):
            check_tags(encoded[found.start() :])


def exif_is_cheap(image: Image.Image) -> bool:
    """Whether the EXIF data of an opened image can be looked up quickly."""
    try:
        for name in ("exif", "Raw profile type exif"):
            blob = image.info.get(name) or b""
            blob = blob if isinstance(blob, bytes) else b""
            check_tags(blob.removeprefix(_EXIF))
        return len(image.info.get("Raw profile type exif", "")) <= MAX_SKIPPED_BYTES
    except ValueError:
        return False


# JPEG


def _check_jpeg(encoded: bytes) -> None:
    place, skipped, pixels, exif = 2, 0, 0, b""
    for _ in range(MAX_SEGMENTS):
        start, place = place, encoded.find(b"\xff", place)
        fill = _FILL.match(encoded, place) if place >= 0 else None
        if fill is None or fill.end() + 3 > len(encoded):
            return  # no scan, which the decoder will say
        place = fill.end() - 1
        skipped += place - start
        if skipped > MAX_SKIPPED_BYTES:
            raise ValueError(f"more than {MAX_SKIPPED_BYTES:,} bytes between the segments of a JPEG mean nothing")
        marker, length = encoded[place + 1], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if marker in (_SCAN, _END):
            check_tags(exif)
            _check_scans(encoded, place, pixels)
            return
        content = place + 4
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", encoded.ljust(content + 5, b"\0"), content + 1)
            pixels = height * width
        elif marker == _APP1 and encoded.startswith(_EXIF, content):  # may go on in a second segment
            exif += encoded[content + len(_EXIF) : place + 2 + length]
            if len(exif) > MAX_EXIF_BYTES:  # PIL joins the segments one by one, which takes the square of their number
                raise ValueError(f"the JPEG has more than {MAX_EXIF_BYTES:,} bytes of EXIF data")
        elif marker == _APP2 and encoded.startswith(_MPF, content):
            check_tags(encoded[content + len(_MPF) : place + 2 + length])
        place += 2 if marker in _BARE else 2 + max(length, 2)
    raise ValueError(f"the JPEG has more than {MAX_SEGMENTS:,} segments before its pixels")


def _check_scans(encoded: bytes, place: int, pixels: int) -> None:
    limit = max(1, min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1)))  # too many pixels are told elsewhere
    if encoded.count(bytes((0xFF, _SCAN)), place) <= limit:  # counts some too many, and is fast
        return
    scans = 0
    while found := _NEXT_MARKER.search(encoded, place):
        marker = encoded[found.start() + 1]
        if marker == _END:
            return
        scans += marker == _SCAN
        if scans > limit:
            raise ValueError(f"the JPEG has more than {limit} scans, each a pass over {pixels:,} pixels")
        length = int.from_bytes(encoded[found.end() : found.end() + 2], "big")
        place = found.end() + (0 if marker in _BARE else max(length, 2))


# Tags of TIFF and EXIF


def check_tags(encoded: bytes) -> None:
    """Raises ValueError if the first list of tags of a TIFF, or of EXIF data without their prefix, costs too much.

    PIL reads the content of every tag, even if it is the same bytes, and makes an object of every fraction.
    """
    if _TIFF_HEADER.match(encoded):
        _check_list(encoded, _Form(encoded).first_list())


def _check_tiff(encoded: bytes) -> None:
    """`check_tags`, also for the lists of EXIF and GPS tags, which PIL reads from a TIFF."""
    if not _TIFF_HEADER.match(encoded):
        return
    places = [_Form(encoded).first_list()]
    for place in places:  # grows
        if len(places) > MAX_LISTS:
            raise ValueError(f"the TIFF has more than {MAX_LISTS} lists of EXIF tags")
        places += _check_list(encoded, place)


class _Form:
    """How the lists of tags of a TIFF are written."""

    def __init__(self, encoded: bytes):
        self.encoded, self.order = encoded, "<" if encoded[:2] == b"II" else ">"
        self.is_big = encoded[:4] in (b"II+\0", b"MM\0+")
        forms = ("Q", "Q", "HHQQ", 8) if self.is_big else ("I", "H", "HHII", 4)
        self.start, self.count, self.entry, self.inside = forms

    def read(self, form: str, place: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + form, self.encoded, place)

    def first_list(self) -> int | None:
        """Its place; None if the file is cut off."""
        try:
            return self.read(self.start, 8 if self.is_big else 4)[0]
        except struct.error:
            return None


def _check_list(encoded: bytes, place: int | None) -> list[int]:
    """Checks a list of tags, and returns the places of other lists in it."""
    form, total, others = _Form(encoded), 0, []
    try:
        if place is None:
            return []
        (num_tags,) = form.read(form.count, place)
        place += struct.calcsize("=" + form.count)
        for number in range(min(num_tags, MAX_SEGMENTS + 1)):
            tag, kind, num_values, offset = form.read(form.entry, place)
            place += struct.calcsize("=" + form.entry)
            size = num_values * _BYTES_OF_TYPE.get(kind, 0)
            there = 0 if size <= form.inside else max(0, min(size, len(encoded) - offset))
            _check_tag(tag, kind, there // _BYTES_OF_TYPE.get(kind, 1))
            total += there
            if number == MAX_SEGMENTS or total > len(encoded):
                raise ValueError(f"the {num_tags:,} tags have more content than the file")
            if tag in _TAGS_OF_LISTS:
                others.append(offset)
    except (struct.error, OverflowError):
        pass  # cut off, which the decoder will say
    return others


def _check_tag(tag: int, kind: int, num_values: int) -> None:
    limit = MAX_FRACTIONS if kind in _FRACTIONS else MAX_NUMBERS
    if kind not in _TEXTS and num_values > limit:
        raise ValueError(f"the tag {tag} has {num_values:,} numbers, more than {limit:,}")


# Other formats


def _check_png(encoded: bytes) -> None:
    place = 8
    for _ in range(MAX_CHUNKS):
        if place + 8 > len(encoded):
            return
        if encoded[place + 4 : place + 8] == b"eXIf":
            length = int.from_bytes(encoded[place : place + 4], "big")
            check_tags(encoded[place + 8 : place + 8 + length].removeprefix(_EXIF))
        place += 12 + int.from_bytes(encoded[place : place + 4], "big")
    raise ValueError(f"the PNG has more than {MAX_CHUNKS:,} chunks")


def _check_gif(encoded: bytes) -> None:
    """PIL joins the blocks of a comment one by one, which takes the square of their number."""
    if len(encoded) < 13:
        return
    place = 13 + (3 << (encoded[10] & 7) + 1 if encoded[10] & 0x80 else 0)
    in_extension = False
    for _ in range(MAX_BLOCKS):
        if place >= len(encoded) or (not in_extension and encoded[place] in b",;"):
            return
        if in_extension:
            in_extension = encoded[place] > 0
            place += 1 + encoded[place]
        else:  # other bytes mean nothing
            in_extension = encoded[place] == 0x21
            place += 1 + in_extension
    raise ValueError(f"the GIF has more than {MAX_BLOCKS:,} blocks before its pixels")


def _check_bmp(encoded: bytes) -> None:
    is_run_length_encoded = encoded[30:34] in (b"\1\0\0\0", b"\2\0\0\0")
    if is_run_length_encoded and len(encoded) > MAX_SLOW_BYTES:
        raise ValueError(
            f"a run-length encoded BMP of {len(encoded):,} bytes takes too long: at most {MAX_SLOW_BYTES:,}"
        )


def _check_pnm(encoded: bytes) -> None:
    found = _PNM_HEADER.match(encoded, 0, MAX_SKIPPED_BYTES)
    if found is None:
        if len(encoded) > MAX_SKIPPED_BYTES:
            raise ValueError(f"the header of the PNM is not within its first {MAX_SKIPPED_BYTES:,} bytes")
        return
    kind, numbers = found[1], [int(word) for word in re.sub(rb"#[^\r\n]*", b"", found[2]).split()]
    if kind in b"123" and len(encoded) > MAX_SLOW_BYTES:
        raise ValueError(f"a PNM in plain text of {len(encoded):,} bytes takes too long: at most {MAX_SLOW_BYTES:,}")
    if kind in b"56" and len(numbers) == 3 and numbers[2] not in (255, 65535):
        samples = numbers[0] * numbers[1] * (3 if kind == b"6" else 1)
        if samples > MAX_SLOW_SAMPLES:
            raise ValueError(
                f"a PNM with the largest value {numbers[2]} and {samples:,} values takes too long: at most"
                f" {MAX_SLOW_SAMPLES:,}; store it as PNG or TIFF"
            )


def _check_boxes(encoded: bytes) -> None:
    """Boxes of a JP2 file before its pixels."""
    _check_jpeg_2000_size(encoded)
    place = 0
    for _ in range(MAX_SEGMENTS):
        length, kind = int.from_bytes(encoded[place : place + 4], "big"), encoded[place + 4 : place + 8]
        header = 16 if length == 1 else 8
        if kind in (b"", b"jp2c"):
            _check_codestream(encoded[place + header :][:64])
            return
        length = int.from_bytes(encoded[place + 8 : place + 16], "big") if length == 1 else length
        # The header box is looked into: it holds boxes too.
        place += header if kind == b"jp2h" else max(length, header) if length else len(encoded)
    raise ValueError(f"the JPEG 2000 file has more than {MAX_SEGMENTS:,} boxes before its pixels")


def _check_jpeg_2000_size(encoded: bytes) -> None:
    if len(encoded) > MAX_JPEG_2000_BYTES:
        raise ValueError(f"a JPEG 2000 file of {len(encoded):,} bytes takes too long: at most {MAX_JPEG_2000_BYTES:,}")


def _check_codestream(encoded: bytes) -> None:
    _check_jpeg_2000_size(encoded)
    try:
        width, height, left, top, tile_width, tile_height, tile_left, tile_top = struct.unpack_from(">8I", encoded, 8)
    except struct.error:
        return
    del left, top
    columns = -(-(width - tile_left) // max(tile_width, 1))
    tiles = columns * -(-(height - tile_top) // max(tile_height, 1))
    if tiles > MAX_TILES:
        raise ValueError(f"the JPEG 2000 file has {tiles:,} tiles, more than {MAX_TILES:,}")


_CHECKS: dict[bytes, Callable[[bytes], None]] = {
    b"\xff\xd8": _check_jpeg,
    **dict.fromkeys((b"II*\0", b"II+\0", b"MM\0*", b"MM\0+"), _check_tiff),
    b"\x89PNG\r\n\x1a\n": _check_png,
    b"GIF8": _check_gif,
    b"BM": _check_bmp,
    **{b"P" + bytes((kind,)): _check_pnm for kind in b"0123456fy"},  # a zip file begins with P too
    b"\0\0\0\x0cjP  ": _check_boxes,
    b"\xff\x4f\xff\x51": _check_codestream,
}
