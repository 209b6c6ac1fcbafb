# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Decodes image files to uint8 arrays, and refuses files that are damaged or too large.

Shape legend: H rows, W columns, C channels (1 to 16). A decoded image is a uint8 array (H, W, C) in 0..255.
"""

import io
import logging
import math
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

from .arrays import open_array
from .heif import NotReadableError, is_heif, open_heif
from .limits import check_cost, exif_is_cheap
from .notices import WHITE, tell_of_first
from .samples import MAX_CHANNELS, Samples, samples_of
from .tiff import is_tiff, read_tiff_header, tiff_samples


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
# Limits that bound the memory for any file (docs/development/decoding.md has the figures).
MAX_IMAGE_PIXELS = 2**27  # 134 million: more than the largest common cameras (102), less than PIL's own limit (179)
MAX_ASPECT_RATIO = 256  # longer over shorter side. Evaluation resizes the shorter side; the longer one grows with it.
MAX_FILE_BYTES = 2**29  # of the encoded file
MAX_SAMPLES = 2**29  # of an image of many channels, or of more than 8 bits
_EXIF_ORIENTATION = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
_NO_STEPS = (False, False, False)
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
_ANIMATED_FORMATS = ("GIF", "PNG", "WEBP", "AVIF")
_LFS_POINTER = b"version https://git-lfs"
_JPEG_FORMATS = ("JPEG", "MPO")  # MPO is PIL's name for a JPEG that holds several images; phones write such files
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


def check_channels(num_channels: int) -> None:
    """Raises ValueError for a number of channels that images cannot be read with."""
    if not 1 <= num_channels <= MAX_CHANNELS:
        raise ValueError(f"num_channels must be from 1 to {MAX_CHANNELS}, got {num_channels!r}")


def decode_image(
    value: ImageValue, num_channels: int = 3, name: str | None = None, sixteen_bit_max: int | None = None
) -> np.ndarray:
    """Decodes an image to uint8 (H, W, C), turned upright by its EXIF orientation.

    For 1 or 3 channels, transparent images are laid on white, palettes and CMYK become RGB. One channel is the luma
    of ITU-R 601. Any other number is that of the stored channels: bands of a TIFF or of an array, or RGB and alpha.

    16-bit values are scaled, so that `sixteen_bit_max` becomes 255, as do larger values. An animation gives its first
    frame. Colour profiles are ignored, and so is EXIF data that cannot be read. The content decides the format, one of
    IMAGE_FORMATS, .npy or .npz, not the file's name.

    Args:
        value: `{"bytes": ..., "path": ...}` as in a column `Image(decode=False)`, or a PIL image.
        num_channels: from 1 to 16.
        name: of the image in messages; its path by default.
        sixteen_bit_max: the value of white in 16-bit images: 4095 for 12 bits, 65535 for all. If it is None, it is
            65535, and an image whose values are all below 32768 is refused.

    Raises:
        BadImageError: if the image cannot be decoded to its last pixel, has other channels, or exceeds
            MAX_IMAGE_PIXELS, MAX_ASPECT_RATIO, MAX_FILE_BYTES or MAX_SAMPLES. The limits are checked before anything
            is decoded. A JPEG that is damaged before its end marker is decoded without an error: libjpeg fills the
            missing part with grey.
        ValueError: for another number of channels.
    """
    array = OpenedImage(value, name).decode(num_channels, sixteen_bit_max=sixteen_bit_max)
    return np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"])


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
            self._encoded = b"" if isinstance(value, Image.Image) else encoded_bytes(value)
            self._array = open_array(self._encoded)
            self._tiff = read_tiff_header(self._encoded) if is_tiff(self._encoded) else None
            self._image = value if isinstance(value, Image.Image) else self._open()
            self._size = self._read_size()
            if self._array is None:
                _check_size(*self._size)
                _check_tiles(getattr(self._image, "tag_v2", {}))

    def _open(self) -> Image.Image | None:
        """PIL's image, of which only the header is read; None for an array or a TIFF that PIL cannot open."""
        if self._array is not None:
            return None
        try:
            return open_image(self._encoded)
        except UnidentifiedImageError:
            if self._tiff is None:
                raise
            return None

    def _read_size(self) -> tuple[int, int]:
        """Width and height; decoding may reduce those of PIL's image."""
        if self._array is not None:
            _check_samples(self._array.shape)
            return 0, 0  # known when the number of channels is
        if self._tiff is None:
            return self._image.size if self._image is not None else (0, 0)
        width, height = self._tiff.width, self._tiff.height
        if self._tiff.num_samples > 4:
            _check_samples((width, height, self._tiff.num_samples))
        return width, height

    @property
    def reducible(self) -> bool:
        """Whether `decode` can make the image smaller."""
        return bool(self._encoded) and self._image is not None and self._image.format in _JPEG_FORMATS

    @property
    def is_animation(self) -> bool:
        """Whether the image has several frames, of which the first is read."""
        try:
            return getattr(self._image, "format", None) in _ANIMATED_FORMATS and bool(self._image.is_animated)  # type: ignore[union-attr]
        except Exception:  # what is broken behind the first frame does not matter
            return False

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

    def decode(self, num_channels: int, reduction: int = 1, sixteen_bit_max: int | None = None) -> np.ndarray:
        """Upright uint8 (H, W, C). The array may be read-only, and a view. Call this once only.

        Args:
            num_channels, sixteen_bit_max: as in `decode_image`.
            reduction: 2, 4 or 8 divides the sides of a `reducible` image, rounded up. libjpeg then decodes fewer
                frequencies, which takes less time.

        Raises:
            BadImageError: as `decode_image`.
            ValueError: for another number of channels.
        """
        check_channels(num_channels)
        with _errors_as_bad_image(self.name):
            samples, steps = self._samples(num_channels)
            if samples is not None:
                self._tell_of_doubt(samples, sixteen_bit_max)
                return _upright(samples.decode(num_channels, sixteen_bit_max), *steps)
            assert self._image is not None  # what PIL cannot open gives samples
            array = None
            if self.reducible and num_channels in (1, 3):
                array = _decode_jpeg(self._encoded, self._image, num_channels, reduction)
            if array is None:
                array = _decode_with_pil(self._image, num_channels, reduction)
            return _upright(array, *_upright_steps(self._image))

    def _tell_of_doubt(self, samples: Samples, sixteen_bit_max: int | None) -> None:
        """Tells if the white of the data set does not suit this image, which was not in the sample that chose it."""
        doubt = samples.doubt(sixteen_bit_max) if samples.needs_setting and sixteen_bit_max else None
        if doubt:
            tell_of_first(
                WHITE,
                f"the 16-bit image {self.name!r} {doubt}. sixteen_bit_max is {sixteen_bit_max} for all images. Others"
                " like this one are not told of.",
            )

    def samples(self, num_channels: int) -> Samples | None:
        """The stored values, if they are not just 8 bits of grey or colours. Call this or `decode` once only.

        Raises:
            BadImageError: as `decode_image`.
        """
        with _errors_as_bad_image(self.name):
            return self._samples(num_channels)[0]

    def _samples(self, num_channels: int) -> tuple[Samples | None, tuple[bool, bool, bool]]:
        """`samples`, and the steps that make them upright."""
        if self._array is not None:
            height, width = self._array.height_and_width(num_channels)
            _check_size(width, height)
            return self._array.read(num_channels), _NO_STEPS
        if self._tiff is not None:
            samples, is_upright = tiff_samples(self._encoded, self._tiff, self._image, num_channels)
            steps = _STEPS_BY_ORIENTATION.get(self._tiff.orientation, _NO_STEPS)
            return samples, _NO_STEPS if is_upright else steps
        if self._image is None or self.reducible:
            return None, _NO_STEPS
        samples = samples_of(self._image, self._encoded)
        # Asked for only after decoding: PIL reads a whole PNG to find its EXIF data, and hides the errors.
        return samples, _NO_STEPS if samples is None else _upright_steps(self._image)


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
    converted = _with_channels(image, num_channels) if num_channels in (1, 3) else _with_stored_channels(image)
    array = _three_axes(np.asarray(converted))  # read-only, which saves a copy
    if array.shape[2] != num_channels:
        raise ValueError(f"it has {array.shape[2]} channels, but num_channels is {num_channels}")
    return array


