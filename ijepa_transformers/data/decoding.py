# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decodes image files to uint8 arrays, and refuses files that are damaged or too large.

Shape legend: H rows, W columns, C channels (1 or 3). A decoded image is a uint8 array (H, W, C) in 0..255.
"""

import io
import logging
import os
import stat
import urllib.parse
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias, TypedDict

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError


try:
    import simplejpeg
except ImportError:  # PIL is slower and gives the same pixels
    simplejpeg = None


class StoredImage(TypedDict):
    """A row of a column `Image(decode=False)` of `datasets`: the bytes of a file, or where the file is."""

    bytes: bytes | None
    path: str | None


ImageValue: TypeAlias = StoredImage | Image.Image | None  # None is a row without an image

# A file's content decides its format, not its name. PIL knows more formats; for some it starts other programs (for EPS
# Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
# Limits that bound the memory for any file (docs/bad_images.md has the figures).
MAX_IMAGE_PIXELS = 2**27  # 134 million: more than the largest common cameras (102), less than PIL's own limit (179)
MAX_ASPECT_RATIO = 256  # longer over shorter side. Evaluation resizes the shorter side; the longer one grows with it.
MAX_FILE_BYTES = 2**29  # of the encoded file
_EXIF_ORIENTATION = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
# By EXIF orientation: whether to reverse the rows, to reverse the columns, and then to swap rows and columns.
_STEPS_BY_ORIENTATION = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO is PIL's name for a JPEG that holds several images; phones write such files
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PIXELS_AT_A_TIME = 2**20
FILE_URI = "file://"
# A broken file is reported once, by its name, in a BadImageError. PIL's own warnings do not name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


class BadImageError(ValueError):
    """An image that cannot be read, or too many of them. The message holds the file's name and the reason."""

    def __init__(self, name: str, reason: str = ""):
        # One argument must be enough: a DataLoader re-raises a worker's error as type(error)(message).
        super().__init__(f"{name}: {reason}" if reason else name)
        self.reason = reason


def jpeg_decoder() -> str:
    """The library that decodes JPEG files, with its version: simplejpeg if it is installed, else PIL."""
    return f"simplejpeg {simplejpeg.__version__}" if simplejpeg else f"PIL {PIL.__version__}"


def decode_image(value: ImageValue, num_channels: int = 3, name: str | None = None) -> np.ndarray:
    """Decodes an image to uint8 (H, W, C), turned upright by its EXIF orientation.

    Transparent images are laid on white. 16-bit values are scaled, so that 65535 becomes 255. An animation gives its
    first frame. Palettes and CMYK become RGB. One channel is the luma of ITU-R 601. Colour profiles are ignored, and
    so is EXIF data that cannot be read. The content decides the format, one of IMAGE_FORMATS, not the file's name.

    Args:
        value: `{"bytes": ..., "path": ...}` as in a column `Image(decode=False)`, or a PIL image.
        num_channels: 1 or 3.
        name: of the image in messages; its path by default.

    Raises:
        BadImageError: if the image cannot be decoded to its last pixel, or exceeds MAX_IMAGE_PIXELS, MAX_ASPECT_RATIO
            or MAX_FILE_BYTES. The limits are checked before anything is decoded. A JPEG that is damaged before its end
            marker is decoded without an error: libjpeg fills the missing part with grey.
        ValueError: for another number of channels.
    """
    return np.require(OpenedImage(value, name).decode(num_channels), requirements=["C_CONTIGUOUS", "WRITEABLE"])


