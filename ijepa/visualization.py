# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a run: training curves, masks, and what the features hold. Takes tensors and knows no model; matplotlib
is imported only where it draws, and its global state (backend, pyplot figures, style) is left alone.

Shapes: B images, N patches of an image (row by row), D features, H heads, C context masks, M target blocks, T patches
of one target block, (height, width) of an image in pixels. `patch_size` is one number or (height, width); both sides
of the images are multiples of it. Images are uint8 (B, 1 or 3, height, width).
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize


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
# Blue, orange, green, purple, dark yellow, black: apart also for colour-blind readers.
COLORS = ("#0b5fa5", "#c8511b", "#00805e", "#9b3f86", "#a67c00", "#222222")
RUN_STYLES = (("-", "o"), (":", "x"))  # of a panel's first and second metric, where colours tell runs apart
FEW_POINTS, MANY_POINTS = 60, 400  # up to FEW each point is marked; above MANY a running mean is drawn over the points

Rows = Sequence[Mapping[str, float]]


def plot_training_curves(
    metrics: Rows | Mapping[str, Rows], path: str | Path | BinaryIO, title: str | None = None
) -> None:
    """Draws the rows of one `metrics.jsonl`, or of several runs together, a panel for each metric that occurs.

    Args:
        metrics: one mapping per logged step, in order; or the name of each run -> its rows. `step` is the x axis
            (without it, the row's number). Known keys are those of `PANELS` and `random_knn_accuracy`, the k-NN
            baseline, whose last value becomes a dashed line. Rows may lack any key; other keys, None, NaN and
            infinity are not drawn. Several runs differ in colour and share one legend.
        path: where to write; its ending (.png, .svg, .pdf) decides the format. A file object gets PNG.
        title: first line of the picture, such as the recipe's name.

    Raises:
        ValueError: no row holds a known key.
    """
    from matplotlib.figure import Figure  # the Figure itself, not pyplot: no backend is chosen, no window can open

    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    rows = [row for run in runs.values() for row in run]
    panels = [panel for panel in PANELS if any(len(_series(rows, key)[0]) for key in panel.lines)]
    if not panels:
        seen = sorted({key for row in rows for key in row})
        raise ValueError(f"none of the metrics can be drawn: {len(rows)} rows with the keys {seen}")
    num_columns = min(2, len(panels))
    num_rows = math.ceil(len(panels) / num_columns)
    figure = Figure(figsize=(max(6, 4.2 * num_columns), 2.8 * num_rows + 0.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    axes = None
    for position, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position, sharex=axes)
        _draw_panel(axes, panel, list(runs.values()))
        if position > len(panels) - num_columns:  # the lowest panel of each column
            has_steps = any("step" in row for row in rows)
            axes.set_xlabel("optimizer step" if has_steps else "number of the logged row", fontsize=11.5)
    if len(runs) > 1:
        _name_runs(figure, list(runs), title)
    elif title:
        figure.suptitle(title, fontsize=15, fontweight="bold", parse_math=False)
    figure.supxlabel(CAPTION, fontsize=12, style="italic")
    figure.savefig(path, dpi=150)


def _series(metrics: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that hold a finite `key`."""
    points = [(row.get("step", index), row[key]) for index, row in enumerate(metrics) if row.get(key) is not None]
    points = np.array([point for point in points if math.isfinite(point[1])], dtype=float).reshape(-1, 2)
    return points[:, 0], points[:, 1]


def _name_runs(figure, names: list[str], title: str | None) -> None:
    """The title and the names of the runs at the top of the figure."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=_color(number), linewidth=4) for number in range(len(names))]
    columns = max(1, min(len(names), 80 // max(len(name) + 8 for name in names)))
    handles, names = _row_by_row(handles, columns), _row_by_row(names, columns)
    legend = figure.legend(
        handles, names, title=title, loc="outside upper center", ncols=columns, fontsize=12, frameon=False
    )
    legend.get_title().set(fontsize=15, fontweight="bold")
    for text in (legend.get_title(), *legend.get_texts()):
        text.set_parse_math(False)  # a dollar sign in a name is no formula


def _row_by_row(entries: Sequence, columns: int) -> list:
    """Entries of a legend, which matplotlib fills column by column, in the order that reads row by row."""
    return [entry for column in range(columns) for entry in entries[column::columns]]


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _draw_panel(axes, panel: Panel, runs: Sequence[Rows]) -> None:
    drawn = [key for key in panel.lines if any(len(_series(rows, key)[0]) for rows in runs)]
    for number, rows in enumerate(runs):
        for place, key in enumerate(drawn):
            label = panel.lines[key] if number == 0 else None  # the runs themselves have the legend of the figure
            _draw_line(axes, *_series(rows, key), label, **_line_style(place, number, len(runs)))
        baseline = _series(rows, BASELINE_KEY)[1] if BASELINE_OF in drawn else []
        if len(baseline):
            color = "#555555" if len(runs) == 1 else _color(number)
            axes.axhline(baseline[-1], color=color, linestyle="--", linewidth=1.5, label="random encoder")
    if panel.from_zero:  # two lines leave no free corner, so their legend gets room above them
        axes.set_ylim(0, (1.5 if len(drawn) > 1 else 1.1) * axes.get_ylim()[1])
    _name_lines(axes, is_grey=len(runs) > 1, loc="upper right" if len(drawn) > 1 else "best")
    _label(axes, panel)


def _line_style(place: int, run: int, num_runs: int) -> dict:
    """Of the metric at this place of a panel, in this run. Earlier runs are thicker, to be seen beneath equal ones."""
    if num_runs == 1:
        return {"color": _color(place), "linestyle": "-", "marker": "o", "linewidth": 1.8}
    linestyle, marker = RUN_STYLES[place]
    linewidth = 1.8 * (2 - run / (num_runs - 1))
    return {"color": _color(run), "linestyle": linestyle, "marker": marker, "linewidth": linewidth}


def _name_lines(axes, is_grey: bool, loc: str) -> None:
    """A legend of the lines with different names, if there are two; grey where a colour means a run."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if len(handles) > 1:
        legend = axes.legend(handles.values(), handles.keys(), fontsize=11, framealpha=0.8, loc=loc)
        for line in legend.get_lines() if is_grey else ():
            line.set_color("#555555")


def _draw_line(axes, steps: np.ndarray, values: np.ndarray, label: str | None, marker: str, **style) -> None:
    """The values as a line: marked when they are few, pale beneath their running mean when they are many."""
    if len(values) <= MANY_POINTS:
        marker = marker if len(values) <= FEW_POINTS else None
        axes.plot(steps, values, marker=marker, markersize=2.2 + style["linewidth"], label=label, **style)
        return
    window = len(values) // 100
    means = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.25)
    axes.plot(steps[window // 2 :][: len(means)], means, label=label, **style)


def _label(axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=12.5)
    axes.set_ylabel(panel.ylabel, fontsize=11.5)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 5))
    axes.locator_params(axis="x", nbins=4, integer=True)


# -------------------------------------------------------------------------------------------------- sheets of pictures


CELL_PIXELS = 112  # images are enlarged, by a whole factor, to at least this height
GAP = 8  # pixels
HIDDEN, OUTLINE = 215, (214, 0, 110)  # grey of hidden patches, magenta around what is pointed at
HEAT_COLORS = "cividis"  # dark blue to yellow: the same order for colour-blind readers and in grey


def _pair(patch_size: int | Sequence[int]) -> tuple[int, int]:
    return (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)


def _check_images(images: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patch grid."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch[0]} x {patch[1]}")
    return height // patch[0], width // patch[1]


def _check_shape(name: str, values: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the shape is as expected; a word stands for any size."""
    fits = zip(values.shape, expected, strict=False)
    if values.dim() != len(expected) or not all(isinstance(size, str) or real == size for real, size in fits):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must be ({wanted}), got {tuple(values.shape)}")


def _as_picture(image: torch.Tensor) -> np.ndarray:
    """(1 or 3, H, W) -> (H, W, 3)."""
    return np.moveaxis(image.expand(3, -1, -1).cpu().numpy(), 0, -1)


def _visible(indices: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """Which patches are visible, (rows, columns), bool."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[indices.cpu().numpy()] = True
    return mask.reshape(rows, columns)


def _enlarge(
    picture: np.ndarray,
    patch: tuple[int, int],
    visible: np.ndarray | None = None,
    outlined: np.ndarray | None = None,
) -> Image.Image:
    """The picture (H, W, 3) enlarged to be seen.

    Args:
        visible: (rows, columns), bool: the other patches become grey.
        outlined: (rows, columns), bool: a line around these patches.
    """
    factor = max(1, math.ceil(CELL_PIXELS / picture.shape[0]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    block = np.ones((factor * patch[0], factor * patch[1]), dtype=bool)
    if visible is not None:
        seen = np.kron(visible, block).astype(bool)  # (H, W)
        faint = (HIDDEN + 0.12 * (picture.mean(axis=2, keepdims=True) - 128)).clip(0, 255)
        picture = np.where(seen[..., None], picture, faint).astype(np.uint8)
    if outlined is not None:
        inside = np.kron(outlined, block).astype(bool)  # (H, W)
        inner = np.pad(inside, 2)
        inner = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]  # 2 pixels inside the border
        picture[inside & ~inner] = OUTLINE
    return Image.fromarray(picture)


def _heat(values: torch.Tensor, low: float, high: float, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """A map (N,) as colours between two values, every patch in its place: (H, W, 3)."""
    from matplotlib import colormaps

    shares = ((values.double() - low) / (high - low)).clamp(0, 1).cpu().numpy().reshape(grid)
    colors = (255 * colormaps[HEAT_COLORS](shares)[..., :3]).round().astype(np.uint8)
    return colors.repeat(patch[0], axis=0).repeat(patch[1], axis=1)


def _compose(
    cells: list[list[Image.Image]],
    headers: Sequence[tuple[str, str]] = (),
    titles: Sequence[str] = (),
    scale: Sequence[str] = (),
) -> Image.Image:
    """Rows of equal pictures on a white sheet.

    Args:
        headers: two lines above each column.
        titles: a line above each row.
        scale: what the colours of the maps mean, words from the darkest to the brightest, in a strip at the bottom.
    """
    width, height = cells[0][0].width + GAP, cells[0][0].height + GAP
    letter = cells[0][0].width // 8  # "14 x 14 patches" fits, and is read on a phone as far as its width allows
    top, between = (2 * GAP + 2 * letter if headers else 0), (GAP + letter if titles else 0)
    bottom = 2 * GAP + 3 * letter if scale else 0
    size = GAP + width * len(cells[0]), top + GAP + (height + between) * len(cells) + bottom
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
    for column, lines in enumerate(headers):
        draw.multiline_text((GAP + width * column, GAP), "\n".join(lines), fill="black", font=font, spacing=2)
    for row, line in enumerate(cells):
        upper = top + GAP + (height + between) * row
        if titles:
            draw.text((GAP, upper), titles[row], fill="black", font=font)
        for column, picture in enumerate(line):
            sheet.paste(picture, (GAP + width * column, upper + between))
    if scale:
        _draw_scale(sheet, scale, letter)
    return sheet


def _draw_scale(sheet: Image.Image, words: Sequence[str], letter: int) -> None:
    """The strip of colours at the foot of the sheet, its meaning beneath: two words or three, evenly spread."""
    width, upper = sheet.width - 2 * GAP, sheet.height - GAP - 3 * letter
    strip = _heat(torch.arange(width), 0, width - 1, (1, width), (letter, 1))
    sheet.paste(Image.fromarray(strip), (GAP, upper))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
    anchors = ("la", "ma", "ra") if len(words) == 3 else ("la", "ra")
    for place, (word, anchor) in enumerate(zip(words, anchors, strict=True)):
        left = GAP + width * place // (len(words) - 1)
        draw.text((left, upper + letter + 4), word, fill="black", font=font, anchor=anchor)


def cut_patches(images: torch.Tensor, patch_size: int | tuple[int, int]) -> torch.Tensor:
    """Images to the pixels of their patches, (B, N, channels, patch height, patch width)."""
    patch = _pair(patch_size)
    _check_images(images, patch)
    pieces = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # (B, channels, rows, columns, h, w)
    return pieces.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def most_detailed_patches(images: torch.Tensor, patch_size: int | tuple[int, int]) -> torch.Tensor:
    """The patch of each image whose pixels differ most among themselves, (B,)."""
    return cut_patches(images, patch_size).float().flatten(2).std(dim=2).argmax(dim=1)


def most_detailed_blocks(
    images: torch.Tensor, target_indices: torch.Tensor, patch_size: int | tuple[int, int]
) -> torch.Tensor:
    """The target block of each image, out of (B, M, T), whose pixels differ most among themselves, (B,)."""
    patches = cut_patches(images, patch_size).float().flatten(2)  # (B, N, pixels)
    places = target_indices.flatten(1).unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    blocks = patches.gather(1, places).unflatten(1, target_indices.shape[1:])  # (B, M, T, pixels)
    return blocks.flatten(2).std(dim=2).argmax(dim=1)


# -------------------------------------------------------------------------------------------------------------- masks


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
    patch = _pair(patch_size)
    rows, columns = _check_masks(images, context_indices, target_indices, patch)
    names = _mask_names("context", context_indices) + _mask_names("target", target_indices)
    headers = [("image", f"{rows} x {columns} patches"), *names]
    cells = []
    for image, contexts, targets in zip(images, context_indices, target_indices, strict=True):
        picture = _as_picture(image)
        masks = [_visible(indices, rows, columns) for indices in (*contexts, *targets)]
        cells.append([_enlarge(picture, patch)] + [_enlarge(picture, patch, mask, mask) for mask in masks])
    sheet = _compose(cells, headers)
    if path is not None:
        sheet.save(path)
    return sheet


def _check_masks(
    images: torch.Tensor, context_indices: torch.Tensor, target_indices: torch.Tensor, patch: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the patch grid."""
    rows, columns = _check_images(images, patch)
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


# ---------------------------------------------------------------------------------------------------------------- PCA


class PatchColors(NamedTuple):
    colors: torch.Tensor  # (B, N, 3), float32 in 0..1
    share: float  # of the features' variance that the three colours hold


def pca_colors(features: torch.Tensor) -> PatchColors:
    """The three main directions of patch features (B, N, D) as red, green and blue, in one basis for the whole batch.

    Each direction is scaled by its own percentiles over the batch, so that two patches with one colour have nearly
    one feature, in whatever image they are. Its sign is fixed: the largest weight of a direction is positive.
    """
    features = features.double()
    centred = (features - features.mean(dim=(0, 1))).flatten(0, 1)  # (B * N, D)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    variances, directions = variances.flip(0)[:3], directions.flip(1)[:, :3]
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    scores = centred @ (directions * signs)  # (B * N, 3)
    colors = torch.stack([_spread(score) for score in scores.T], dim=1)
    # What is left of a direction without variance is rounding, which scaling would make visible.
    total = features.square().sum()
    colors[:, variances <= 1e-12 * total] = 0.5
    share = (variances.sum() / centred.square().sum().clamp(min=1e-12 * total)).item()
    return PatchColors(colors.float().unflatten(0, features.shape[:2]), share)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """The 1st percentile becomes 0, the 99th 1; what lies beyond is cut."""
    low, high = np.quantile(values.cpu().numpy(), (0.01, 0.99))
    return ((values - low) / max(high - low, np.finfo(float).tiny)).clamp(0, 1)


def position_mean(features: torch.Tensor) -> torch.Tensor:
    """What the features (B, N, D) of each place have in common over the images, (N, D)."""
    return features.mean(dim=0)


def position_share(features: torch.Tensor) -> float:
    """The share of the variance of patch features (B, N, D) that knowing a patch's place explains, 0 to 1."""
    overall = features.mean(dim=(0, 1))
    of_places = (position_mean(features) - overall).square().mean(dim=0).sum()
    of_patches = (features - overall).square().mean(dim=(0, 1)).sum()
    return (of_places / of_patches.clamp(min=torch.finfo(features.dtype).tiny)).item()


def draw_pca(
    images: torch.Tensor, colors: Mapping[tuple[str, str], PatchColors], patch_size: int | tuple[int, int]
) -> Image.Image:
    """A row per image: the image, and its patches in the colours of each `pca_colors` result.

    Args:
        colors: two lines for the head of the column -> the colours, for the same images.
    """
    patch = _pair(patch_size)
    grid = _check_images(images, patch)
    for result in colors.values():
        _check_shape("colors", result.colors, (len(images), grid[0] * grid[1], 3))
    cells = [[_enlarge(_as_picture(image), patch)] for image in images]
    for result in colors.values():
        for row, values in zip(cells, result.colors, strict=True):
            picture = (255 * values.view(*grid, 3)).round().to(torch.uint8).cpu().numpy()
            row.append(_enlarge(picture.repeat(patch[0], axis=0).repeat(patch[1], axis=1), patch))
    return _compose(cells, [("image", f"{grid[0]} x {grid[1]} patches"), *colors])


# ------------------------------------------------------------------------------------------ attention and similarity


def attention_maps(attentions: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """What a chosen patch of each image attends to, and what all its patches attend to.

    Args:
        attentions: (B, H, N, N) of one layer: how much each patch (third axis) takes from each patch (fourth axis).
        patches: (B,), the chosen ones.

    Returns:
        (B, 2 + H, N), every map of sum 1: of the chosen patch the mean over the heads; the mean over all patches and
        heads; of the chosen patch each head.

    Raises:
        ValueError: for other shapes, or rows that do not sum to 1.
    """
    _check_shape("attentions", attentions, (len(patches), "heads", attentions.shape[-1], "patches"))
    sums = attentions.sum(dim=-1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(f"attentions must sum to 1 over the last axis, but sums are {sums.min()} to {sums.max()}")
    paid = attentions[torch.arange(len(patches)), :, patches]  # (B, H, N)
    return torch.cat([paid.mean(dim=1, keepdim=True), attentions.mean(dim=(1, 2)).unsqueeze(1), paid], dim=1)


def draw_attention(
    images: torch.Tensor, attentions: torch.Tensor, patches: torch.Tensor, patch_size: int | tuple[int, int]
) -> Image.Image:
    """A column per image, a row per map of `attention_maps`; the chosen patch is outlined.

    One scale for all maps, in multiples of the share that each patch gets if attention is spread evenly.
    """
    patch = _pair(patch_size)
    grid = _check_images(images, patch)
    maps = attention_maps(attentions, patches) * attentions.shape[-1]  # 1 is an even share
    _check_shape("attentions", maps, (len(images), "maps", grid[0] * grid[1]))
    high = max(2.0, np.quantile(maps.cpu().numpy(), 0.99))
    marks = [_visible(chosen, *grid) for chosen in patches]
    cells = [[_enlarge(_as_picture(image), patch, outlined=mark) for image, mark in zip(images, marks, strict=True)]]
    for number, row in enumerate(maps.unbind(1)):
        heats = [_heat(values, 0, high, grid, patch) for values in row]
        outlines = [None] * len(marks) if number == 1 else marks  # the second map is about all patches
        cells.append([_enlarge(heat, patch, outlined=each) for heat, each in zip(heats, outlines, strict=True)])
    heads = [f"the marked patch, head {number + 1}" for number in range(attentions.shape[1])]
    titles = ["one patch marked", "attention of the marked patch", "attention of all patches together", *heads]
    return _compose(cells, titles=titles, scale=("0: not at all", f"{high:.1f} x an even share or more"))


def similarity_maps(features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of a chosen patch of each image to all patches of all images.

    Args:
        features: (B, N, D).
        patches: (B,), the chosen ones.

    Returns:
        (B, B, N): the chosen patch's image, the other image, its patches.
    """
    features = normalize(features.double(), dim=-1)
    return torch.einsum("id,jnd->ijn", features[torch.arange(len(patches)), patches], features).float()


def draw_similarity(
    images: torch.Tensor, features: torch.Tensor, patches: torch.Tensor, patch_size: int | tuple[int, int]
) -> Image.Image:
    """A table: each row is about one marked patch, each column shows the similarity of an image's patches to it.

    The scale is the cosine, from -1 to 1.
    """
    patch = _pair(patch_size)
    grid = _check_images(images, patch)
    _check_shape("features", features, (len(images), grid[0] * grid[1], "features"))
    maps = similarity_maps(features, patches)
    plain = [_enlarge(_as_picture(image), patch) for image in images]
    cells = [[Image.new("RGB", plain[0].size, "white"), *plain]]
    for row, (image, chosen) in enumerate(zip(images, patches, strict=True)):
        mark = _visible(chosen, *grid)
        heats = [_heat(values, -1, 1, grid, patch) for values in maps[row]]
        pictures = [_enlarge(heat, patch, outlined=mark if row == other else None) for other, heat in enumerate(heats)]
        cells.append([_enlarge(_as_picture(image), patch, outlined=mark), *pictures])
    headers = [
        ("marked patch", "of each row"),
        *(("compared with", f"image {number + 1}") for number in range(len(images))),
    ]
    return _compose(cells, headers, scale=("-1: opposite", "0: unrelated", "1: the same"))


# -------------------------------------------------------------------------------------------------------- predictions


def nearest_patches(
    queries: torch.Tensor, query_images: torch.Tensor, bank: torch.Tensor, bank_images: torch.Tensor
) -> torch.Tensor:
    """For each query the patch of ANOTHER image whose features have the largest cosine similarity to it.

    Args:
        queries: (Q, D).
        query_images: (Q,), the number of the image that a query is from.
        bank: (K, N, D), features of all patches of K images.
        bank_images: (K,), their numbers.

    Returns:
        (Q,), indices into `bank.flatten(0, 1)`.

    Raises:
        ValueError: the bank holds no other image.
    """
    found = []
    for similarities, _ in _similarities(queries, query_images, bank, bank_images):
        found.append(similarities.argmax(dim=1))
    return torch.cat(found)


QUERIES_AT_ONCE = 128  # similarities of so many queries to the whole bank are in memory


def _similarities(queries, query_images, bank, bank_images):
    """Cosines (queries, K * N), -inf for patches of the query's own image, and those queries, a part at a time."""
    others = bank_images != query_images.unsqueeze(1)  # (Q, K)
    if not others.any(dim=1).all():
        raise ValueError(f"the bank of {len(bank)} images holds no other image than that of a query")
    num_patches = bank.shape[1]
    bank = normalize(bank.float(), dim=-1).flatten(0, 1)
    for chosen in torch.arange(len(queries)).split(QUERIES_AT_ONCE):
        similarities = normalize(queries[chosen].float(), dim=-1) @ bank.T
        own_image = ~others[chosen].repeat_interleave(num_patches, dim=1)
        yield similarities.masked_fill_(own_image, -torch.inf), chosen


class PredictionScores(NamedTuple):
    """Mean cosine similarities to the true features, and where the truth ranks."""

    prediction: float  # of the predictions
    place: float  # of the mean features of the same place in the other images: what knowing the place alone gives
    random: float  # of the patches of the other images
    rank: float  # the share of those patches that are less like the prediction than the truth is; 0.5 is chance


def score_predictions(
    predictions: torch.Tensor,
    truths: torch.Tensor,
    query_images: torch.Tensor,
    query_patches: torch.Tensor,
    bank: torch.Tensor,
    bank_images: torch.Tensor,
) -> PredictionScores:
    """Compares predictions and true features, both (Q, D), with what the other images of the bank have.

    `query_patches` (Q,) are the places; the other arguments are those of `nearest_patches`.
    """
    likeness = torch.cosine_similarity(predictions.float(), truths.float(), dim=-1)  # (Q,)
    places, randoms, ranks = [], [], []
    for similarities, chosen in _similarities(predictions, query_images, bank, bank_images):
        allowed = similarities > -torch.inf
        ranks.append(((similarities < likeness[chosen, None]) & allowed).sum(dim=1) / allowed.sum(dim=1))
    for image in query_images.unique():
        asked, others = query_images == image, bank[bank_images != image].float()  # (Q,), (K', N, D)
        places.append(torch.cosine_similarity(position_mean(others)[query_patches[asked]], truths[asked], dim=-1))
        randoms.append(normalize(truths[asked].float(), dim=-1) @ normalize(others, dim=-1).mean(dim=(0, 1)))
    means = [torch.cat(values).mean().item() for values in (places, randoms, ranks)]
    return PredictionScores(likeness.mean().item(), *means)


def draw_predictions(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    nearest_to_truth: torch.Tensor,
    nearest_to_prediction: torch.Tensor,
    patch_size: int | tuple[int, int],
    titles: Sequence[str] = (),
) -> Image.Image:
    """A row per image: the image, the context, and in it the true block and what was found for it among real patches.

    Args:
        context_indices: (B, N_ctx), the patches the context encoder saw.
        target_indices: (B, T), the patches of one block that was predicted.
        nearest_to_truth, nearest_to_prediction: (B, T, channels, patch height, patch width), uint8: the real patches
            whose features are nearest to the block's true features, and to the predicted ones.
        titles: a line above each row.
    """
    patch = _pair(patch_size)
    grid = _check_masks(images, context_indices.unsqueeze(1), target_indices.unsqueeze(1), patch)
    cells = []
    for number, image in enumerate(images):
        block = target_indices[number]
        seen, filled = _visible(context_indices[number], *grid), _visible(block, *grid)
        pasted = [_paste(image, block, pieces[number], grid) for pieces in (nearest_to_truth, nearest_to_prediction)]
        cells.append([_enlarge(_as_picture(image), patch), _enlarge(_as_picture(image), patch, seen, seen & False)])
        cells[-1] += [_enlarge(_as_picture(each), patch, seen | filled, filled) for each in (image, *pasted)]
    headers = [("image", ""), ("context: all that", "the model saw"), ("true block", "in the context")]
    headers += [("nearest patches", "to the truth"), ("nearest patches", "to the guess")]
    return _compose(cells, headers, titles)


def _paste(image: torch.Tensor, indices: torch.Tensor, pieces: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The image (channels, H, W) with other patches (T, channels, patch height, patch width) in these places."""
    image, (height, width) = image.clone(), pieces.shape[-2:]
    for index, piece in zip(indices.tolist(), pieces, strict=True):
        row, column = divmod(index, grid[1])
        image[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = piece
    return image


def draw_scores(scores: PredictionScores) -> Image.Image:
    """The similarities as bars, with the rank in words."""
    from matplotlib.figure import Figure

    bars = {
        "the predictor's guess": scores.prediction,
        "average of that place\nin other images": scores.place,
        "any patch of\nother images": scores.random,
    }
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), list(bars.values()), color=[COLORS[0], COLORS[1], "#777777"])
    axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=12)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    lowest = min(bars.values())
    axes.set_xlim(lowest - 0.25 if lowest < 0 else 0, 1.1)  # room for the number of a bar to the left
    axes.set_title("Similarity to the true features", fontsize=12.5)
    axes.set_xlabel("cosine (1 = the same direction)", fontsize=11.5)
    axes.tick_params(labelsize=11.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return _as_image(figure)


def _as_image(figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return Image.open(file).convert("RGB")


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
    looks = {label: (_color(number), MARKS[number]) for number, label in enumerate(shown)}
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
    return _as_image(figure)


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

    picture = Image.fromarray(_as_picture(image))
    ratio = THUMBNAIL_PIXELS / max(picture.size)
    size = [max(1, round(side * ratio)) for side in picture.size]
    picture = picture.resize(size, Image.Resampling.BOX if ratio < 1 else Image.Resampling.NEAREST)
    box = OffsetImage(np.asarray(picture), zoom=72 / 150, interpolation="nearest")  # one pixel is one of the picture's
    axes.add_artist(AnnotationBbox(box, point, pad=0.12, bboxprops={"edgecolor": color, "linewidth": 2}))


def _name_classes(figure, entries: list[tuple[str, tuple[str, str]]], columns: int) -> None:
    """A legend of (name, (colour, mark)) beneath the map."""
    from matplotlib.lines import Line2D

    names, looks = zip(*_row_by_row(entries, columns), strict=True)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..." for name in names]
    handles = [Line2D([], [], color=color, marker=mark, linestyle="", markersize=10) for color, mark in looks]
    legend = figure.legend(handles, names, loc="outside lower center", ncols=columns, fontsize=13, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