def open_image(encoded: bytes) -> Image.Image:
    """The image of a file, of which only the header has been read."""
    try:
        return Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)
    except UnidentifiedImageError:
        if encoded.startswith(_LFS_POINTER):
            raise NotReadableError("this is a pointer of Git LFS, not the image: run git lfs pull") from None
        if not is_heif(encoded):
            raise
    return open_heif(encoded)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def _check_samples(shape: tuple[int, ...]) -> None:
    if math.prod(shape) > MAX_SAMPLES:
        raise ValueError(f"{' x '.join(map(str, shape))} values are more than {MAX_SAMPLES:,}")


def _check_tiles(tags: Mapping[int, int]) -> None:
    """Limits the tiles of a TIFF: libtiff allocates a whole tile, even if the image fills only a corner of it."""
    width, height = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"tiles of {width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")


def read_image(value: ImageValue, index: int, num_channels: int, sixteen_bit_max: int | None = None) -> np.ndarray:
    """Image `index` of a data set, uint8 (H, W, C), which may be read-only. Raises as `decode_image`."""
    return OpenedImage(value, name_in_messages(value, index)).decode(num_channels, sixteen_bit_max=sixteen_bit_max)


def name_in_messages(value: ImageValue, index: int) -> str:
    """The path of an image, or its number if it has none."""
    return value_name(value) or f"image {index}"


