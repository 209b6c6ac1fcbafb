"""A file is either decoded, upright and with the right channels, or it is a bad image with a name and a reason. Memory
stays bounded. docs/development/decoding.md has the results as a table."""

import io
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ijepa_transformers.data import decoding, samples
from ijepa_transformers.data.decoding import BadImageError, decode_image
from tests import forked
from tests.data.images import photo_pixels
from tests.data.nasty_images import (
    ACCEPTED,
    REFUSED,
    encoded,
    gray_png,
    mutations,
    photo,
    rgb16_png,
    solid,
    truncations,
)


FROM_LIBTIFF = ("TIFF", "ZIP", "LZW", "Fax", "_TIFF")
DECODERS = ["simplejpeg", "PIL"]


@pytest.fixture(params=DECODERS)
def jpeg_decoder(request, monkeypatch):
    use_decoder(request.param, monkeypatch)


def use_decoder(name, monkeypatch):
    if name == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decoding, "simplejpeg", None)


def decoded(content, num_channels=3, name="photo.jpg"):
    return decode_image({"bytes": content, "path": name}, num_channels)


def reason_of(value):
    with pytest.raises(BadImageError) as caught:
        decode_image(value)
    return caught.value.reason


# Sound images


def test_lossless_files_decode_to_their_pixels():
    for file_format in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(decoded(encoded(photo_pixels(), file_format)), photo_pixels())
    assert np.array_equal(decode_image(Image.fromarray(photo_pixels())), photo_pixels())


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "PA", "LA", "RGBA", "CMYK", "I;16", "YCbCr", "HSV", "LAB"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_every_mode_becomes_the_channels_asked_for(mode, num_channels):
    image = Image.fromarray(photo_pixels())
    image = Image.fromarray(photo_pixels()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    array = decode_image(image, num_channels)
    assert array.shape == (30, 40, num_channels) and array.dtype == np.uint8


def test_gray_is_repeated_and_colour_becomes_luma():
    gray = photo_pixels()[..., 0]
    assert np.array_equal(decoded(encoded(gray)), np.repeat(gray[..., None], 3, axis=2))
    luma = photo_pixels() @ np.array([0.299, 0.587, 0.114])
    assert np.abs(decoded(encoded(photo_pixels()), 1)[..., 0] - luma).max() <= 1


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_and_not_clipped(file_format):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    assert np.array_equal(decoded(encoded(ramp, file_format), 1)[..., 0].ravel(), np.arange(256))


def test_one_bit_is_black_and_white():
    bits = Image.fromarray(photo_pixels()).convert("1")
    assert np.array_equal(decoded(encoded(bits), 1)[..., 0], np.array(bits) * np.uint8(255))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode):
    black = Image.new("L", (3, 1), 0).convert(mode)
    black.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
    assert np.abs(decoded(encoded(black), 1)[0, :, 0].astype(int) - [255, 127, 0]).max() <= 1


def test_palettes_are_looked_up_and_their_transparent_colour_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 10, 20, 30, 40, 50])
    palette.putdata([0, 1])
    assert decoded(encoded(palette)).tolist() == [[[200, 10, 20], [30, 40, 50]]]
    assert decoded(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255], [30, 40, 50]]]


def test_cmyk_jpeg_keeps_its_colours():
    red = Image.new("RGB", (16, 16), (250, 10, 20)).convert("CMYK")
    assert np.abs(decoded(encoded(red, "JPEG", quality=95)).astype(int) - [250, 10, 20]).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(photo_pixels())
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(upright, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(decoded(content), np.array(expected))
    if orientation == 6:  # the camera was turned: the stored top row is the right column
        assert np.array_equal(decoded(content)[:, -1], photo_pixels()[0])


def test_the_first_frame_of_an_animation_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert decoded(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"hello", "not an image that PIL knows"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a pointer of Git LFS, not the image"),
        (encoded(photo_pixels(), "JPEG")[:-40], "truncated"),
        (encoded(photo_pixels(200, 200), "PNG")[:4000], "truncated"),
        (encoded(photo_pixels(), "WEBP")[:-40], "decoder"),
        (encoded(photo_pixels()[..., 0].astype(np.float32), "TIFF"), "floating-point"),
        (encoded(photo_pixels()[..., 0].astype(np.int32) * 1000, "TIFF"), "only 8 and 16 bits"),
        (None, "neither a path nor bytes"),
    ],
)
def test_bad_files_raise_with_name_and_reason(content, reason):
    path = None if content is None else "holiday.jpg"
    with pytest.raises(BadImageError, match=reason) as caught:
        decode_image({"bytes": content, "path": path}, name="holiday.jpg")
    assert "holiday.jpg" in str(caught.value)


def test_missing_files_and_decompression_bombs_are_bad_images(tmp_path, monkeypatch):
    with pytest.raises(BadImageError, match=r"gone\.jpg"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match="DecompressionBombError"):
        decoded(encoded(photo_pixels()))


