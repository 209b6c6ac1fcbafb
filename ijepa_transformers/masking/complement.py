# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Masks in which every patch that a context does not see is its target, and all of them are predicted in one pass.

Shapes: B images, (H, W) grid in patches, N = H * W patches, C context masks, N_ctx patches in each context,
N_tgt = N - N_ctx patches in its target. N_ctx is fixed, so no list is cut and no shape changes. Indices are row-major.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch

from .checks import check_grid_size, check_positive_integers, check_range, check_sample_arguments
from .streams import VISIBLE_BLOCK, VISIBLE_PATCHES, SlotStream, choice_bits


# The area of a visible block may differ from the asked share by this part of the grid.
_LARGEST_DEVIATION = 0.1


@dataclass(frozen=True)
class ComplementMasking(ABC):
    """What `RandomMasking` and `InverseBlockMasking` share."""

    mode: ClassVar[str]
    num_targets: ClassVar[int] = 1  # M: all hidden patches are one target

    grid_size: Sequence[int]
    visible_share: float = 0.3
    num_contexts: int = 1

    def __post_init__(self) -> None:
        check_grid_size(self.grid_size)
        check_positive_integers(num_contexts=self.num_contexts)
        if not 0 < self.visible_share < 1:
            raise ValueError(f"visible_share={self.visible_share} must be above 0 and below 1")
        asked = round(self.visible_share * self.num_patches)
        if not 1 <= asked < self.num_patches:
            kind, change = ("visible", "raise") if asked < 1 else ("hidden", "lower")
            raise ValueError(
                f"visible_share={self.visible_share} leaves no {kind} patch on grid_size={tuple(self.grid_size)}: "
                f"{change} visible_share"
            )

    def sample(self, batch_size: int, seed: int, step: int = 0, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of one slice of the global batch of this step.

        Args:
            batch_size, seed, step, rank: as in `MultiBlockMasking.sample`.

        Returns:
            context_indices (B, C, N_ctx), and target_indices: (B, 1, N_tgt) with one context, (B, C, 1, N_tgt) with
            more, the target of each context. int64, sorted along the last dimension. A context and its target together
            are the whole grid.

        Raises:
            ValueError: if `batch_size` is below 1, or another argument is negative or needs more than 64 bits.
        """
        check_sample_arguments(batch_size, seed, step, rank)
        visible = self._draw_visible(SlotStream(seed, step, first_slot=rank * batch_size, num_slots=batch_size))
        contexts, targets = (torch.from_numpy(_indices(chosen)) for chosen in (visible, ~visible))
        return contexts, targets if self.num_contexts == 1 else targets.unsqueeze(2)

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_target_tokens(self) -> int:
        """N_tgt."""
        return self.num_patches - self.num_context_tokens

    @property
    @abstractmethod
    def num_context_tokens(self) -> int:
        """N_ctx."""

    @abstractmethod
    def _draw_visible(self, stream: SlotStream) -> np.ndarray:
        """Which patches each context sees, bool (B, C, N)."""


@dataclass(frozen=True)
class RandomMasking(ComplementMasking):
    """Each context sees patches that are drawn uniformly at random. All others are its target.

    Args:
        grid_size: (H, W), patches.
        visible_share: the share of the patches that a context sees, rounded to whole patches.
        num_contexts: C. The contexts of an image are drawn independently.

    Raises:
        ValueError: if a value is out of range, or no patch or every patch would be visible.
    """

    mode = "random"

    @property
    def num_context_tokens(self) -> int:
        """N_ctx."""
        return round(self.visible_share * self.num_patches)

    def _draw_visible(self, stream: SlotStream) -> np.ndarray:
        keys = stream.distinct_keys(VISIBLE_PATCHES, self.num_contexts, self.num_patches)
        last = self.num_context_tokens - 1
        return keys <= np.partition(keys, last, axis=-1)[..., last, None]


@dataclass(frozen=True)
class InverseBlockMasking(ComplementMasking):
    """Each context is one block of the grid. All patches around it are its target.

    All blocks of a run have one area, so that no shape changes: the area nearest to `visible_share` that a block with
    an allowed aspect ratio can have. A block is drawn uniformly from all blocks of this area, in every allowed shape
    and at every place. So patches in the middle of the grid are visible more often than those at its edge.

    Args:
        grid_size: (H, W), patches.
        visible_share: the share of the patches that a context sees. The true share can differ from it by up to a tenth
            of the grid (`num_context_tokens` is the true number).
        num_contexts: C. The contexts of an image are different blocks.
        visible_aspect_ratio: smallest and largest height / width of a visible block, both in patches.

    Raises:
        ValueError: if a value is out of range, no patch or every patch would be visible, no block comes near enough to
            `visible_share`, or there are fewer blocks than contexts.
    """

    mode = "inverse_block"

    visible_aspect_ratio: Sequence[float] = (0.66, 1.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("visible_aspect_ratio", self.visible_aspect_ratio, largest=float("inf"))
        area, asked = self.num_context_tokens, self.visible_share * self.num_patches
        if abs(area - asked) > _LARGEST_DEVIATION * self.num_patches:
            raise ValueError(
                f"visible_share={self.visible_share} asks for about {asked:.1f} patches, but the nearest block with "
                f"visible_aspect_ratio={self.visible_aspect_ratio} on grid_size={tuple(self.grid_size)} has {area}: "
                "change visible_share or widen visible_aspect_ratio"
            )
        num_blocks = len(self._blocks)
        if num_blocks < self.num_contexts:
            raise ValueError(
                f"num_contexts={self.num_contexts}, but only {num_blocks} different blocks of {area} patches fit "
                f"grid_size={tuple(self.grid_size)}: lower num_contexts or widen visible_aspect_ratio"
            )

    @property
    def num_context_tokens(self) -> int:
        """N_ctx. 0 if the grid has no block with an allowed aspect ratio."""
        shapes = self._shapes
        return shapes[0][0] * shapes[0][1] if shapes else 0

    @property
    def _shapes(self) -> tuple[tuple[int, int], ...]:
        return _shapes_of_one_area(tuple(self.grid_size), self.visible_share, tuple(self.visible_aspect_ratio))

    @property
    def _blocks(self) -> np.ndarray:
        return _all_blocks(tuple(self.grid_size), self._shapes)

    def _draw_visible(self, stream: SlotStream) -> np.ndarray:
        blocks = self._blocks
        keys = stream.distinct_keys(VISIBLE_BLOCK, 1, len(blocks))
        drawn = np.partition(keys, self.num_contexts - 1, axis=-1)[:, 0, : self.num_contexts]  # (B, C)
        drawn.sort(axis=-1)  # by the random bits, so the order is random too
        return blocks[drawn & choice_bits(len(blocks))]


def _indices(chosen: np.ndarray) -> np.ndarray:
    """(B, C, N) bool, equally many in every row -> (B, C, count) patch indices, sorted."""
    num_images, num_rows, num_patches = chosen.shape
    patches = np.flatnonzero(chosen).reshape(num_images, num_rows, -1)
    patches -= np.arange(0, chosen.size, num_patches).reshape(num_images, num_rows, 1)
    return patches


@lru_cache(maxsize=128)
def _shapes_of_one_area(
    grid_size: tuple[int, ...], share: float, aspect_ratio: tuple[float, ...]
) -> tuple[tuple[int, int], ...]:
    """All (height, width) with an allowed aspect ratio and the area nearest to the share, but not the whole grid."""
    num_patches = grid_size[0] * grid_size[1]
    shapes = [
        (height, width)
        for height in range(1, grid_size[0] + 1)
        for width in range(1, grid_size[1] + 1)
        if aspect_ratio[0] <= height / width <= aspect_ratio[1] and height * width < num_patches
    ]
    areas = {height * width for height, width in shapes}
    nearest = min(areas, key=lambda area: (abs(area - share * num_patches), area), default=0)
    return tuple((height, width) for height, width in shapes if height * width == nearest)


@lru_cache(maxsize=16)
def _all_blocks(grid_size: tuple[int, ...], shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """(blocks, N) bool: the patches of every block of these shapes, at every place."""
    blocks = []
    for shape in shapes:
        rows, columns = (_spans(side, length) for side, length in zip(grid_size, shape, strict=True))
        covered = rows[:, None, :, None] & columns[None, :, None, :]  # (tops, lefts, H, W)
        blocks.append(covered.reshape(-1, grid_size[0] * grid_size[1]))
    return np.concatenate(blocks)


def _spans(side: int, length: int) -> np.ndarray:
    """(starts, side) bool: the rows (or columns) from each possible start on."""
    places, starts = np.arange(side), np.arange(side - length + 1)[:, None]
    return (places >= starts) & (places < starts + length)
