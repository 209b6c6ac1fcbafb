# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A map of many images by their features."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from .cells import to_picture
from .curves import legend_row_by_row
from .page import CLASS_COLORS, REST, Point, ScatterBody, Thumbnail
from .predictions import to_image


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_IMAGES = 50  # below this number t-SNE has too few neighbours, and PCA is drawn
MAX_CLASSES = len(CLASS_COLORS)  # classes with a colour and a mark of their own; nobody can tell more apart
MARKS = "osD^vPX*<p"
REST_COLOR = "#aaaaaa"
MAP_WIDTH = 7.2  # inches
LONGEST_NAME = 24  # letters; longer class names are cut
THUMBNAIL_PIXELS, THUMBNAILS_ACROSS = 40, 16  # the size of a small image, and how many fit beside each other


def map_points(features: torch.Tensor) -> np.ndarray:
    """Points (K, 2) for image features (K, D). Images with similar features lie near each other.

    This is t-SNE with a fixed seed, starting from PCA. For fewer than `FEW_IMAGES` images it is PCA alone.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    values = features.double().cpu().numpy()
    if np.ptp(values, axis=0).max() == 0:  # the encoder has collapsed, so every image is at one place
        return np.zeros((len(values), 2))
    if len(values) < FEW_IMAGES:
        return PCA(2, random_state=0).fit_transform(values)
    return TSNE(2, perplexity=min(30, len(values) / 4), init="pca", random_state=0).fit_transform(values)


def draw_map(
    points: np.ndarray,
    images: torch.Tensor,
    labels: Sequence[int] | np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> Image.Image:
    """The points of `map_points`, with some of the images (K, channels, H, W) on them.

    Args:
        labels: (K,), the class of each image, or -1. The most frequent classes get a colour and a mark.
        class_names: names for the legend. By default it shows the numbers of the classes.
    """
    from matplotlib.figure import Figure

    classes = np.full(len(points), -1) if labels is None else np.asarray(labels)
    shown = _frequent_classes(classes)
    rest = ~np.isin(classes, shown)
    looks = {label: (CLASS_COLORS[number], MARKS[number]) for number, label in enumerate(shown)}
    names = [str(label) if class_names is None else str(class_names[label]) for label in shown]
    columns, lines = _legend_size([*names, "the rest"])
    width, height = np.ptp(points, axis=0)
    ratio = np.clip(height / max(width, 1e-12), 0.25, 1.2)
    figure = Figure(figsize=(MAP_WIDTH, 0.96 * MAP_WIDTH * ratio + 0.3 * (1 + lines)), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xticks=[], yticks=[], aspect="equal")
    axes.scatter(points[rest, 0], points[rest, 1], s=14, color=REST_COLOR)
    for label, (color, mark) in looks.items():
        axes.scatter(points[classes == label, 0], points[classes == label, 1], s=22, color=color, marker=mark)
    for index in _choose_apart(points, THUMBNAILS_ACROSS):
        _draw_thumbnail(axes, points[index], images[index], looks.get(classes[index], (REST_COLOR, ""))[0])
    if shown:
        entries = [
            *zip(names, looks.values(), strict=True),
            *([("the rest", (REST_COLOR, "o"))] if rest.any() else []),
        ]
        _name_classes(figure, entries, columns)
    return to_image(figure)


def scatter_of(
    points: np.ndarray,
    images: torch.Tensor,
    labels: Sequence[int] | np.ndarray | None,
    class_names: Sequence[str] | None,
    label: str,
) -> ScatterBody:
    """The map for the page. The arguments are those of `draw_map`; `label` says what it is."""
    classes = np.full(len(points), -1) if labels is None else np.asarray(labels)
    shown = _frequent_classes(classes)
    group_of: dict[int, int | str] = {kind: number for number, kind in enumerate(shown)}
    kinds = set(classes.tolist()) - {-1}
    names = {kind: str(kind) if class_names is None else str(class_names[kind]) for kind in kinds}
    sides = np.ptp(points, axis=0)
    across = PAGE_WIDTH - 2 * PAGE_MARGIN
    scale = across / max(sides.max(), 1e-12)
    places = (points - points.min(axis=0)) * scale + PAGE_MARGIN + (across - sides * scale) * [0.5, 0]
    height = max(PAGE_WIDTH / 4, sides[1] * scale + 2 * PAGE_MARGIN)
    places[:, 1] = height - places[:, 1]  # upwards, as in a plot
    dots = [
        Point(round(float(x), 1), round(float(y), 1), group_of.get(kind, REST), names.get(kind, ""))
        for (x, y), kind in zip(places, classes.tolist(), strict=True)
    ]
    thumbnails = []
    for index in _choose_apart(points, PAGE_THUMBNAILS):
        picture = _small_picture(images[index])
        width, tall = (THUMBNAIL_SIDE * side / max(picture.size) for side in picture.size)
        x, y = (round(float(place), 1) for place in places[index] - [width / 2, tall / 2])
        group = group_of.get(int(classes[index]), REST)
        thumbnails.append(Thumbnail(x, y, round(width, 1), round(tall, 1), group, picture))
    legend: list[tuple[int | str, str]] = [(group_of[kind], names[kind]) for kind in shown]
    if shown and (~np.isin(classes, shown)).any():
        legend.append((REST, "the rest"))
    return ScatterBody(label, round(float(height), 1), dots, thumbnails, legend)


PAGE_WIDTH, PAGE_MARGIN, THUMBNAIL_SIDE, PAGE_THUMBNAILS = 100, 4, 6, 13  # in units of the page's map


def _small_picture(image: torch.Tensor) -> Image.Image:
    picture = Image.fromarray(to_picture(image))
    ratio = THUMBNAIL_PIXELS / max(picture.size)
    size = [max(1, round(side * ratio)) for side in picture.size]
    return picture.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.NEAREST)


def _legend_size(names: list[str]) -> tuple[int, int]:
    """Columns and lines of a legend with these names below the map."""
    widest = max(min(len(name), LONGEST_NAME) for name in names)
    columns = max(1, int(72 * MAP_WIDTH / (7.5 * widest + 48)))  # in points: 7.5 per letter, 48 for a mark and a gap
    return columns, math.ceil(len(names) / columns)


def _frequent_classes(labels: np.ndarray) -> list[int]:
    """The most frequent classes, in the order of their numbers."""
    classes, counts = np.unique(labels[labels >= 0], return_counts=True)
    return sorted(classes[np.argsort(-counts, kind="stable")[:MAX_CLASSES]].tolist())


def _choose_apart(points: np.ndarray, num_across: int) -> list[int]:
    """Indices of points where pictures do not overlap, if `num_across` pictures fit beside each other."""
    distance = np.ptp(points, axis=0).max() / num_across
    chosen: list[int] = []
    for index, point in enumerate(points):
        if all(np.abs(point - points[other]).max() > distance for other in chosen):
            chosen.append(index)
    return chosen


def _draw_thumbnail(axes: "Axes", point: np.ndarray, image: torch.Tensor, color: str) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    pixels = np.asarray(_small_picture(image))
    box = OffsetImage(pixels, zoom=72 / 150, interpolation="nearest")  # pixel by pixel at 150 dpi
    place = float(point[0]), float(point[1])
    axes.add_artist(AnnotationBbox(box, place, pad=0.12, bboxprops={"edgecolor": color, "linewidth": 2}))


def _name_classes(figure: "Figure", entries: list[tuple[str, tuple[str, str]]], columns: int) -> None:
    """Adds a legend of (name, (colour, mark)) below the map."""
    from matplotlib.lines import Line2D

    entries = legend_row_by_row(entries, columns)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name, _ in entries]
    handles = [Line2D([], [], color=color, marker=mark, linestyle="", markersize=10) for _, (color, mark) in entries]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=13, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