@pytest.mark.parametrize("num_channels", [0, 17])
def test_other_numbers_of_channels_are_the_callers_mistake(num_channels):
    with pytest.raises(ValueError, match=f"from 1 to 16, got {num_channels}") as caught:
        decoded(encoded(photo_pixels()), num_channels=num_channels)
    assert not isinstance(caught.value, BadImageError)


# Unusual and broken images


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("num_channels", [1, 3])
def test_an_unusual_image_is_decoded(name, num_channels):
    make, color, shape = ACCEPTED[name]
    array = decoded(make(), num_channels=num_channels)
    assert array.shape == (*shape, num_channels) and array.dtype == np.uint8
    if color is not None:
        expected = color if num_channels == 3 else [np.dot(color, [0.299, 0.587, 0.114])]
        assert np.abs(array.reshape(-1, num_channels).astype(int) - expected).max() <= 3


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_an_image_is_a_bad_image_with_a_reason(name):
    make, reason = REFUSED[name]
    said = reason_of({"bytes": make(), "path": "photo.jpg"})
    assert reason in said and said.strip()


@pytest.mark.usefixtures("jpeg_decoder")
def test_a_truncated_file_of_any_format_is_a_bad_image():
    for name, content in truncations():
        try:
            decoded(content)
        except BadImageError:
            continue
        raise AssertionError(f"{name} was decoded")


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("seed", range(4))
def test_random_damage_gives_an_image_or_a_bad_image_and_nothing_else(seed):
    outcomes = {True: 0, False: 0}
    for _, content in mutations(175, seed):
        try:
            array = decoded(content)
            assert array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3 and array.size > 0
            outcomes[True] += 1
        except BadImageError as error:
            assert error.reason
            outcomes[False] += 1
    assert min(outcomes.values()) > 20  # the damage is neither nothing nor everything


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_format_comes_out_upright(file_format, orientation):
    """The white corner of a black image, and where a viewer shows it."""
    image, exif = Image.new("RGB", (32, 16)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 8, 8))  # top left as stored
    exif[0x0112] = orientation
    array = decoded(encoded(image, file_format, exif=exif))
    corners = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    assert array.shape[:2] == ((16, 32) if orientation < 5 else (32, 16))
    bright = [place for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)) if array[place].mean() > 127]
    assert bright == [corners[orientation]]


# JPEG by simplejpeg, and by PIL


JPEG_KINDS = {
    **{f"4:{ratio}": {"subsampling": place} for place, ratio in enumerate(("4:4", "2:2", "2:0"))},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 2},
    "hardly compressed": {"quality": 100},
    "strongly compressed": {"quality": 5},
    "RGB": {"keep_rgb": True},
    "grey": {},
    "CMYK": {},
    "several images": {"save_all": True, "append_images": [photo(seed=1)]},
}


