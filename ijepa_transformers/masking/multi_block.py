# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Multi-block masks (paper section 3): contexts, and several target blocks for each image.

Shapes: B images, (H, W) grid in patches, N = H * W patches, C context masks, M target blocks,
N_ctx and N_tgt patches kept in each context and in each target block. Indices are row-major.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias, TypeVar

import numpy as np
import torch

from .checks import check_grid_size, check_positive_integers, check_range, check_sample_arguments
from .streams import CONTEXT_TRIM, SIZES, TARGET_TRIM, SlotStream, lowest, random_words


MODES = ("unbiased", "meta")
_CONTEXT_ASPECT_RATIO = (1.0, 1.0)
# "meta": failed draws of a context before it may overlap one more target (published value).
_TRIES_PER_TARGET = 20
# "unbiased": draws of an image's positions before all its targets are put at one place.
_MAX_POSITION_DRAWS = 50
_LAST_KEY = np.uint32(2**32 - 1)  # of a patch that a context does not see

_Numbers: TypeAlias = float | np.ndarray
_NumberOrArray = TypeVar("_NumberOrArray", float, np.ndarray)
_Size: TypeAlias = tuple[int, int]  # (height, width) in patches


@dataclass(frozen=True)
class BlockBounds:
    """Bounds (height, width) in patches of all blocks that can be drawn.

    Args:
        lower: every block is at least as high and as wide as one of these.
        upper: every block is at most as high and as wide as one of these.
    """

    lower: list[_Size]
    upper: list[_Size]

    @property
    def smallest(self) -> _Size:
        """The lower bound with the smallest area."""
        return min(self.lower, key=math.prod)

    @property
    def largest(self) -> _Size:
        """The upper bound with the largest area."""
        return max(self.upper, key=math.prod)


