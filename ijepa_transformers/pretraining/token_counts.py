# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How many patches the batches of a run can hold, and how many they do hold."""

import math
from dataclasses import dataclass

from ..masking import Masking, MultiBlockMasking


@dataclass(frozen=True)
class TokenCounts:
    """Patches in each of `num_contexts` contexts and in each of `num_targets` target blocks of an image.

    With `own_targets` each context has `num_targets` blocks of its own. Otherwise all contexts share them.
    """

    context: int
    target: int
    num_contexts: int = 1
    num_targets: int = 4
    own_targets: bool = False

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Of the target indices of an image: (M, N_tgt), or (C, M, N_tgt) if each context has its own."""
        shared = (self.num_targets, self.target)
        return (self.num_contexts, *shared) if self.own_targets else shared

    def __str__(self) -> str:
        contexts = f"{self.num_contexts} x {self.context}" if self.num_contexts > 1 else str(self.context)
        return f"{contexts} context patches and {' x '.join(map(str, self.target_shape))} target patches"


def worst_case_tokens(masking: Masking) -> TokenCounts:
    """The most patches that a batch of these masks can hold, whatever the seed, the step and the batch.

    Of `MultiBlockMasking` a bound: with one image per pass it is reached, with many it is far away, because the
    shortest context of a batch sets the length of all (`sampled_tokens`). The other masks have fixed lengths.
    """
    if not isinstance(masking, MultiBlockMasking):
        return sampled_tokens(masking, batch_size=1, num_batches=1)
    targets, contexts = masking.extreme_block_sides()
    target = math.prod(targets.largest)
    context = max(_most_visible(masking, size, targets.lower, target) for size in contexts.upper)
    return TokenCounts(
        masking.num_context_tokens or context,
        masking.num_target_tokens or target,
        masking.num_contexts,
        masking.num_targets,
    )


def _most_visible(
    masking: MultiBlockMasking, context: tuple[int, int], small_targets: list[tuple[int, int]], largest_target: int
) -> int:
    """Most patches of a context block that its targets leave: they are stacked, and as far outside as they can be."""
    area = context[0] * context[1]
    if masking.allow_overlap:
        return area
    is_meta = masking.mode == "meta"
    grid = [side - is_meta for side in masking.grid_size]  # quirk: "meta" keeps off the last row and column
    overlaps = (
        math.prod(max(0, side + own - whole) for side, own, whole in zip(target, context, grid, strict=True))
        for target in small_targets
    )
    # Quirk: "meta" forgives the last target only to a context that this target leaves too little of.
    forgiven = min(area, masking.required_patches - 1 + largest_target) if is_meta else 0
    return max(area - min(overlaps), forgiven)


def sampled_tokens(masking: Masking, batch_size: int, num_batches: int = 200, seed: int = 0) -> TokenCounts:
    """The most patches seen in `num_batches` sampled batches of `batch_size` images: what a run meets, no bound."""
    shapes = [masking.sample(batch_size, seed, step) for step in range(num_batches)]
    context, target = (max(pair[kind].shape[-1] for pair in shapes) for kind in (0, 1))
    return TokenCounts(context, target, masking.num_contexts, masking.num_targets, shapes[0][1].dim() == 4)