def jpeg(kind, height=61, width=83, **options):
    image = photo(height, width).convert({"grey": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
    return encoded(image, "MPO" if kind == "several images" else "JPEG", **JPEG_KINDS[kind], **options)


def by_both(monkeypatch, content, num_channels=3):
    """The results of simplejpeg and PIL for a file: pixels, or the reason why it is refused."""
    outcomes = []
    for decoder in DECODERS:
        with monkeypatch.context() as patch:
            use_decoder(decoder, patch)
            try:
                outcomes.append(decoded(content, num_channels=num_channels).astype(int))
            except BadImageError as error:
                outcomes.append(error.reason)
    return outcomes


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_both_decoders_give_the_same_pixels(monkeypatch, kind, num_channels):
    for height, width in ((61, 83), (64, 80), (1, 9), (8, 8)):
        fast, slow = by_both(monkeypatch, jpeg(kind, height, width), num_channels)
        assert fast.shape == slow.shape == (height, width, num_channels) and np.abs(fast - slow).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_both_decoders_turn_an_image_upright_alike(monkeypatch, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg("4:2:0", exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), dtype=int)
    for array in by_both(monkeypatch, content):
        assert np.abs(array - upright).max() <= 1


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_both_decoders_refuse_a_jpeg_that_is_cut_off(monkeypatch, kind):
    """Wherever it is cut; of several images, only the first one counts."""
    whole = jpeg(kind, 24, 31)
    for end in range(whole.index(b"\xff\xd9") + 1):
        fast, slow = by_both(monkeypatch, whole[:end])
        assert isinstance(fast, str) and fast == slow


@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_both_decoders_make_the_same_of_a_damaged_jpeg(monkeypatch, kind):
    accepted = 0
    for content in damaged(jpeg(kind), 100):
        fast, slow = by_both(monkeypatch, content)
        if isinstance(slow, str):
            assert fast == slow
        else:
            accepted += 1
            assert fast.shape == slow.shape and np.abs(fast - slow).max() <= 1
    assert 0 < accepted < 100


def damaged(whole, count):
    generator = np.random.default_rng(0)
    for _ in range(count):
        content = bytearray(whole)
        for place in generator.integers(0, len(content), generator.integers(1, 6)).tolist():
            content[place] = int(generator.integers(256))
        yield bytes(content)


def test_simplejpeg_is_not_used_if_it_finds_another_size(monkeypatch):
    """Otherwise an image beyond the limits could have a header that PIL reads differently."""
    simplejpeg = pytest.importorskip("simplejpeg")
    content = jpeg("4:2:0")
    expected = decoded(content)
    asked = []
    monkeypatch.setattr(simplejpeg, "decode_jpeg_header", lambda encoded: (20_000, 30_000, "YCbCr", "420"))
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *arguments, **options: asked.append(arguments))
    assert np.abs(decoded(content).astype(int) - expected).max() <= 1 and not asked


def test_the_decoder_of_jpeg_files_has_a_name(monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg")
    assert decoding.jpeg_decoder() == f"simplejpeg {simplejpeg.__version__}"
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert decoding.jpeg_decoder().startswith("PIL ")


# Bounds


DECODE_EVERYTHING = """
import json, sys
sys.path.insert(0, "tests")
from tests.data.nasty_images import ACCEPTED, REFUSED, mutations
from ijepa_transformers.data.decoding import BadImageError, decode_image

def peak():
    return int(next(line for line in open("/proc/self/status") if "VmHWM" in line).split()[1]) // 1024

def growth(content):
    before = peak()
    try:
        decode_image({"bytes": content, "path": "x.jpg"})
    except BadImageError:
        pass
    return peak() - before

for _, content in mutations(175, seed=9):
    growth(content)
print(json.dumps({name: growth(make[0]()) for name, make in {**ACCEPTED, **REFUSED}.items()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_broken_files_are_silent_and_refused_ones_take_less_than_100_megabytes():
    """PIL's warnings about repaired files have no names; with a million images they would hide everything else. The
    lines of libtiff are written in C and cannot be silenced."""
    result = forked.run(["-c", DECODE_EVERYTHING], check=True)
    assert [line for line in result.stderr.splitlines() if not line.startswith(FROM_LIBTIFF)] == []
    growth = json.loads(result.stdout)
    assert set(growth) == {*ACCEPTED, *REFUSED} and max(growth.values()) < 100


def test_pixels_tiles_sides_and_bytes_have_limits_that_hold_before_decoding(monkeypatch):
    def load(self):
        raise AssertionError("decoded before it was measured")

    sound = encoded(solid(size=(40, 30)))
    for limit, value, reason in (
        ("MAX_IMAGE_PIXELS", 40 * 30 - 1, "40 x 30 pixels are more than 1,199"),
        ("MAX_ASPECT_RATIO", 1.3, "one side is more than 1.3 times the other"),
        ("MAX_FILE_BYTES", len(sound) - 1, f"the file has {len(sound)} bytes, more than {len(sound) - 1}"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, limit, value)
            patch.setattr(Image.Image, "load", load)
            assert reason in reason_of({"bytes": sound, "path": None})
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 40 * 30)
    assert decoded(sound).shape == (30, 40, 3)


def test_a_file_that_is_too_large_is_not_read(tmp_path):
    with open(tmp_path / "film.jpg", "wb") as file:
        file.truncate(50 * 2**30)  # no blocks on disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reason = reason_of({"bytes": None, "path": str(tmp_path / "film.jpg")})
    assert "the file has 53,687,091,200 bytes, more than 536,870,912" in reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


# Files that cannot be read


def test_pipes_devices_and_missing_files_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    assert "not a regular file" in reason_of({"bytes": None, "path": str(tmp_path / "pipe.jpg")})
    assert "not a regular file" in reason_of({"bytes": None, "path": "/dev/zero"})
    assert "not a regular file" in reason_of({"bytes": None, "path": str(tmp_path)})
    assert "FileNotFoundError" in reason_of({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    assert "null byte" in reason_of({"bytes": None, "path": "a\0b.jpg"})


def test_an_unreadable_file_is_a_bad_image(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(encoded(solid()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "PermissionError" in reason_of({"bytes": None, "path": str(path)})


def test_colours_of_sixteen_bits_lose_the_lower_eight():
    assert np.abs(decoded(rgb16_png())[0, 0].astype(int) - [250, 10, 20]).max() <= 1


def test_large_images_of_sixteen_bits_are_scaled_piece_by_piece(monkeypatch):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    monkeypatch.setattr(samples, "_PIXELS_AT_A_TIME", 1000)
    assert np.array_equal(decoded(encoded(Image.fromarray(ramp)), num_channels=1)[..., 0], np.rint(ramp / 257))


def test_the_largest_image_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 2**20)
    assert decoded(gray_png(1024, 1024)).shape == (1024, 1024, 3)
