# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decodes image files to uint8 arrays, and refuses what is damaged or too large.

Shape legend: H rows, W columns, C channels (1 or 3). A decoded image is a uint8 array (H, W, C) in 0..255.
"""

import io
import logging
import os
import stat
import urllib.parse
import warnings
from contextlib import contextmanager

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError


try:
    import simplejpeg
except ImportError:  # slower, with the same pixels
    simplejpeg = None
# What a file may be, whatever it is called. PIL knows more, some of it by starting other programs (EPS: Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
# What an image may at most be, so that memory is bounded whatever a file holds (docs/bad_images.md has the figures).
MAX_IMAGE_PIXELS = 2**27  # 134 million: above the largest common cameras (102), below where PIL itself refuses (179)
MAX_ASPECT_RATIO = 256  # longer over shorter side: evaluation resizes the shorter side, and the longer one follows
MAX_FILE_BYTES = 2**29  # encoded
_EXIF_ORIENTATION = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
# Whether to turn the rows upside down, to mirror the columns, and then to exchange rows and columns.
_UPRIGHT_BY_ORIENTATION = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_JPEG_FORMATS = ("JPEG", "MPO")  # PIL's name for a JPEG that holds further images: phones write them
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PIXELS_AT_A_TIME = 2**20
FILE_URI = "file://"
# A broken file is told of once, by its name, in a BadImageError, and not by PIL as well, without a name.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


# Bad images
class BadImageError(ValueError):
    """An image that cannot be read, or too many of them. The message holds the file's name and the reason."""

    def __init__(self, name, reason=None):
        # One argument must be enough: a DataLoader re-raises a worker's error as type(error)(message).
        super().__init__(name if reason is None else f"{name}: {reason}")
        self.reason = reason


# Decoding
def jpeg_decoder() -> str:
    """What decodes JPEG files here, with its version: simplejpeg where it is installed, else PIL."""
    return f"simplejpeg {simplejpeg.__version__}" if simplejpeg else f"PIL {PIL.__version__}"


def decode_image(value, num_channels: int = 3, name: str | None = None) -> np.ndarray:
    """Decodes an image to uint8 (H, W, C), upright as its EXIF orientation says.

    Transparent pixels are laid on white, 16-bit values are scaled (65535 becomes 255), of an animation the first frame
    is taken, palettes and CMYK become RGB, and one channel is the luma of ITU-R 601. Colour profiles are ignored, and
    so is EXIF data that cannot be read. The content decides the format, one of IMAGE_FORMATS, not the file's name.

    Args:
        value: `{"bytes": ..., "path": ...}` as in a column `Image(decode=False)`, or a PIL image.
        num_channels: 1 or 3.
        name: what messages call the image; its path by default.

    Raises:
        BadImageError: if the image cannot be decoded to its last pixel, or is beyond MAX_IMAGE_PIXELS,
            MAX_ASPECT_RATIO or MAX_FILE_BYTES, which is known before anything is decoded. A JPEG that is damaged
            before its end marker does decode: what is missing is grey, and libjpeg does not tell.
    """
    return np.require(OpenedImage(value, name).decode(num_channels), requirements=["C_CONTIGUOUS", "WRITEABLE"])


