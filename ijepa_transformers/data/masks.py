# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds masks of a segmentation data set among the images: they are neither a class nor images to learn from.

A mask has the size of its image, and is grey where the image has colours, or is called a mask. Which image it belongs
to follows from their names: `masks/7.png` and `images/7.jpg`, `7_mask.png` and `7.png`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

from .decoding import encoded_bytes, open_image
from .splits import split_meaning


Header: TypeAlias = tuple[tuple[int, int], str]  # width and height, and PIL's mode
_MASK_NAMES = (
    *("mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "ground_truth", "seg"),
    *("segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimaps", "trimap", "depth"),
)
_MASK_WORDS = {*_MASK_NAMES, "labeled", "labelled", "truth"}
_IMAGE_WORDS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb", "sat", "input"}
_MOST_FOLDERS = 8  # side by side; more are classes
_MOST_FILES = 5000  # of a folder are compared by name
_PAIRS_LOOKED_AT = 3
_SINGLE_CHANNEL_MODES = ("1", "L", "P", "I", "I;16")
_NAME = "|".join(_MASK_NAMES)
_ENDING = re.compile(rf"(.+?)[ ._-]+(?:{_NAME})(?:[ ._-]*\d+)?", re.IGNORECASE)  # 7_mask, 7_mask_1
_BEGINNING = re.compile(rf"(?:{_NAME})[ ._-]+(.+)", re.IGNORECASE)  # mask_7
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SEPARATOR = re.compile(r"[ ._-]+")


def refuse_masks(
    source: str, files: Sequence[Path], header: Callable[[Path], Header | None], is_folder: bool = True
) -> None:
    """Raises ValueError if images are masks of others.

    Args:
        source: for the message.
        files: the images, relative to one folder.
        header: of one of them; None if it cannot be opened.
        is_folder: whether `source` is a folder, of which a part can be named.
    """
    for folders in _folders_side_by_side(files):
        images, others, pairs = _mask_folders(folders, header)
        if pairs:
            example = str(Path(source) / pairs[0][0].parent)
            advice = f"name the folder of the images alone, such as {example!r}" if is_folder else "take the masks out"
            raise ValueError(
                f"{source!r}: the images in {others!r} look like masks of those in {images!r}, not like a class;"
                f" {advice}"
            )
    _refuse_mask_files(source, files, header)


def header_of(path: Path) -> Header | None:
    """The header of an image file; None if it cannot be opened."""
    try:
        return header_in(encoded_bytes({"bytes": None, "path": str(path)}))
    except (OSError, ValueError):
        return None


def header_in(encoded: bytes) -> Header | None:
    """The header of an encoded image; None if it cannot be opened."""
    try:
        image = open_image(encoded)
        return image.size, image.mode
    except Exception:  # PIL raises errors of many classes; bad images are told of elsewhere
        return None


# Folders of masks


def _folders_side_by_side(files: Sequence[Path]) -> Iterator[dict[str, list[Path]]]:
    """Of each folder with a few folders in it: the images by folder, at any depth; "" has those beside the folders."""
    names: dict[tuple[str, ...], set[str]] = {}
    for file in files:
        for place in range(len(file.parts)):
            inside = names.setdefault(file.parts[:place], set())
            if len(inside) <= _MOST_FOLDERS:
                inside.add(file.parts[place] if place < len(file.parts) - 1 else "")
    found: dict[tuple[str, ...], dict[str, list[Path]]] = {
        above: {} for above, inside in names.items() if 2 <= len(inside) <= _MOST_FOLDERS
    }
    for file in files if found else ():
        for place in range(len(file.parts)):
            if file.parts[:place] in found:
                name = file.parts[place] if place < len(file.parts) - 1 else ""
                inside_folder = found[file.parts[:place]].setdefault(name, [])
                if len(inside_folder) < _MOST_FILES:
                    inside_folder.append(file)
    yield from list(found.values())[: 2 * _PAIRS_LOOKED_AT]


def _mask_folders(
    folders: dict[str, list[Path]], header: Callable[[Path], Header | None]
) -> tuple[str, str, list[tuple[Path, Path]]]:
    """The names of a folder of images and of one with their masks, and some pairs of an image and its mask."""
    for images, others in ((images, others) for images in folders for others in folders if images != others):
        if split_meaning(images) and split_meaning(others):
            continue
        called_so = bool(_words(others) & _MASK_WORDS) and not _words(images) & _MASK_WORDS
        pairs = _pairs(folders[images], folders[others])
        if not pairs and called_so and _words(images) & _IMAGE_WORDS:
            pairs = list(zip(folders[images], folders[others], strict=False))[:1]
        if all(_may_be_mask(header(image), header(other), called_so) for image, other in pairs) and pairs:
            return images, others, pairs
    return "", "", []


def _words(name: str) -> set[str]:
    """The words of a name in lower case: {"segmentation", "class"} of "SegmentationClass"."""
    return {name.lower(), *(word.lower() for word in _WORD.findall(name))}


def _pairs(images: list[Path], others: list[Path]) -> list[tuple[Path, Path]]:
    """Some images, each with the file that is called like it but for a word at its end or beginning, if most of
    `others` are called like one image each."""
    for cut_image in _CUTS:
        by_name = {cut_image(image.stem): image for image in images}
        if len(by_name) < len({image.stem for image in images}):
            continue  # without this word the images are called alike
        for cut in _CUTS:
            found = {cut(other.stem): other for other in others if cut(other.stem) in by_name}
            num_found = sum(cut(other.stem) in by_name for other in others)
            if 2 * num_found > len(others) and 2 * len(found) >= min(len(images), len(others)):
                return [(by_name[name], other) for name, other in found.items()][:_PAIRS_LOOKED_AT]
    return []


def _without_last(stem: str) -> str:
    return _SEPARATOR.split(stem[::-1], maxsplit=1)[-1][::-1]


_CUTS: tuple[Callable[[str], str], ...] = (
    lambda stem: stem,
    _without_last,
    lambda stem: _without_last(_without_last(stem)),  # 7_gtFine_labelIds
    lambda stem: _SEPARATOR.split(stem, maxsplit=1)[-1],
)


def _may_be_mask(image: Header | None, other: Header | None, called_so: bool) -> bool:
    """Whether a file has the size of an image, and is called a mask or is grey beside an image in colour."""
    if image is None or other is None or image[0] != other[0]:
        return False
    return called_so or (other[1] in _SINGLE_CHANNEL_MODES and image[1] not in _SINGLE_CHANNEL_MODES)


# Masks beside their images


def _refuse_mask_files(source: str, files: Sequence[Path], header: Callable[[Path], Header | None]) -> None:
    """Raises ValueError for `7_mask.png` of `7.png`, or `7.png` of `7.jpg`."""
    for image, other, called_so in _pairs_beside(files):
        if _may_be_mask(header(image), header(other), called_so):
            raise ValueError(
                f"{source!r}: {str(other)!r} looks like a mask of {str(image)!r}, not like an image to learn"
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
    if stem.lower() in _MASK_NAMES:  # mask.png beside image.png
        return sorted(_IMAGE_WORDS)
    return [match.group(1) for pattern in (_ENDING, _BEGINNING) if (match := pattern.fullmatch(stem))]
