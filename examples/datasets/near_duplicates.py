# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Keeps near duplicates of a data set on the same side of its split.

Shapes: N images.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image


THUMBNAIL = 16  # pixels of a side, for the comparison of images


def near_duplicates(
    images: Sequence[np.ndarray], labels: np.ndarray, names: Sequence[str], same_picture: float
) -> np.ndarray:
    """A group number (N,) for each image: near duplicates, directly or through others, have the same.

    Two images are near duplicates if they have the same label, and either the same name or grey thumbnails that
    correlate by `same_picture` or more.

    Args:
        images: grey (H, W) or coloured (H, W, 3) each, uint8, of any sizes.
        labels: (N,).
        names: N of them.
    """
    grey = [Image.fromarray(image).convert("L") for image in images]
    small = [np.asarray(image.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)) for image in grey]
    thumbnails = np.stack(small).reshape(len(images), -1).astype(np.float64)
    thumbnails -= thumbnails.mean(axis=1, keepdims=True)
    thumbnails /= np.maximum(np.linalg.norm(thumbnails, axis=1, keepdims=True), 1e-9)
    kinds = np.unique([f"{label} {name}" for label, name in zip(labels, names, strict=True)], return_inverse=True)[1]
    alike = (thumbnails @ thumbnails.T >= same_picture) & (labels[:, None] == labels)  # (N, N)
    linked = alike | (kinds[:, None] == kinds)  # with itself too, though a plain rectangle correlates with nothing
    groups, smallest = None, np.arange(len(images))
    while groups is None or (groups != smallest).any():
        groups = smallest
        smallest = np.where(linked, groups, len(images)).min(axis=1)
    return groups


def split_groups(
    labels: np.ndarray, groups: np.ndarray, test_share: float, seed: int, most: int | None = None
) -> dict[str, np.ndarray]:
    """Indices of each split. Groups in random order go to the test split while their class has room there.

    Args:
        labels, groups: (N,). All images of a group have one label.
        test_share: of each class, at most, for the test split.
        most: images of a class in both splits together. Groups that are more than that are left out.
    """
    counts = np.bincount(labels)
    room = counts if most is None else np.minimum(counts, most)  # of each class, in both splits
    test_room = np.round(test_share * room)
    chosen: dict[str, list[int]] = {"train": [], "test": []}
    for group in np.random.default_rng(seed).permutation(np.unique(groups)):
        members = np.flatnonzero(groups == group)
        label = labels[members[0]]
        if len(members) > room[label]:
            continue
        room[label] -= len(members)
        split = "test" if len(members) <= test_room[label] else "train"
        test_room[label] -= len(members) * (split == "test")
        chosen[split].extend(members)
    return {split: np.sort(np.array(indices, dtype=int)) for split, indices in chosen.items()}
