"""The builders of image sets keep pixels and labels, keep training and test images apart, and write all or nothing."""

import gzip
import io
import struct
import sys
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from examples.datasets import (
    build_animals_and_plants,
    build_clip_art,
    build_fashion_mnist,
    build_photo_crops,
    build_solar_cells,
    build_surfaces,
)
from examples.datasets.build_clip_art import ROOT, read_drawing
from examples.datasets.build_photo_crops import SIDE, TILE, WIDTH
from ijepa_transformers.data.decoding import decode_image
from ijepa_transformers.data.sources import load_image_dataset


def write_idx_files(folder):
    """The four original files in small; split -> images and labels."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split, prefix, count in (("train", "train", 12), ("test", "t10k", 5)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + images.tobytes()))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(bytes(8) + labels.tobytes())
        arrays[split] = images, labels
    return arrays


def write_photographs(folder):
    """Photographs of black and white noise; class -> bits (height, WIDTH)."""
    generator, photographs = np.random.default_rng(0), {}
    for names in build_photo_crops.PHOTOGRAPHS.values():
        for name in names:
            path = folder / "usr/share" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            bits = generator.integers(0, 2, (2 * TILE, WIDTH)).astype(bool)
            Image.fromarray(bits).save(path, "PNG")  # whatever its name says: without loss
            photographs[build_photo_crops.class_name(path)] = bits
    return photographs


def save_drawing(path, seed, light=(240, 200, 90)):
    """A drawing of 64 x 64 pixels, another for every seed, without margins; `light` is one of its two colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    bits = np.random.default_rng(seed).integers(0, 2, (8, 8, 1)).repeat(8, axis=0).repeat(8, axis=1)
    Image.fromarray(np.where(bits, (10, 60, 20), light).astype(np.uint8)).save(path)


