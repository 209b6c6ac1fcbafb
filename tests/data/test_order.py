# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Which image comes when: a pure function of the seed, the step and the place in the global batch."""

import numpy as np
import pytest

from ijepa_transformers.data.order import EpochSampler, PretrainingBatchSampler, epoch_order


def keys(**changes):
    settings = {"num_images": 53, "batch_size": 4, "total_steps": 12, "seed": 3, **changes}
    return list(PretrainingBatchSampler(**settings))


def indices(batches):
    return [key[3] for batch in batches for key in batch]


def test_an_epoch_shows_every_image_once_except_the_incomplete_last_batch():
    sampler = PretrainingBatchSampler(53, 4, 26, seed=3)
    assert sampler.steps_per_epoch == 13 and len(sampler) == 26
    first, second = indices(list(sampler)[:13]), indices(list(sampler)[13:])
    for epoch in (first, second):
        assert len(epoch) == len(set(epoch)) == 52 and set(epoch) <= set(range(53))
    assert first != second
    assert {key[2] for batch in list(sampler)[13:] for key in batch} == {1}


def test_orders_are_permutations_that_depend_on_seed_and_epoch_only():
    orders = [epoch_order(1000, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({tuple(order) for order in orders}) == 9
    # These numbers are part of a run: if they change, no earlier run can be resumed.
    assert epoch_order(10, 0, 0).tolist() == [7, 6, 8, 3, 2, 4, 1, 5, 0, 9]


@pytest.mark.parametrize("start_step", [0, 1, 5, 12])
@pytest.mark.parametrize("accumulation_steps, rank, world_size", [(1, 0, 1), (3, 1, 2)])
def test_resuming_gives_exactly_the_tail(start_step, accumulation_steps, rank, world_size):
    settings = {"accumulation_steps": accumulation_steps, "rank": rank, "world_size": world_size}
    tail = keys(start_step=start_step, **settings)
    assert tail == keys(**settings)[start_step * accumulation_steps :]
    assert len(PretrainingBatchSampler(53, 4, 12, 3, start_step, **settings)) == len(tail)


@pytest.mark.parametrize("accumulation_steps, world_size", [(1, 2), (2, 1), (2, 2), (3, 4)])
def test_ranks_and_micro_steps_cut_the_same_global_batches(accumulation_steps, world_size):
    whole = keys(batch_size=4 * accumulation_steps * world_size)
    parts = [
        batch
        for rank in range(world_size)
        for batch in keys(accumulation_steps=accumulation_steps, rank=rank, world_size=world_size)
    ]
    for step, global_batch in enumerate(whole):
        blocks = sorted((batch for batch in parts if batch[0][0] == step), key=lambda batch: batch[0][1])
        assert [batch[0][1] for batch in blocks] == list(range(accumulation_steps * world_size))
        assert indices(blocks) == indices([global_batch])


def test_impossible_orders_are_refused():
    with pytest.raises(ValueError, match="53 images cannot fill one global batch of 64"):
        keys(batch_size=16, accumulation_steps=2, world_size=2)
    with pytest.raises(ValueError, match="rank below world_size, got 4, 1, 2 and rank 2"):
        keys(rank=2, world_size=2)
    with pytest.raises(ValueError, match="got 13 of 12"):
        keys(start_step=13)


def test_every_epoch_has_every_image_once_in_an_order_of_its_own():
    sampler = EpochSampler(50, seed=0)
    keys = {}
    for epoch in (0, 1):
        sampler.epoch = epoch
        keys[epoch] = list(sampler)
        assert {key[0] for key in keys[epoch]} == {epoch} and sorted(key[1] for key in keys[epoch]) == list(range(50))
    assert [index for _, index in keys[0]] != [index for _, index in keys[1]]
    assert [index for _, index in keys[1]] == epoch_order(50, 0, 1).tolist() and len(sampler) == 50
