"""A data set whose 16-bit images would be dark stops a command, also if only most of them are, or have hot pixels."""

import io
import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.data.bit_depth import look, settle, white_of
from ijepa_transformers.data.decoding import decode_image
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


def with_missing_rows(pixels, mark=65535):
    return np.concatenate([pixels, np.full_like(pixels[:8], mark)])


def test_a_mark_of_missing_pixels_does_not_hide_that_images_are_dark():
    dark = with_missing_rows(TWELVE)
    told = r"use at most 4,080 of 65,535: .* 65,535 was taken for the mark of missing pixels\."
    with pytest.raises(ValueError, match=told):
        white_of(sample_of(dark, dark), None)
    for array in (with_missing_rows(FULL), with_missing_rows(BLACK), with_hot_pixel(FULL)):
        assert white_of(sample_of(array), None, tell=pytest.fail) == 65535


def test_images_with_an_offset_are_told():
    told = []
    processor = SimpleNamespace(sixteen_bit_max=None)
    settle(processor, sample_of(in_bits(cells(), 2000) + np.uint16(40000)), None, told.append)
    assert processor.sixteen_bit_max == 65535 and len(told) == 1
    assert "lie from 40,000 to 42,000, so they are nearly one grey" in told[0]


def test_black_images_are_called_so():
    with pytest.raises(ValueError, match="'scans': 16-bit images are black: set --sixteen_bit_max 65535 if this is"):
        white_of(sample_of(BLACK, BLACK), None)


@pytest.mark.parametrize("value", ["x", -4, 0, 70000, True, 4095.0])
def test_a_setting_of_a_model_that_cannot_be_right_is_named(value):
    with pytest.raises(ValueError, match=rf"sixteen_bit_max in the preprocessor_config.json .* got {value!r}"):
        settle(SimpleNamespace(sixteen_bit_max=value), sample_of(FULL), None)


def test_a_few_dark_images_are_told():
    told = []
    assert white_of(sample_of(TWELVE, FULL, FULL), None, tell=told.append) == 65535
    assert "1 of 3 16-bit images of 'scans' use at most 4,080 and are dark" in told[0]


@pytest.mark.parametrize(("asked", "whites", "bits"), [(None, (32767, 65535), 15), (4095, (1023, 4095), 10)])
def test_images_of_fewer_bits_than_the_others_are_told(asked, whites, bits):
    told = []
    sample = sample_of(*(in_bits(cells(), white) for white in whites))
    assert white_of(sample, asked, tell=told.append) == whites[1]
    assert f"1 of 2 16-bit images of 'scans' end at exactly {whites[0]:,}, as images of {bits} bits do" in told[0]


def read(pixels, white):
    decode_image({"bytes": png(pixels), "path": "scans/7.png"}, 1, sixteen_bit_max=white)


def test_the_first_image_outside_of_the_sample_that_does_not_fit_is_told(capsys):
    sample_of(FULL)
    for pixels, white in ((BLACK, 65535), (FULL, 65535), (TWELVE, 4095), (TWELVE, 65535), (TWELVE, 65535)):
        read(pixels, white)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the 16-bit image 'scans/7.png' has no value above 4,080, so it is dark. sixteen")
    sample_of(TWELVE)
    read(FULL, 4095)
    assert "of its values above white. sixteen_bit_max is 4095" in capsys.readouterr().err
    sample_of(FULL)
    read(in_bits(cells(), 32767), 65535)
    assert "ends at exactly 32,767, as images of 15 bits do" in capsys.readouterr().err


def test_forked_data_loading_processes_tell_once(capfd):
    sample_of(FULL)
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=read, args=(TWELVE, 65535))
        process.start()
        process.join()
    assert capfd.readouterr().err.count("so it is dark") == 1


def test_images_of_several_frames_are_told(capsys):
    frames = [Image.fromarray(cells(number, 3)) for number in range(3)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    still = {"bytes": png(cells(samples=3)), "path": None}
    settle(SimpleNamespace(), look([{"bytes": file.getvalue(), "path": None}, still], 3, "films"), None)
    said = "1 of 2 images looked at in 'films' have several frames; only the first one is read"
    assert said in capsys.readouterr().err


def test_images_of_different_brightness_are_no_fault():
    told = []
    assert white_of(sample_of(FULL, FULL // 3, FULL // 3, BLACK), None, tell=told.append) == 65535 and not told
