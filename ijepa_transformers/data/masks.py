# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds masks of a segmentation data set among the images: they are neither a class nor images to learn from."""

import re
from collections.abc import Sequence
from pathlib import Path

from .decoding import encoded_bytes, open_image


_MASK_NAMES = (
    *("mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "ground_truth", "seg"),
    *("segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimaps", "trimap", "depth"),
)
_PAIRS_LOOKED_AT = 3
_SINGLE_CHANNEL_MODES = ("1", "L", "P", "I", "I;16")
_NAME = "|".join(_MASK_NAMES)
_ENDING = re.compile(rf"(.+?)[ ._-]+(?:{_NAME})(?:[ ._-]*\d+)?", re.IGNORECASE)  # 7_mask, 7_mask_1
_BEGINNING = re.compile(rf"(?:{_NAME})[ ._-]+(.+)", re.IGNORECASE)  # mask_7


def refuse_mask_folders(folder: Path, files: Sequence[Path], classes: Sequence[str]) -> None:
    """Raises ValueError if the images of a class folder are masks of those of another."""
    by_class: dict[str, dict[str, Path]] = {}
    for file, name in zip(files, classes, strict=True):
        by_class.setdefault(name, {})[file.stem] = file
    if not 2 <= len(by_class) <= 8:
        return
    for images, others in ((images, others) for images in by_class for others in by_class if images != others):
        pairs = _pairs(by_class[images], by_class[others])
        if pairs and _are_masks(folder, images, others, pairs):
            raise ValueError(
                f"{str(folder)!r}: the images in {others!r} look like masks of those in {images!r}, not like a class;"
                f" name the folder of the images alone, such as {str(folder / pairs[0][0].parent)!r}"
            )


def _pairs(images: dict[str, Path], others: dict[str, Path]) -> list[tuple[Path, Path]]:
    """An image and the file that is called like it, if most of `others` are called like an image."""
    stems = {stem: stem if stem in images else stem.rpartition("_")[0] for stem in others}
    found = [(images[stem], others[other]) for other, stem in stems.items() if stem in images]
    return found[:_PAIRS_LOOKED_AT] if 2 * len(found) > len(others) else []


def _are_masks(folder: Path, images: str, others: str, pairs: list[tuple[Path, Path]]) -> bool:
    called_so = others.lower() in _MASK_NAMES and others.lower().rstrip("s") not in images.lower()
    return all(_may_be_mask(folder / image, folder / other, called_so) for image, other in pairs)


def _may_be_mask(image: Path, other: Path, called_so: bool) -> bool:
    """Whether a file has the size of an image, and is called a mask or is grey beside an image in colour."""
    header, other_header = _header(image), _header(other)
    if header is None or other_header is None or header[0] != other_header[0]:
        return False
    one_channel = other_header[1] in _SINGLE_CHANNEL_MODES and header[1] not in _SINGLE_CHANNEL_MODES
    return called_so or one_channel


def _header(path: Path) -> tuple[tuple[int, int], str] | None:
    """Width and height, and PIL's mode, of an image; None if it cannot be opened."""
    try:
        image = open_image(encoded_bytes({"bytes": None, "path": str(path)}))
        return image.size, image.mode
    except Exception:  # PIL raises errors of many classes; bad images are told of elsewhere
        return None


def refuse_mask_files(folder: Path, files: Sequence[Path]) -> None:
    """Raises ValueError if images are masks of those beside them: `7_mask.png` of `7.png`, or `7.png` of `7.jpg`."""
    for image, other, called_so in _pairs_beside(files):
        if _may_be_mask(folder / image, folder / other, called_so):
            raise ValueError(
                f"{str(folder)!r}: {str(other)!r} looks like a mask of {str(image)!r}, not like an image to learn"
                " from; move the masks out of this folder, or rename them if they are images"
            )


def _pairs_beside(files: Sequence[Path]) -> list[tuple[Path, Path, bool]]:
    """Some images, files in the same folder that may be masks of them, and whether these are called so."""
    by_stem: dict[tuple[Path, str], list[Path]] = {}
    by_start: dict[tuple[Path, str], Path] = {}  # 7_sat beside 7_mask
    for file in files:
        by_stem.setdefault((file.parent, file.stem), []).append(file)
        if not _stems_of_image(file.stem):
            by_start[file.parent, file.stem.rpartition("_")[0]] = file
    called_so, others = [], []
    for file in files:
        for key in ((file.parent, stem) for stem in _stems_of_image(file.stem)):
            if key in by_stem:
                called_so.append((by_stem[key][0], file, True))
            elif key in by_start:
                others.append((by_start[key], file, False))
    for same in by_stem.values():
        if len(same) == 2:
            others += [(same[0], same[1], False), (same[1], same[0], False)]
    return called_so[:_PAIRS_LOOKED_AT] + others[: 2 * _PAIRS_LOOKED_AT]


def _stems_of_image(stem: str) -> list[str]:
    """The names that an image may have if a file called `stem` is its mask."""
    return [match.group(1) for pattern in (_ENDING, _BEGINNING) if (match := pattern.fullmatch(stem))]
