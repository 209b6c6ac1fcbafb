# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a run: training curves and masks. Knows no model; matplotlib is imported only where it draws, and its
global state (backend, pyplot figures, style) is left alone.

Shapes: B images, C context masks, M target blocks, N patches kept in each, (H, W) image size in pixels.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


# --------------------------------------------------------------------------------------------------- training curves


class Panel(NamedTuple):
    title: str
    ylabel: str
    lines: dict[str, str]  # metric key -> name in the legend
    from_zero: bool = False  # the distance to 0 has a meaning, so the axis shows it


BASELINE_KEY, BASELINE_OF = "random_knn_accuracy", "knn_accuracy"
PANELS = (
    Panel("k-NN accuracy (higher is better)", "share of images right", {"knn_accuracy": "target encoder"}, True),
    Panel("Effective rank (falling to 1 = collapse)", "directions used", {"effective_rank": "target features"}, True),
    Panel("Spread over images (0 = collapse)", "std of the features", {"target_std": "target features"}, True),
    Panel("Loss (not a measure of quality)", "loss per target value", {"loss": "loss"}),
    Panel("Gradient norm", "L2 norm", {"grad_norm": "gradient norm"}, True),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}, True),
    Panel("Weight decay", "weight decay", {"weight_decay": "weight decay"}),
    Panel("Target momentum", "share kept per step", {"momentum": "momentum"}),
    Panel("Patches per mask", "patches", {"context_tokens": "context", "target_tokens": "one target block"}, True),
    Panel("Speed", "images per second", {"images_per_second": "images per second"}, True),
)
CAPTION = "The loss may rise while rank and k-NN improve: judge by those."
COLORS = ("#0b5fa5", "#c8511b")  # blue and orange, apart also for colour-blind readers
FEW_POINTS, MANY_POINTS = 60, 400  # up to FEW each point is marked; above MANY a running mean is drawn over the points


def plot_training_curves(metrics: Sequence[Mapping[str, float]], path: str | Path, title: str | None = None) -> None:
    """Draws the rows of a `metrics.jsonl` as one picture, a panel for each metric that occurs.

    Args:
        metrics: one mapping per logged step, in order. `step` is the x axis (without it, the row's number). Known
            keys are those of `PANELS` and `random_knn_accuracy`, the k-NN baseline, whose last value becomes a dashed
            line. Rows may lack any key; other keys, None, NaN and infinity are not drawn.
        path: where to write; its ending (.png, .svg, .pdf) decides the format.
        title: first line of the picture, such as the recipe's name.

    Raises:
        ValueError: no row holds a known key.
    """
    from matplotlib.figure import Figure  # the Figure itself, not pyplot: no backend is chosen, no window can open

    panels = [panel for panel in PANELS if any(len(_series(metrics, key)[0]) for key in panel.lines)]
    if not panels:
        seen = sorted({key for row in metrics for key in row})
        raise ValueError(f"none of the metrics can be drawn: {len(metrics)} rows with the keys {seen}")
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(max(6, 4.2 * num_columns), 2.8 * num_rows + 0.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = None
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position, sharex=axes)
        _draw_panel(axes, panel, metrics)
        if position > len(panels) - num_columns:  # the lowest panel of each column
            has_steps = any("step" in row for row in metrics)
            axes.set_xlabel("optimizer step" if has_steps else "number of the logged row", fontsize=11.5)
    if title:
        figure.suptitle(title, fontsize=15, fontweight="bold")
    figure.supxlabel(CAPTION, fontsize=12, style="italic")
    figure.savefig(path, dpi=150)


