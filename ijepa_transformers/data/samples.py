# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The stored values of images that have more than 8 bits, a sign, or other channels than colours, and how they become
8 bits.

Shape legend: H rows, W columns, S samples of a pixel, C channels (1 or 3).
"""

import functools
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image


MAX_CHANNELS = 16  # of a model
FULL_RANGE = 65535
FAR_BELOW_FULL_RANGE = 2**15  # values that all lie below it leave at least one of 16 bits unused
_PIXELS_AT_A_TIME = 2**20
_DARK = 4  # an image is dark if its values stay below white by this factor
_MANY = 0.05  # of the values
SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by the colour type
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_JPEG_2000_SIZES = b"\xff\x4f\xff\x51"  # begins the marker in which the precision is
# PIL's names of ways to unpack 16 bits. N is the byte order of this machine.
_OTHER_BYTE = {"RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGBA;16B": "RGBA;16L"}
_OTHER_BYTE["RGB;16N"] = "RGB;16B" if sys.byteorder == "little" else "RGB;16L"


@dataclass(frozen=True)
class Samples:
    """Stored values, and what they mean.

    Args:
        values: (H, W, S), integers or truth values.
        mode: "L", "RGB" or "CMYK", then "A" if the last sample is alpha, or "a" if the colours are multiplied by it.
            An empty string if the samples are channels without a meaning.
        white: the value of white, if the file says it. None for 16 bits, which often hold fewer.
        is_inverted: whether 0 is white.
    """

    values: np.ndarray
    mode: str = ""
    white: int | None = None
    is_inverted: bool = False

    @property
    def needs_setting(self) -> bool:
        """Whether `sixteen_bit_max` says what is white."""
        return self.white is None and self.values.dtype.itemsize > 1

    @property
    def alpha(self) -> np.ndarray | None:
        """(H, W), if there is one."""
        return self.values[..., -1] if self.mode[-1:] in ("A", "a") else None

    @property
    def colours(self) -> np.ndarray:
        """The values without alpha."""
        return self.values if self.alpha is None else self.values[..., :-1]

    @functools.cached_property
    def _range(self) -> tuple[int, int]:
        return int(self.colours.min()), int(self.colours.max())

    def largest(self) -> int:
        """The largest value of a colour.

        Raises:
            ValueError: if a value has no known range.
        """
        least, most = self._range
        if least < 0 or most > FULL_RANGE:
            raise ValueError(f"integer pixels from {least} to {most}; only 8 and 16 bits have a known range")
        return most

    def doubt(self, white: int) -> str | None:
        """Why `white` is not that of this image, as a sentence without a subject; None if nothing speaks against it.

        A black image tells nothing.

        Raises:
            ValueError: as `largest`.
        """
        largest = self.largest()
        if 0 < largest < (white + 1) // _DARK:
            return f"has no value above {largest:,}, so it is {'bright' if self.is_inverted else 'dark'}"
        if 255 <= largest < white and not largest & (largest + 1):
            return f"ends at exactly {largest:,}, as images of {largest.bit_length()} bits do"
        share = float((self.colours > white).mean()) if largest > white else 0.0
        return f"has {100 * share:.2g} % of its values above white" if share > _MANY else None

    def decode(self, num_channels: int, sixteen_bit_max: int | None) -> np.ndarray:
        """As uint8 (H, W, num_channels): grey or colours laid on white for 1 or 3 channels, else the samples.

        The white of the file, or `sixteen_bit_max`, becomes 255, and 0 stays 0. A signed 8-bit -128 becomes 0.

        Raises:
            ValueError: if a value has no known range, if nothing says what is white and all values are small, or if
                the image has another number of samples.
        """
        whites = self._whites(sixteen_bit_max)
        height, width, num_samples = self.values.shape
        if num_channels not in (1, 3) or not self.mode:
            if num_samples != num_channels:
                raise ValueError(f"it has {num_samples} channels, but num_channels is {num_channels}")
            return self._eight_bits(*whites)
        result = np.empty((height, width, num_channels), np.uint8)
        rows = max(1, _PIXELS_AT_A_TIME // max(1, width))  # of all rows at once the intermediate values fill gigabytes
        for start in range(0, height, rows):
            array = replace(self, values=self.values[start : start + rows])._eight_bits(*whites)
            colours = _on_white(array, self.mode)
            result[start : start + rows] = _with_channels(colours, self.mode.rstrip("Aa"), num_channels)
        return result

    def _whites(self, sixteen_bit_max: int | None) -> tuple[int, int]:
        """The values of white, and of what is opaque."""
        if self.values.dtype.itemsize == 1:
            return self.white or 255, self.white or 255
        largest = self.largest()
        white = self.white or sixteen_bit_max or full_range(largest)
        only_colours_have_fewer_bits = self.alpha is not None and self.needs_setting and self.alpha.max() > white
        return white, FULL_RANGE if only_colours_have_fewer_bits else white

    def _eight_bits(self, white: int, opaque: int) -> np.ndarray:
        """The values as uint8 (H, W, S)."""
        if self.values.dtype.itemsize == 1:
            array = _from_one_byte(self.values, white)
        else:
            array = _scaled(self.values, white)
            if self.alpha is not None and opaque != white:
                array[..., -1] = _scaled(self.alpha, opaque)
        if self.is_inverted:
            array[..., : self.colours.shape[2]] ^= 255
        return array


def advice(largest: int, sixteen_bit_max: str = "sixteen_bit_max") -> str:
    """What to set for 16-bit values up to `largest`."""
    if not largest:
        return f"16-bit images are black: set {sixteen_bit_max} {FULL_RANGE} if this is meant"
    likely = max(255, 2 ** largest.bit_length() - 1)
    return (
        f"16-bit images use at most {largest:,} of 65,535: set {sixteen_bit_max} {likely}, or another value that is "
        f"white, or {FULL_RANGE} if they are meant to be this dark"
    )


def full_range(largest: int) -> int:
    """FULL_RANGE, if the largest value of an image suits it.

    Raises:
        ValueError: if the image would be nearly black.
    """
    if largest < FAR_BELOW_FULL_RANGE:
        raise ValueError(advice(largest))
    return FULL_RANGE


def _from_one_byte(values: np.ndarray, white: int) -> np.ndarray:
    if values.dtype == np.uint8 and white < 255:
        return _scaled(values, white)
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    return values.view(np.uint8) ^ np.uint8(128) if values.dtype == np.int8 else values.copy()


def _scaled(values: np.ndarray, white: int) -> np.ndarray:
    """Values of which `white` becomes 255, as uint8 of the same shape. Larger ones are white too."""
    table = np.rint(np.arange(white + 1) / (white / 255)).astype(np.uint8)  # faster than to divide each value
    result = np.empty(values.shape, np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // max(1, values[0].size))  # indices of all rows at once would take much memory
    for start in range(0, len(values), rows):
        result[start : start + rows] = table[np.minimum(values[start : start + rows], white)]
    return result


def _on_white(array: np.ndarray, mode: str) -> np.ndarray:
    """Colours (H, W, S) without the alpha that may be behind them."""
    if mode[-1:] not in ("A", "a"):
        return array
    if array[..., -1].min() == 255:
        return array[..., :-1]
    colours, alpha = array[..., :-1].astype(np.uint16), array[..., -1:].astype(np.uint16)
    if mode.endswith("a"):
        return np.minimum(colours + (255 - alpha), 255).astype(np.uint8)
    return (255 - ((255 - colours) * alpha + 127) // 255).astype(np.uint8)


def _with_channels(array: np.ndarray, mode: str, num_channels: int) -> np.ndarray:
    if mode == "L":
        return np.repeat(array, num_channels, axis=2)
    if mode == "RGB" and num_channels == 3:
        return array
    planes = [Image.fromarray(np.ascontiguousarray(array[..., place])) for place in range(array.shape[2])]
    converted = np.asarray(Image.merge(mode, planes).convert("L" if num_channels == 1 else "RGB"))
    return converted.reshape(*array.shape[:2], num_channels)


# Files


def samples_of(image: Image.Image, encoded: bytes | None) -> Samples | None:
    """The stored values of an image that PIL opened, or None if PIL gives them all in 8 bits. TIFFs are read
    elsewhere.

    Raises:
        OSError, SyntaxError, ValueError: if it cannot be decoded to its last pixel.
    """
    if encoded is not None and image.format == "PNG" and encoded[24] == 16:
        return _png_samples(image, encoded)
    if encoded is not None and image.format == "PPM" and image.mode == "RGB":
        return _ppm_samples(image, encoded)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no common range; store 8 or 16 bits")
    if image.format == "JPEG2000" and encoded is not None:
        _check_jpeg_2000(image, encoded)
    if image.mode not in SIXTEEN_BIT_MODES:
        return None
    white = _declared_white(image, encoded)
    image.load()
    return Samples(np.asarray(image)[..., None], "L", white)


def _declared_white(image: Image.Image, encoded: bytes | None) -> int | None:
    """The value of white in the array of a grey image, if its header says that it has fewer than 16 bits."""
    if image.format == "PPM":
        args = image.tile[0][3] if getattr(image, "tile", None) else "I;16B"  # type: ignore[attr-defined]
        return FULL_RANGE if isinstance(args, tuple) and args[-1] != FULL_RANGE else None  # PIL has scaled it
    if image.format == "JPEG2000" and encoded is not None:
        bits = _jpeg_2000_bits(encoded)[0]
        return (2**bits - 1) << (16 - bits) if bits < 16 else None  # PIL has shifted it
    return None


def _jpeg_2000_bits(encoded: bytes) -> tuple[int, ...]:
    """The bits of each component; 8 if the header is damaged, which the decoder will say."""
    start = encoded.find(_JPEG_2000_SIZES)
    components = encoded[start + 40 : start + 42] if start >= 0 else b""
    sizes = encoded[start + 42 : start + 42 + 3 * int.from_bytes(components, "big") : 3]
    return tuple((size & 127) + 1 for size in sizes) or (8,)


def _check_jpeg_2000(image: Image.Image, encoded: bytes) -> None:
    """Raises ValueError for bits that PIL reads wrongly: it turns white into black, or into grey."""
    bits = _jpeg_2000_bits(encoded)
    if set(bits) != {8} and image.mode not in SIXTEEN_BIT_MODES:
        which = "grey" if len(bits) == 1 else "colours"
        raise ValueError(f"{which} of {max(bits)} bits in JPEG 2000 are not read; store PNG or TIFF")


def _png_samples(image: Image.Image, encoded: bytes) -> Samples:
    """16 bits of a PNG, of which PIL's image keeps only the upper 8 unless it is grey."""
    channels = _PNG_CHANNELS[encoded[25]]
    transparent = image.info.get("transparency")
    if channels == 1:
        image.load()
        values = np.asarray(image)[..., None]
    elif channels == 2:
        stored = unpacked(encoded, "PNG", "RGBA")  # four bytes of a pixel
        values = stored[..., 0::2].astype(np.uint16) * 256 + stored[..., 1::2]
    else:
        values = both_bytes(encoded, "PNG", f"{_MODES[channels]};16B")
    if channels in (1, 3) and transparent is not None:
        is_opaque = (values != np.reshape(transparent, (1, 1, -1))).any(axis=2, keepdims=True)
        values = np.concatenate([values, is_opaque * np.uint16(FULL_RANGE)], axis=2)
        channels += 1
    return Samples(values, _MODES[channels])