class OpenedImage:
    """An image whose header was read: it is within the limits, but not decoded yet.

    Args:
        value, name: as in `decode_image`.

    Raises:
        BadImageError: as `decode_image`.
    """

    def __init__(self, value: ImageValue, name: str | None = None):
        self.name = name or value_name(value) or "an image without a name"
        with _errors_as_bad_image(self.name):
            self._encoded: bytes | None = None
            if isinstance(value, Image.Image):
                self._image = value
            else:
                self._encoded = encoded_bytes(value)
                self._image = open_image(self._encoded)
            self._size = self._image.size  # decoding may reduce it
            _check_size(*self._size)
            _check_tiles(getattr(self._image, "tag_v2", {}))

    @property
    def reducible(self) -> bool:
        """Whether `decode` can make the image smaller."""
        return self._encoded is not None and self._image.format in _JPEG_FORMATS

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the upright image. Only for JPEG files, whose orientation is known before they are decoded."""
        width, height = self._size
        return (width, height) if _upright_steps(self._image)[2] else (height, width)

    def reduced_box(self, box: tuple[int, int, int, int], reduction: int) -> tuple[float, float, float, float]:
        """The box (top, left, height, width) of the upright image, in pixels of `decode(..., reduction)`."""
        reverse_rows, reverse_columns, swap = _upright_steps(self._image)
        is_reversed = (reverse_columns, reverse_rows) if swap else (reverse_rows, reverse_columns)
        # libjpeg rounds a side up at its stored end. On a reversed side that end is the beginning.
        top, left = (
            start + (-side % reduction if reverse else 0)
            for start, side, reverse in zip(box[:2], self.height_and_width, is_reversed, strict=True)
        )
        return top / reduction, left / reduction, box[2] / reduction, box[3] / reduction

    def decode(self, num_channels: int, reduction: int = 1) -> np.ndarray:
        """Upright uint8 (H, W, C). The array may be read-only, and a view. Call this once only.

        Args:
            num_channels: 1 or 3.
            reduction: 2, 4 or 8 divides the sides of a `reducible` image, rounded up. libjpeg then decodes fewer
                frequencies, which takes less time.

        Raises:
            BadImageError: if the image cannot be decoded to its last pixel.
            ValueError: for another number of channels.
        """
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {num_channels!r}")
        with _errors_as_bad_image(self.name):
            array = None
            if self._encoded is not None and self.reducible:
                array = _decode_jpeg(self._encoded, self._image, num_channels, reduction)
            if array is None:
                array = _decode_with_pil(self._image, num_channels, reduction)
            return _upright(array, *_upright_steps(self._image))


@contextmanager
def _errors_as_bad_image(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error and more
        raise BadImageError(name, _reason(error)) from error


def _decode_jpeg(encoded: bytes, image: Image.Image, num_channels: int, reduction: int) -> np.ndarray | None:
    """Decodes with simplejpeg, to the pixels (H, W, C) that PIL would give, but faster; None leaves the file to PIL.

    Both use libjpeg-turbo. simplejpeg is strict: it raises an error where libjpeg only warns. PIL refuses a file that
    is cut off too, but it may accept a damaged one. So PIL alone decides what is refused, and gives the reason.
    """
    if simplejpeg is None or image.mode not in ("L", "RGB"):
        return None
    colorspace = "GRAY" if image.mode == "L" and num_channels == 1 else "RGB"
    width, height = image.size
    smallest = {"min_width": -(-width // reduction), "min_height": -(-height // reduction)} if reduction > 1 else {}
    try:
        if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
            return None  # the limits were checked for the size that PIL found
        array = simplejpeg.decode_jpeg(encoded, colorspace, min_factor=reduction, **smallest)  # (H, W, C)
    except ValueError:
        return None
    is_luma = num_channels == 1 and image.mode == "RGB"
    return to_array(Image.fromarray(array).convert("L")) if is_luma else array


def _decode_with_pil(image: Image.Image, num_channels: int, reduction: int) -> np.ndarray:
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    image.load()
    return _three_axes(np.asarray(_with_channels(image, num_channels)))  # read-only, which saves a copy


def open_image(encoded: bytes) -> Image.Image:
    """The image of a file, of which only the header has been read."""
    return Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def _check_tiles(tags: Mapping[int, int]) -> None:
    """Limits the tiles of a TIFF: libtiff allocates a whole tile, even if the image fills only a corner of it."""
    width, height = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"tiles of {width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")


def read_image(value: ImageValue, index: int, num_channels: int) -> np.ndarray:
    """Image `index` of a data set, uint8 (H, W, C), which may be read-only. Raises as `decode_image`."""
    return OpenedImage(value, name_in_messages(value, index)).decode(num_channels)


def name_in_messages(value: ImageValue, index: int) -> str:
    """The path of an image, or its number if it has none."""
    return value_name(value) or f"image {index}"


def value_name(value: ImageValue) -> str | None:
    """The path of an image, if it has one."""
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def encoded_bytes(value: StoredImage | None) -> bytes:
    """The content of an image file.

    Raises:
        ValueError: if there is none, or it is empty or too large.
        OSError: if the file cannot be read.
    """
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("there is neither a path nor bytes")
    encoded = value.get("bytes")
    if encoded is None:
        encoded = _read_file(value["path"] or "")
    if not encoded:
        raise ValueError("the file is empty")
    _check_file_size(len(encoded))
    return encoded


def _read_file(path: str) -> bytes:
    """Checks the kind of file before it opens it, because opening a pipe waits for a writer that may never come."""
    if path.startswith(FILE_URI):
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix(FILE_URI)))
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is not a regular file")
    _check_file_size(status.st_size)
    with open(path, "rb") as file:
        # Python allocates as many bytes as it is asked to read. Files of /proc report a size of 0.
        return file.read((status.st_size or MAX_FILE_BYTES) + 1)


def _check_file_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"the file has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message shows the address of a buffer
        return "this is not an image that PIL knows"
    return f"{type(error).__name__}: {error}"


def _upright_steps(image: Image.Image) -> tuple[bool, bool, bool]:
    """The steps that make the image upright, as in _STEPS_BY_ORIENTATION."""
    none = (False, False, False)
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF data says nothing about the pixels
        return none
    return _STEPS_BY_ORIENTATION.get(orientation, none) if isinstance(orientation, int) else none


def _upright(array: np.ndarray, reverse_rows: bool, reverse_columns: bool, swap: bool) -> np.ndarray:
    """A view of the array after these steps."""
    array = array[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]
    return array.swapaxes(0, 1) if swap else array


def _with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _eight_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no common range; store 8 or 16 bits")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # PIL cannot convert LAB to L
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit values to 8 bits. PIL's own convert("L") clips them at 255, so that nearly all become white."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"integer pixels from {pixels.min()} to {pixels.max()}; only 8 and 16 bits have a known range"
        )
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // pixels.shape[1])  # all rows at once, as floats, would take much memory
    for start in range(0, len(pixels), rows):
        result[start : start + rows] = np.rint(pixels[start : start + rows] / 257)
    return Image.fromarray(result)


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image, or an array (H, W) or (H, W, C), as an array (H, W, C)."""
    return _three_axes(np.array(image) if isinstance(image, Image.Image) else image)


def _three_axes(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 3 else array[:, :, None]
