# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Sheets of pictures: masks, patch features as colours, attention and similarity."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import normalize


CELL_PIXELS = 112  # images are enlarged by a whole factor to at least this height
GAP = 8  # pixels
HIDDEN, OUTLINE = 215, (214, 0, 110)  # grey of hidden patches, magenta of outlines
HEAT_COLORS = "cividis"  # dark blue to yellow, in the same order for colour-blind readers and in grey


def height_and_width_pair(patch_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a patch.

    Raises:
        ValueError: if there are not one or two numbers.
    """
    if isinstance(patch_size, int):
        return patch_size, patch_size
    height, width = patch_size
    return height, width


def _check_images(images: torch.Tensor, patch: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patch grid. Raises ValueError if the images do not fit."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must be uint8 (B, 1 or 3, H, W), got {images.dtype} {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch[0]} x {patch[1]}")
    return height // patch[0], width // patch[1]


def _check_shape(name: str, values: torch.Tensor, expected: tuple[int | str, ...]) -> None:
    """Raises ValueError unless the shape is as expected. A string stands for any size."""
    fits = zip(values.shape, expected, strict=False)
    if values.dim() != len(expected) or not all(isinstance(size, str) or real == size for real, size in fits):
        wanted = ", ".join(map(str, expected))
        raise ValueError(f"{name} must be ({wanted}), got {tuple(values.shape)}")


def to_picture(image: torch.Tensor) -> np.ndarray:
    """(1 or 3, H, W) -> (H, W, 3)."""
    return np.moveaxis(image.expand(3, -1, -1).cpu().numpy(), 0, -1)


def visible_patches(indices: torch.Tensor, rows: int, columns: int) -> np.ndarray:
    """Which patches are visible, (rows, columns), bool."""
    mask = np.zeros(rows * columns, dtype=bool)
    mask[indices.cpu().numpy()] = True
    return mask.reshape(rows, columns)


def enlarge(
    picture: np.ndarray,
    patch: tuple[int, int],
    visible: np.ndarray | None = None,
    outlined: np.ndarray | None = None,
) -> Image.Image:
    """The picture (H, W, 3), enlarged by a whole factor.

    Args:
        visible: (rows, columns), bool. The other patches become grey.
        outlined: (rows, columns), bool. These patches get an outline.
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
        inner = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]  # without a border of 2 pixels
        picture[inside & ~inner] = OUTLINE
    return Image.fromarray(picture)


def _heat(values: torch.Tensor, low: float, high: float, grid: tuple[int, int], patch: tuple[int, int]) -> np.ndarray:
    """The values (N,) of the patches as colours (H, W, 3), from `low` (dark) to `high` (bright)."""
    from matplotlib import colormaps

    shares = ((values.double() - low) / (high - low)).clamp(0, 1).cpu().numpy().reshape(grid)
    colors = (255 * colormaps[HEAT_COLORS](shares)[..., :3]).round().astype(np.uint8)
    return colors.repeat(patch[0], axis=0).repeat(patch[1], axis=1)


def compose_sheet(
    cells: list[list[Image.Image]],
    headers: Sequence[tuple[str, str]] = (),
    titles: Sequence[str] = (),
    scale: Sequence[str] = (),
) -> Image.Image:
    """Rows of equal pictures on a white sheet.

    Args:
        headers: two lines above each column.
        titles: a line above each row.
        scale: labels of the colour strip at the bottom, from the darkest to the brightest colour.
    """
    width, height = cells[0][0].width + GAP, cells[0][0].height + GAP
    letter = cells[0][0].width // 8  # so "14 x 14 patches" fits into a column
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


def _draw_scale(sheet: Image.Image, labels: Sequence[str], letter: int) -> None:
    """Draws the colour strip at the bottom of the sheet, with two or three labels below it."""
    width, upper = sheet.width - 2 * GAP, sheet.height - GAP - 3 * letter
    strip = _heat(torch.arange(width), 0, width - 1, (1, width), (letter, 1))
    sheet.paste(Image.fromarray(strip), (GAP, upper))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=letter)
    anchors = ("la", "ma", "ra") if len(labels) == 3 else ("la", "ra")
    for place, (label, anchor) in enumerate(zip(labels, anchors, strict=True)):
        left = GAP + width * place // (len(labels) - 1)
        draw.text((left, upper + letter + 4), label, fill="black", font=font, anchor=anchor)