class OpenedImage:
    """An image of which only the header was read: it is within the limits, but not decoded yet.

    Args:
        value, name: as in `decode_image`.

    Raises:
        BadImageError: as `decode_image`.
    """

    def __init__(self, value, name: str | None = None):
        self.name = name or value_name(value) or "an image without a name"
        with _faults_as_bad_image(self.name):
            self._encoded = None if isinstance(value, Image.Image) else encoded_bytes(value)
            self._image = value if self._encoded is None else open_image(self._encoded)
            self._size = self._image.size  # decoding may reduce it
            _check_size(*self._size)
            _check_tiles(getattr(self._image, "tag_v2", {}))

    @property
    def reducible(self) -> bool:
        """Whether `decode` can make the image smaller."""
        return self._encoded is not None and self._image.format in _JPEG_FORMATS

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the upright image; for JPEG files, whose orientation is known before they are decoded."""
        width, height = self._size
        return (width, height) if _turns(self._image)[2] else (height, width)

    def reduced_box(self, box: tuple[int, int, int, int], reduction: int) -> tuple[float, float, float, float]:
        """Where a box of the upright image lies in what `decode` makes of it."""
        upside_down, mirrored, exchanged = _turns(self._image)
        turned_round = (mirrored, upside_down) if exchanged else (upside_down, mirrored)
        # Sides are rounded up at their end as stored, which is the beginning of a side that is turned round.
        top, left = (
            start + (-side % reduction if turned else 0)
            for start, side, turned in zip(box[:2], self.height_and_width, turned_round, strict=True)
        )
        return top / reduction, left / reduction, box[2] / reduction, box[3] / reduction

    def decode(self, num_channels: int, reduction: int = 1) -> np.ndarray:
        """Upright uint8 (H, W, C), which may be read-only and a view; once only.

        Args:
            num_channels: 1 or 3.
            reduction: 2, 4 or 8 divides a `reducible` image's sides, rounded up: libjpeg then decodes fewer of the
                frequencies, which takes less time.

        Raises:
            BadImageError: the image cannot be decoded to its last pixel.
        """
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {num_channels!r}")
        with _faults_as_bad_image(self.name):
            array = _decode_jpeg(self._encoded, self._image, num_channels, reduction) if self.reducible else None
            if array is None:
                array = _decode_with_pil(self._image, num_channels, reduction)
            return _upright(array, *_turns(self._image))


@contextmanager
def _faults_as_bad_image(name: str):
    try:
        yield
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error and more
        raise BadImageError(name, _reason(error)) from error


def _decode_jpeg(encoded: bytes, image: Image.Image, num_channels: int, reduction: int) -> np.ndarray | None:
    """The pixels (H, W, C) as PIL would decode them, by simplejpeg, which does so faster; None to leave them to PIL.

    Both are libjpeg-turbo. But simplejpeg, being strict, gives up where libjpeg only warns: at a file that is cut off,
    which PIL refuses too, and at one that is damaged, which PIL may accept. So what is refused, and why, is for PIL.
    """
    if simplejpeg is None or image.mode not in ("L", "RGB"):
        return None
    colorspace = "GRAY" if image.mode == "L" and num_channels == 1 else "RGB"
    width, height = image.size
    smallest = {"min_width": -(-width // reduction), "min_height": -(-height // reduction)} if reduction > 1 else {}
    try:
        if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
            return None  # the limits were checked for the size that PIL has read
        array = simplejpeg.decode_jpeg(encoded, colorspace, min_factor=reduction, **smallest)  # (H, W, C)
    except ValueError:
        return None
    is_luma = num_channels == 1 and image.mode == "RGB"
    return to_array(Image.fromarray(array).convert("L")) if is_luma else array


def _decode_with_pil(image: Image.Image, num_channels: int, reduction: int) -> np.ndarray:
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    image.load()
    array = np.asarray(_with_channels(image, num_channels))  # read-only, which saves a copy
    return array if array.ndim == 3 else array[:, :, None]


def open_image(encoded: bytes) -> Image.Image:
    """Reads the header only."""
    return Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def _check_tiles(tags) -> None:
    """libtiff takes memory for a whole tile before it reads one, however small the image in its corner is."""
    width, height = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"tiles of {width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")


def read_image(value, index: int, num_channels: int) -> np.ndarray:
    return OpenedImage(value, name_in_messages(value, index)).decode(num_channels)


def name_in_messages(value, index: int) -> str:
    return value_name(value) or f"image {index}"


def value_name(value) -> str | None:
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def encoded_bytes(value: dict | None) -> bytes:
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("there is neither a path nor bytes")
    encoded = _read_file(value["path"]) if value.get("bytes") is None else value["bytes"]
    if not encoded:
        raise ValueError("the file is empty")
    _check_file_size(len(encoded))
    return encoded


def _read_file(path: str) -> bytes:
    """Looks before it opens: opening a pipe would wait for a writer that never comes."""
    if path.startswith(FILE_URI):
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix(FILE_URI)))
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is no regular file")
    _check_file_size(status.st_size)
    with open(path, "rb") as file:
        # Python takes memory for what it is asked to read. A file of /proc says that it has no size.
        return file.read((status.st_size or MAX_FILE_BYTES) + 1)


def _check_file_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"the file has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message is the address of a buffer
        return "this is no image that PIL knows"
    return f"{type(error).__name__}: {error}"


def _turns(image: Image.Image) -> tuple[bool, bool, bool]:
    """What makes the image upright, as in _UPRIGHT_BY_ORIENTATION."""
    as_stored = (False, False, False)
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # the pixels are there, only what was said about them is broken
        return as_stored
    return _UPRIGHT_BY_ORIENTATION.get(orientation, as_stored) if isinstance(orientation, int) else as_stored


def _upright(array: np.ndarray, upside_down: bool, mirrored: bool, exchanged: bool) -> np.ndarray:
    """A view of the array."""
    array = array[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return array.swapaxes(0, 1) if exchanged else array


def _with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _eight_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only mode without a way to L
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL's own convert("L") cuts 16-bit values at 255, which makes nearly all of them white."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"integer pixels from {pixels.min()} to {pixels.max()}; only 8 and 16 bits have a known range"
        )
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // pixels.shape[1])  # or floats would take eight times the memory of the file
    for start in range(0, len(pixels), rows):
        result[start : start + rows] = np.rint(pixels[start : start + rows] / 257)
    return Image.fromarray(result)


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    array = np.array(image) if isinstance(image, Image.Image) else image
    return array if array.ndim == 3 else array[:, :, None]  # (H, W, C)
