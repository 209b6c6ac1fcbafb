# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Which part of a data set is used: few labels per class, or the images that a list names."""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc

from .notices import counted
from .order import SUBSET_STREAM, random_stream


def select_labelled(
    labels: Sequence[int] | np.ndarray,
    *,
    images_per_class: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
) -> list[int]:
    """Selects a class-balanced part of a data set, for training with few labels; returns sorted indices.

    `seed` alone decides the order of the images of a class, and the first ones are taken. So a larger part contains
    every smaller part of the same seed.

    Args:
        labels: class id of every image.
        images_per_class: number of images of every class.
        label_fraction: this share of every class, rounded, and at least one image. Give exactly one of the two.
        seed: of the selection.

    Raises:
        ValueError: if not exactly one is given, a number is out of range, or a class has fewer than `images_per_class`
            images.
    """
    if (images_per_class is None) == (label_fraction is None):
        raise ValueError(f"Give images_per_class or label_fraction, got {images_per_class} and {label_fraction}.")
    if images_per_class is not None and images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}.")
    if label_fraction is not None and not 0 < label_fraction <= 1:
        raise ValueError(f"label_fraction must lie in (0, 1], got {label_fraction}.")
    class_ids = np.asarray(labels)
    order = np.argsort(random_stream(seed, SUBSET_STREAM).random_raw(len(class_ids)), kind="stable")
    selected: list[int] = []
    for label in np.unique(class_ids):
        members = order[class_ids[order] == label]
        count = images_per_class or max(1, round((label_fraction or 0) * len(members)))
        if count > len(members):
            raise ValueError(
                f"Class {label} has {counted(len(members), 'image')}, fewer than images_per_class {count}."
            )
        selected += members[:count].tolist()
    return sorted(selected)


def select_listed(dataset: datasets.Dataset, path: str | os.PathLike) -> list[int]:
    """Selects the images that a text file names, one file name per line; returns sorted indices.

    Folders in front of a name are ignored, in the file and in the data set. Blank lines are ignored too.

    Raises:
        ValueError: if the file cannot be read or is empty, or if the data set has no image of a listed name, or
            several.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The list {str(path)!r} cannot be read: {error}") from None
    listed = {os.path.basename(line.strip()) for line in lines} - {""}
    if not listed:
        raise ValueError(f"The list {str(path)!r} names no image.")
    places: dict[str, list[int]] = {}
    for index, image in enumerate(_paths(dataset)):
        places.setdefault(os.path.basename(image or ""), []).append(index)
    unknown = sorted(listed - set(places))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(listed)} names in {str(path)!r} are not in the data, for example"
            f" {unknown[0]!r}."
        )
    repeated = sorted(name for name in listed if len(places[name]) > 1)
    if repeated:
        raise ValueError(f"{repeated[0]!r} in {str(path)!r} is the name of {len(places[repeated[0]])} images.")
    return sorted(places[name][0] for name in listed)


def _paths(dataset: datasets.Dataset) -> list[str | None]:
    """The path of every image, without reading the images beside it."""
    column = dataset.select_columns(["image"]).with_format("arrow")
    parts = (column[start : start + 1000]["image"] for start in range(0, len(column), 1000))
    return [path for part in parts for path in pc.struct_field(part, "path").to_pylist()]
