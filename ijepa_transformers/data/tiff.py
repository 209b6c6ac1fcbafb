# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Reads the tags of a TIFF before its pixels: bits, bands, alpha and pages decide which library reads it, if any.

PIL reads few layouts of TIFF, and some of them wrongly: it drops bands, takes infrared for alpha, ignores the sign and
gives the upper 8 of 16 bits. `tifffile` (the extra `multiband`) reads the others.

Shape legend: H rows, W columns, S samples (bands) of a pixel.
"""

import io
import logging
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .samples import MAX_CHANNELS, Samples, both_bytes


try:
    import tifffile
except ImportError:  # an extra; TIFFs that PIL cannot read are then refused with a word about it
    tifffile = None  # type: ignore[assignment]
logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # a broken file is reported once, by its name

INSTALL = "pip install 'ijepa-transformers[multiband]'"
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK = 0, 1, 2, 3, 5
_COLOUR_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, 4: 1, CMYK: 4, 6: 3, 8: 3}
_UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 2, 3, 4
_PREMULTIPLIED, _ALPHA = 1, 2
_FORMS = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of the integers that a tag may hold
_MAX_VALUES = 1024  # of a tag that is read here
_MAX_PAGES = 10_000


@dataclass(frozen=True)
class TiffHeader:
    """What the first directory says, and the number of pages. Reduced copies and masks of a page are not pages.

    Args:
        width, height: in pixels.
        bits: of each sample.
        samples: S.
        sample_format: 1 unsigned, 2 signed, 3 floating-point.
        photometric: 0 WhiteIsZero, 1 BlackIsZero, 2 RGB, 3 palette, 5 CMYK, ...
        extra_samples: what the tag says of samples beyond the colours: 1 premultiplied alpha, 2 alpha, 0 unspecified.
        is_separate: each band is stored on its own.
        orientation: as in EXIF.
        pages: the places of the pages among all directories.
    """

    width: int
    height: int
    bits: int
    samples: int
    sample_format: int
    photometric: int
    extra_samples: tuple[int, ...]
    is_separate: bool
    orientation: int
    is_little_endian: bool
    pages: tuple[int, ...]

    @property
    def alpha(self) -> str:
        """PIL's letter for the alpha of the image: "A", "a" if it is premultiplied, or "" without alpha."""
        is_alpha = self.samples == _COLOUR_SAMPLES.get(self.photometric, 0) + 1 and len(self.extra_samples) == 1
        return {_PREMULTIPLIED: "a", _ALPHA: "A"}.get(self.extra_samples[0], "") if is_alpha else ""

    @property
    def surplus(self) -> int:
        """The bands that are neither colour nor alpha."""
        return max(0, self.samples - _COLOUR_SAMPLES.get(self.photometric, self.samples) - len(self.alpha))

    @property
    def num_samples(self) -> int:
        """Samples of one pixel in all pages."""
        return self.samples * len(self.pages)

    def check(self, num_channels: int) -> None:
        """Raises ValueError if the image cannot be read as one of `num_channels` channels."""
        if self.sample_format == _FLOAT:
            raise ValueError("floating-point pixels have no common range; store 8 or 16 bits")
        if self.sample_format not in (_UNSIGNED, _SIGNED):
            raise ValueError(f"pixels of SampleFormat {self.sample_format} are not read; store 8 or 16 bits")
        if num_channels in (1, 3):
            self._check_colours(num_channels)
        elif self.num_samples != num_channels or self.photometric in (PALETTE, 6):
            bands = f"{self.num_samples} bands" if len(self.pages) == 1 else f"{self.samples} bands in each of its"
            pages = "" if len(self.pages) == 1 else f" {len(self.pages)} pages"
            raise ValueError(f"it has {bands}{pages}, but num_channels is {num_channels}")

    def _check_colours(self, num_channels: int) -> None:
        if len(self.pages) > 1:
            raise ValueError(
                f"it has {len(self.pages)} pages, and one file is one image: split it"
                + self._advice("if the pages are the channels of one image")
            )
        if self.surplus:
            raise ValueError(
                f"it has {self.samples} bands, {self.surplus} of them neither colour nor alpha, but num_channels is "
                f"{num_channels}: store fewer" + self._advice("to read them all")
            )
        if self.photometric not in _COLOUR_SAMPLES:
            raise ValueError(f"PhotometricInterpretation {self.photometric} is not read; store grey or RGB")

    def _advice(self, purpose: str) -> str:
        """How to read all samples as channels, if a model can have so many. 1 and 3 channels are grey and RGB."""
        if self.num_samples == _COLOUR_SAMPLES[RGB]:
            return ", or store them as RGB (PhotometricInterpretation 2)"
        return f", or set num_channels {self.num_samples} {purpose}" if self.num_samples <= MAX_CHANNELS else ""

    @property
    def is_for_pil(self) -> bool:
        """Whether PIL gives all values of the colours as they are stored. `check` was called for 1 or 3 channels."""
        if self.bits > 8:
            return self._is_deep_grey_for_pil
        if self.sample_format == _SIGNED:
            return self.bits == 8 and self.samples == 1 and self.photometric == BLACK_IS_ZERO
        return not self.is_separate or self.samples in (1, 3)

    @property
    def _is_deep_grey_for_pil(self) -> bool:
        if self.samples > 1 or self.is_separate:
            return False
        if self.photometric == WHITE_IS_ZERO:
            return self.bits == 16 and self.sample_format == _UNSIGNED and self.is_little_endian
        is_little = self.is_little_endian or (self.bits == 32 and self.sample_format == _SIGNED)
        return self.photometric == BLACK_IS_ZERO and (self.bits == 16 or (self.bits in (12, 32) and is_little))

    @property
    def is_for_pil_twice(self) -> bool:
        """Whether PIL gives the upper and the lower 8 bits of 16-bit RGB."""
        is_plain = self.sample_format == _UNSIGNED and not self.is_separate
        return is_plain and self.bits == 16 and self.samples == 3 and self.photometric == RGB

    @property
    def declared_max(self) -> int | None:
        """The value of white that the header says: None for 16 bits and more, which may hold fewer."""
        return 2**self.bits - 1 if self.bits < 16 else None