def both_bytes(encoded: bytes, image_format: str, upper: str) -> np.ndarray:
    """16-bit values (H, W, S), from two passes of PIL, which unpack the upper and the lower bytes."""
    image = _unpacked(encoded, image_format, upper)
    values = np.empty((image.height, image.width, len(image.getbands())), np.uint16)
    for rows, part in _rows_of(image):
        values[rows] = part
        values[rows] *= 256
    del image  # both at once would take gigabytes
    for rows, part in _rows_of(_unpacked(encoded, image_format, _OTHER_BYTE[upper])):
        values[rows] += part
    return values


def unpacked(encoded: bytes, image_format: str, unpacking: str) -> np.ndarray:
    """uint8 (H, W, S), with another of PIL's ways to unpack stored pixels than the usual one."""
    return np.asarray(_unpacked(encoded, image_format, unpacking))


def _unpacked(encoded: bytes, image_format: str, unpacking: str) -> Image.Image:
    image = Image.open(io.BytesIO(encoded), formats=[image_format])
    image.tile = [_unpacked_tile(tile, unpacking) for tile in image.tile]  # type: ignore[attr-defined, misc]
    image.load()
    return image


def _rows_of(image: Image.Image) -> Iterator[tuple[slice, np.ndarray]]:
    """Some rows (n, W, S) at a time. An array of all of them would be a copy, and PIL needs another one to make it."""
    step = max(1, _PIXELS_AT_A_TIME // image.width)
    for start in range(0, image.height, step):
        rows = slice(start, min(start + step, image.height))
        yield rows, np.asarray(image.crop((0, rows.start, image.width, rows.stop)))


def _unpacked_tile(tile: tuple, unpacking: str) -> tuple:
    args = (unpacking, *tile[3][1:]) if isinstance(tile[3], tuple) else unpacking
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)


def _ppm_samples(image: Image.Image, encoded: bytes) -> Samples | None:
    decoder, _, offset, args = image.tile[0]  # type: ignore[attr-defined]
    if not isinstance(args, tuple) or args[-1] != FULL_RANGE:
        return None  # PIL scales by the value of white that the header says
    if decoder != "ppm":
        raise ValueError("a PPM of 16-bit colours as text is not read; store it as PNG")
    width, height = image.size
    num_values = 3 * width * height
    if len(encoded) - offset < 2 * num_values:
        raise ValueError("the PPM is cut off")
    return Samples(np.frombuffer(encoded, ">u2", num_values, offset).reshape(height, width, 3), "RGB")
