"""Each image has the values that its file means, whatever its bits, sign, bands and pages are; or it is a bad image
whose reason says why."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from ijepa_transformers.data import tiff as tiff_module
from ijepa_transformers.data.decoding import BadImageError, decode_image
from tests.data.image_files import cells, in_bits, jpeg_2000, npy, npz, png, tiff


RGB = 2


def decoded(content, num_channels=3, sixteen_bit_max=None):
    return decode_image({"bytes": content, "path": "image"}, num_channels, sixteen_bit_max=sixteen_bit_max)


def reason_of(content, num_channels=3, sixteen_bit_max=None):
    with pytest.raises(BadImageError) as caught:
        decoded(content, num_channels, sixteen_bit_max)
    return caught.value.reason


def grey_tiff(pixels, **options):
    return tiff(pixels, photometric=1, **options)


def colour_tiff(pixels, **options):
    return tiff(pixels, photometric=RGB, **options)


# Bits


@pytest.mark.parametrize("white", [255, 1023, 3000, 4095, 16383, 65535])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("write", [png, grey_tiff, colour_tiff, npy])
def test_sixteen_bits_are_those_of_the_eight_bit_image(write, samples, white):
    if write is (colour_tiff if samples == 1 else grey_tiff):
        return
    pixels = cells(samples=samples)
    array = decoded(write(in_bits(pixels, white)), samples, sixteen_bit_max=white)
    assert np.array_equal(array, pixels)


@pytest.mark.parametrize(
    "options", [{"order": ">"}, {"deflate": True}, {"order": ">", "deflate": True}, {"separate": True}]
)
@pytest.mark.parametrize("samples", [1, 3])
def test_the_layout_of_a_tiff_does_not_matter(samples, options):
    pixels = cells(samples=samples)
    content = tiff(in_bits(pixels, 4095), photometric=RGB if samples == 3 else 1, **options)
    assert np.array_equal(decoded(content, samples, 4095), pixels)


@pytest.mark.parametrize("write", [png, colour_tiff, npy])
def test_dark_sixteen_bits_are_refused_without_a_setting(write):
    said = reason_of(write(in_bits(cells(samples=3), 4080)))
    assert "16-bit images use at most 4,080 of 65,535: set sixteen_bit_max 4095" in said


@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("white", [4095, 65535])
def test_alpha_says_nothing_about_the_bits_of_the_colours(samples, white):
    pixels = cells(samples=samples)
    pixels[..., -1] = 255
    deep = in_bits(pixels, white)
    deep[..., -1] = 65535
    expected = np.repeat(pixels[..., :-1], 3 if samples == 2 else 1, axis=2)
    assert np.array_equal(decoded(png(deep), sixteen_bit_max=white), expected)
    if white < 65535:
        assert "at most 4,095" in reason_of(png(deep))


def test_transparent_sixteen_bits_are_laid_on_white():
    pixels = np.zeros((8, 8, 4), np.uint16)
    pixels[:, :4, 3] = 65535
    expected = np.repeat([0, 255], 4)
    assert np.array_equal(decoded(png(pixels), 1, 65535)[0, :, 0], expected)
    key = np.full((8, 8, 3), 7, np.uint16)
    key[:, :4] = 0
    content = png(key, (b"tRNS", b"\0\7\0\7\0\7"))
    assert np.array_equal(decoded(content, 1, 65535)[0, :, 0], expected)


def test_values_above_white_are_white():
    assert decoded(png(np.full((8, 8, 1), 5000, np.uint16)), 1, 4095).min() == 255


def test_a_portable_pixmap_has_the_range_that_it_says(tmp_path):
    pixels = cells(samples=3)
    for white in (4095, 65535):
        big = in_bits(pixels, white).astype(">u2").tobytes()
        content = b"P6 40 40 %d\n" % white + big
        assert np.array_equal(decoded(content, sixteen_bit_max=65535), pixels)
    dark = b"P6 40 40 65535\n" + in_bits(pixels, 4095).astype(">u2").tobytes()
    assert np.array_equal(decoded(dark, sixteen_bit_max=4095), pixels)
    assert "at most 4,095" in reason_of(dark)
    assert "cut off" in reason_of(dark[:-2])


# TIFF: sign and WhiteIsZero


@pytest.mark.parametrize("white", [4095, 65535])
def test_white_is_zero(white):
    pixels = cells()
    for order in "<>":
        content = tiff(in_bits(pixels, white), photometric=0, order=order)
        assert np.array_equal(decoded(content, 1, white), 255 - pixels)
    assert np.array_equal(decoded(tiff(pixels, photometric=0), 1), 255 - pixels)


def test_signed_eight_bits_begin_at_minus_128():
    for samples, photometric in ((1, 1), (3, RGB)):
        pixels = cells(samples=samples)
        signed = (pixels.astype(np.int16) - 128).astype(np.int8)
        assert np.array_equal(decoded(tiff(signed, photometric=photometric), samples), pixels)


def test_signed_sixteen_bits_are_read_if_none_is_negative():
    pixels = in_bits(cells(), 3000).astype(np.int16)
    assert np.array_equal(decoded(tiff(pixels), 1, 3000), cells())
    assert "integer pixels from -1 to 3000" in reason_of(
        tiff(np.where(pixels == 0, -1, pixels).astype(np.int16)), 1, 3000
    )


def test_a_refused_tiff_of_32_bits_is_told_with_its_true_values():
    pixels = np.full((8, 8, 1), 2**31 + 5, np.uint32)
    pixels[0] = 2**32 - 1
    for order in "<>":
        reason = reason_of(tiff(pixels, order=order), 1)
        assert "integer pixels from 2147483653 to 4294967295; only 8 and 16 bits have a known range" in reason
    assert "integer pixels from -5 to 70000" in reason_of(
        tiff(np.where(pixels > 2**31 + 5, -5, 70000).astype("i4")), 1
    )


# TIFF: bands and pages


def test_integers_of_64_bits_are_taken_as_16_bits():
    """Their white would be 2**64 - 1, and every image black."""
    pixels = cells()
    assert np.array_equal(decoded(grey_tiff(in_bits(pixels, 65535).astype("u8")), 1), pixels)


def test_samples_of_an_undefined_kind_are_unsigned():
    pixels = cells()
    content = grey_tiff(pixels).replace(struct.pack("<HHIH", 339, 3, 1, 1), struct.pack("<HHIH", 339, 3, 1, 4))
    assert np.array_equal(decoded(content, 1), pixels)


@pytest.mark.parametrize(("samples", "bits"), [(1, 9), (3, 4), (3, 12), (3, 16)])
def test_bits_that_pil_reads_wrongly_in_jpeg_2000_are_refused(samples, bits):
    pixels = cells(samples=samples)
    content = jpeg_2000(pixels if samples == 3 else pixels[..., 0])
    content = content.replace(b"\7\1\1" * samples, bytes((bits - 1, 1, 1)) * samples)
    which = "grey" if samples == 1 else "colours"
    assert f"{which} of {bits} bits in JPEG 2000 are not read" in reason_of(content)


def test_an_archive_of_an_array_may_be_large():
    pixels = np.random.default_rng(0).integers(0, 256, (160, 160, 5), dtype=np.uint8)
    content = npz(image=pixels)
    assert len(content) > 2**16 and np.array_equal(decoded(content, 5), pixels)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize(
    "samples, photometric, extra",
    [
        (4, RGB, [0]),
        (4, RGB, None),
        (5, RGB, [0, 0]),
        (5, RGB, [2, 0]),
        (6, RGB, [0] * 3),
        (7, 1, [0] * 6),
        (13, 1, [0] * 12),
        (2, 1, [0]),
    ],
)
def test_bands_that_are_no_colours_are_read_if_all_are_asked_for(samples, photometric, extra, dtype):
    pixels = cells(samples=samples)
    content = tiff(in_bits(pixels, 65535) if dtype == "u2" else pixels, photometric=photometric, extra=extra)
    assert np.array_equal(decoded(content, samples), pixels)
    assert f"it has {samples} bands" in reason_of(content, 3)
    assert f"it has {samples} bands" in reason_of(content, 1)
    assert f"it has {samples} bands, but num_channels is 16" in reason_of(content, 16)


@pytest.mark.parametrize("dtype", ["u1", "u2"])
@pytest.mark.parametrize("extra", [1, 2])
@pytest.mark.parametrize("samples", [2, 4])
def test_what_is_said_to_be_alpha_is_laid_on_white(samples, extra, dtype):
    pixels = np.zeros((8, 8, samples), np.uint8)
    pixels[:, :4, -1] = 255
    content = tiff(
        in_bits(pixels, 65535) if dtype == "u2" else pixels, photometric=RGB if samples == 4 else 1, extra=[extra]
    )
    assert np.array_equal(decoded(content, 1, 65535)[0, :, 0], np.repeat([0, 255], 4))
    assert np.array_equal(decoded(content, samples, 65535), pixels)


def test_a_tiff_of_several_pages_is_refused_or_read_as_channels():
    pages = [cells(seed=seed) for seed in range(6)]
    content = tiff(*pages)
    assert "it has 6 pages" in reason_of(content)
    assert "it has 6 pages" in reason_of(content, 1)
    assert np.array_equal(decoded(content, 6), np.concatenate(pages, axis=2))
    assert "pages differ in size" in reason_of(tiff(*pages[:5], cells(side=48)), 6)


def test_the_advice_on_bands_and_pages_can_be_followed():
    three = [reason_of(tiff(*3 * [cells()])), reason_of(tiff(cells(samples=3), photometric=1, extra=[0, 0]), 1)]
    for reason in three:
        assert reason.endswith(", or store them as RGB (PhotometricInterpretation 2)")
    assert "or set num_channels 16 if the pages are" in reason_of(tiff(*16 * [cells()]))
    assert "num_channels" not in reason_of(tiff(*17 * [cells()]))
    assert "or set num_channels 4 to read them all" in reason_of(tiff(cells(samples=4), photometric=RGB))


def test_smaller_copies_of_an_image_are_no_pages():
    tifffile = pytest.importorskip("tifffile")
    file, pixels = io.BytesIO(), cells(samples=3)
    with tifffile.TiffWriter(file) as writer:
        writer.write(pixels, photometric="rgb")
        writer.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(decoded(file.getvalue()), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_every_way_to_read_a_tiff_turns_it_upright(orientation, dtype):
    pixels = cells(samples=4)
    pixels[..., 3] = 255
    stored = in_bits(pixels, 65535) if dtype == "u2" else pixels
    plain = decoded(tiff(pixels[..., :3], photometric=RGB, orientation=orientation))
    assert np.array_equal(decoded(tiff(stored[..., :3].copy(), photometric=RGB, orientation=orientation)), plain)
    bands = decoded(tiff(stored, photometric=RGB, extra=[0], orientation=orientation), 4)
    assert np.array_equal(bands[..., :3], plain)


def test_without_tifffile_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tiff_module, "tifffile", None)
    assert "pip install 'ijepa-transformers[multiband]'" in reason_of(tiff(cells(samples=13), extra=[0] * 12), 13)
    assert np.array_equal(decoded(colour_tiff(in_bits(cells(samples=3), 4095)), 3, 4095), cells(samples=3))


def test_a_tiff_that_is_cut_off_or_goes_in_a_circle_is_refused():
    content = tiff(cells(samples=13), extra=[0] * 12)
    for size in (6, 20, 100, len(content) // 2, len(content) - 100):
        assert reason_of(content[:size], 13)
    circle = bytearray(tiff(cells()))
    end = 8 + 2 + 12 * circle[8]
    circle[end : end + 4] = (8).to_bytes(4, "little")
    assert np.array_equal(decoded(bytes(circle), 1), cells())


def test_bands_that_differ_in_bits_are_refused():
    content = bytearray(tiff(cells(samples=3), photometric=RGB))
    place = content.index(b"\x08\0\x08\0\x08\0")
    content[place] = 16
    assert "its bands differ: BitsPerSample is 16, 8, 8" in reason_of(bytes(content))


# Channels of other files


def test_arrays_have_their_channels_first_or_last():
    pixels = cells(samples=5)
    assert np.array_equal(decoded(npy(pixels), 5), pixels)
    assert np.array_equal(decoded(npy(np.moveaxis(pixels, 2, 0)), 5), pixels)
    assert np.array_equal(decoded(npz(image=pixels), 5), pixels)
    assert np.array_equal(decoded(npy(pixels[..., 0]), 1), pixels[..., :1])
    assert np.array_equal(decoded(npy(pixels[..., :1]), 3), np.repeat(pixels[..., :1], 3, axis=2))
    assert np.array_equal(decoded(npy(pixels[..., :3] > 127), 3), np.where(pixels[..., :3] > 127, 255, 0))


@pytest.mark.parametrize(
    "content, num_channels, reason",
    [
        (npy(np.zeros((8, 8, 5), np.uint8)), 3, "neither its first nor its last axis"),
        (npy(np.zeros((5, 8, 5), np.uint8)), 5, "both its first and its last axis"),
        (npy(np.zeros((8, 8), np.uint8)), 5, "it has 1 channels, but num_channels is 5"),
        (npy(np.zeros((8, 8, 3), np.float32)), 3, "floating-point pixels"),
        (npy(np.zeros((8, 8, 3), "U1")), 3, "are no pixels"),
        (npy(np.array([None, {}], dtype=object)), 3, "are no pixels"),
        (npy(np.zeros(8, np.uint8)), 3, "is no image"),
        (npy(np.zeros((0, 8), np.uint8)), 3, "is no image"),
        (npy(np.zeros((8, 8, 3), np.uint8))[:-1], 3, "EOF"),
        (npz(a=np.zeros((8, 8)), b=np.zeros((8, 8))), 3, "2 arrays"),
        (npy(np.zeros((1, 8), np.uint8)).replace(b"(1, 8)", b"(9**9,"), 1, "Header"),
        (npy(np.full((8, 8, 3), 70000)), 3, "integer pixels from 70000"),
    ],
)
def test_an_array_that_is_no_image_is_refused(content, num_channels, reason):
    assert reason.lower() in reason_of(content, num_channels).lower()


def test_a_photograph_with_alpha_has_four_channels_if_they_are_asked_for():
    pixels = cells(samples=4)
    assert np.array_equal(decoded(png(pixels), 4), pixels)
    assert np.array_equal(decoded(png(in_bits(pixels, 65535)), 4), pixels)
    assert "it has 4 channels, but num_channels is 5" in reason_of(png(pixels), 5)
    assert "it has 3 channels, but num_channels is 5" in reason_of(png(pixels[..., :3]), 5)


def test_an_image_of_pil_is_scaled_as_its_file():
    pixels = cells()
    image = Image.fromarray(in_bits(pixels, 4095)[..., 0])
    assert np.array_equal(decode_image(image, 1, sixteen_bit_max=4095), pixels)
    with pytest.raises(BadImageError, match="at most 4,095"):
        decode_image(image, 1)