@dataclass(frozen=True)
class MultiBlockMasking:
    """Samples the context and target patches of a batch (paper section 3, "Multi-block masking").

    All images of a global batch have blocks of the same sizes, which depend on (seed, step) and not on the rank. The
    positions differ from image to image. `mode` is one of two sets of rules:

    - `"unbiased"`: Scale and aspect ratio are drawn independently. A block may lie anywhere on the grid. A context
      never overlaps a target of its image (unless `allow_overlap`). Surplus context patches are dropped uniformly at
      random. Every patch is sometimes context and sometimes target. An image whose context is too small gets new
      positions, up to 50 times; then all its targets are put at one place. The constructor checks that this leaves
      enough context.
    - `"meta"`: the published sampler with its quirks, kept for parity. One random number sets both the scale and the
      aspect ratio of the targets. Blocks are smaller than the grid in both sides and never touch its last row and
      column. After every 20 failed draws a context may overlap one more target. Surplus context patches are cut from
      the end of the row-major list, that is from the bottom rows. The sequence of sizes is the published one: it
      depends on the step, not on the seed.

    Args:
        grid_size: (H, W), patches.
        target_scale: smallest and largest area of a target block, as a fraction of the grid.
        target_aspect_ratio: smallest and largest height / width of a target block, both in patches, so the shape of a
            block does not depend on the shape of the grid. A side longer than the grid is cut, the other side is not
            changed: on a very long or wide grid a block can be smaller than `target_scale`.
        num_targets: M.
        context_scale: smallest and largest area of a context block before the targets are taken out. The block has
            the shape of the grid, so scale 1.0 is the whole grid. In mode "meta" it is square and smaller than the
            grid.
        num_contexts: C. The contexts of an image have one size and are drawn independently.
        min_patches: least number of patches in each context. It does not apply to targets. In mode "meta" contexts
            and targets must have more patches than this (quirk).
        allow_overlap: leave the targets in the context.
        num_context_tokens: exact N_ctx, for static shapes. None: the length of the shortest context in the batch. A
            context with fewer patches is treated like one below `min_patches`. Mode "meta" keeps the first ones in
            row-major order.
        num_target_tokens: exact N_tgt: a random subset of every target block. None: the whole block. Not in mode
            "meta", because published targets are never cut.

    Raises:
        ValueError: if a value is out of range, or blocks can be drawn that do not work on this grid; the message names
            the setting to change.
    """

    grid_size: Sequence[int]
    target_scale: Sequence[float] = (0.15, 0.2)
    target_aspect_ratio: Sequence[float] = (0.75, 1.5)
    num_targets: int = 4
    context_scale: Sequence[float] = (0.85, 1.0)
    num_contexts: int = 1
    min_patches: int = 10
    allow_overlap: bool = False
    mode: str = "unbiased"
    num_context_tokens: int | None = None
    num_target_tokens: int | None = None

    def __post_init__(self) -> None:
        self._check_values()
        if self.mode == "meta":
            self._check_meta_blocks()
        else:
            self._check_unbiased_blocks()

    def sample(self, batch_size: int, seed: int, step: int = 0, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks of one slice of the global batch of this step.

        Args:
            batch_size: B, images in the slice.
            seed: of the run.
            step: batch counter, from 0.
            rank: number of the slice in the global batch: image i has the slot `rank * batch_size + i`. With gradient
                accumulation it counts the micro-batches of all processes, not the processes. The masks of an image
                depend on its slot alone, but for the final cut to the shortest context of the slice (there is no cut
                with `num_context_tokens`).

        Returns:
            context_indices (B, C, N_ctx) and target_indices (B, M, N_tgt), int64, sorted along the last dimension.

        Raises:
            ValueError: if `batch_size` is below 1, or another argument is negative or needs more than 64 bits.
        """
        check_sample_arguments(batch_size, seed, step, rank)
        target_size, context_size = self.block_sizes(seed, step)
        stream = SlotStream(seed, step, first_slot=rank * batch_size, num_slots=batch_size)
        return self._masks(target_size, context_size, stream)

    def block_sizes(self, seed: int, step: int = 0) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) in patches of the step's target blocks and context blocks, before they are cut."""
        if self.mode == "meta":
            # As published: a generator seeded with the batch counter gives a number for the targets and one for the
            # contexts.
            generator = torch.Generator().manual_seed(step)
            scale, context_scale = torch.rand(2, generator=generator).tolist()
            aspect_ratio = scale  # quirk, kept for parity: scale and aspect ratio come from one draw
        else:
            words = random_words(seed, step, SIZES, attempt=0, first_slot=0, num_slots=1, words_per_slot=3)[0]
            scale, aspect_ratio, context_scale = (words[:3] >> np.uint64(11)) * 2.0**-53  # uniform in [0, 1)
        target_height, target_width = self._target_sides(
            _between(self.target_scale, scale), _between(self.target_aspect_ratio, aspect_ratio)
        )
        context_height, context_width = self._context_sides(_between(self.context_scale, context_scale), 1.0)
        return (int(target_height), int(target_width)), (int(context_height), int(context_width))

    def extreme_block_sides(self, cells: int = 256) -> tuple[BlockBounds, BlockBounds]:
        """Bounds of the target blocks and of the context blocks (before they are cut) for every seed and step.

        Args:
            cells: number of parts into which the ranges of scale and aspect ratio are divided. More parts give
                tighter bounds.
        """
        targets = self._block_bounds(self._target_sides, self.target_scale, self.target_aspect_ratio, cells)
        return targets, self._block_bounds(self._context_sides, self.context_scale, _CONTEXT_ASPECT_RATIO, cells)

    @property
    def required_patches(self) -> int:
        """Least number of patches in a context."""
        least = self.min_patches + 1 if self.mode == "meta" else self.min_patches  # quirk: more than min_patches
        return max(least, self.num_context_tokens or 0)

    # Block sizes, of numbers or arrays.

    def _target_sides(self, scale: _Numbers, aspect_ratio: _Numbers) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.grid_size
        area = scale * (height * width)
        if self.mode == "meta":
            area = np.floor(area)
        return self._clip_sides(np.sqrt(area * aspect_ratio), np.sqrt(area / aspect_ratio))

    def _context_sides(self, scale: _Numbers, aspect_ratio: _Numbers) -> tuple[np.ndarray, np.ndarray]:
        if self.mode == "meta":
            return self._target_sides(scale, aspect_ratio)
        height, width = self.grid_size
        return self._clip_sides(height * np.sqrt(scale * aspect_ratio), width * np.sqrt(scale / aspect_ratio))

    def _clip_sides(self, block_height: _Numbers, block_width: _Numbers) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.grid_size
        block_height, block_width = np.rint(block_height), np.rint(block_width)
        if self.mode == "meta":  # quirk, kept for parity: smaller than the grid in both sides
            return np.minimum(block_height, height - 1), np.minimum(block_width, width - 1)
        return np.minimum(np.maximum(block_height, 1), height), np.minimum(np.maximum(block_width, 1), width)

    # Masks from random numbers.

    def _masks(self, target_size: _Size, context_size: _Size, stream: SlotStream) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts (B, C, N_ctx) and targets (B, M, N_tgt) of the image slots of a stream."""
        place = self._place_meta if self.mode == "meta" else self._place_unbiased
        target_corners, visible = place(target_size, context_size, stream)  # (B, M, 2), (B, C, N)
        contexts = self._trim_contexts(visible, stream)  # (B, C, N_ctx)
        targets = self._trim_targets(_block_indices(target_corners, target_size, self.grid_size), stream)
        return torch.from_numpy(contexts), torch.from_numpy(targets)

    def _place_unbiased(
        self, target_size: _Size, context_size: _Size, stream: SlotStream
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the targets (B, M, 2), and which patches each context sees, bool (B, C, N)."""
        targets, contexts = self._draw_corners(target_size, context_size, stream, attempt=0)
        visible = self._visible(targets, contexts, target_size, context_size)
        for attempt in range(1, _MAX_POSITION_DRAWS + 1):
            failing = np.flatnonzero((_counts(visible) < self.required_patches).any(axis=-1))
            if not failing.size:
                break
            new_targets, contexts = self._draw_corners(target_size, context_size, stream, attempt)
            if attempt == _MAX_POSITION_DRAWS:
                new_targets[:] = new_targets[:, :1]  # all at one place, which always leaves enough context
            targets[failing] = new_targets[failing]
            visible[failing] = self._visible(targets[failing], contexts[failing], target_size, context_size)
        return targets, visible

    def _place_meta(
        self, target_size: _Size, context_size: _Size, stream: SlotStream
    ) -> tuple[np.ndarray, np.ndarray]:
        """Corners of the targets (B, M, 2), and which patches each context sees, bool (B, C, N).

        Only contexts are drawn again. Targets are always large enough: the constructor checks their sizes.
        """
        targets, contexts = self._draw_corners(target_size, context_size, stream, attempt=0)
        visible = self._visible(targets, contexts, target_size, context_size)
        for attempt in range(1, _TRIES_PER_TARGET * self.num_targets + 1):
            images, masks = np.nonzero(_counts(visible) < self.required_patches)
            if not images.size:
                break
            excluded = targets[images, : self.num_targets - attempt // _TRIES_PER_TARGET]
            contexts = self._draw_corners(target_size, context_size, stream, attempt)[1][images, masks][:, None]
            visible[images, masks] = self._visible(excluded, contexts, target_size, context_size)[:, 0]
        return targets, visible

    def _draw_corners(
        self, target_size: _Size, context_size: _Size, stream: SlotStream, attempt: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Top-left corners of targets (B, M, 2) and of contexts (B, C, 2)."""
        words = stream.position_words(attempt, self.num_targets + self.num_contexts)  # (B, M + C, 2)
        num_corners = [self._num_corners(target_size)] * self.num_targets
        num_corners += [self._num_corners(context_size)] * self.num_contexts
        corners = (words % np.array(num_corners, dtype=np.uint64)).astype(np.int64)
        return corners[:, : self.num_targets], corners[:, self.num_targets :]

    def _num_corners(self, block_size: _Size) -> list[int]:
        """Number of rows, and of columns, at which a block of this size can start."""
        # Quirk, kept for parity: the published sampler leaves out the last valid row and column.
        inclusive = 0 if self.mode == "meta" else 1
        return [side - block_side + inclusive for side, block_side in zip(self.grid_size, block_size, strict=True)]

    def _visible(
        self, target_corners: np.ndarray, context_corners: np.ndarray, target_size: _Size, context_size: _Size
    ) -> np.ndarray:
        """Which patches are in the context blocks and outside the given targets, bool (B, C, N)."""
        visible = _block_coverage(context_corners, context_size, self.grid_size)  # (C, B, bytes)
        if not self.allow_overlap:
            visible &= ~np.bitwise_or.reduce(_block_coverage(target_corners, target_size, self.grid_size))
        num_patches = self.grid_size[0] * self.grid_size[1]
        return np.unpackbits(visible.swapaxes(0, 1), axis=-1, count=num_patches).view(bool)

    def _trim_contexts(self, visible: np.ndarray, stream: SlotStream) -> np.ndarray:
        """(B, C, N) bool -> (B, C, N_ctx) indices."""
        count = self.num_context_tokens or int(_counts(visible).min())
        if self.mode == "meta":  # quirk, kept for parity: the last patches in row-major order are lost
            return _first_patches(visible, count)
        keys = stream.distinct_keys(CONTEXT_TRIM, visible.shape[1], visible.shape[2])
        return lowest(np.maximum(keys, ~visible * _LAST_KEY), count)

    def _trim_targets(self, targets: np.ndarray, stream: SlotStream) -> np.ndarray:
        """(B, M, block area) -> (B, M, N_tgt)."""
        _, num_targets, area = targets.shape
        count = self.num_target_tokens or area
        if count == area:
            return targets
        keys = stream.distinct_keys(TARGET_TRIM, num_targets, area)
        return np.take_along_axis(targets, lowest(keys, count), axis=-1)

    # Checks at construction.

    def _check_values(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown: choose one of {MODES}")
        check_grid_size(self.grid_size)
        check_positive_integers(
            num_targets=self.num_targets, num_contexts=self.num_contexts, min_patches=self.min_patches
        )
        check_range("target_scale", self.target_scale, largest=1)
        check_range("context_scale", self.context_scale, largest=1)
        check_range("target_aspect_ratio", self.target_aspect_ratio, largest=float("inf"))
        self._check_token_counts()

    def _check_token_counts(self) -> None:
        if self.num_context_tokens is not None:
            check_positive_integers(num_context_tokens=self.num_context_tokens)
            if self.num_context_tokens < self.required_patches:
                more = "more than " if self.mode == "meta" else ""
                raise ValueError(
                    f"num_context_tokens={self.num_context_tokens} contradicts min_patches={self.min_patches}: mode "
                    f"{self.mode!r} keeps {more}min_patches patches of every context; lower min_patches"
                )
        if self.num_target_tokens is not None:
            check_positive_integers(num_target_tokens=self.num_target_tokens)
            if self.mode == "meta":
                raise ValueError(
                    f"num_target_tokens={self.num_target_tokens} needs mode 'unbiased': 'meta' never cuts a target"
                )

    def _check_meta_blocks(self) -> None:
        """Targets, and contexts that may overlap all targets, must always be large enough."""
        if min(self.grid_size) < 2:
            raise ValueError(f"grid_size={tuple(self.grid_size)} is below 2x2, the least that mode 'meta' can use")
        target = self.extreme_block_sides()[0].smallest
        if target[0] * target[1] <= self.min_patches:
            raise ValueError(
                f"min_patches={self.min_patches}: mode 'meta' needs more patches than this in every target, but "
                f"target_scale={self.target_scale} on grid_size={tuple(self.grid_size)} can give {_describe(target)}: "
                "lower min_patches, raise target_scale or use mode 'unbiased'"
            )
        self._check_context_blocks(taken=(0, 0))

    def _check_unbiased_blocks(self) -> None:
        targets = self.extreme_block_sides()[0]
        smallest, largest = targets.smallest, targets.largest
        if self.num_target_tokens is not None and self.num_target_tokens > smallest[0] * smallest[1]:
            raise ValueError(
                f"num_target_tokens={self.num_target_tokens} is more than the smallest target block holds, "
                f"{_describe(smallest)}, with target_scale={self.target_scale} on grid_size={tuple(self.grid_size)}: "
                "lower num_target_tokens or raise target_scale"
            )
        self._check_context_blocks(taken=(0, 0) if self.allow_overlap else largest)

    def _check_context_blocks(self, taken: _Size) -> None:
        """The smallest context block must be large enough after a target block of size `taken` is taken out."""
        context = self.extreme_block_sides()[1].smallest
        if context[0] * context[1] - taken[0] * taken[1] < self.required_patches:
            setting = "min_patches" if self.num_context_tokens is None else "num_context_tokens"
            raise ValueError(
                f"{setting}={getattr(self, setting)}: a context must hold at least {self.required_patches} patches, "
                f"but context_scale={self.context_scale} on grid_size={tuple(self.grid_size)} can give "
                f"{_describe(context)}, and a target of target_scale={self.target_scale} can take away "
                f"{_describe(taken)}: lower {setting} or target_scale, or raise context_scale"
            )

    def _block_bounds(
        self,
        sides: Callable[[_Numbers, _Numbers], tuple[np.ndarray, np.ndarray]],
        scale_range: Sequence[float],
        aspect_ratio_range: Sequence[float],
        cells: int,
    ) -> BlockBounds:
        """Divides the range of draws into cells. Both sides of a block are monotone in the scale and in the aspect
        ratio, so the corners of a cell bound every block that is drawn in it. Wide cells give bounds that are too
        cautious, but never wrong.
        """
        steps = np.linspace(0, 1, cells + 1)
        scale, aspect_ratio = _between(scale_range, steps), _between(aspect_ratio_range, steps)
        if self.mode == "unbiased":  # every pair of both; in mode "meta" one number sets both
            scale = scale[:, None]
        narrow, wide = aspect_ratio[1:], aspect_ratio[:-1]
        smallest = sides(scale[:-1], wide)[0], sides(scale[:-1], narrow)[1]
        largest = sides(scale[1:], narrow)[0], sides(scale[1:], wide)[1]
        return BlockBounds(_distinct_sizes(*smallest), _distinct_sizes(*largest))


def _block_coverage(corners: np.ndarray, block_size: _Size, grid_size: Sequence[int]) -> np.ndarray:
    """Corners (B, K, 2) of K blocks -> (K, B, bytes): the patches of each block, as bits, eight in a byte."""
    rows, columns = corners.transpose(2, 1, 0)
    in_rows, in_columns = (_spans(axis, block_size[axis], tuple(grid_size)) for axis in (0, 1))
    return in_rows.take(rows, axis=0) & in_columns.take(columns, axis=0)


@lru_cache(maxsize=128)
def _spans(axis: int, length: int, grid_size: tuple[int, ...]) -> np.ndarray:
    """(starts, bytes): for each possible start, the patches whose row (axis 0) or column (axis 1) is in the span."""
    coordinates = np.indices(grid_size)[axis].ravel()  # (N,)
    starts = np.arange(grid_size[axis] - length + 1)[:, None]
    return np.packbits((coordinates >= starts) & (coordinates < starts + length), axis=-1)


def _block_indices(corners: np.ndarray, block_size: _Size, grid_size: Sequence[int]) -> np.ndarray:
    """Corners (..., 2) -> (..., height * width) patch indices, sorted."""
    offsets = np.add.outer(np.arange(block_size[0]) * grid_size[1], np.arange(block_size[1])).ravel()
    return (corners[..., 0] * grid_size[1] + corners[..., 1])[..., None] + offsets


def _distinct_sizes(height: np.ndarray, width: np.ndarray) -> list[_Size]:
    """The different (height, width) pairs of two arrays that can be broadcast to one shape."""
    base = int(width.max()) + 1
    found = np.bincount((height * base + width).astype(int).ravel())  # much faster than `np.unique` on pairs
    return [divmod(code, base) for code in np.flatnonzero(found).tolist()]


def _counts(visible: np.ndarray) -> np.ndarray:
    """(B, C, N) bool -> (B, C): number of patches that each context sees."""
    return visible.sum(axis=-1, dtype=np.uint32)  # faster than the 64 bits that NumPy would choose


def _first_patches(visible: np.ndarray, count: int) -> np.ndarray:
    """(B, C, N) bool -> (B, C, count): the first patches that each context sees. It must see at least `count`."""
    num_images, num_contexts, num_patches = visible.shape
    seen = _counts(visible).reshape(-1, 1)  # (B * C, 1)
    starts = seen.cumsum(dtype=np.int64)[:, None] - seen
    patches = np.flatnonzero(visible).take(starts + np.arange(count))  # (B * C, count)
    patches -= np.arange(len(seen))[:, None] * num_patches
    return patches.reshape(num_images, num_contexts, count)


def _between(bounds: Sequence[float], fraction: _NumberOrArray) -> _NumberOrArray:
    return bounds[0] + fraction * (bounds[1] - bounds[0])


def _describe(size: _Size) -> str:
    return f"{size[0]}x{size[1]}={size[0] * size[1]} patches"
