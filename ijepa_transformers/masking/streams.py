# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The random numbers of masks: pure functions of (seed, step, purpose, image slot).

They come from numpy's Philox, with (seed, step) as its key and the slot in its counter. The slot is the image's place
in the global batch. So workers and ranks share no state, and a run can be resumed from its step alone. B images.
"""

from dataclasses import dataclass

import numpy as np


# The third number of Philox's counter. Each use has its own, so that no two uses read the same random numbers.
SIZES, POSITIONS, CONTEXT_TRIM, TARGET_TRIM, VISIBLE_PATCHES, VISIBLE_BLOCK = range(6)


@dataclass(frozen=True)
class SlotStream:
    """The random numbers of consecutive image slots. Each slot has its own fixed places in Philox's sequence."""

    seed: int
    step: int
    first_slot: int
    num_slots: int

    def position_words(self, attempt: int, num_blocks: int) -> np.ndarray:
        """(B, num_blocks, 2) uint64: a number for the row and one for the column of each block's corner."""
        words = self._words(POSITIONS, attempt, 2 * num_blocks)
        return words[:, : 2 * num_blocks].reshape(self.num_slots, num_blocks, 2)

    def distinct_keys(self, purpose: int, num_rows: int, num_choices: int) -> np.ndarray:
        """(B, num_rows, num_choices) uint32: a random key for each patch, or other choice, all different in a row."""
        words = self._words(purpose, 0, -(-num_rows * num_choices // 2))
        keys = words.view(np.uint32)[:, : num_rows * num_choices].reshape(self.num_slots, num_rows, num_choices)
        # The low bits hold the number of the choice, so that no two keys are equal. 24 bits are random for 16x16
        # patches.
        keys = keys & ~choice_bits(num_choices)
        keys |= np.arange(num_choices, dtype=np.uint32)
        return keys

    def _words(self, purpose: int, attempt: int, words_per_slot: int) -> np.ndarray:
        return random_words(self.seed, self.step, purpose, attempt, self.first_slot, self.num_slots, words_per_slot)


def random_words(
    seed: int, step: int, purpose: int, attempt: int, first_slot: int, num_slots: int, words_per_slot: int
) -> np.ndarray:
    """(num_slots, at least words_per_slot) uint64. Philox gives four numbers per tick of its counter."""
    ticks = -(-words_per_slot // 4)
    key = np.array([seed, step], dtype=np.uint64)
    counter = np.array([first_slot * ticks, attempt, purpose, 0], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(num_slots * ticks * 4).reshape(num_slots, ticks * 4)


def lowest(keys: np.ndarray, count: int) -> np.ndarray:
    """(B, rows, choices) keys of `distinct_keys` -> (B, rows, count): the choices with the lowest keys, sorted."""
    choices = np.partition(keys, count - 1, axis=-1)[..., :count] & choice_bits(keys.shape[-1])
    choices.sort(axis=-1)
    return choices.astype(np.int64)


def choice_bits(num_choices: int) -> np.uint32:
    """The bits of a key that hold the number of the choice."""
    return np.uint32((1 << (num_choices - 1).bit_length()) - 1)
