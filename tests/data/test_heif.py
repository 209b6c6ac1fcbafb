# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""HEIC files are read upright where pillow-heif is installed, and name it where it is not."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.data.decoding import BadImageError, decode_image
from ijepa_transformers.data.sources import load_image_dataset


pytest.importorskip("pillow_heif")


def heic(pixels, orientation):
    import pillow_heif

    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(file, exif=exif.tobytes())
    return file.getvalue()


def half_white():
    """White on the left, black on the right, (20, 40, 3)."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    return pixels


def test_a_photo_on_its_side_is_decoded_upright(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(heic(half_white(), 6))
    dataset = load_image_dataset(tmp_path)
    image = decode_image(dataset[0]["image"])
    assert image.shape == (40, 20, 3) and image[0].mean() > 250 and image[-1].mean() < 5


def test_without_the_package_the_reason_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif.as_plugin", None)
    with pytest.raises(BadImageError, match=r'a.heic: this is HEIC, which needs pip install "ijepa-tra'):
        decode_image({"bytes": heic(half_white(), 1), "path": "a.heic"})