def value_name(value: ImageValue) -> str | None:
    """The path of an image, if it has one."""
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def encoded_bytes(value: StoredImage | None) -> bytes:
    """The content of an image file.

    Raises:
        ValueError: if there is none, if it is empty or too large, or if it would cost too much (`check_cost`).
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
    check_cost(encoded)
    return encoded


def path_of_uri(path: str) -> str:
    """The path that a `file://` URI names. Other paths are returned as they are."""
    if path.startswith(FILE_URI):
        return os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix(FILE_URI)))
    return path


def _read_file(path: str) -> bytes:
    """Checks the kind of file before it opens it, because opening a pipe waits for a writer that may never come."""
    path = path_of_uri(path)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is not a regular file")
    _check_file_size(status.st_size)
    if not status.st_size:
        raise ValueError("the file is empty")  # or one of the kernel, as in /proc, which may have no end
    with open(path, "rb") as file:
        return file.read(status.st_size + 1)


def _check_file_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"the file has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _reason(error: Exception) -> str:
    if isinstance(error, NotReadableError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):  # its own message shows the address of a buffer
        return "this is not an image that PIL knows"
    return f"{type(error).__name__}: {error}"


def _upright_steps(image: Image.Image | None) -> tuple[bool, bool, bool]:
    """The steps that make the image upright, as in _STEPS_BY_ORIENTATION."""
    if image is None or not exif_is_cheap(image):
        return _NO_STEPS
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # broken EXIF data says nothing about the pixels
        return _NO_STEPS
    return _STEPS_BY_ORIENTATION.get(orientation, _NO_STEPS) if isinstance(orientation, int) else _NO_STEPS


def _upright(array: np.ndarray, reverse_rows: bool, reverse_columns: bool, swap: bool) -> np.ndarray:
    """A view of the array after these steps."""
    array = array[:: -1 if reverse_rows else 1, :: -1 if reverse_columns else 1]
    return array.swapaxes(0, 1) if swap else array


def _with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no common range; store 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # PIL cannot convert LAB to L
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _with_stored_channels(image: Image.Image) -> Image.Image:
    """The image in a mode in which each channel is one that the file has."""
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    if image.mode in ("1", "La"):
        return image.convert("L" if image.mode == "1" else "LA")
    return image if image.mode in ("L", "LA", "RGB", "RGBA", "CMYK") else image.convert("RGB")


def to_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """A PIL image, or an array (H, W) or (H, W, C), as an array (H, W, C)."""
    return _three_axes(np.array(image) if isinstance(image, Image.Image) else image)


def _three_axes(array: np.ndarray) -> np.ndarray:
    return array if array.ndim == 3 else array[:, :, None]