def cut_patches(images: torch.Tensor, patch_size: int | tuple[int, int]) -> torch.Tensor:
    """The pixels of the patches of images, (B, N, channels, patch height, patch width)."""
    patch = height_and_width_pair(patch_size)
    _check_images(images, patch)
    pieces = images.unfold(2, patch[0], patch[0]).unfold(3, patch[1], patch[1])  # (B, channels, rows, columns, h, w)
    return pieces.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def most_detailed_patches(images: torch.Tensor, patch_size: int | tuple[int, int]) -> torch.Tensor:
    """The number of the patch of each image with the largest standard deviation of its pixels, (B,)."""
    return cut_patches(images, patch_size).float().flatten(2).std(dim=2).argmax(dim=1)


def most_detailed_blocks(
    images: torch.Tensor, target_indices: torch.Tensor, patch_size: int | tuple[int, int]
) -> torch.Tensor:
    """The number of the target block of each image with the largest standard deviation of its pixels, (B,).

    `target_indices` are (B, M, T).
    """
    patches = cut_patches(images, patch_size).float().flatten(2)  # (B, N, pixels)
    places = target_indices.flatten(1).unsqueeze(-1).expand(-1, -1, patches.shape[-1])
    blocks = patches.gather(1, places).unflatten(1, target_indices.shape[1:])  # (B, M, T, pixels)
    return blocks.flatten(2).std(dim=2).argmax(dim=1)


def draw_masks(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    patch_size: int | tuple[int, int],
    path: str | Path | None = None,
) -> Image.Image:
    """A sheet with one row per image: the image, each context (the rest is grey), each target block in its place.

    Args:
        images: (B, 1 or 3, H, W), uint8.
        context_indices: (B, C, N_ctx), row-major patch indices.
        target_indices: (B, M, N_tgt), likewise; or (B, C, M, N_tgt), the targets of each context one after the other.
        patch_size: pixels, one number or (height, width). H and W are multiples of it.
        path: if given, the sheet is also written there.

    Raises:
        ValueError: images that are not uint8 (B, 1 or 3, H, W), sizes that do not fit, or an index outside the grid.
    """
    patch = height_and_width_pair(patch_size)
    if target_indices.dim() == 4:
        target_indices = target_indices.flatten(1, 2)
    rows, columns = check_masks(images, context_indices, target_indices, patch)
    names = _mask_names("context", context_indices) + _mask_names("target", target_indices)
    headers = [("image", f"{rows} x {columns} patches"), *names]
    cells = []
    for image, contexts, targets in zip(images, context_indices, target_indices, strict=True):
        picture = to_picture(image)
        masks = [visible_patches(indices, rows, columns) for indices in (*contexts, *targets)]
        cells.append([enlarge(picture, patch)] + [enlarge(picture, patch, mask, mask) for mask in masks])
    sheet = compose_sheet(cells, headers)
    if path is not None:
        sheet.save(path)
    return sheet


