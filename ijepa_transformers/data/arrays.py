# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Images in NumPy's files .npy and .npz, for channels that no format of photographs has.

Shape legend: H rows, W columns, C channels. A file holds one array (H, W), (H, W, C) or (C, H, W) of integers.
"""

import io
import zipfile
from dataclasses import dataclass
from typing import IO

import numpy as np

from .samples import Samples


_NPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_MAX_HEADER_BYTES = 10_000


@dataclass(frozen=True)
class ArrayFile:
    """The header of an array: its shape and the bytes it takes; the values are not read yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    content: bytes | None  # of a .npy
    archive: zipfile.ZipFile | None = None
    member: str = ""

    def channel_axis(self, num_channels: int) -> int | None:
        """The axis of the channels: the last or the first of three, None of two.

        Raises:
            ValueError: if no axis, or both, can be that of the channels.
        """
        if len(self.shape) == 2:
            return None
        wanted = (1, 3) if num_channels in (1, 3) else (num_channels,)
        found = [axis for axis in (2, 0) if len(self.shape) == 3 and self.shape[axis] in wanted]
        if len(found) == 1:
            return found[0]
        which = "both its first and its last axis" if found else "neither its first nor its last axis"
        raise ValueError(f"an array {self.shape}: {which} can hold the channels; num_channels is {num_channels}")

    def height_and_width(self, num_channels: int) -> tuple[int, int]:
        """H and W, if `num_channels` are read."""
        axis = self.channel_axis(num_channels)
        height, width = self.shape[1:] if axis == 0 else self.shape[:2]
        return height, width

    def read(self, num_channels: int) -> Samples:
        """The values.

        Raises:
            ValueError: if they are not those of an image, or are cut off.
        """
        axis = self.channel_axis(num_channels)
        content = self.content if self.archive is None else self.archive.read(self.member)
        values = np.load(io.BytesIO(content or b""), allow_pickle=False)
        values = values[..., None] if axis is None else np.moveaxis(values, axis, 2)
        modes = {1: "L", 3: "RGB"} if num_channels in (1, 3) else {}
        return Samples(values, modes.get(values.shape[2], ""))


def open_array(encoded: bytes) -> ArrayFile | None:
    """The header of an array file, or None for another file.

    Raises:
        ValueError: if it holds several arrays, no integers, or no image.
    """
    if encoded.startswith(_NPY):
        return _checked(ArrayFile(*_header(io.BytesIO(encoded)), encoded))
    return _open_npz(encoded) if encoded.startswith(_ZIP) else None


def _open_npz(encoded: bytes) -> ArrayFile | None:
    archive = zipfile.ZipFile(io.BytesIO(encoded))
    members = archive.namelist()
    arrays = [name for name in members if name.endswith(".npy")]
    if not arrays:
        return None  # another kind of zip file
    if len(members) > 1:
        raise ValueError(f"it holds {len(members)} arrays ({', '.join(members[:5])}); store one image in a file")
    with archive.open(arrays[0]) as file:
        shape, dtype = _header(file)
    return _checked(ArrayFile(shape, dtype, None, archive, arrays[0]), archive.getinfo(arrays[0]).file_size)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"an array file of version {version} is not read")
    try:
        shape, _, dtype = readers[version](file, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # NumPy reads it as a Python expression, which fails in many ways
        raise ValueError(f"the header of the array cannot be read: {error}") from error
    return shape, dtype


def _checked(array: ArrayFile, stored_bytes: int | None = None) -> ArrayFile:
    if array.dtype.kind == "f":
        raise ValueError("floating-point pixels have no common range; store 8 or 16 bits")
    if array.dtype.kind not in "uib":
        raise ValueError(f"values of the type {array.dtype} are no pixels; store 8 or 16 bits")
    if len(array.shape) not in (2, 3) or 0 in array.shape:
        raise ValueError(f"an array {array.shape} is no image; store rows, columns and channels")
    num_bytes = array.dtype.itemsize * int(np.prod(array.shape, dtype=object))
    stored = len(array.content) if array.content is not None else stored_bytes or 0
    if stored < num_bytes:
        raise ValueError(f"the array is cut off: {array.shape} of {array.dtype} are {num_bytes:,} bytes")
    if array.archive is not None and stored > num_bytes + _MAX_HEADER_BYTES + 100:
        raise ValueError(f"the file unpacks to {stored:,} bytes, more than the array's {num_bytes:,}")
    return array
