# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What `auto` stands for: masks follow from the grid and the length of the run, the momentum from the length."""

import dataclasses
from typing import Any, TypeVar

from ..mask_arguments import MASK_SETTINGS, MaskArguments, unused_mask_settings
from .arguments import AUTO, UncheckedArguments


Arguments = TypeVar("Arguments", bound=UncheckedArguments)

# Blocks were tried on grids from 7 x 7 patches on. Random masks fit every grid.
SMALLEST_BLOCK_GRID = 49
# On photographs in grids of 8 x 8 patches, in equal time: random masks are ahead or level if they take up to 3,600
# steps, about level with 9,000, and behind with 12,000 and 23,000 (docs/masks.md, docs/results.md). On 14 x 14 patches
# of ImageNet blocks are far ahead, as the paper found. Nothing in between was tried.
LARGEST_RANDOM_GRID = 100
LONGEST_RANDOM_RUN = 10_000  # steps
# In runs of 2,000 to 6,000 steps shares of 0.5 to 1 % were the best. Published runs have a fixed momentum.
HALF_LIFE_SHARE = 0.01
PUBLISHED_MOMENTUM = 0.996


def mask_mode_for(grid_size: tuple[int, int], max_steps: int | None) -> tuple[str, str]:
    """The mode that suits a grid of (height, width) patches and a run of so many steps, and why.

    Args:
        max_steps: None if the length of the run is given in epochs. Such runs are taken as long ones.
    """
    num_patches, grid = grid_size[0] * grid_size[1], f"the grid of {grid_size[0]} x {grid_size[1]}"
    if num_patches < SMALLEST_BLOCK_GRID:
        return "random", f"{grid} has fewer than {SMALLEST_BLOCK_GRID} patches"
    if num_patches > LARGEST_RANDOM_GRID:
        return "unbiased", f"{grid} has more than {LARGEST_RANDOM_GRID} patches"
    small = f"{grid} has at most {LARGEST_RANDOM_GRID} patches"
    if max_steps is None:
        return "unbiased", f"{small}, but the length of the run is given in epochs"
    if max_steps > LONGEST_RANDOM_RUN:
        return "unbiased", f"{small}, but the run more than {LONGEST_RANDOM_RUN:,} steps"
    return "random", f"{small}, and the run at most {LONGEST_RANDOM_RUN:,} steps"


def with_masks_for(arguments: Arguments, grid_size: tuple[int, int], recorded: Any = None) -> tuple[Arguments, str]:
    """The arguments with a mode in place of `mask_mode` auto, and why in a sentence or two; empty without auto.

    Args:
        recorded: the mode of the run to resume, which stays; another value than a mode counts as none.
    """
    if arguments.mask_mode != AUTO:
        return arguments, ""
    if isinstance(recorded, str) and recorded in MASK_SETTINGS:
        mode, why = recorded, "as in the run that is resumed"
    else:
        mode, reason = mask_mode_for(grid_size, arguments.max_steps)
        why = f"because {reason}"
    chosen = with_mask_mode(arguments, mode)
    left_out = [name for name in sorted(_unused(mode)) if getattr(arguments, name) != getattr(chosen, name)]
    more = f" Left out: {', '.join(left_out)}." if left_out else ""
    return chosen, f"Masks are {mode} (mask_mode), {why}.{more}"


def with_mask_mode(arguments: Arguments, mode: str) -> Arguments:
    """The arguments with this mode in place of `mask_mode` auto. Settings that it does not use get their defaults."""
    defaults = MaskArguments()
    return dataclasses.replace(arguments, mask_mode=mode, **{name: getattr(defaults, name) for name in _unused(mode)})


def _unused(mode: str) -> set[str]:
    """Settings of other modes. Also `num_contexts` with blocks, where each more context costs as much as the first."""
    return unused_mask_settings(mode) | (set() if mode == "random" else {"num_contexts"})


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
