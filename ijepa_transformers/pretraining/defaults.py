# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What `auto` stands for: masks that follow from the grid, and a momentum that follows from the length of the run."""

import dataclasses
from typing import TypeVar

from ..mask_arguments import MaskArguments, unused_mask_settings
from .arguments import AUTO, UncheckedArguments


Arguments = TypeVar("Arguments", bound=UncheckedArguments)

# Random masks were better than blocks on photographs in grids of 8 x 8 patches. On 14 x 14 patches of ImageNet the
# paper found the opposite. Nothing in between was tried.
LARGEST_RANDOM_GRID = 100
# In runs of 2,000 to 6,000 steps shares of 0.5 to 1 % were the best. Published runs have a fixed momentum.
HALF_LIFE_SHARE = 0.01
PUBLISHED_MOMENTUM = 0.996


def mask_mode_for(grid_size: tuple[int, int]) -> str:
    """The mode that suits a grid of (height, width) patches."""
    return "random" if grid_size[0] * grid_size[1] <= LARGEST_RANDOM_GRID else "unbiased"


def with_masks_for(arguments: Arguments, grid_size: tuple[int, int]) -> tuple[Arguments, str]:
    """The arguments with a mode in place of `mask_mode` auto, and a sentence that says why; empty without auto.

    Settings of the other mode get their defaults. `num_contexts` is kept for random masks only: with blocks each more
    context costs as much as the first.
    """
    if arguments.mask_mode != AUTO:
        return arguments, ""
    height, width = grid_size
    mode = mask_mode_for(grid_size)
    is_small = mode == "random"
    unused = unused_mask_settings(mode) | (set() if is_small else {"num_contexts"})
    defaults = MaskArguments()
    chosen = dataclasses.replace(arguments, mask_mode=mode, **{name: getattr(defaults, name) for name in unused})
    relation = "at most" if is_small else "more than"
    return (
        chosen,
        f"Masks are {mode} (mask_mode), because the grid of {height} x {width} has {relation} {LARGEST_RANDOM_GRID}"
        " patches.",
    )


def half_life_steps(half_life: float | str, total_steps: int) -> float:
    """Steps in which the target encoder forgets half of its past at the start of a run.

    Args:
        half_life: a share of the run; or auto: 1 % of the run, but not more than the published momentum has (173
            steps).
    """
    from ..optimization import half_life_of_momentum  # slow to import

    if isinstance(half_life, str):
        return max(1.0, min(HALF_LIFE_SHARE * total_steps, half_life_of_momentum(PUBLISHED_MOMENTUM)))
    return half_life * total_steps
