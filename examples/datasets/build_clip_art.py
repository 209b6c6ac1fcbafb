#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds `clip_art`, small coloured drawings labelled by what they show, from a package of Debian, without root:

    python examples/datasets/build_clip_art.py --output data/clip_art

The drawings are those of the Open Clip Art Library (public domain) in Debian's package openclipart-png; a class is one
or a few of its folders. Each drawing is laid on white, freed of its margins, made square with white, and scaled to
48 x 48 pixels.

- A drawing filed under two classes is in neither; one that is there twice is kept once; files above MOST_PIXELS are
  left out, by their headers.
- Near duplicates are on the same side of the split. Two drawings of a class are near duplicates if their grey 16 x 16
  thumbnails correlate by SAME_PICTURE or more, or if the first two words of their file names are the same, digits
  and words for colours and directions apart; groups are what hangs together by such pairs.
- About a fifth of every class is for the test split; no class has more than MOST_DRAWINGS in all.

2,264 drawings to train on, 564 to test on, 16 classes. Raw pixels, standardised: 20 nearest neighbours are right in
41 % of the test images, logistic regression from 5 drawings of each class in 19 %; the largest class is 11 %.

The images are a pure function of the package and `--seed`. They are not part of this repository.
"""

import re
import struct
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
from examples.datasets.near_duplicates import near_duplicates, split_groups


PACKAGE = "openclipart-png"
ROOT = "usr/share/openclipart/png"

SIDE = 48  # pixels of an image
MOST_PIXELS = 4_000_000  # of a file; 20 of 8,121 have more, up to hundreds of millions
LIGHTEST_INK = 249  # grey level; lighter margins are cut off
SAME_PICTURE = 0.97  # correlation; from .96 down striped flags make one chain of 90 and more
MOST_DRAWINGS = 300  # of a class
TEST_SHARE = 0.2

# Class -> folders under ROOT, each with all that is below it, but without the folders after "-".
CLASSES = {
    "animals": ["animals"],
    "arrows": ["shapes/arrows"],
    "devices": ["computer/hardware", "electronics"],
    "flags": ["signs_and_symbols/flags", "-signs_and_symbols/flags/semaphore"],
    "food": ["food"],
    "green icons": ["computer/icons/lemon-theme"],
    "grey icons": ["computer/icons/flat-theme"],
    "maps": ["geography", "-geography/astronomy"],
    "music": ["recreation/music"],
    "office": ["education", "office"],
    "patterns": ["special/patterns"],
    "people": ["people", "-people/clothing", "-people/smilies"],
    "plants": ["plants"],
    "signs": ["signs_and_symbols/map_symbols", "transportation/aiga-symbols", "transportation/roadsigns"],
    "tools": ["tools"],
    "vehicles": ["transportation", "-transportation/aiga-symbols", "-transportation/roadsigns"],
}
# Words of a file's name that tell variants of a drawing apart; "bw" is black and white.
VARIANTS = (
    "b black blue brown bw cyan dark gold gray green grey light magenta orange pink purple red silver w white yellow"
    " down left right up"
)


def find_files(root: Path, folders: list[str]) -> list[Path]:
    """The files of a class.

    Raises:
        ValueError: if a folder is missing.
    """
    found = {"": set(), "-": set()}
    for name in folders:
        folder = root / name.removeprefix("-")
        if not folder.is_dir():
            raise ValueError(f"There is no folder {str(folder)!r}; the source must be {PACKAGE}, unpacked.")
        found["-" if name.startswith("-") else ""].update(folder.rglob("*.png"))
    return sorted(found[""] - found["-"])


def pixel_count(path: Path) -> int:
    """Of a PNG, from its header.

    Raises:
        ValueError: if the file is no PNG.
    """
    with open(path, "rb") as file:
        header = file.read(24)
    if len(header) < 24 or header[12:16] != b"IHDR":
        raise ValueError(f"{str(path)!r} is not a PNG.")
    width, height = struct.unpack(">II", header[16:24])
    return width * height


def read_drawing(path: Path) -> np.ndarray | None:
    """The drawing on white, without margins, square: (SIDE, SIDE, 3), uint8. None if nothing is to be seen."""
    drawing = read_image(path, "RGBA")
    paper = Image.new("RGBA", drawing.size, "white")
    paper.alpha_composite(drawing)
    drawing = paper.convert("RGB")
    margins = drawing.convert("L").point(lambda level: 255 * (level <= LIGHTEST_INK)).getbbox()
    if margins is None:
        return None
    drawing = drawing.crop(margins)
    side = max(drawing.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(drawing, ((side - drawing.width) // 2, (side - drawing.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def series(path: Path) -> str:
    """The first two words of the file's name, but for digits and VARIANTS: `bullet_hole_linda_kim_r` ends at "hole".

    (The author's name that follows is cut off anywhere.)
    """
    words = [word for word in re.split(r"[^a-z]+", path.stem.lower()) if word and word not in VARIANTS.split()]
    return " ".join(words[:2]) or path.stem


def read_drawings(root: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, SIDE, SIDE, 3), labels (N,) and series of the drawings, each once, that are of one class only."""
    found: dict[bytes, tuple[np.ndarray, set[int], str]] = {}
    for label, folders in enumerate(CLASSES.values()):
        for path in find_files(root, folders):
            drawing = read_drawing(path) if pixel_count(path) <= MOST_PIXELS else None
            if drawing is not None:
                found.setdefault(drawing.tobytes(), (drawing, set(), series(path)))[1].add(label)
    kept = [(drawing, *labels, name) for drawing, labels, name in found.values() if len(labels) == 1]
    if not kept:
        raise ValueError(f"{str(root)!r} holds no drawings.")
    drawings, labels, names = zip(*kept, strict=True)
    return np.stack(drawings), np.array(labels), list(names)


def build(source: Path, seed: int) -> dict[str, datasets.Dataset]:
    drawings, labels, names = read_drawings(source / ROOT)
    groups = near_duplicates(drawings, labels, names, SAME_PICTURE)
    splits = split_groups(labels, groups, TEST_SHARE, seed, most=MOST_DRAWINGS)
    return {split: as_dataset(drawings[chosen], labels[chosen], list(CLASSES)) for split, chosen in splits.items()}


def main(words: list[str] | None = None) -> None:
    parser = command_line(__doc__.splitlines()[0], f"folder of {PACKAGE} unpacked, instead of downloading it")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the split")
    arguments = parser.parse_args(words)
    with errors_in_one_sentence(parser):
        with source_folder(arguments.source, [PACKAGE]) as source:
            splits = build(source, arguments.seed)
        write_splits(splits, Path(arguments.output))


if __name__ == "__main__":
    main()
