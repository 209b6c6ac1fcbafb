# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The order of the images, and the random streams of crops: pure functions of the seed and the place in the run."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from .notices import counted


# The first number in the key of a random stream. Each use has its own, so that no two uses share a stream.
_ORDER_STREAM, CROP_STREAM, AUGMENTATION_STREAM, MIX_STREAM, SUBSET_STREAM = range(5)
_BLOCK_STREAM, _FORWARD_STREAM = 5, 6


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, int64 (num_images,): the stable sorting order of raw Philox numbers.

    NumPy guarantees the raw numbers of a bit generator for all versions, but not `Generator.permutation`.
    """
    return np.argsort(random_stream(seed, _ORDER_STREAM, epoch).random_raw(num_images), kind="stable")


def block_order(num_images: int, seed: int, lane: int, epoch: int, block: int) -> np.ndarray:
    """The permutation of a block of a stream (streaming.py), int64 (num_images,), made as in `epoch_order`."""
    return np.argsort(random_stream(seed, _BLOCK_STREAM, lane, epoch, block).random_raw(num_images), kind="stable")


class EpochSampler(torch.utils.data.Sampler):
    """Every image once per epoch, as keys (epoch, index) for `FineTuningImages`, in the order of `epoch_order`.

    Set the attribute `epoch` before each epoch, also before a resumed one.
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images = num_images
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, index) for index in epoch_order(self.num_images, self.seed, epoch).tolist())


def random_stream(seed: int, *key: int) -> np.random.Philox:
    """The bit generator of a seed and a key. Different keys give independent streams."""
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


def forward_seed(seed: int, step: int, slot_block: int) -> int:
    """The seed for `torch.manual_seed` before the forward pass of a slot block. So dropout and stochastic depth are a
    pure function of (seed, step, slot_block)."""
    return int(random_stream(seed, _FORWARD_STREAM, step, slot_block).random_raw()) % 2**63


@contextmanager
def seeded_torch(seed: int, *key: int) -> Iterator[None]:
    """Seeds torch's global CPU generator from the arguments inside the block, and restores its state afterwards."""
    state = torch.default_generator.get_state()
    # Not torch.manual_seed: it would also seed the generators of accelerators, which are not restored here.
    torch.default_generator.manual_seed(int(random_stream(seed, *key).random_raw()) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class PretrainingBatchSampler(torch.utils.data.Sampler):
    """Which images a rank sees in which step, as a pure function of its arguments. Do not let Accelerate prepare it.

    An optimizer step takes one global batch of batch_size x accumulation_steps x world_size images. It is divided into
    equal slot blocks. In micro-step k, rank r takes the slot block k x world_size + r. An epoch is one permutation of
    the images; its last, incomplete global batch is dropped.

    Args:
        num_images: in the data set.
        batch_size: images per rank and micro-step.
        total_steps: the optimizer step after the last one.
        seed: of the order.
        start_step: the optimizer step to go on with after an interruption.
        accumulation_steps: micro-steps in an optimizer step.
        rank, world_size: of this process, and the number of processes.

    Yields:
        Lists of `batch_size` keys (step, slot_block, epoch, index), `accumulation_steps` lists per optimizer step.

    Raises:
        ValueError: if a number is out of range, or the images do not fill one global batch.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        total_steps: int,
        seed: int,
        start_step: int = 0,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        if min(batch_size, accumulation_steps, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size, accumulation_steps and world_size must be positive and rank below world_size, got "
                f"{batch_size}, {accumulation_steps}, {world_size} and rank {rank}"
            )
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in 0..total_steps, got {start_step} of {total_steps}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulation_steps = accumulation_steps
        self.rank = rank
        self.world_size = world_size
        if num_images < self.global_batch_size:
            raise ValueError(
                f"{counted(num_images, 'image')} cannot fill one global batch of {self.global_batch_size}"
            )

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        current_epoch = None
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != current_epoch:
                current_epoch, order = epoch, epoch_order(self.num_images, self.seed, epoch)
            for micro_step in range(self.accumulation_steps):
                slot_block = micro_step * self.world_size + self.rank
                first = step_in_epoch * self.global_batch_size + slot_block * self.batch_size
                indices = order[first : first + self.batch_size].tolist()
                yield [(step, slot_block, epoch, index) for index in indices]
