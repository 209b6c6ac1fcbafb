# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Sheets of pictures: masks, patch features as colours, attention and similarity."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from .cells import (
    Sheet,
    check_images,
    check_shape,
    cut_patches,
    enlarge,
    faded,
    heat,
    heat_over,
    height_and_width_pair,
    to_picture,
    visible_patches,
)
from .colors import PatchColors


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
    """A sheet with one row per image: the image, each context, each target block in its place. The rest is hatched.

    Args:
        images: (B, 1 or 3, H, W), uint8.
        context_indices: (B, C, N_ctx), row-major patch indices.
        target_indices: (B, M, N_tgt), likewise; or (B, C, M, N_tgt), the targets of each context one after the other.
        patch_size: pixels, one number or (height, width). H and W are multiples of it.
        path: if given, the sheet is also written there.

    Raises:
        ValueError: images that are not uint8 (B, 1 or 3, H, W), sizes that do not fit, or an index outside the grid.
    """
    picture = mask_sheet(images, context_indices, target_indices, patch_size).draw()
    if path is not None:
        picture.save(path)
    return picture


def mask_sheet(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    patch_size: int | tuple[int, int],
) -> Sheet:
    """The sheet of `draw_masks`."""
    patch = height_and_width_pair(patch_size)
    if target_indices.dim() == 4:
        target_indices = target_indices.flatten(1, 2)
    rows, columns = check_masks(images, context_indices, target_indices, patch)
    names = _mask_names("context", context_indices) + _mask_names("target", target_indices)
    headers = [("image,", f"{rows} x {columns} patches"), *names]
    cells = []
    for image, contexts, targets in zip(images, context_indices, target_indices, strict=True):
        picture = to_picture(image)
        masks = [visible_patches(indices, rows, columns) for indices in (*contexts, *targets)]
        cells.append([enlarge(picture, patch)] + [enlarge(picture, patch, mask, mask) for mask in masks])
    return Sheet(cells, headers)


