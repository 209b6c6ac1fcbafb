# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds masks of a segmentation data set among the images: they are neither a class nor images to learn from.

A mask is called a mask, is grey where the image has colours, or consists of areas of few values where the image does
not. If the image has such areas too, as on a black background, the mask must show the areas of its own image better
than those of others. Which image it belongs to follows from their names: `masks/7.png` and `images/7.jpg`,
`7_mask.png` and `7.png`.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from PIL import Image

from .decoding import MAX_IMAGE_PIXELS, StoredImage, encoded_bytes, open_image
from .paths import parent_of, parents_of, stem_of
from .splits import split_meaning


_Pair: TypeAlias = tuple[str, str, bool]  # an image, a file that may be its mask, and whether this is called so
_MASK_NAMES = (
    *("mask", "masks", "annotation", "annotations", "label", "labels", "gt", "groundtruth", "ground_truth", "seg"),
    *("segmentation", "segmentations", "segmentationclass", "segmentationobject", "trimaps", "trimap", "depth"),
)
_MASK_WORDS = {*_MASK_NAMES, "labeled", "labelled", "truth"}
_IMAGE_WORDS = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "rgb", "sat", "input"}
_MOST_FOLDERS = 8  # side by side; more are classes
_MOST_FILES = 5000  # of a folder are compared by name
_PAIRS_LOOKED_AT = 3
_PAIRS_COMPARED = 8  # with one another
_SHARE_OF_OWN = 0.75  # of the compared masks must fit their own image best
_ON_BLACK = 0.5  # of the pixels of a mask
_FEW_VALUES = 16  # in a mask. MNIST's digits have about a hundred
_VERY_FEW_VALUES = 8  # in a mask that need not fit its image
_CLEARLY = 2.0  # standard errors
_FEW_LEVELS = 4  # values that are frequent in a mask to which JPEG has given more
_MANY_VALUES = 32  # in an image
_ROWS_LOOKED_AT = 512  # of an image
_FLAT = 0.8  # of the pixels of a mask have the value of the pixel beside them
_MUCH_OF_A_PHOTOGRAPH = 0.5  # likewise
_BINS = 32  # of values
_SHARE_OF_BIN = 0.005  # of the pixels; bins with fewer do not count, because JPEG writes some beside every edge
_SINGLE_CHANNEL_MODES = ("1", "L", "P", "I", "I;16")
_NAME = "|".join(_MASK_NAMES)
_ENDING = re.compile(rf"(.+?)[ ._-]+(?:{_NAME})(?:[ ._-]*\d+)?", re.IGNORECASE)  # 7_mask, 7_mask_1
_BEGINNING = re.compile(rf"(?:{_NAME})[ ._-]+(.+)", re.IGNORECASE)  # mask_7
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_SEPARATOR = re.compile(r"[ ._-]+")


class Header(NamedTuple):
    """Width and height of an image, and PIL's mode."""

    size: tuple[int, int]
    mode: str

    @property
    def is_grey(self) -> bool:
        return self.mode in _SINGLE_CHANNEL_MODES


