"""A data set whose 16-bit images would be dark stops a command, also if only most of them are, or have hot pixels."""

import numpy as np
import pytest

from ijepa_transformers.data.bit_depth import look, white_of
from tests.data.image_files import cells, in_bits, png


def sample_of(*arrays):
    return look([{"bytes": png(array), "path": None} for array in arrays], 1, "scans")


def with_hot_pixel(pixels):
    pixels = np.tile(pixels, (8, 8, 1))  # a hot pixel is one of many
    pixels[3, 5] = 65535
    return pixels


TWELVE, FULL = in_bits(cells(), 4080), in_bits(cells(), 65535)
BLACK = np.zeros_like(TWELVE)


@pytest.mark.parametrize(
    ("arrays", "count"),
    [
        ([TWELVE, TWELVE, TWELVE, FULL], "3 of 4 "),
        ([TWELVE, with_hot_pixel(TWELVE)], ""),
        ([with_hot_pixel(TWELVE)] * 2, ""),
        ([TWELVE, BLACK, FULL], "1 of 3 "),
    ],
)
def test_images_of_which_most_would_be_dark_are_refused(arrays, count):
    advice = f"'scans': {count}16-bit images use at most 4,080 of 65,535: set --sixteen_bit_max 4095, .* or 65535 if"
    sample, told = sample_of(*arrays), []
    with pytest.raises(ValueError, match=advice):
        white_of(sample, None)
    with pytest.raises(ValueError, match=r"use at most 4,080.* trained with sixteen_bit_max 65535"):
        white_of(sample, None, 65535)
    assert white_of(sample, 65535, tell=told.append) == 65535 and not told


def test_a_few_dark_images_are_told():
    told = []
    assert white_of(sample_of(TWELVE, FULL, FULL), None, tell=told.append) == 65535
    assert "1 of 3 16-bit images of 'scans' use at most 4,080 and are dark" in told[0]


def test_images_of_different_brightness_are_no_fault():
    told = []
    assert white_of(sample_of(FULL, FULL // 3, FULL // 3, BLACK), None, tell=told.append) == 65535 and not told
