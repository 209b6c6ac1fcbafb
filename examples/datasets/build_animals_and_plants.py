#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds `animals_and_plants`, coloured photographs that may be shown, from packages of Debian, without root:

    python examples/datasets/build_animals_and_plants.py --output data/animals_and_plants

Each image is a photograph of an animal, a fruit, a vegetable, a flower or a vehicle, without its own background, on a
part of a photograph of a landscape or of plants. The class is what the photograph in front shows.

- The photographs in front are the stamps of the painting program Tux Paint (Debian's package tuxpaint-stamps-default).
  Drawings are left out.
- The backgrounds are wallpapers of the MATE desktop and of Plasma (mate-backgrounds, plasma-workspace-wallpapers).
- Size, place and side (left or right) of the photograph in front are random.
- About a fifth of the photographs of each class, and of the backgrounds, is for the test split. None is in both.
  Photographs whose names are the same up to the first number or hyphen are on the same side.

The licence of all these photographs is the GNU General Public License, version 2 or later. Pictures made from them may
be shown under the same licence. The builder writes the copyright files of the packages beside the images. The images
are a pure function of the packages and the arguments. They are not part of this repository.
"""

import re
import sys
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from examples.datasets.building import (
    as_dataset,
    at_least,
    command_line,
    errors_in_one_sentence,
    read_image,
    source_folder,
    write_splits,
)
from ijepa_transformers.files import write_text


STAMPS = "usr/share/tuxpaint/stamps"
# Class -> folders under STAMPS.
CLASSES = {
    "birds": ["animals/birds"],
    "fish": ["animals/fish", "animals/mammals/aquatic"],
    "flowers": ["plants/flowers"],
    "fruit": ["food/fruit"],
    "hoofed animals": ["animals/mammals/bovines", "animals/mammals/camel", "animals/mammals/deer"],
    "insects": ["animals/insects"],
    "mammals with paws": ["animals/mammals/bears", "animals/mammals/cats", "animals/mammals/dogs"],
    "rodents": ["animals/mammals/rodents"],
    "vegetables": ["food/vegetables", "plants/mushrooms"],
    "vehicles": ["vehicles"],
}
NO_PHOTOGRAPHS = {"cartoon", "plastic", "toys"}  # folders
DRAWINGS = {"hedgehog", "7spoke256", "wheel_tractor", "shrimp", "albino_peahen"}  # or hardly anything to see
# Photographs as backgrounds, by package; names under usr/share.
BACKGROUNDS = {
    "mate-backgrounds": [
        f"backgrounds/mate/nature/{name}.jpg"
        for name in ("Blinds", "Dune", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm", "TwoWings", "Wood")
    ],
    "plasma-workspace-wallpapers": [
        f"wallpapers/{name}/contents/images/2560x1600.jpg"
        for name in ("Autumn", "BytheWater", "EveningGlow", "FallenLeaf", "OneStandsOut", "Path")
    ],
}
PACKAGE = "tuxpaint-stamps-default"
PACKAGES = [PACKAGE, *BACKGROUNDS]
COUNTS = {"train": 4000, "test": 800}  # images of the splits, unless the command line says otherwise
TEST_EVERY = 5  # every fifth family of photographs is for the test split
LONGER_SIDE = (0.6, 0.95)  # of the photograph in front, as a share of the image's side
BACKGROUND_SIDES = 3.0  # the shorter side of a background, as a multiple of the image's side


def find_photographs(root: Path, folders: list[str]) -> list[Path]:
    """The photographs of a class, in the order of their names.

    Raises:
        ValueError: if a folder is missing.
    """
    found = []
    for name in folders:
        if not (root / name).is_dir():
            raise ValueError(f"There is no folder {str(root / name)!r}; it is in Debian's package {PACKAGE}.")
        for path in (root / name).rglob("*.png"):
            is_drawing = NO_PHOTOGRAPHS & set(path.parts) or path.stem in DRAWINGS or "_mirror" in path.stem
            if not is_drawing:
                found.append(path)
    return sorted(found, key=lambda path: (path.stem, path))


def family(path: Path) -> str:
    """The name up to the first number or hyphen: `lion` and `lion-2` are both `lion`.

    A wallpaper in several sizes is named by its folder.
    """
    name = path.parents[2].name if path.stem == "2560x1600" else path.stem
    return re.split(r"[-_]?\d|-", name.lower())[0]


def of_split(paths: list[Path], split: str) -> list[Path]:
    """The photographs of a split: every fifth family is for testing."""
    names = list(dict.fromkeys(map(family, paths)))
    return [path for path in paths if (names.index(family(path)) % TEST_EVERY == 0) == (split == "test")]


def read_front(path: Path) -> Image.Image:
    """The photograph, RGBA, without transparent margins."""
    image = read_image(path, "RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        raise ValueError(f"{str(path)!r} shows nothing.")
    return image.crop(box)


def read_background(path: Path, side: int) -> Image.Image:
    """The photograph, RGB, whose shorter side is BACKGROUND_SIDES times as long as an image."""
    image = read_image(path, "RGB")
    factor = BACKGROUND_SIDES * side / min(image.size)
    size = max(side, round(factor * image.width)), max(side, round(factor * image.height))
    return image.resize(size, Image.Resampling.LANCZOS)


def compose(front: Image.Image, background: Image.Image, side: int, generator: np.random.Generator) -> np.ndarray:
    """One image (side, side, 3), uint8."""
    left, top = (int(generator.integers(0, length - side + 1)) for length in background.size)
    image = background.crop((left, top, left + side, top + side))
    factor = side * generator.uniform(*LONGER_SIDE) / max(front.size)
    front = front.resize([max(1, round(factor * length)) for length in front.size], Image.Resampling.LANCZOS)
    if generator.random() < 0.5:
        front = front.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, top = (int(generator.integers(0, side - length + 1)) for length in front.size)
    image.paste(front, (left, top), front)
    return np.asarray(image)


def build(source: Path, counts: dict[str, int], side: int, seed: int) -> dict[str, datasets.Dataset]:
    """A dataset for each split, with `counts[split]` images, of the classes in turn.

    Raises:
        ValueError: if photographs are missing or damaged.
    """
    photographs = [find_photographs(source / STAMPS, folders) for folders in CLASSES.values()]
    scenes = [source / "usr/share" / name for names in BACKGROUNDS.values() for name in names]
    splits = {}
    for split, count in counts.items():
        fronts = [of_split(paths, split) for paths in photographs]
        splits[split] = _build_split(fronts, of_split(scenes, split), count, side, [seed, split == "test"])
    return splits


def _build_split(
    photographs: list[list[Path]], scenes: list[Path], count: int, side: int, seed: list[int]
) -> datasets.Dataset:
    for kind, paths in zip(CLASSES, photographs, strict=True):
        if not paths:
            raise ValueError(f"There are too few photographs of {kind} for two splits.")
    generator = np.random.default_rng(seed)
    fronts = [[read_front(path) for path in paths] for paths in photographs]
    backgrounds = [read_background(path, side) for path in scenes]
    labels = [number % len(fronts) for number in range(count)]
    images = []
    for number, label in enumerate(labels):
        front = fronts[label][number // len(fronts) % len(fronts[label])]
        background = backgrounds[int(generator.integers(len(backgrounds)))]
        images.append(compose(front, background, side, generator))
    return as_dataset(images, labels, list(CLASSES))


def copyright_text(source: Path) -> str:
    """The copyright files of the packages, one after the other.

    Raises:
        ValueError: if one is missing.
    """
    texts = []
    for package in PACKAGES:
        path = source / "usr/share/doc" / package / "copyright"
        if not path.is_file():
            raise ValueError(f"There is no file {str(path)!r}, which holds the licence of the photographs.")
        texts.append(f"Debian's package {package}\n\n{path.read_text(encoding='utf-8', errors='replace').strip()}\n")
    return "\n\n".join(texts)


def main(words: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0], "folder of the packages unpacked, instead of downloading them")
    parser.add_argument("--train", type=at_least(1), default=COUNTS["train"], help="training images")
    parser.add_argument("--test", type=at_least(1), default=COUNTS["test"], help="test images")
    parser.add_argument("--side", type=at_least(16), default=96, help="pixels of a side of an image")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of sizes, places and backgrounds")
    arguments = parser.parse_args(words)
    counts = {"train": arguments.train, "test": arguments.test}
    with errors_in_one_sentence(parser):
        with source_folder(arguments.source, PACKAGES) as source:
            licence = copyright_text(source)
            splits = build(source, counts, arguments.side, arguments.seed)
        write_splits(splits, Path(arguments.output))
        write_text(Path(arguments.output) / "COPYRIGHT.txt", licence)


if __name__ == "__main__":
    main()