class _Looks:
    """What images look like. Each is read once for its header, and once or twice for its pixels.

    Args:
        read: the stored image of a path.
    """

    def __init__(self, read: Callable[[str], StoredImage]):
        self._read = read
        self._headers: dict[str, Header | None] = {}
        self._areas: dict[str, tuple[float, int]] = {}
        self._planes: dict[str, np.ndarray] = {}

    def header(self, path: str) -> Header | None:
        """None if it cannot be opened. Bad images are told of elsewhere."""
        if path not in self._headers:
            image = self._open(path)
            self._headers[path] = None if image is None else Header(image.size, image.mode)
        return self._headers[path]

    def is_drawn(self, image: str, other: str, called_so: bool) -> bool:
        """Whether `other` consists of areas of few values, and `image` has at least twice as many values.

        Without the name of a mask, `image` must not have such areas: digits of two classes have, on black. And `other`
        must have few values: smooth digits have areas, and many values on their edges.
        """
        flat, num_levels = self._areas_of(other)
        flat_of_image, num_levels_of_image = self._areas_of(image)
        if flat < _FLAT or 2 * num_levels > num_levels_of_image:
            return False
        return called_so or (flat_of_image < _MUCH_OF_A_PHOTOGRAPH and self._has_few_values(other))

    def _has_few_values(self, mask: str) -> bool:
        """Whether a mask has few values, or more that JPEG has made of them."""
        return len(np.unique(self._plane(mask))) <= _FEW_VALUES or self._areas_of(mask)[1] <= _FEW_LEVELS

    def fit_together(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether in these pairs of an image and another file the other files are masks. Then nearly each of them
        explains its own image better than all others do."""
        pairs = pairs[:_PAIRS_COMPARED]
        if len(pairs) < _PAIRS_LOOKED_AT or not all(self._may_be_mask(*pair) for pair in pairs):
            return False
        own = 0
        for place, (image, _) in enumerate(pairs):
            explained = [_explained(self._plane(image), self._plane(mask)) for _, mask in pairs]
            own += explained[place] > max(explained[:place] + explained[place + 1 :])
        return own >= _SHARE_OF_OWN * len(pairs)

    def are_clear(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Whether pairs that look like a grey image and its mask have masks of very few values, or masks that explain
        their own images better than the others do. Smooth digits have more values, and explain nothing."""
        pairs = [pair for pair in pairs[:_PAIRS_COMPARED] if all(self._plane(path).size for path in pair)]
        masks = [self._plane(mask) for _, mask in pairs]
        are_equal = all(np.array_equal(mask, masks[0]) for mask in masks)
        if are_equal or all(len(np.unique(mask)) <= _VERY_FEW_VALUES for mask in masks):
            return True
        better = []
        for place, (image, _) in enumerate(pairs):
            explained = [_explained(self._plane(image), mask) for mask in masks]
            better.append(explained[place] - np.mean(explained[:place] + explained[place + 1 :]))
        return bool(np.mean(better) > _CLEARLY * np.std(better, ddof=1) / len(better) ** 0.5)

    def _may_be_mask(self, image: str, other: str) -> bool:
        """Whether `other` has few values, in areas on black, and `image` has many and the same aspect ratio."""
        if self._areas_of(other)[0] < _FLAT:
            return False
        mask, plane = self._plane(other), self._plane(image)
        if not mask.size or not plane.size or (mask == 0).mean() < _ON_BLACK or len(np.unique(mask)) > _FEW_VALUES:
            return False
        one, two = self.header(image), self.header(other)
        if one is None or two is None or len(np.unique(plane)) < _MANY_VALUES:
            return False
        difference = abs(one.size[0] * two.size[1] - one.size[1] * two.size[0])
        return difference <= max(*one.size, *two.size)  # a smaller mask has rounded sides

    def _plane(self, path: str) -> np.ndarray:
        """Some rows and columns of the first channel; empty if the image cannot be read."""
        if path not in self._planes:
            image, self._planes[path] = self._open(path), np.zeros((0, 0))
            try:
                if image is not None and image.width * image.height <= MAX_IMAGE_PIXELS:
                    pixels = np.asarray(image)
                    rows, columns = (max(1, size // _ROWS_LOOKED_AT) for size in pixels.shape[:2])
                    pixels = pixels[::rows, ::columns]
                    self._planes[path] = pixels.reshape(*pixels.shape[:2], -1)[..., 0].copy()
            except Exception:  # damaged behind its header
                pass
        return self._planes[path]

    def _open(self, path: str) -> Image.Image | None:
        try:
            return open_image(encoded_bytes(self._read(path)))
        except Exception:  # PIL raises errors of many classes
            return None

    def _areas_of(self, path: str) -> tuple[float, int]:
        if path not in self._areas:
            image = self._open(path)
            try:
                too_large = image is None or image.width * image.height > MAX_IMAGE_PIXELS
                self._areas[path] = (0.0, 0) if image is None or too_large else _areas(np.asarray(image))
            except Exception:  # damaged behind its header
                self._areas[path] = (0.0, 0)
        return self._areas[path]


def _explained(image: np.ndarray, mask: np.ndarray) -> float:
    """The share of the variance of `image` that lies between the areas of `mask`, which may have another size."""
    rows, columns = (np.arange(size) * other // size for size, other in zip(image.shape, mask.shape, strict=True))
    _, areas = np.unique(mask[np.ix_(rows, columns)], return_inverse=True)
    areas, values = areas.reshape(-1), image.reshape(-1).astype(np.float64)
    counts = np.bincount(areas)
    means = np.bincount(areas, values) / counts
    return float((counts * (means - values.mean()) ** 2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-12))


def _areas(pixels: np.ndarray) -> tuple[float, int]:
    """The share of pixels that are equal to the next one in their row, and the number of values that are frequent.

    Args:
        pixels: (H, W) or (H, W, C).
    """
    pixels = pixels[:: max(1, len(pixels) // _ROWS_LOOKED_AT)].astype(np.float64)
    planes = pixels.reshape(*pixels.shape[:2], -1)
    flat = (planes[:, 1:] == planes[:, :-1]).all(axis=2).mean() if planes.shape[1] > 1 else 0.0
    first = planes[..., 0]  # of colours, one is enough
    frequent = (np.histogram(first, _BINS)[0] >= _SHARE_OF_BIN * first.size).sum()
    return float(flat), int(min(frequent, len(np.unique(first))))


def refuse_masks(
    source: str, files: Sequence[str], read: Callable[[str], StoredImage], is_folder: bool = True
) -> None:
    """Raises ValueError if images are masks of others.

    Args:
        source: for the message.
        files: the images, relative to one folder, with "/" between the parts of a path.
        read: the stored image of one of them.
        is_folder: whether `source` is a folder, of which a part can be named.
    """
    looks = _Looks(read)
    for folders in _folders_side_by_side(files):
        images, others, pairs = _mask_folders(folders, looks)
        if pairs:
            example = str(Path(source) / parent_of(pairs[0][0]))
            advice = f"name the folder of the images alone, such as {example!r}" if is_folder else "take the masks out"
            raise ValueError(
                f"{source!r}: the images in {others!r} look like masks of those in {images!r}, not like a class;"
                f" {advice}, or, if they are a class, give its files names of their own"
            )
    _refuse_mask_files(source, files, looks)


# Folders of masks


def _folders_side_by_side(files: Sequence[str]) -> Iterator[dict[str, list[str]]]:
    """Of each folder with a few folders in it: the images by folder, at any depth; "" has those beside the folders."""
    parents = parents_of(files)
    names: dict[tuple[str, ...], set[str]] = {}
    for parts in parents.values():
        for above, name in _steps(parts):
            inside = names.setdefault(above, set())
            if len(inside) <= _MOST_FOLDERS:
                inside.add(name)
    found: dict[tuple[str, ...], dict[str, list[str]]] = {
        above: {} for above, inside in names.items() if 2 <= len(inside) <= _MOST_FOLDERS
    }
    found = dict(list(found.items())[: 2 * _PAIRS_LOOKED_AT])
    belongs_to = {  # to which lists the images of each folder belong
        parent: [found[above].setdefault(name, []) for above, name in _steps(parts) if above in found]
        for parent, parts in parents.items()
    }
    for file in files if found else ():
        for inside_folder in belongs_to[parent_of(file)]:
            if len(inside_folder) < _MOST_FILES:
                inside_folder.append(file)
    yield from found.values()


def _steps(parts: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each folder on the way down, and the name of what is next in it; "" for a file."""
    return ((parts[:place], name) for place, name in enumerate((*parts, "")))


def _mask_folders(folders: dict[str, list[str]], looks: _Looks) -> tuple[str, str, list[tuple[str, str]]]:
    """The names of a folder of images and of one with their masks, and some pairs of an image and its mask."""
    for images, others in ((images, others) for images in folders for others in folders if images != others):
        if split_meaning(images) and split_meaning(others):
            continue
        called_so = bool(_words(others) & _MASK_WORDS) and not _words(images) & _MASK_WORDS
        pairs = _pairs(folders[images], folders[others])
        if not pairs and called_so and _words(images) & _IMAGE_WORDS:
            pairs = list(zip(folders[images], folders[others], strict=False))[:1]
        are_masks = all(_is_mask(looks, image, other, called_so) for image, other in pairs[:_PAIRS_LOOKED_AT])
        are_masks = are_masks and (called_so or _are_clear(looks, pairs))
        if pairs and (are_masks or looks.fit_together(pairs)):
            return images, others, pairs
    return "", "", []


def _words(name: str) -> set[str]:
    """The words of a name in lower case: {"segmentation", "class"} of "SegmentationClass"."""
    return {name.lower(), *(word.lower() for word in _WORD.findall(name))}


def _pairs(images: list[str], others: list[str]) -> list[tuple[str, str]]:
    """Some images, each with the file that is called like it but for a word at its end or beginning, if most of
    `others` are called like one image each."""
    for cut_image in _CUTS:
        by_name = {cut_image(stem_of(image)): image for image in images}
        if len(by_name) < len(set(map(stem_of, images))):
            continue  # without this word the images are called alike
        for cut in _CUTS:
            found = {name: other for other in others if (name := cut(stem_of(other))) in by_name}
            num_found = sum(cut(stem_of(other)) in by_name for other in others)
            if 2 * num_found > len(others) and 2 * len(found) >= min(len(images), len(others)):
                return [(by_name[name], other) for name, other in found.items()][:_PAIRS_COMPARED]
    return []


def _without_last(stem: str) -> str:
    return _SEPARATOR.split(stem[::-1], maxsplit=1)[-1][::-1]


_CUTS: tuple[Callable[[str], str], ...] = (
    lambda stem: stem,
    _without_last,
    lambda stem: _without_last(_without_last(stem)),  # 7_gtFine_labelIds
    lambda stem: _SEPARATOR.split(stem, maxsplit=1)[-1],
)


def _are_clear(looks: _Looks, pairs: Sequence[tuple[str, str]]) -> bool:
    """As `_Looks.are_clear`. Grey masks of images in colour need not be looked at."""
    return any(_is_grey_beside_colour(looks, *pair) for pair in pairs[:1]) or looks.are_clear(pairs)


def _is_grey_beside_colour(looks: _Looks, path: str, other_path: str) -> bool:
    image, other = looks.header(path), looks.header(other_path)
    return image is not None and other is not None and other.is_grey and not image.is_grey


def _is_mask(looks: _Looks, path: str, other_path: str, called_so: bool) -> bool:
    """Whether a file is a mask of an image. A mask of another size than its image must be called a mask."""
    image, other = looks.header(path), looks.header(other_path)
    if image is None or other is None:
        return False
    has_its_size = image.size == other.size
    if called_so and has_its_size:
        return True
    is_grey_beside_colour = _is_grey_beside_colour(looks, path, other_path)
    return (called_so or has_its_size) and (is_grey_beside_colour or looks.is_drawn(path, other_path, called_so))


# Masks beside their images


def _refuse_mask_files(source: str, files: Sequence[str], looks: _Looks) -> None:
    """Raises ValueError for `7_mask.png` of `7.png`, or `7.png` of `7.jpg`."""
    by_folder: dict[str, list[str]] = {}
    for file in files:
        by_folder.setdefault(parent_of(file), []).append(file)
    folders = list(by_folder.values())
    masks = [
        (image, other)
        for image, other, called_so in _pairs_beside(folders)
        if _is_mask(looks, image, other, called_so)
    ]
    pairs = [] if masks else _pairs_by_ending(folders)
    are_masks = all(
        _has_size_of(looks, image, other) and looks.is_drawn(image, other, False)
        for image, other in pairs[:_PAIRS_LOOKED_AT]
    )
    if (are_masks and bool(pairs) and looks.are_clear(pairs)) or looks.fit_together(pairs):
        masks += pairs
    if masks:
        image, other = masks[0]
        raise ValueError(
            f"{source!r}: {other!r} looks like a mask of {image!r}, not like an image to learn"
            " from; move the masks out of this folder, or rename them if they are images"
        )


def _has_size_of(looks: _Looks, image: str, other: str) -> bool:
    return (header := looks.header(image)) is not None and header.size == getattr(looks.header(other), "size", None)


def _pairs_by_ending(folders: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Some images, each with the file in its folder that has one more word: `7.png` and `7_lesion.png`. Nothing if
    fewer than a third of the files have one.

    Args:
        folders: the images of each folder.
    """
    pairs: list[tuple[str, str]] = []
    num_pairs = 0
    for files in folders:
        by_stem = {stem_of(file): file for file in files}
        for stem in map(stem_of, files):
            shorter = _without_last(stem)
            if shorter != stem and shorter in by_stem:
                num_pairs += 1
                if len(pairs) < _PAIRS_COMPARED:
                    pairs.append((by_stem[shorter], by_stem[stem]))
    return pairs if 3 * num_pairs >= sum(map(len, folders)) else []


def _pairs_beside(folders: Sequence[Sequence[str]]) -> list[_Pair]:
    """Some images with files in the same folder that may be masks of them. `folders` as in `_pairs_by_ending`."""
    found = [_pairs_in_folder(files) for files in folders if _may_have_pairs(files)]
    called_so, by_start, alike = ([pair for kinds in found for pair in kinds[place]] for place in range(3))
    return called_so[:_PAIRS_LOOKED_AT] + (by_start + alike)[: 2 * _PAIRS_LOOKED_AT]


def _may_have_pairs(files: Sequence[str]) -> bool:
    """A quick look at the images of a folder, because most folders have no pairs."""
    stems = list(map(stem_of, files))
    names = "\n".join(stems).lower()
    return len(set(stems)) < len(stems) or any(name in names for name in _MASK_NAMES)


def _pairs_in_folder(files: Sequence[str]) -> tuple[list[_Pair], list[_Pair], list[_Pair]]:
    """The pairs of one folder: `7.png` and `7_mask.png`; `7_sat.png` and `7_mask.png`; `7.jpg` and `7.png`."""
    by_stem: dict[str, list[str]] = {}
    by_start: dict[str, str] = {}  # the files that are not called masks
    for file in files:
        stem = stem_of(file)
        by_stem.setdefault(stem, []).append(file)
        if not _stems_of_image(stem):
            by_start[stem.rpartition("_")[0]] = file
    called_so: list[_Pair] = []
    same_start: list[_Pair] = []
    alike: list[_Pair] = []
    for file in files:
        for stem in _stems_of_image(stem_of(file)):
            if stem in by_stem:
                called_so.append((by_stem[stem][0], file, True))
            elif stem in by_start:
                same_start.append((by_start[stem], file, False))
    for same in by_stem.values():
        if len(same) == 2:
            alike += [(same[0], same[1], False), (same[1], same[0], False)]
    return called_so, same_start, alike


def _stems_of_image(stem: str) -> list[str]:
    """The names that an image may have if a file called `stem` is its mask."""
    if stem.lower() in _MASK_NAMES:  # mask.png beside image.png
        return sorted(_IMAGE_WORDS)
    return [match.group(1) for pattern in (_ENDING, _BEGINNING) if (match := pattern.fullmatch(stem))]