class _Directories:
    """Walks through the directories of a TIFF or BigTIFF."""

    def __init__(self, encoded: bytes):
        self.encoded = encoded
        self.order = {b"II": "<", b"MM": ">"}[encoded[:2]]
        self.is_big = self._read("H", 2) == 43
        self.count, self.offset, self.entry = ("Q", "Q", 20) if self.is_big else ("H", "I", 12)

    def _read(self, form: str, place: int) -> int:
        return self._read_many(form, 1, place)[0]

    def _read_many(self, form: str, count: int, place: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(f"{self.order}{count}{form}", self.encoded, place)
        except struct.error:
            raise ValueError(f"the TIFF is cut off: byte {place:,} is missing") from None

    def tags(self) -> list[dict[int, tuple[int, ...]]]:
        """The integer tags of every directory that are needed here."""
        place = self._read(self.offset, 8 if self.is_big else 4)
        directories: list[dict[int, tuple[int, ...]]] = []
        seen: set[int] = set()
        while place and place not in seen:
            seen.add(place)
            if len(seen) > _MAX_PAGES:
                raise ValueError(f"it has more than {_MAX_PAGES:,} pages")
            entries = self._read(self.count, place)
            first = place + struct.calcsize(f"={self.count}")
            wanted = _WANTED if not directories else _WANTED_OF_OTHERS
            directories.append(self._entries(first, min(entries, len(self.encoded)), wanted))
            place = self._read(self.offset, first + entries * self.entry)
        return directories

    def _entries(self, first: int, count: int, wanted: frozenset[int]) -> dict[int, tuple[int, ...]]:
        found = {}
        for place in range(first, first + count * self.entry, self.entry):
            tag, kind = self._read_many("H", 2, place)
            if tag in wanted and kind in _FORMS:
                found[tag] = self._values(kind, place)
        return found

    def _values(self, kind: int, place: int) -> tuple[int, ...]:
        count = self._read(self.offset, place + 4)
        if not 0 < count <= _MAX_VALUES:
            raise ValueError(f"a tag of the TIFF has {count:,} values")
        inline = place + 4 + struct.calcsize(f"={self.offset}")
        fits = count * struct.calcsize(f"={_FORMS[kind]}") <= struct.calcsize(f"={self.offset}")
        return self._read_many(_FORMS[kind], count, inline if fits else self._read(self.offset, inline))


_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION = 254, 255, 256, 257, 258, 262, 274
_SAMPLES, _PLANAR, _EXTRA, _FORMAT = 277, 284, 338, 339
_WANTED_OF_OTHERS = frozenset((_SUBFILE, _OLD_SUBFILE))
_WANTED = _WANTED_OF_OTHERS | {_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES, _PLANAR, _EXTRA, _FORMAT}
_REDUCED_OR_MASK = 1 | 4  # bits of _SUBFILE
_OLD_REDUCED = 2


def is_tiff(encoded: bytes) -> bool:
    """Whether the file begins like a TIFF or a BigTIFF."""
    return encoded[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_tiff_header(encoded: bytes) -> TiffHeader:
    """The header of a file of which `is_tiff` is true. No pixel is read.

    Raises:
        ValueError: if a directory is cut off, or if its samples differ in kind.
    """
    directories = _Directories(encoded)
    everywhere = directories.tags()
    if not everywhere:
        raise ValueError("the TIFF has no image")
    tags = everywhere[0]

    def one(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    for tag, name in ((_BITS, "BitsPerSample"), (_FORMAT, "SampleFormat")):
        if len(set(tags.get(tag, ()))) > 1:
            raise ValueError(f"its bands differ: {name} is {', '.join(map(str, tags[tag]))}")
    if min(one(_WIDTH, 0), one(_HEIGHT, 0)) < 1:
        raise ValueError("the TIFF says no width or no height")
    return TiffHeader(
        width=one(_WIDTH, 0),
        height=one(_HEIGHT, 0),
        bits=one(_BITS, 1),
        samples=one(_SAMPLES, 1),
        sample_format=_UNSIGNED if one(_FORMAT, _UNSIGNED) == _UNDEFINED else one(_FORMAT, _UNSIGNED),
        photometric=one(_PHOTOMETRIC, BLACK_IS_ZERO),
        extra_samples=tags.get(_EXTRA, ()),
        is_separate=one(_PLANAR, 1) == 2,
        orientation=one(_ORIENTATION, 1),
        is_little_endian=directories.order == "<",
        pages=tuple(place for place, page in enumerate(everywhere) if place == 0 or not _is_copy(page)),
    )


def _is_copy(tags: dict[int, tuple[int, ...]]) -> bool:
    """Whether a directory is a smaller copy or a mask of another one."""
    is_old_copy = tags.get(_OLD_SUBFILE, (0,))[0] == _OLD_REDUCED
    return bool(tags.get(_SUBFILE, (0,))[0] & _REDUCED_OR_MASK) or is_old_copy


def tiff_samples(
    encoded: bytes, header: TiffHeader, image: Image.Image | None, num_channels: int
) -> tuple[Samples | None, bool]:
    """The stored values, and whether they are upright already; None leaves the file to PIL, which gives 8 bits.

    Args:
        encoded, header: the file.
        image: opened by PIL but not loaded, or None if PIL cannot open it.
        num_channels: 1 or 3 for grey or colours, another number for bands.

    Raises:
        ValueError: if the image has other channels, a kind of pixels that is not read, or needs tifffile.
    """
    header.check(num_channels)
    is_inverted = header.photometric == WHITE_IS_ZERO
    if num_channels in (1, 3) and image is not None:
        if header.is_for_pil and header.bits <= 8 and header.sample_format == _UNSIGNED:
            return None, True
        if header.is_for_pil:
            image.load()
            values = np.asarray(image)[..., None]
            return Samples(_with_sign(values, header), "L", header.declared_max, is_inverted), True
        if header.is_for_pil_twice:
            upper = image.tile[0][3][0]  # type: ignore[attr-defined]
            return Samples(both_bytes(encoded, "TIFF", upper), "RGB"), True
    mode = _MODES.get(header.photometric, "") + header.alpha if num_channels in (1, 3) else ""
    if num_channels in (1, 3) and header.photometric not in _MODES:
        raise ValueError(f"PhotometricInterpretation {header.photometric} of {header.bits} bits is not read")
    return Samples(read_with_tifffile(encoded, header), mode, header.declared_max, is_inverted), False


def _with_sign(values: np.ndarray, header: TiffHeader) -> np.ndarray:
    """The values of a grey image of PIL, which takes 8 bits for unsigned and 32 bits for signed."""
    if header.bits == 8:
        return values.view(np.int8)
    return values.view(np.uint32) if header.bits == 32 and header.sample_format == _UNSIGNED else values


_MODES = {WHITE_IS_ZERO: "L", BLACK_IS_ZERO: "L", RGB: "RGB", CMYK: "CMYK"}


def read_with_tifffile(encoded: bytes, header: TiffHeader) -> np.ndarray:
    """The stored values (H, W, S), the pages one after the other.

    Raises:
        ValueError: if tifffile is missing, or cannot read the file.
    """
    if tifffile is None:
        raise ValueError(
            f"this kind of TIFF ({header.num_samples} bands of {header.bits} bits) is read by tifffile: {INSTALL}"
        )
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        pages = [_page(file.pages[place]) for place in header.pages]
    if len({page.shape for page in pages}) > 1 or len({page.dtype for page in pages}) > 1:
        raise ValueError(f"its {len(pages)} pages differ in size or kind")
    return pages[0] if len(pages) == 1 else np.concatenate(pages, axis=2)


def _page(page: Any) -> np.ndarray:
    """The values of a page of tifffile, whose bands are its first axis if they are stored separately: (H, W, S)."""
    planes = page.asarray(squeeze=False)  # (separate bands, depth, H, W, bands of a pixel)
    if planes.ndim != 5 or planes.shape[1] != 1:
        raise ValueError(f"it is no plane of pixels but has the shape {planes.shape}")
    return planes[:, 0].transpose(1, 2, 0, 3).reshape(*planes.shape[2:4], -1)
