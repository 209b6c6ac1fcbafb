#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds `surfaces`, grey crops of textures labelled by their material, from a package of Debian, without root:

    python examples/datasets/build_surfaces.py --output data/surfaces

The textures are those of the game UFO: Alien Invasion, in Debian's package ufoai-textures. The first word of a file's
name tells the material. Each texture is shrunk until its shorter side has at most 256 pixels, and crops of 64 x 64
pixels are drawn from it at random places.

- The crops are grey, and mean and contrast of every crop are equalised. Colour alone would give the class away.
- About a quarter of the textures of each class is for the test split. No texture is in both splits.
- Near duplicates are on the same side of the split. Two textures of a class are near duplicates if their grey 16 x 16
  thumbnails correlate by SAME_PICTURE or more, or if their names are the same up to the first number.

3,240 crops of 233 textures to train on, 810 crops of 79 textures to test on, 9 classes. The crops of one texture are
alike, so the sampling error of the test set is that of some 70 independent images, not of 810. Raw pixels at 32 x 32,
standardised: 20 nearest neighbours are right in 17 % of the test images, logistic regression from all crops in 15 %
(chance 11 %).

The images are a pure function of the package and `--seed`. They are not part of this repository: their licences are
those of the package.
"""

import re
import sys
import zipfile
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
from examples.datasets.near_duplicates import near_duplicates, split_groups


PACKAGE = "ufoai-textures"
ARCHIVE = "usr/share/games/ufoai/base/0textures.pk3"  # a ZIP file

SIDE = 64  # pixels of a crop
SHORTER_SIDE = 256  # pixels of a texture after shrinking; most of rock have 1,024 before
LEAST_CONTRAST = 4.0  # grey levels of standard deviation; flatter crops show nothing, and others are drawn
ATTEMPTS = 50  # places tried for each crop wanted
SAME_PICTURE = 0.7  # correlation; down to it, the pairs of the same class are variants of one texture
TEST_SHARE = 0.25  # of the textures of a class

# Class -> first words of the files' names.
CLASSES = {
    "brick": ["brick", "bricks"],
    "carpet": ["carpet"],
    "concrete": ["conc", "concrete"],
    "dirt": ["dirt"],
    "grass": ["grass"],
    "metal": ["metal", "metall"],
    "rock": ["pjrock", "rock", "rocks"],
    "tiles": ["tile", "tiles"],
    "wood": ["wood"],
}
NO_COLOURS = re.compile(r"_(nm|sm|gm)$")  # maps of normals, of gloss and of glow, which belong to another texture


def find_textures(path: Path) -> list[tuple[zipfile.Path, int]]:
    """File and class of every texture of one of the CLASSES, in the order of their names.

    Raises:
        ValueError: if the archive is missing or damaged, or a class has no texture.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {str(path)!r}; the source must be {PACKAGE}, unpacked.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png")))
    except zipfile.BadZipFile as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error}).") from error
    label_of = {word: label for label, words in enumerate(CLASSES.values()) for word in words}
    found = []
    for name in names:
        stem = Path(name).stem.lower()
        label = label_of.get(re.split(r"[^a-z]", stem)[0])
        if label is not None and not NO_COLOURS.search(stem):
            found.append((zipfile.Path(path, name), label))
    for label, kind in enumerate(CLASSES):
        if label not in {found_label for _, found_label in found}:
            raise ValueError(f"{str(path)!r} holds no texture of {kind}.")
    return found


def read_texture(path: zipfile.Path) -> np.ndarray | None:
    """Grey levels (H, W), uint8, whose shorter side is at most SHORTER_SIDE. None if a crop does not fit.

    Raises:
        ValueError: if the file is damaged.
    """
    grey = read_image(path, "RGBA").convert("L")
    factor = min(1.0, SHORTER_SIDE / min(grey.size))
    size = (round(grey.width * factor), round(grey.height * factor))
    return np.asarray(grey.resize(size, Image.Resampling.LANCZOS)) if min(size) >= SIDE else None


def family(path: zipfile.Path) -> str:
    """Folder and name up to the first number: `grass003_way_hor` and `grass003_way_vert` are both `grass003`."""
    stem, number = path.name.rpartition(".")[0], re.match(r"\D*\d+", path.name)
    return f"{path.parent.name}/{number.group() if number else stem}"


def draw_crops(textures: list[np.ndarray], count: int, generator: np.random.Generator) -> list[np.ndarray]:
    """`count` crops (SIDE, SIDE), uint8, of the textures in turn, each at a random place; fewer if all are flat."""
    crops = []
    for attempt in range(ATTEMPTS * count if textures else 0):
        if len(crops) == count:
            break
        texture = textures[attempt % len(textures)]
        top, left = (generator.integers(0, side - SIDE + 1) for side in texture.shape)
        crop = texture[top : top + SIDE, left : left + SIDE].astype(np.float32)
        if crop.std() >= LEAST_CONTRAST:
            equalised = 128 + 48 * (crop - crop.mean()) / crop.std()
            crops.append(equalised.round().clip(0, 255).astype(np.uint8))
    return crops


def read_textures(path: Path) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
    """Grey textures (H, W) that hold a crop, N of them, their labels (N,) and their families.

    Raises:
        ValueError: if textures are missing or damaged, or all are too small.
    """
    read = [(read_texture(file), label, family(file)) for file, label in find_textures(path)]
    kept = [(texture, label, name) for texture, label, name in read if texture is not None]
    if not kept:
        raise ValueError(f"{str(path)!r} holds no texture of at least {SIDE} x {SIDE} pixels.")
    return [row[0] for row in kept], np.array([row[1] for row in kept]), [row[2] for row in kept]


def crops_of_classes(textures: list[np.ndarray], labels: np.ndarray, count: int, seed: list[int]) -> datasets.Dataset:
    """`count` crops of each class, class after class.

    Raises:
        ValueError: if the textures of a class show too little.
    """
    crops: list[np.ndarray] = []
    for label, kind in enumerate(CLASSES):
        of_class = [texture for texture, found in zip(textures, labels, strict=True) if found == label]
        drawn = draw_crops(of_class, count, np.random.default_rng([*seed, label]))
        if len(drawn) < count:
            raise ValueError(f"The {len(of_class)} textures of {kind} in a split have places for {len(drawn)} crops.")
        crops += drawn
    return as_dataset(crops, [label for label in range(len(CLASSES)) for _ in range(count)], list(CLASSES))


def build(source: Path, counts: dict[str, int], seed: int) -> dict[str, datasets.Dataset]:
    """A dataset for each split, with `counts[split]` crops of each class.

    Raises:
        ValueError: if textures are missing or damaged, or those of a class show too little.
    """
    textures, labels, names = read_textures(source / ARCHIVE)
    chosen = split_groups(labels, near_duplicates(textures, labels, names, SAME_PICTURE), TEST_SHARE, seed)
    return {
        split: crops_of_classes(
            [textures[place] for place in places], labels[places], counts[split], [seed, split == "test"]
        )
        for split, places in chosen.items()
    }


def main(words: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0], f"folder of {PACKAGE} unpacked, instead of downloading it")
    parser.add_argument("--train", type=at_least(1), default=360, help="training crops of a class")
    parser.add_argument("--test", type=at_least(1), default=90, help="test crops of a class")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the split and of the places of the crops")
    arguments = parser.parse_args(words)
    counts = {"train": arguments.train, "test": arguments.test}
    with errors_in_one_sentence(parser):
        with source_folder(arguments.source, [PACKAGE]) as source:
            splits = build(source, counts, arguments.seed)
        write_splits(splits, Path(arguments.output))


if __name__ == "__main__":
    main()
