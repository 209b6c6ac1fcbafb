# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Features of patches, small enough to lie inside the page: projected to few directions, in one byte each."""

import base64
from typing import Any

import torch
from torch.nn.functional import normalize

from .colors import position_mean


MOST_DIRECTIONS = 64


def quantized_features(features: torch.Tensor, most_directions: int = MOST_DIRECTIONS) -> tuple[str, int]:
    """Bytes in base64 whose cosines are nearly those of the features (B, N, D), and the number of directions.

    The features, of length 1 each, are projected to the directions that hold most of them. Each patch is scaled so
    that its largest value is 127. The bytes are signed, image by image, patch by patch.
    """
    vectors = normalize(features.double(), dim=-1).flatten(0, 1)  # (B * N, D)
    size = min(most_directions, *vectors.shape)
    directions = torch.linalg.eigh(vectors.T @ vectors)[1][:, -size:]  # (D, size)
    values = vectors @ directions
    values = 127 * values / values.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    return base64.b64encode(values.round().to(torch.int8).numpy().tobytes()).decode(), size


def browser_data(features: torch.Tensor, shown: int, grid: tuple[int, int], chosen: tuple[int, int]) -> dict[str, Any]:
    """What the script of the page reads.

    Args:
        features: (K, N, D), of the shown images and of others, which tell what is usual at a place.
        shown: images whose features are embedded.
        chosen: number of the image and of the patch that are marked at first.
    """
    both = {"features": features[:shown], "placeless": (features - position_mean(features))[:shown]}
    encoded = {name: quantized_features(values) for name, values in both.items()}
    return {
        "rows": grid[0],
        "columns": grid[1],
        "size": encoded["features"][1],
        "image": chosen[0],
        "patch": chosen[1],
        **{name: text for name, (text, _) in encoded.items()},
    }