def write_clip_art(folder):
    """Families of each class: one drawing alone, one in two colours, three of a series; drawing -> family."""
    families = {}
    for label, folders in enumerate(build_clip_art.CLASSES.values()):
        for number in range(30):
            word = "abcdefghijklmnopqrstuvwxyz"[number % 26] * (1 + number // 26)
            names = [[f"{word}"], [f"{word}-sun", f"{word}-moon"], [f"{word}_thing_by_{maker}_1" for maker in "klm"]]
            for copy, name in enumerate(names[number % 3]):
                path = folder / ROOT / folders[0] / f"{name}.png"
                seed = [label, number, copy if number % 3 == 2 else 0]
                save_drawing(path, seed, light=(240, 200, 90 + 50 * copy))
                families[read_drawing(path).tobytes()] = (label, number)
    return families


def write_cells(folder, number=45):
    """A list of `number` cells and their images; the first pixel of an image is its place in the list."""
    (folder / build_solar_cells.ROOT / "images").mkdir(parents=True)
    lines = []
    for place in range(number):
        name = f"images/cell{place:04d}.png"
        Image.new("L", (30, 30), place).save(folder / build_solar_cells.ROOT / name)
        lines.append(f"{name}  {(place % 4) / 3}  {'mono' if place < 20 else 'poly'}\n")
    (folder / build_solar_cells.ROOT / "labels.csv").write_text("".join(lines))


def write_textures(folder):
    """An archive of textures of noise; class -> grey textures (96, 64)."""
    generator, textures = np.random.default_rng(0), {kind: [] for kind in build_surfaces.CLASSES}
    (folder / build_surfaces.ARCHIVE).parent.mkdir(parents=True)
    with zipfile.ZipFile(folder / build_surfaces.ARCHIVE, "w") as archive:
        for kind, words in build_surfaces.CLASSES.items():
            for number in range(8):
                texture = generator.integers(0, 256, (96, 64, 3), dtype=np.uint8)
                textures[kind].append(np.asarray(Image.fromarray(texture).convert("L")))
                save_in(archive, f"textures/tex_new/{words[number % len(words)]}_{number}.png", texture)
    return textures


FRONTS = ("ant.png", "ant-2.png", "bear_mirror.png", "bear.png", "cartoon/cat.png", *(f"{x}owl.png" for x in "cdef"))


def write_animals(folder):
    """Photographs of one colour, before a transparent margin, on backgrounds of one colour; colour -> its file."""
    colours = {}
    for label, folders in enumerate(build_animals_and_plants.CLASSES.values()):
        for number, name in enumerate(FRONTS):
            path = folder / build_animals_and_plants.STAMPS / folders[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            colours[250, label, number] = path
            front = Image.new("RGBA", (40, 30))
            front.paste((250, label, number, 255), (10, 5, 30, 25))
            front.save(path)
    for number, name in enumerate(name for names in build_animals_and_plants.BACKGROUNDS.values() for name in names):
        path = folder / "usr/share" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colours[10, number, 0] = path
        Image.new("RGB", (60, 50), (10, number, 0)).save(path, "PNG")
    for package in build_animals_and_plants.PACKAGES:
        path = folder / "usr/share/doc" / package / "copyright"
        path.parent.mkdir(parents=True)
        path.write_text(f"License of {package}: GPL-2+")
    return colours


def save_in(archive, name, pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    archive.writestr(name, buffer.getvalue())


@pytest.fixture
def few_files(monkeypatch):
    """Two photographs, two classes of clip art and of surfaces, and short blocks of cells, instead of many."""
    photographs = {"one-package": ["one/Sea.jpg"], "other-package": ["other/Wood/contents/images/2560x1600.jpg"]}
    monkeypatch.setattr(build_photo_crops, "PHOTOGRAPHS", photographs)
    monkeypatch.setattr(build_clip_art, "CLASSES", {"planets": ["sky", "-sky/stars"], "stars": ["sky/stars"]})
    monkeypatch.setattr(build_surfaces, "CLASSES", {"brick": ["brick", "bricks"], "wood": ["wood"]})
    monkeypatch.setattr(build_solar_cells, "BLOCK", 5)
    monkeypatch.setattr(build_animals_and_plants, "CLASSES", {"birds": ["birds"], "cars": ["cars"]})
    monkeypatch.setattr(build_animals_and_plants, "DRAWINGS", {"eowl"})
    monkeypatch.setattr(build_animals_and_plants, "COUNTS", {"train": 24, "test": 8})


BUILDERS = {
    build_animals_and_plants: write_animals,
    build_fashion_mnist: write_idx_files,
    build_photo_crops: write_photographs,
    build_clip_art: write_clip_art,
    build_solar_cells: write_cells,
    build_surfaces: write_textures,
}
every_builder = pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__.split(".")[-1])


def build(builder, folder, name="out", *words):
    """Runs a builder on the files in `folder`; split -> dataset."""
    builder.main(["--source", str(folder), "--output", str(folder / name), *words])
    return {split: load_image_dataset(str(folder / name), split=split) for split in ("train", "test")}


def images_of(dataset, num_channels=3):
    return [decode_image(row["image"], num_channels=num_channels) for row in dataset]


def error_of(builder, folder, capsys, *words):
    with pytest.raises(SystemExit) as stopped:
        builder.main(["--output", str(folder / "out"), *words])
    message = capsys.readouterr().err
    assert stopped.value.code != 0 and "Traceback" not in message and not (folder / "out").exists()
    return message


# All of them


@every_builder
def test_the_same_command_writes_the_same_bytes(builder, tmp_path, few_files):
    BUILDERS[builder](tmp_path)
    for name in ("first", "second"):
        build(builder, tmp_path, name)
    for split in ("train", "test"):
        assert (tmp_path / f"first/{split}.parquet").read_bytes() == (
            tmp_path / f"second/{split}.parquet"
        ).read_bytes()


@every_builder
@pytest.mark.parametrize("whole_files", [0, 1])
def test_both_files_are_there_or_none(builder, whole_files, tmp_path, few_files, monkeypatch):
    BUILDERS[builder](tmp_path)
    calls = []

    def write_half(dataset, path):
        calls.append(path)
        Path(path).write_bytes(b"PAR1")
        if len(calls) > whole_files:
            raise KeyboardInterrupt

    monkeypatch.setattr(datasets.Dataset, "to_parquet", write_half)
    with pytest.raises(KeyboardInterrupt):
        build(builder, tmp_path)
    assert len(calls) == whole_files + 1 and not list(tmp_path.glob("out/[!.]*"))


@every_builder
def test_a_source_that_is_not_there_is_named(builder, tmp_path, capsys):
    assert "nowhere' is not a folder" in error_of(builder, tmp_path, capsys, "--source", str(tmp_path / "nowhere"))


@every_builder
def test_a_file_in_place_of_the_folder_is_refused_before_anything_is_built(builder, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").touch()
    monkeypatch.setattr(builder, "source_folder", None)
    with pytest.raises(SystemExit):
        builder.main(["--output", str(tmp_path / "out")])
    assert "out' is a file, not a folder" in capsys.readouterr().err


@every_builder
def test_a_package_that_cannot_be_fetched_is_named_with_the_reason(builder, tmp_path, few_files, capsys, monkeypatch):
    for program in ("apt-get", "python"):
        (tmp_path / program).write_text('#!/bin/sh\necho "E: Unable to locate package" >&2\nexit 100\n')
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    package = getattr(builder, "PACKAGE", "one-package")
    owner, program = ("PyPI", "python") if "==" in package else ("Debian", "apt-get")
    wanted = f"{owner}'s package {package} cannot be fetched ({program}: Unable to locate package); name a --source."
    assert wanted in error_of(builder, tmp_path, capsys)


def test_packages_are_fetched_and_unpacked_without_a_source(tmp_path, few_files, monkeypatch):
    write_photographs(tmp_path / "packages")
    commands = {"apt-get": 'touch "$3_1.0_all.deb"', "dpkg-deb": f'mkdir -p "$3" && cp -r {tmp_path}/packages/* "$3"'}
    for name, script in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    build_photo_crops.main(["--output", str(tmp_path / "out"), "--train", "2", "--test", "1"])
    assert len(load_image_dataset(str(tmp_path / "out"), split="train")) == 4


def test_a_wheel_is_fetched_and_unpacked_without_a_source(tmp_path, few_files, monkeypatch):
    write_cells(tmp_path / "wheel")
    with zipfile.ZipFile(tmp_path / "elpv.whl", "w") as archive:
        for path in (tmp_path / "wheel").rglob("*.*"):
            archive.write(path, path.relative_to(tmp_path / "wheel"))
    (tmp_path / "python").write_text(f'#!/bin/sh\nmkdir wheels && cp "{tmp_path}/elpv.whl" wheels\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    build_solar_cells.main(["--output", str(tmp_path / "out")])
    assert len(load_image_dataset(str(tmp_path / "out"), split="train")) == 35


# Fashion-MNIST


def test_the_fashion_mnist_files_keep_every_pixel_and_label(tmp_path):
    arrays = write_idx_files(tmp_path)
    for split, dataset in build(build_fashion_mnist, tmp_path).items():
        images, labels = arrays[split]
        assert dataset["label"][:] == labels.tolist() and dataset.features["label"].names[9] == "ankle boot"
        for found, image in zip(images_of(dataset, num_channels=1), images, strict=True):
            assert np.array_equal(found[..., 0], image)


def test_missing_fashion_mnist_files_are_named(tmp_path, capsys):
    message = error_of(build_fashion_mnist, tmp_path, capsys, "--source", str(tmp_path))
    assert "holds no file train-images-idx*-ubyte.gz" in message


# Crops of photographs


def places_of(crops, photograph):
    """Top left corner in the photograph of each crop of noise, which is in one place only."""
    corners = np.lib.stride_tricks.sliding_window_view(photograph[: 1 - SIDE], (1, SIDE))  # of their first rows
    corners = {np.packbits(corners[index]).tobytes(): index[:2] for index in np.ndindex(corners.shape[:2])}
    found = [corners[np.packbits(crop[:1] > 128).tobytes()] for crop in crops]
    for crop, (top, left) in zip(crops, found, strict=True):
        assert np.array_equal(crop > 128, photograph[top : top + SIDE, left : left + SIDE])
    return np.array(found)


def test_a_crop_never_leaves_its_tile_and_no_tile_serves_both_splits(tmp_path, few_files):
    photographs = write_photographs(tmp_path)
    splits = build(build_photo_crops, tmp_path, "out", "--train", "60", "--test", "20")
    for label, name in enumerate(["Sea", "Wood"]):
        used = {}
        for split, dataset in splits.items():
            assert dataset.features["label"].names == ["Sea", "Wood"]
            crops = [
                image[..., 0] for image in images_of(dataset.filter(lambda row, label=label: row["label"] == label))
            ]
            corners = places_of(crops, photographs[name])
            assert np.array_equal(corners // TILE, (corners + SIDE - 1) // TILE)
            used[split] = {tuple(tile) for tile in corners // TILE}
        assert len(used["train"]) == 18 and len(used["test"]) == 6 and not used["train"] & used["test"]


def test_another_seed_draws_other_crops(tmp_path, few_files):
    write_photographs(tmp_path)
    words = ["--train", "4", "--test", "2", "--seed"]
    first, second = (images_of(build(build_photo_crops, tmp_path, seed, *words, seed)["test"]) for seed in "01")
    assert not any(np.array_equal(one, other) for one, other in zip(first, second, strict=True))


def test_brightness_and_contrast_tell_nothing(tmp_path, few_files):
    write_photographs(tmp_path)
    path = tmp_path / "usr/share/one/Sea.jpg"
    with Image.open(path) as image:
        image.convert("L").point(lambda level: 90 + level // 10).save(path, "PNG")
    crops = np.stack(images_of(build(build_photo_crops, tmp_path, "out", "--train", "5", "--test", "5")["train"]))
    assert np.allclose(crops.mean(axis=(1, 2, 3)), 128, atol=1) and np.allclose(crops.std(axis=(1, 2, 3)), 48, atol=1)


def test_a_photograph_that_is_missing_damaged_or_flat_is_named(tmp_path, few_files, capsys):
    write_photographs(tmp_path)
    path = tmp_path / "usr/share/other/Wood/contents/images/2560x1600.jpg"
    Image.new("L", (WIDTH, 2 * TILE), 77).save(path)
    words = ["--source", str(tmp_path), "--test", "7"]
    assert "2560x1600.jpg' has places for 0 of 240 train crops" in error_of(
        build_photo_crops, tmp_path, capsys, *words
    )
    path.write_bytes(path.read_bytes()[:300])
    assert "2560x1600.jpg' cannot be read as an image" in error_of(build_photo_crops, tmp_path, capsys, *words)
    path.unlink()
    assert "in Debian's package other-package" in error_of(build_photo_crops, tmp_path, capsys, *words)


@pytest.mark.parametrize("words", [["--train", "0"], ["--test", "-3"], ["--seed", "-1"]])
def test_counts_that_make_no_sense_are_refused(words, tmp_path, capsys):
    assert f"got {words[1]}" in error_of(build_photo_crops, tmp_path, capsys, *words)


# Clip art


def test_near_duplicates_are_on_one_side_and_a_fifth_is_for_the_test(tmp_path, few_files):
    families = write_clip_art(tmp_path)
    sides = {family: set() for family in families.values()}
    for split, dataset in build(build_clip_art, tmp_path).items():
        assert dataset.features["label"].names == ["planets", "stars"]
        assert dataset["label"][:].count(0) == dataset["label"][:].count(1) == {"train": 48, "test": 12}[split]
        for label, image in zip(dataset["label"][:], images_of(dataset), strict=True):
            family = families.pop(image.tobytes())  # each drawing once
            assert family[0] == label
            sides[family].add(split)
    assert not families and all(len(splits) == 1 for splits in sides.values())


def test_a_large_class_is_cut_in_whole_families(tmp_path, few_files, monkeypatch):
    monkeypatch.setattr(build_clip_art, "MOST_DRAWINGS", 20)
    families = write_clip_art(tmp_path)
    splits = build(build_clip_art, tmp_path)
    kept = [families[image.tobytes()] for dataset in splits.values() for image in images_of(dataset)]
    assert len(splits["test"]) == 8 and len(kept) == 40
    assert all(kept.count(family) == list(families.values()).count(family) for family in set(kept))


def test_a_drawing_in_two_classes_is_in_neither_and_one_that_is_there_twice_is_kept_once(tmp_path, few_files):
    families = write_clip_art(tmp_path)
    planets, stars = tmp_path / ROOT / "sky", tmp_path / ROOT / "sky/stars"
    save_drawing(planets / "both.png", seed=7)
    save_drawing(stars / "both.png", seed=7)
    save_drawing(planets / "twice" / "other.png", seed=[0, 0, 0])
    drawings = [
        image.tobytes() for dataset in build(build_clip_art, tmp_path).values() for image in images_of(dataset)
    ]
    assert sorted(drawings) == sorted(families)


def test_a_drawing_is_laid_on_white_and_made_square_without_its_margins(tmp_path):
    drawing = Image.new("RGBA", (100, 60), (0, 0, 0, 0))
    drawing.paste((200, 30, 30, 255), (20, 10, 84, 26))
    drawing.save(tmp_path / "bar.png")
    pixels = read_drawing(tmp_path / "bar.png")
    assert pixels.shape == (48, 48, 3) and (pixels[:16] == 255).all() and (pixels[-16:] == 255).all()
    assert (pixels[20:28] == (200, 30, 30)).all()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(tmp_path / "empty.png")
    assert read_drawing(tmp_path / "empty.png") is None


def test_a_huge_drawing_is_left_out_by_its_header(tmp_path, few_files):
    families = write_clip_art(tmp_path)
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", 100_000, 100_000)
    (tmp_path / ROOT / "sky/huge.png").write_bytes(header)
    assert sum(len(dataset) for dataset in build(build_clip_art, tmp_path).values()) == len(families)


def test_clip_art_that_is_missing_or_damaged_is_named(tmp_path, few_files, capsys):
    words = ["--source", str(tmp_path)]
    assert "There is no folder" in error_of(build_clip_art, tmp_path, capsys, *words)
    write_clip_art(tmp_path)
    path = tmp_path / ROOT / "sky/a.png"
    path.write_bytes(path.read_bytes()[:60])
    assert "a.png' cannot be read as an image" in error_of(build_clip_art, tmp_path, capsys, *words)
    path.write_text("a drawing")
    assert "a.png' is not a PNG" in error_of(build_clip_art, tmp_path, capsys, *words)
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    assert "holds no drawings" in error_of(build_clip_art, tmp_path, capsys, *words)


# Solar cells


def test_every_fourth_block_of_cells_is_for_the_test_and_the_order_is_kept(tmp_path, few_files):
    write_cells(tmp_path)
    splits = build(build_solar_cells, tmp_path, "out", "--size", "6")
    places = {"test": [*range(15, 20), *range(35, 40)]}
    places["train"] = [place for place in range(45) if place not in places["test"]]
    for split, dataset in splits.items():
        images = images_of(dataset, num_channels=1)
        assert [image[0, 0, 0] for image in images] == places[split] and images[0].shape == (6, 6, 1)
        assert dataset["label"][:] == [2 * (place >= 20) + (place % 4 > 0) for place in places[split]]
    assert splits["test"].features["label"].names[2] == "poly, intact"


def test_cells_that_are_missing_or_damaged_are_named(tmp_path, few_files, capsys):
    words, folder = ["--source", str(tmp_path)], tmp_path / build_solar_cells.ROOT
    assert "labels.csv'; the source must be elpv-dataset" in error_of(build_solar_cells, tmp_path, capsys, *words)
    write_cells(tmp_path, number=15)
    assert "lists 15 cells, too few" in error_of(build_solar_cells, tmp_path, capsys, *words)
    with open(folder / "labels.csv", "a") as file:
        file.write("images/cell0000.png 0.0 mono\n")
    (folder / "images/cell0003.png").write_bytes(b"no image")
    assert "cell0003.png' cannot be read as an image" in error_of(build_solar_cells, tmp_path, capsys, *words)
    for line in ("images/a.png 0.0 thin", "images/a.png often mono", "images/a.png"):
        (folder / "labels.csv").write_text(line)
        assert f"has the line {line!r}" in error_of(build_solar_cells, tmp_path, capsys, *words)


# Surfaces


def texture_of(crop, textures):
    """Class and number of the texture of noise that a crop is from."""
    for kind, of_kind in textures.items():
        for number, texture in enumerate(of_kind):
            corners = np.lib.stride_tricks.sliding_window_view(texture, (64, 64))[:, 0]
            same = [np.corrcoef(corner.ravel(), crop.ravel())[0, 1] > 0.99 for corner in corners]
            if any(same):
                return kind, number
    raise AssertionError("no texture has this crop")


def test_no_texture_serves_both_splits_of_surfaces(tmp_path, few_files):
    textures = write_textures(tmp_path)
    used = {}
    for split, dataset in build(build_surfaces, tmp_path, "out", "--train", "24", "--test", "8").items():
        crops = [image[..., 0] for image in images_of(dataset, num_channels=1)]
        assert np.allclose([crop.mean() for crop in crops], 128, atol=2)
        found = [texture_of(crop, textures) for crop in crops]
        names = dataset.features["label"].names
        assert [kind for kind, _ in found] == [names[label] for label in dataset["label"][:]]
        used[split] = set(found)
    assert len(used["train"]) == 12 and len(used["test"]) == 4 and not used["train"] & used["test"]


def test_variants_of_a_texture_are_of_one_family():
    names = ["grass003_way_hor.png", "grass003.jpg", "grass004.jpg", "grass_tall_a.jpg", "grass_tall_b.jpg"]
    families = [build_surfaces.family(Path("tex_nature") / name) for name in names]
    assert families[0] == families[1] and len(set(families)) == 4


def test_only_textures_of_the_kinds_that_hold_a_crop_are_taken(tmp_path, few_files):
    write_textures(tmp_path)
    with zipfile.ZipFile(tmp_path / build_surfaces.ARCHIVE, "a") as archive:
        for name in ("wood_1_nm.png", "door_1.png", "woodpile.png"):
            save_in(archive, f"textures/tex_new/{name}", np.zeros((64, 64), np.uint8))
        save_in(archive, "textures/tex_new/wood_9.png", np.zeros((64, 63), np.uint8))
    found = build_surfaces.find_textures(tmp_path / build_surfaces.ARCHIVE)
    assert len(found) == 17
    assert [path.name for path, _ in found if build_surfaces.read_texture(path) is None] == ["wood_9.png"]


def test_textures_that_are_missing_flat_or_damaged_are_named(tmp_path, few_files, capsys, monkeypatch):
    words, path = ["--source", str(tmp_path)], tmp_path / build_surfaces.ARCHIVE
    assert "the source must be ufoai-textures" in error_of(build_surfaces, tmp_path, capsys, *words)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no archive")
    assert "0textures.pk3' cannot be read (" in error_of(build_surfaces, tmp_path, capsys, *words)
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(8):
            save_in(archive, f"textures/tex_new/brick_{number}.png", np.full((64, 64), 30 * number, np.uint8))
    assert "holds no texture of wood" in error_of(build_surfaces, tmp_path, capsys, *words)
    monkeypatch.setattr(build_surfaces, "CLASSES", {"brick": ["brick"]})
    assert "textures of brick in a split have places for 0 crops" in error_of(build_surfaces, tmp_path, capsys, *words)
    with zipfile.ZipFile(path, "w") as archive:
        save_in(archive, "textures/tex_new/brick_9.png", np.zeros((64, 63), np.uint8))
    assert "holds no texture of at least 64 x 64 pixels" in error_of(build_surfaces, tmp_path, capsys, *words)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("textures/tex_new/brick_9.png", b"no image")
    assert "brick_9.png' cannot be read as an image" in error_of(build_surfaces, tmp_path, capsys, *words)


# Animals and plants


def test_photographs_in_front_and_behind_are_of_one_split_and_drawings_are_left_out(tmp_path, few_files):
    files = write_animals(tmp_path)
    used = {}
    for split, dataset in build(build_animals_and_plants, tmp_path, "out", "--side", "20").items():
        assert dataset.features["label"].names == ["birds", "cars"]
        images = images_of(dataset)
        fronts = [image[image[..., 0] == 250][0] for image in images]
        assert [front[1] for front in fronts] == dataset["label"][:]
        assert all((image[..., 0] == 250).sum() >= (0.55 * 20) ** 2 for image in images)  # without its margins
        behind = [image[image[..., 0] == 10][0] for image in images]
        used[split] = {files[tuple(int(value) for value in colour)] for colour in (*fronts, *behind)}
    assert not used["train"] & used["test"]
    names = {split: {path.name for path in paths if "tuxpaint" in str(path)} for split, paths in used.items()}
    assert names == {"test": {"ant.png", "ant-2.png"}, "train": {"bear.png", "cowl.png", "dowl.png", "fowl.png"}}


def test_the_licences_of_the_photographs_lie_beside_them_and_must_be_there(tmp_path, few_files, capsys):
    write_animals(tmp_path)
    build(build_animals_and_plants, tmp_path, "with")
    text = (tmp_path / "with/COPYRIGHT.txt").read_text()
    assert all(f"License of {package}: GPL-2+" in text for package in build_animals_and_plants.PACKAGES)
    (tmp_path / "usr/share/doc/mate-backgrounds/copyright").unlink()
    words = ["--source", str(tmp_path)]
    assert "which holds the licence" in error_of(build_animals_and_plants, tmp_path, capsys, *words)
