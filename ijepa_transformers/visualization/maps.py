# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A map of many images by their features."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from .curves import legend_row_by_row, run_color
from .predictions import to_image
from .sheets import to_picture


# ---------------------------------------------------------------------------------------------------------------- map
FEW_IMAGES = 50  # below, t-SNE has too few neighbours to go by, and PCA is drawn
MAX_CLASSES = 10  # with colours and marks of their own: more cannot be told apart
MARKS = "osD^vPX*<p"
REST_COLOR = "#aaaaaa"
MAP_WIDTH = 7.2  # inches
LONGEST_NAME = 24  # letters of a class name that are written
THUMBNAIL_PIXELS, THUMBNAILS_ACROSS = 40, 16  # the size of one, and how many fit beside each other


def map_points(features: torch.Tensor) -> np.ndarray:
    """Image features (K, D) to points (K, 2), alike images near each other: t-SNE from a PCA start, a fixed seed.

    PCA alone below `FEW_IMAGES` images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    features = features.double().cpu().numpy()
    if np.ptp(features, axis=0).max() == 0:  # a collapsed encoder: every image is at one place
        return np.zeros((len(features), 2))
    if len(features) < FEW_IMAGES:
        return PCA(2, random_state=0).fit_transform(features)
    return TSNE(2, perplexity=min(30, len(features) / 4), init="pca", random_state=0).fit_transform(features)


def draw_map(
    points: np.ndarray,
    images: torch.Tensor,
    labels: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """The points of `map_points`, with some of the images (K, channels, H, W) on them.

    Args:
        labels: (K,), the class of each image, -1 where it has none. The most frequent classes get a colour and a mark.
        class_names: for the legend; the number of a class by default.
    """
    from matplotlib.figure import Figure

    labels = np.full(len(points), -1) if labels is None else np.asarray(labels)
    shown = _frequent_classes(labels)
    rest = ~np.isin(labels, shown)
    looks = {label: (run_color(number), MARKS[number]) for number, label in enumerate(shown)}
    names = [str(label) if class_names is None else str(class_names[label]) for label in shown]
    columns, lines = _legend_size([*names, "the rest"])
    width, height = np.ptp(points, axis=0)
    ratio = np.clip(height / max(width, 1e-12), 0.25, 1.2)
    figure = Figure(figsize=(MAP_WIDTH, 0.96 * MAP_WIDTH * ratio + 0.3 * (1 + lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.scatter(*points[rest].T, s=14, color=REST_COLOR)
    for label, (color, mark) in looks.items():
        axes.scatter(*points[labels == label].T, s=22, color=color, marker=mark)
    for index in _apart(points, THUMBNAILS_ACROSS):
        _draw_thumbnail(axes, points[index], images[index], looks.get(labels[index], (REST_COLOR, ""))[0])
    if shown:
        entries = [
            *zip(names, looks.values(), strict=True),
            *([("the rest", (REST_COLOR, "o"))] if rest.any() else []),
        ]
        _name_classes(figure, entries, columns)
    return to_image(figure)


def _legend_size(names: list[str]) -> tuple[int, int]:
    """Columns and lines of a legend with these names beneath the map."""
    widest = max(min(len(name), LONGEST_NAME) for name in names)
    columns = max(1, int(72 * MAP_WIDTH / (7.5 * widest + 48)))  # points: letters of 7.5, a mark and a gap
    return columns, math.ceil(len(names) / columns)


def _frequent_classes(labels: np.ndarray) -> list[int]:
    """The most frequent classes, in the order of their numbers."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return sorted(classes[np.argsort(-counts, kind="stable")[:MAX_CLASSES]].tolist())


def _apart(points: np.ndarray, num_across: int) -> list[int]:
    """Points so chosen, in order, that pictures of which `num_across` fit beside each other do not overlap."""
    distance, chosen = np.ptp(points, axis=0).max() / num_across, []
    for index, point in enumerate(points):
        if all(np.abs(point - points[other]).max() > distance for other in chosen):
            chosen.append(index)
    return chosen


def _draw_thumbnail(axes, point: np.ndarray, image: torch.Tensor, color: str) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    picture = Image.fromarray(to_picture(image))
    ratio = THUMBNAIL_PIXELS / max(picture.size)
    size = [max(1, round(side * ratio)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.NEAREST)
    box = OffsetImage(np.asarray(picture), zoom=72 / 150, interpolation="nearest")  # one pixel is one of the picture's
    axes.add_artist(AnnotationBbox(box, point, pad=0.12, bboxprops={"edgecolor": color, "linewidth": 2}))


def _name_classes(figure, entries: list[tuple[str, tuple[str, str]]], columns: int) -> None:
    """A legend of (name, (colour, mark)) beneath the map."""
    from matplotlib.lines import Line2D

    names, looks = zip(*legend_row_by_row(entries, columns), strict=True)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in names]
    handles = [Line2D([], [], color=color, marker=mark, linestyle="", markersize=10) for color, mark in looks]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=13, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
