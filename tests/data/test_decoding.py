"""Whatever file lies in a folder of photographs, it is decoded upright with the right channels, or it is a bad image
with a name and a reason; training goes on, and memory stays bounded. docs/bad_images.md is this as a table."""

import io
import json
import os
import resource
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps

from ijepa_transformers.data import datasets as data_datasets
from ijepa_transformers.data import decoding
from ijepa_transformers.data.bad_images import BadImageLog
from ijepa_transformers.data.decoding import BadImageError, decode_image
from ijepa_transformers.data.sources import image_name, load_image_dataset
from tests import forked
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
from tests.runs import pretrain, rows


REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
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


def decoded(content, name="photo.jpg", num_channels=3):
    return decode_image({"bytes": content, "path": name}, num_channels)


def reason_of(value):
    with pytest.raises(BadImageError) as caught:
        decode_image(value)
    return caught.value.reason


# Contents


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
def test_what_is_no_image_is_a_bad_image_with_a_reason(name):
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
    """What simplejpeg and PIL make of a file: pixels, or the reason for refusing it."""
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


def test_simplejpeg_decodes_nothing_that_it_takes_for_another_size(monkeypatch):
    """Or an image beyond the limits could hide behind a header that PIL reads otherwise."""
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
    """PIL warns of what it repairs, without a file's name; in a run of a million images that hides everything else.
    The lines of libtiff come from C, and stay."""
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


# Things in a folder that are no readable file


def test_pipes_devices_and_missing_files_are_bad_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    assert "no regular file" in reason_of({"bytes": None, "path": str(tmp_path / "pipe.jpg")})
    assert "no regular file" in reason_of({"bytes": None, "path": "/dev/zero"})
    assert "no regular file" in reason_of({"bytes": None, "path": str(tmp_path)})
    assert "FileNotFoundError" in reason_of({"bytes": None, "path": str(tmp_path / "gone.jpg")})
    assert "null byte" in reason_of({"bytes": None, "path": "a\0b.jpg"})


def test_an_unreadable_file_is_a_bad_image(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(encoded(solid()))
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert "PermissionError" in reason_of({"bytes": None, "path": str(path)})


def nasty_folder(folder):
    """Writes sound and bad images under hostile names; returns the names of the bad ones, as they are listed."""
    folder.mkdir()
    for number, (make, *_) in enumerate(ACCEPTED.values()):
        (folder / f"{number:02}_unusual.jpg").write_bytes(make())
    bad = [write_bad(folder, f"{number:02}_bad.jpg", make()) for number, (make, _) in enumerate(REFUSED.values())]
    for name in (
        "new\nline.png",
        '"quoted".png',
        "<script>alert(1)<script>.png",
        "x" * 250 + ".png",
    ):
        bad.append(write_bad(folder, name, b"no image"))
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg" / "inside.png").write_bytes(encoded(photo()))
    (folder / "folder.jpg" / "circle").symlink_to(folder)
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    os.mkfifo(folder / "pipe.jpg")
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(encoded(photo()))
    (folder / os.fsdecode(b"bad caf\xe9.png")).write_bytes(b"no image")
    uri = "file://" + str(folder) + "/bad%20caf%E9.png"
    return {*bad, *(str(folder / f"{name}.jpg") for name in ("dangling", "circle", "pipe")), uri}


def write_bad(folder, name, content):
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_a_run_on_a_folder_of_nasty_files_trains_on_and_lists_exactly_the_bad_ones(tmp_path):
    folder = tmp_path / "photographs"
    bad = nasty_folder(folder)
    for number in range(-len(load_image_dataset(folder)) % 8):  # whole batches, so that an epoch meets every image
        (folder / f"{number:02}_good.jpg").write_bytes(encoded(photo(seed=number), "JPEG"))
    num_steps = len(load_image_dataset(folder)) // 8
    weights = pretrain(
        tmp_path / "run", data=folder, num_channels=3, max_bad_images=len(bad), max_steps=num_steps, save_steps=100
    )
    assert all(value.isfinite().all() for value in weights.values())
    records = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert all(set(record) == {"index", "name", "reason"} and record["reason"] for record in records)
    assert sorted(record["name"] for record in records) == sorted(bad)
    assert rows(tmp_path / "run")[-1]["bad_images"] == len(bad)


def test_every_nasty_file_is_decoded_or_listed_once(tmp_path):
    bad = nasty_folder(tmp_path / "photographs")
    dataset = load_image_dataset(tmp_path / "photographs")
    log = BadImageLog(tmp_path / "bad.jsonl", 500, dataset)
    images = data_datasets.ProcessedImages(dataset, None, 3)
    images.prepare = lambda array: array
    log.add(index for index in range(len(dataset)) if isinstance(images[index], str))
    log.add(range(0))
    records = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().split("\n")[:-1]]
    assert {record["name"] for record in records} == bad and len(records) == len(bad)
    good = {image_name(dataset, index) for index in range(len(dataset))} - bad
    assert "file://" + str(tmp_path) + "/photographs/caf%E9.png" in good  # decoded, whatever bytes its name has
    assert not any("circle/" in name for name in good)
    assert BadImageLog(tmp_path / "bad.jsonl", 500, dataset).indices == log.indices


def test_a_file_that_vanishes_after_the_listing_is_a_bad_image(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo()))
    dataset = load_image_dataset(tmp_path)
    (tmp_path / "0.png").unlink()
    log = BadImageLog(tmp_path / "bad.jsonl", 1, dataset)
    log.add([0])
    assert "FileNotFoundError" in json.loads((tmp_path / "bad.jsonl").read_text())["reason"]


def test_bad_rows_of_parquet_are_counted_like_bad_files(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / ".cache")
    contents = [encoded(photo(seed=number)) for number in range(21)] + [b"", b"no image", encoded(photo())[:-50]]
    table = datasets.Dataset.from_dict({"image": [{"bytes": content, "path": None} for content in contents]})
    (tmp_path / "shards").mkdir()
    table.to_parquet(tmp_path / "shards" / "train.parquet")
    pretrain(tmp_path / "run", data=tmp_path / "shards", num_channels=3, max_bad_images=3, max_steps=3)
    records = [json.loads(line) for line in (tmp_path / "run/bad_images.jsonl").read_text().splitlines()]
    assert [record["name"] for record in sorted(records, key=lambda record: record["index"])] == [
        "image 21",
        "image 22",
        "image 23",
    ]


def test_colours_of_sixteen_bits_lose_the_lower_eight():
    assert np.abs(decoded(rgb16_png())[0, 0].astype(int) - [250, 10, 20]).max() <= 1


def test_large_images_of_sixteen_bits_are_scaled_piece_by_piece(monkeypatch):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    monkeypatch.setattr(decoding, "_PIXELS_AT_A_TIME", 1000)
    assert np.array_equal(decoded(encoded(Image.fromarray(ramp)), num_channels=1)[..., 0], np.rint(ramp / 257))


def test_the_largest_image_is_decoded(monkeypatch):
    monkeypatch.setattr(decoding, "MAX_IMAGE_PIXELS", 2**20)
    assert decoded(gray_png(1024, 1024)).shape == (1024, 1024, 3)