def check_masks(
    images: torch.Tensor, context_indices: torch.Tensor, target_indices: torch.Tensor, patch: tuple[int, int]
) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: as `draw_masks`.
    """
    rows, columns = check_images(images, patch)
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
    return [(f"{name}," if count == 1 else f"{name} {number + 1},", f"{size} patches") for number in range(count)]


def draw_pca(
    images: torch.Tensor, colors: Mapping[tuple[str, str], PatchColors], patch_size: int | tuple[int, int]
) -> Image.Image:
    """A row per image: the image, and its patches in the colours of each `pca_colors` result.

    Args:
        colors: the two lines above a column -> its colours, for the same images. They may be on a grid that is a
            whole factor finer along both axes. Where they have a foreground, the rest shows the image in grey.
    """
    return pca_sheet(images, colors, patch_size).draw()


def pca_sheet(
    images: torch.Tensor, colors: Mapping[tuple[str, str], PatchColors], patch_size: int | tuple[int, int]
) -> Sheet:
    """The sheet of `draw_pca`."""
    patch = height_and_width_pair(patch_size)
    grid = check_images(images, patch)
    cells = [[enlarge(to_picture(image), patch)] for image in images]
    for result in colors.values():
        factor = max(1, math.isqrt(result.colors.shape[1] // (grid[0] * grid[1])))
        fine = factor * grid[0], factor * grid[1]
        check_shape("colors", result.colors, (len(images), fine[0] * fine[1], 3))
        for number, row in enumerate(cells):
            row.append(_coloured(row[0], result, number, fine))
    return Sheet(cells, [("image,", f"{grid[0]} x {grid[1]} patches"), *colors])


def _coloured(image: Image.Image, result: PatchColors, number: int, grid: tuple[int, int]) -> Image.Image:
    """The colours of one image, as large as its picture."""
    values = (255 * result.colors[number].view(*grid, 3)).round().to(torch.uint8).cpu().numpy()
    picture = np.asarray(Image.fromarray(values).resize(image.size, Image.Resampling.NEAREST))
    if result.foreground is not None:
        mask = Image.fromarray(result.foreground[number].view(grid).cpu().numpy().astype(np.uint8))
        inside = np.asarray(mask.resize(image.size, Image.Resampling.NEAREST)).astype(bool)
        picture = np.where(inside[..., None], picture, faded(np.asarray(image)))
    return Image.fromarray(picture)


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
    check_shape("attentions", attentions, (len(patches), "heads", attentions.shape[-1], "patches"))
    sums = attentions.sum(dim=-1)
    if not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
        raise ValueError(f"attentions must sum to 1 over the last axis, but sums are {sums.min()} to {sums.max()}")
    paid = attentions[torch.arange(len(patches)), :, patches]  # (B, H, N)
    return torch.cat([paid.mean(dim=1, keepdim=True), attentions.mean(dim=(1, 2)).unsqueeze(1), paid], dim=1)


def draw_attention(
    images: torch.Tensor, attentions: torch.Tensor, patches: torch.Tensor, patch_size: int | tuple[int, int]
) -> Image.Image:
    """A column per image, a row per map of `attention_maps` as heat over the image; the chosen patch is outlined.

    All maps have one scale: multiples of the share that each patch gets if attention is spread evenly.
    """
    rows, high = _attention_rows(images, attentions, patches, patch_size)
    heads = [f"the marked patch, head {number + 1}" for number in range(attentions.shape[1])]
    titles = ["one patch marked", "attention of the marked patch", "attention of all patches together", *heads]
    return Sheet(rows, titles=titles, scale=("0: not at all", f"{high:.1f} x an even share or more")).draw()


def attention_sheet(
    images: torch.Tensor, attentions: torch.Tensor, patches: torch.Tensor, patch_size: int | tuple[int, int]
) -> Sheet:
    """A row per image: the image with the chosen patch, and the means over the heads of `draw_attention`."""
    rows, high = _attention_rows(images, attentions, patches, patch_size, num_maps=2)
    headers = [("one patch", "is marked"), ("what it", "looks at"), ("what all", "look at")]
    cells = [list(column) for column in zip(*rows, strict=True)]
    return Sheet(cells, headers, scale=("0: not at all", f"{high:.1f} x an even share or more"))


def _attention_rows(
    images: torch.Tensor,
    attentions: torch.Tensor,
    patches: torch.Tensor,
    patch_size: int | tuple[int, int],
    num_maps: int | None = None,
) -> tuple[list[list[Image.Image]], float]:
    """A row for the images and one for each of the first maps, and the upper end of the scale."""
    patch = height_and_width_pair(patch_size)
    grid = check_images(images, patch)
    maps = attention_maps(attentions, patches)[:, :num_maps] * attentions.shape[-1]  # 1 is an even share
    check_shape("attentions", maps, (len(images), "maps", grid[0] * grid[1]))
    high = max(2.0, float(np.quantile(maps.cpu().numpy(), 0.99)))
    pictures = [to_picture(image) for image in images]
    marks = [visible_patches(chosen, *grid) for chosen in patches]
    rows = [[enlarge(picture, patch, outlined=mark) for picture, mark in zip(pictures, marks, strict=True)]]
    for number, of_images in enumerate(maps.unbind(1)):
        heats = [heat_over(picture, each, 0, high, grid) for picture, each in zip(pictures, of_images, strict=True)]
        outlines = [None] * len(marks) if number == 1 else marks  # the second map is about all patches
        rows.append([enlarge(each, patch, outlined=mark) for each, mark in zip(heats, outlines, strict=True)])
    return rows, high


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
    grid = check_images(images, patch)
    check_shape("features", features, (len(images), grid[0] * grid[1], "features"))
    maps = similarity_maps(features, patches)
    plain = [enlarge(to_picture(image), patch) for image in images]
    cells = [[Image.new("RGB", plain[0].size, "white"), *plain]]
    for row, (image, chosen) in enumerate(zip(images, patches, strict=True)):
        mark = visible_patches(chosen, *grid)
        heats = [heat(values, -1, 1, grid, patch) for values in maps[row]]
        pictures = [enlarge(each, patch, outlined=mark if row == other else None) for other, each in enumerate(heats)]
        cells.append([enlarge(to_picture(image), patch, outlined=mark), *pictures])
    headers = [
        ("marked patch", "of each row"),
        *(("compared with", f"image {number + 1}") for number in range(len(images))),
    ]
    return Sheet(cells, headers, scale=("-1: opposite", "0: unrelated", "1: the same")).draw()
