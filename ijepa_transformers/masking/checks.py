# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checks of the masks' settings. Each error names the setting and shows the value."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def check_grid_size(grid_size: Sequence[int]) -> None:
    """Raises ValueError unless `grid_size` is two integers of at least 1."""
    if len(grid_size) != 2:
        raise ValueError(f"grid_size={grid_size} must be (height, width) in patches")
    check_positive_integers(grid_height=grid_size[0], grid_width=grid_size[1])


def check_positive_integers(**values: Any) -> None:
    """Raises ValueError, with name and value, unless each is an integer of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be an integer of at least 1")


def check_range(name: str, bounds: Sequence[float], largest: float) -> None:
    """Raises ValueError unless `bounds` is (low, high) with 0 < low <= high <= largest."""
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1] <= largest:
        raise ValueError(f"{name}={bounds} must be (low, high) with 0 < low <= high <= {largest}")


def check_sample_arguments(batch_size: int, seed: int, step: int, rank: int) -> None:
    """Raises ValueError unless `sample` can work with these arguments."""
    check_positive_integers(batch_size=batch_size)
    for name, value in (("seed", seed), ("step", step), ("rank", rank)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}={value} must be from 0 to 2**64 - 1")