def check_masks(
    images: torch.Tensor, context_indices: torch.Tensor, target_indices: torch.Tensor, patch: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: as `draw_masks`.
    """
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
    """The two lines above each mask's column."""
    _, count, size = indices.shape
    return [(name if count == 1 else f"{name} {number + 1}", f"{size} patches") for number in range(count)]


class PatchColors(NamedTuple):
    colors: torch.Tensor  # (B, N, 3), float32 in 0..1
    share: float  # the share of the features' variance that the three colours show


def pca_colors(features: torch.Tensor) -> PatchColors:
    """The three main directions of patch features (B, N, D) as red, green and blue, in one basis for the whole batch.

    Each direction is scaled by its percentiles over the batch. So patches of the same colour have similar features,
    in different images too. The sign is fixed: the largest weight of a direction is positive.
    """
    features = features.double()
    centred = (features - features.mean(dim=(0, 1))).flatten(0, 1)  # (B * N, D)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    variances, directions = variances.flip(0)[:3], directions.flip(1)[:, :3]
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    scores = centred @ (directions * signs)  # (B * N, 3)
    colors = torch.stack([_spread(score) for score in scores.T], dim=1)
    # A direction without variance holds only rounding errors. Scaling would make them visible.
    total = features.square().sum()
    colors[:, variances <= 1e-12 * total] = 0.5
    share = (variances.sum() / centred.square().sum().clamp(min=1e-12 * total)).item()
    return PatchColors(colors.float().unflatten(0, features.shape[:2]), share)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Scales the 1st percentile to 0 and the 99th to 1. Values beyond them are cut."""
    low, high = np.quantile(values.cpu().numpy(), (0.01, 0.99))
    return ((values - low) / max(high - low, np.finfo(float).tiny)).clamp(0, 1)


def position_mean(features: torch.Tensor) -> torch.Tensor:
    """The mean over the images of the features (B, N, D) at each place, (N, D)."""
    return features.mean(dim=0)


def position_share(features: torch.Tensor) -> float:
    """The share of the variance of patch features (B, N, D) that the place of a patch explains, 0 to 1."""
    overall = features.mean(dim=(0, 1))
    of_places = (position_mean(features) - overall).square().mean(dim=0).sum()
    of_patches = (features - overall).square().mean(dim=(0, 1)).sum()
    return (of_places / of_patches.clamp(min=torch.finfo(features.dtype).tiny)).item()


def draw_pca(
    images: torch.Tensor, colors: Mapping[tuple[str, str], PatchColors], patch_size: int | tuple[int, int]
) -> Image.Image:
    """A row per image: the image, and its patches in the colours of each `pca_colors` result.

    Args:
        colors: the two lines above a column -> its colours, for the same images.
    """
    patch = height_and_width_pair(patch_size)
    grid = _check_images(images, patch)
    for result in colors.values():
        _check_shape("colors", result.colors, (len(images), grid[0] * grid[1], 3))
    cells = [[enlarge(to_picture(image), patch)] for image in images]
    for result in colors.values():
        for row, values in zip(cells, result.colors, strict=True):
            picture = (255 * values.view(*grid, 3)).round().to(torch.uint8).cpu().numpy()
            row.append(enlarge(picture.repeat(patch[0], axis=0).repeat(patch[1], axis=1), patch))
    return compose_sheet(cells, [("image", f"{grid[0]} x {grid[1]} patches"), *colors])


def attention_maps(attentions: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """What a chosen patch of each image attends to, and what all its patches attend to.

    Args:
        attentions: (B, H, N, N) of one layer: how much each patch (third axis) takes from each patch (fourth axis).
        patches: (B,), the chosen ones.

    Returns:
        (B, 2 + H, N) maps, each of sum 1. The first is the chosen patch's mean over the heads. The second is the mean
        over all patches and heads. The others are the chosen patch's, one for each head.

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

    All maps have one scale: multiples of the share that each patch gets if attention is spread evenly.
    """
    patch = height_and_width_pair(patch_size)
    grid = _check_images(images, patch)
    maps = attention_maps(attentions, patches) * attentions.shape[-1]  # 1 is an even share
    _check_shape("attentions", maps, (len(images), "maps", grid[0] * grid[1]))
    high = max(2.0, np.quantile(maps.cpu().numpy(), 0.99))
    marks = [visible_patches(chosen, *grid) for chosen in patches]
    cells = [[enlarge(to_picture(image), patch, outlined=mark) for image, mark in zip(images, marks, strict=True)]]
    for number, row in enumerate(maps.unbind(1)):
        heats = [_heat(values, 0, high, grid, patch) for values in row]
        outlines = [None] * len(marks) if number == 1 else marks  # the second map is about all patches
        cells.append([enlarge(heat, patch, outlined=each) for heat, each in zip(heats, outlines, strict=True)])
    heads = [f"the marked patch, head {number + 1}" for number in range(attentions.shape[1])]
    titles = ["one patch marked", "attention of the marked patch", "attention of all patches together", *heads]
    return compose_sheet(cells, titles=titles, scale=("0: not at all", f"{high:.1f} x an even share or more"))


def similarity_maps(features: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Cosine similarity of a chosen patch of each image to all patches of all images.

    Args:
        features: (B, N, D).
        patches: (B,), the chosen ones.

    Returns:
        (B, B, N): image of the chosen patch, compared image, patch of the compared image.
    """
    features = normalize(features.double(), dim=-1)
    return torch.einsum("id,jnd->ijn", features[torch.arange(len(patches)), patches], features).float()


def draw_similarity(
    images: torch.Tensor, features: torch.Tensor, patches: torch.Tensor, patch_size: int | tuple[int, int]
) -> Image.Image:
    """A table with a row for each marked patch. Each column shows how similar the patches of one image are to it.

    The scale is the cosine, from -1 to 1.
    """
    patch = height_and_width_pair(patch_size)
    grid = _check_images(images, patch)
    _check_shape("features", features, (len(images), grid[0] * grid[1], "features"))
    maps = similarity_maps(features, patches)
    plain = [enlarge(to_picture(image), patch) for image in images]
    cells = [[Image.new("RGB", plain[0].size, "white"), *plain]]
    for row, (image, chosen) in enumerate(zip(images, patches, strict=True)):
        mark = visible_patches(chosen, *grid)
        heats = [_heat(values, -1, 1, grid, patch) for values in maps[row]]
        pictures = [enlarge(heat, patch, outlined=mark if row == other else None) for other, heat in enumerate(heats)]
        cells.append([enlarge(to_picture(image), patch, outlined=mark), *pictures])
    headers = [
        ("marked patch", "of each row"),
        *(("compared with", f"image {number + 1}") for number in range(len(images))),
    ]
    return compose_sheet(cells, headers, scale=("-1: opposite", "0: unrelated", "1: the same"))