def _series(metrics: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a finite `key`."""
    points = [(row.get("step", index), row[key]) for index, row in enumerate(metrics) if row.get(key) is not None]
    points = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _draw_panel(axes, panel: Panel, metrics: Sequence[Mapping[str, float]]) -> None:
    drawn = [key for key in panel.lines if len(_series(metrics, key)[0])]
    for key, color in zip(drawn, COLORS, strict=False):
        _draw_line(axes, *_series(metrics, key), panel.lines[key], color)
    baseline = _series(metrics, BASELINE_KEY)[1] if BASELINE_OF in drawn else []
    if len(baseline):
        axes.axhline(baseline[-1], color="#555555", linestyle="--", linewidth=1.5, label="random encoder")
    if panel.from_zero:  # two lines leave no free corner, so their legend gets room above them
        axes.set_ylim(0, (1.5 if len(drawn) > 1 else 1.1) * axes.get_ylim()[1])
    if len(drawn) > 1 or len(baseline):
        axes.legend(fontsize=11, framealpha=0.8, loc="upper right" if len(drawn) > 1 else "best")
    _label(axes, panel)


def _draw_line(axes, steps: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    """The values as a line: marked when they are few, pale beneath their running mean when they are many."""
    if len(values) <= MANY_POINTS:
        marker = "o" if len(values) <= FEW_POINTS else None
        axes.plot(steps, values, color=color, linewidth=1.8, marker=marker, markersize=4, label=label)
        return
    window = len(values) // 100
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.25)
    axes.plot(steps[window // 2 :][: len(means)], means, color=color, linewidth=1.8, label=label)


def _label(axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=12.5)
    axes.set_ylabel(panel.ylabel, fontsize=11.5)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.locator_params(axis="x", nbins=4, integer=True)


# -------------------------------------------------------------------------------------------------------------- masks


CELL_PIXELS = 112  # images are enlarged, by a whole factor, to at least this height
GAP = 8  # pixels
HIDDEN, OUTLINE = 215, (214, 0, 110)  # grey of hidden patches, magenta around visible ones


def draw_masks(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    patch_size: int | tuple[int, int],
    path: str | Path | None = None,
) -> Image.Image:
    """A sheet with one row per image: the image, each context (the rest greyed out), each target block in its place.

    Args:
        images: (B, 1 or 3, H, W), uint8.
        context_indices: (B, C, N), and target_indices (B, M, N): row-major patch indices; the two N may differ.
        patch_size: pixels, one number or (height, width); H and W are multiples of it.
        path: also written there, if given.

    Raises:
        ValueError: images that are not uint8 (B, 1 or 3, H, W), sizes that do not fit, or an index outside the grid.
    """
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    rows, columns = _check_masks(images, context_indices, target_indices, patch)
    names = _mask_names("context", context_indices) + _mask_names("target", target_indices)
    headers = [("image", f"{rows} x {columns} patches"), *names]
    cells = []
    for image, contexts, targets in zip(images, context_indices, target_indices, strict=True):
        picture = np.moveaxis(image.expand(3, -1, -1).cpu().numpy(), 0, -1)  # (H, W, 3)
        masks = [_visible(indices, rows, columns) for indices in (*contexts, *targets)]
        cells.append([_enlarge(picture, *patch)] + [_enlarge(picture, *patch, visible=mask) for mask in masks])
    sheet = _compose(cells, headers)
    if path is not None:
        sheet.save(path)
    return sheet


def _check_masks(
    images: torch.Tensor, context_indices: torch.Tensor, target_indices: torch.Tensor, patch: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the patch grid."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch[0]} x {patch[1]}")
    rows, columns = height // patch[0], width // patch[1]
    for name, indices in (("context", context_indices), ("target", target_indices)):
        if indices.dim() != 3 or len(indices) != len(images):
            shape = tuple(indices.shape)
            raise ValueError(f"{name}_indices must be ({len(images)}, number of masks, patches), got {shape}")
        if indices.numel() and not 0 <= indices.min() <= indices.max() < rows * columns:
            extremes = f"{indices.min().item()} to {indices.max().item()}"
            raise ValueError(f"{name}_indices run from {extremes}, but there are {rows * columns} patches")
    return rows, columns


def _mask_names(name: str, indices: torch.Tensor) -> list[tuple[str, str]]:
    """Two lines for the head of each mask's column."""
    _, count, size = indices.shape
    return [(name if count == 1 else f"{name} {number + 1}", f"{size} patches") for number in range(count)]


def _visible(indices: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """Which patches are visible, (rows, columns), bool."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[indices.cpu().numpy()] = True
    return mask.reshape(rows, columns)


def _enlarge(
    picture: np.ndarray, patch_height: int, patch_width: int, visible: np.ndarray | None = None
) -> Image.Image:
    """The picture (H, W, 3) enlarged to be seen; with a mask, hidden patches grey and the visible region outlined."""
    factor = max(1, math.ceil(CELL_PIXELS / picture.shape[0]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    if visible is None:
        return Image.fromarray(picture)
    patch = np.ones((factor * patch_height, factor * patch_width), dtype=bool)
    seen = np.kron(visible, patch).astype(bool)  # (H, W)
    faint = (HIDDEN + 0.12 * (picture.mean(axis=2, keepdims=True) - 128)).clip(0, 255)
    picture = np.where(seen[..., None], picture, faint).astype(np.uint8)
    inner = np.pad(seen, 2)
    inner = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]  # 2 pixels inside the border
    picture[seen & ~inner] = OUTLINE
    return Image.fromarray(picture)


def _compose(cells: list[list[Image.Image]], headers: list[tuple[str, str]]) -> Image.Image:
    """Rows of equal pictures on a white sheet, beneath their headers."""
    width, height = cells[0][0].width + GAP, cells[0][0].height + GAP
    letter = cells[0][0].width // 9  # "14 x 14 patches" fits, and is read on a phone as far as its width allows
    top = 2 * GAP + 2 * letter
    sheet = Image.new("RGB", (GAP + width * len(headers), top + GAP + height * len(cells)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
    for column, lines in enumerate(headers):
        draw.multiline_text((GAP + width * column, GAP), "\n".join(lines), fill="black", font=font, spacing=2)
        for row, line in enumerate(cells):
            sheet.paste(line[column], (GAP + width * column, top + GAP + height * row))
    return sheet
