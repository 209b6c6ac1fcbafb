# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Patch features as colours: principal directions, the object before its background, and a finer grid."""

from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel


class PatchColors(NamedTuple):
    """Colours of patches. Where `foreground` is False, the image is shown instead."""

    colors: torch.Tensor  # (B, N, 3), float32 in 0..1
    share: float  # the share of the features' variance that the three colours show
    foreground: torch.Tensor | None = None  # (B, N), bool; None: all patches are coloured


def pca_colors(features: torch.Tensor, foreground: torch.Tensor | None = None) -> PatchColors:
    """The three main directions of patch features (B, N, D) as red, green and blue, in one basis for the whole batch.

    Each direction is scaled by its percentiles over the batch. So patches of the same colour have similar features,
    in different images too. The sign is fixed: the largest weight of a direction is positive.

    Args:
        foreground: (B, N), bool. If given, the directions and their scale are those of these patches alone.
    """
    features = features.double()
    chosen = features.flatten(0, 1) if foreground is None else features[foreground]  # (K, D)
    if not len(chosen):
        raise ValueError("pca_colors needs at least one patch in the foreground.")
    mean = chosen.mean(dim=0)
    variances, directions = torch.linalg.eigh((chosen - mean).T @ (chosen - mean))  # ascending
    variances, directions = variances.flip(0)[:3], directions.flip(1)[:, :3]
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    scores = (features.flatten(0, 1) - mean) @ (directions * signs)  # (B * N, 3)
    bounds = (chosen - mean) @ (directions * signs)  # (K, 3)
    colors = torch.stack([_spread(score, bound) for score, bound in zip(scores.T, bounds.T, strict=True)], dim=1)
    # A direction without variance holds only rounding errors. Scaling would make them visible.
    total = chosen.square().sum()
    colors[:, variances <= 1e-12 * total] = 0.5
    share = (variances.sum() / (chosen - mean).square().sum().clamp(min=1e-12 * total)).item()
    return PatchColors(colors.float().unflatten(0, features.shape[:2]), share, foreground)


def _spread(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Scales the 1st percentile of `bounds` to 0 and the 99th to 1. Values beyond them are cut."""
    low, high = np.quantile(bounds.cpu().numpy(), (0.01, 0.99))
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


def foreground_of(features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which patches are the foreground, (B, N), bool: one side of the first principal direction.

    The first direction of patch features mostly tells objects from their background (Oquab et al. 2023, DINOv2). The
    foreground is the side that has fewer of the patches at the border of the images.

    Args:
        features: (B, N, D), best without the mean of each place.
    """
    centred = features.double() - features.double().mean(dim=(0, 1))
    direction = torch.linalg.eigh(centred.flatten(0, 1).T @ centred.flatten(0, 1))[1][:, -1]
    side = centred @ direction > 0
    rows, columns = torch.arange(grid[0]).unsqueeze(1), torch.arange(grid[1])
    border = ((rows % max(grid[0] - 1, 1) == 0) | (columns % max(grid[1] - 1, 1) == 0)).flatten()
    side = side if side[:, border].double().mean() <= 0.5 else ~side
    return side if side.any() else ~side


FINE_GRID = 14  # patches along the shorter side that a picture of features should have
MOST_SHIFTS = 4  # along one axis


def shifts_for(grid: tuple[int, int], patch: tuple[int, int]) -> int:
    """How many shifted copies along each axis make the grid at least `FINE_GRID` fine, as far as pixels allow."""
    wanted = -(-FINE_GRID // min(grid))
    return max(1, min(wanted, MOST_SHIFTS, min(patch) // 2))


@torch.no_grad()
def shifted_features(encoder: PreTrainedModel, pixel_values: torch.Tensor, shifts: int) -> torch.Tensor:
    """Patch features on a grid that is `shifts` times finer along each axis.

    The image is moved by parts of a patch, encoded each time, and the features are sorted by place. So the encoder
    sees the size of image and of patches that it was trained on.

    Args:
        encoder: with `patch_height_and_width` and `grid_size` in its configuration.
        pixel_values: (B, channels, H, W).

    Returns:
        (B, (shifts * rows) * (shifts * columns), D), row by row.
    """
    (rows, columns), patch = encoder.config.grid_size, encoder.config.patch_height_and_width
    steps = [[round((part + 0.5) * side / shifts - side / 2) for part in range(shifts)] for side in patch]
    height, width = pixel_values.shape[-2:]
    edge = (patch[1], patch[1], patch[0], patch[0])
    padded = torch.nn.functional.pad(pixel_values, edge, mode="replicate")
    finer = []
    for down in steps[0]:
        for right in steps[1]:
            top, left = patch[0] + down, patch[1] + right
            moved = padded[..., top : top + height, left : left + width]
            finer.append(encoder(moved.to(encoder.device)).last_hidden_state.float().cpu())
    stacked = torch.stack(finer, dim=1).unflatten(1, (shifts, shifts)).unflatten(3, (rows, columns))
    return stacked.permute(0, 3, 1, 4, 2, 5).flatten(1, 4)  # (B, rows, shifts, columns, shifts, D)
