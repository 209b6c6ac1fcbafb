# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""All modes of masks, and the masks of a mode."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from . import multi_block
from .complement import InverseBlockMasking, RandomMasking
from .multi_block import MultiBlockMasking


Masking: TypeAlias = MultiBlockMasking | RandomMasking | InverseBlockMasking

MODES = (*multi_block.MODES, RandomMasking.mode, InverseBlockMasking.mode)


def build_masking(grid_size: Sequence[int], mode: str = "unbiased", **settings: Any) -> Masking:
    """The masks of a mode.

    Args:
        grid_size: (H, W), patches.
        mode: "unbiased" or "meta" (`MultiBlockMasking`), "random" (`RandomMasking`) or "inverse_block"
            (`InverseBlockMasking`).
        settings: of the class of this mode. What is not given has its default.

    Raises:
        ValueError: if the mode is unknown, a value is out of range, or the settings do not work on this grid.
        TypeError: for a setting that the mode does not have.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is unknown: choose one of {MODES}")
    if mode == RandomMasking.mode:
        return RandomMasking(grid_size, **settings)
    if mode == InverseBlockMasking.mode:
        return InverseBlockMasking(grid_size, **settings)
    return MultiBlockMasking(grid_size, mode=mode, **settings)
