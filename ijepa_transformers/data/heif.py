# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""HEIC files, which phones write. The package pillow-heif reads them; it is an extra."""

import io

from PIL import Image


_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class NotReadableError(ValueError):
    """A file of a known kind that cannot be read here. The message is the whole reason."""


def is_heif(encoded: bytes) -> bool:
    """Whether a file begins like HEIC."""
    return encoded[4:8] == b"ftyp" and encoded[8:12] in _BRANDS


def open_heif(encoded: bytes) -> Image.Image:
    """The image of a HEIC file, of which only the header has been read. It is upright already.

    Raises:
        NotReadableError: if it cannot be opened, or if pillow-heif is not installed.
    """
    try:
        from pillow_heif.as_plugin import HeifImageFile
    except ImportError:
        raise NotReadableError('this is HEIC, which needs pip install "ijepa-transformers[heif]"') from None
    try:
        return HeifImageFile(io.BytesIO(encoded))
    except Exception as error:  # of many classes, as everywhere in PIL
        raise NotReadableError(f"this HEIC cannot be read: {error}") from error
