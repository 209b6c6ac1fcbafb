# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Laws of random and inverse-block masks. Shapes: B images, C contexts, N patches, see `masking/complement.py`."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ijepa_transformers.mask_arguments import MASK_SETTINGS
from ijepa_transformers.masking import (
    MODES,
    InverseBlockMasking,
    MaskingCollator,
    MultiBlockMasking,
    RandomMasking,
    build_masking,
)


NEW_MODES = ("random", "inverse_block")
GRIDS = [(4, 4), (7, 7), (8, 8), (14, 14), (10, 18), (28, 28)]


def seen(indices, num_patches):
    """(..., K) indices -> (..., N) bool. An index that comes twice is an error."""
    counts = torch.zeros(*indices.shape[:-1], num_patches, dtype=torch.int64)
    counts.scatter_add_(-1, indices, torch.ones_like(indices))
    assert counts.max() == 1
    return counts.bool()


def own_targets(contexts, targets):
    """(B, C, N_tgt): the target of each context."""
    return targets if contexts.shape[1] == 1 else targets[:, :, 0]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", NEW_MODES)
@pytest.mark.parametrize("grid_size", GRIDS, ids=str)
@pytest.mark.parametrize("num_contexts", [1, 3])
def test_a_context_and_its_target_are_the_whole_grid_and_never_change_their_lengths(mode, grid_size, num_contexts):
    masking, num_patches = build_masking(grid_size, mode, num_contexts=num_contexts), grid_size[0] * grid_size[1]
    lengths = masking.num_context_tokens, masking.num_target_tokens
    assert sum(lengths) == num_patches and abs(lengths[0] - 0.3 * num_patches) < 0.06 * num_patches
    own = () if num_contexts == 1 else (num_contexts,)
    for step in range(10):
        contexts, targets = masking.sample(5, seed=1, step=step)
        assert contexts.shape == (5, num_contexts, lengths[0]) and targets.shape == (5, *own, 1, lengths[1])
        for indices in (contexts, targets):
            assert indices.dtype == torch.int64 and indices.is_contiguous() and (indices.diff(dim=-1) > 0).all()
        visible, hidden = seen(contexts, num_patches), seen(own_targets(contexts, targets), num_patches)
        assert torch.equal(visible, ~hidden)


@pytest.mark.parametrize("mode", NEW_MODES)
def test_masks_are_a_pure_function_of_seed_step_and_slot(mode):
    masking = build_masking((8, 8), mode, num_contexts=2)
    first = masking.sample(8, seed=3, step=5, rank=2)
    np.random.seed(0)
    state = torch.get_rng_state()
    again = pickle.loads(pickle.dumps(masking)).sample(8, seed=3, step=5, rank=2)
    assert same(first, again) and torch.equal(state, torch.get_rng_state())
    for other in ({"seed": 4}, {"step": 6}, {"rank": 1}):
        assert not same(first, masking.sample(8, **{"seed": 3, "step": 5, "rank": 2, **other}))


@pytest.mark.parametrize("mode", NEW_MODES)
@pytest.mark.parametrize("num_contexts", [1, 3])
def test_slicing_a_global_batch_does_not_change_an_image(mode, num_contexts):
    masking = build_masking((14, 14), mode, num_contexts=num_contexts)
    for step in range(5):
        whole = masking.sample(8, seed=1, step=step)
        for slices in (2, 4, 8):  # processes, accumulation steps
            parts = [masking.sample(8 // slices, seed=1, step=step, rank=rank) for rank in range(slices)]
            assert same(whole, [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        step, place = divmod(index, 4)
        return {"pixel_values": torch.full((3, 4, 4), place), "step": step, "slot_block": 0}


@pytest.mark.parametrize("mode", NEW_MODES)
def test_workers_do_not_change_the_masks(mode):
    collator = MaskingCollator(build_masking((8, 8), mode), seed=3)
    alone, workers = (
        [(batch["context_indices"], batch["target_indices"]) for batch in loader]
        for loader in (DataLoader(Samples(), 4, collate_fn=collator, num_workers=number) for number in (0, 2))
    )
    assert len(alone) == 4 and all(same(one, other) for one, other in zip(alone, workers, strict=True))


@pytest.mark.parametrize("mode", NEW_MODES)
def test_images_contexts_and_steps_differ(mode):
    masking = build_masking((14, 14), mode, num_contexts=3)
    contexts = torch.cat([masking.sample(8, seed=0, step=step)[0] for step in range(4)])  # (32, 3, N_ctx)
    for image in contexts.tolist():
        assert len(set(map(tuple, image))) == 3
    firsts = len({tuple(context) for context in contexts[:, 0].tolist()})
    assert firsts == 32 if mode == "random" else firsts > 20  # there are 112 blocks


def test_random_contexts_see_every_patch_equally_often():
    masking = RandomMasking((8, 8), num_contexts=2)
    contexts = torch.cat([masking.sample(128, seed=0, step=step)[0] for step in range(20)])
    for place in range(2):
        counts = torch.bincount(contexts[:, place].flatten(), minlength=64)
        expected = len(contexts) * 19 / 64
        # Chi-square with 63 degrees of freedom, 1e-6 quantile 126; drawing without repetition makes it smaller.
        assert ((counts - expected) ** 2 / expected).sum() < 126


def test_random_contexts_reach_every_subset_equally():
    contexts = torch.cat([RandomMasking((4, 4), 2 / 16).sample(1200, seed=0, step=step)[0] for step in range(10)])
    counts = torch.bincount(contexts[:, 0, 0] * 16 + contexts[:, 0, 1])
    counts = counts[counts > 0]
    assert len(counts) == 120
    assert counts.max() < 160 and counts.min() > 50  # 100 expected, standard deviation 10


def test_contexts_of_an_image_are_drawn_independently():
    masking = RandomMasking((8, 8), 0.5, num_contexts=2)
    visible = seen(torch.cat([masking.sample(128, seed=0, step=step)[0] for step in range(20)]), 64).double()
    shared = (visible[:, 0] * visible[:, 1]).sum(dim=-1)
    assert abs(shared.mean() - 16) < 0.2  # standard deviation 2 / sqrt(2560)


@pytest.mark.parametrize("grid_size", GRIDS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"visible_share": 0.5, "visible_aspect_ratio": (0.4, 2.5)}], ids=str)
def test_an_inverse_block_context_is_a_full_rectangle_of_an_allowed_shape(grid_size, settings):
    masking = InverseBlockMasking(grid_size, num_contexts=2, **settings)
    for step in range(10):
        contexts, _ = masking.sample(16, seed=0, step=step)
        visible = seen(contexts, grid_size[0] * grid_size[1]).unflatten(-1, grid_size)
        heights, widths = (visible.any(dim=dim).sum(dim=-1) for dim in (-1, -2))
        assert (heights * widths == masking.num_context_tokens).all()
        for axis in (-1, -2):  # and its rows and columns follow one another
            lines = visible.any(dim=axis).int()
            starts = (lines.diff(dim=-1, prepend=torch.zeros_like(lines[..., :1])) == 1).sum(dim=-1)
            assert (starts == 1).all()
        low, high = masking.visible_aspect_ratio
        assert (low <= heights / widths).all() and (heights / widths <= high + 1e-6).all()


def test_inverse_blocks_are_uniform_over_all_shapes_and_places():
    masking = InverseBlockMasking((8, 8))  # 4x5 and 5x4 at 5 * 4 places each
    contexts = torch.cat([masking.sample(200, seed=0, step=step)[0] for step in range(20)])
    counts = np.unique(contexts[:, 0].numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == 40 and ((counts - 100) ** 2 / 100).sum() < 102  # chi-square, 39 degrees, 1e-6 quantile 102


def test_every_context_of_an_image_has_the_same_distribution_of_blocks():
    masking = InverseBlockMasking((4, 4), num_contexts=3)  # 2x2 at 9 places
    contexts = torch.cat([masking.sample(180, seed=0, step=step)[0] for step in range(20)])
    for place in range(3):
        counts = torch.bincount(contexts[:, place, 0], minlength=16)
        counts = counts[counts > 0]
        assert len(counts) == 9 and ((counts - 400) ** 2 / 400).sum() < 44  # 8 degrees, 1e-6 quantile 44


def test_the_largest_number_of_contexts_uses_every_block_once():
    contexts, _ = InverseBlockMasking((4, 4), num_contexts=9).sample(6, seed=0)
    for image in contexts.tolist():
        assert len(set(map(tuple, image))) == 9


def test_modes_and_the_purposes_within_them_use_different_numbers():
    random = RandomMasking((4, 4), 4 / 16).sample(64, seed=0)[0]
    trimmed = MultiBlockMasking(
        (4, 4), target_scale=(1 / 16, 1 / 16), target_aspect_ratio=(1, 1), num_targets=1, context_scale=(1, 1),
        min_patches=1, allow_overlap=True, num_context_tokens=4,
    ).sample(64, seed=0)[0]  # fmt: skip
    assert (random == trimmed).all(dim=-1).float().mean() < 0.1


# ---- the factory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_factory_builds_the_masks_of_each_mode_with_the_settings_of_the_arguments(mode):
    masking = build_masking((16, 16), mode)
    assert masking.mode == mode
    fields = {entry.name for entry in dataclasses.fields(masking)} - {"grid_size", "mode"}
    assert fields == set(MASK_SETTINGS[mode])


def test_the_factory_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"mode='chess'.*random"):
        build_masking((8, 8), "chess")
    with pytest.raises(TypeError, match="num_targets"):
        build_masking((8, 8), "random", num_targets=2)


@pytest.mark.parametrize("mode", NEW_MODES)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visible_share": 0}, "visible_share=0 must be above 0 and below 1"),
        ({"visible_share": 1.0}, "visible_share=1.0 must be above 0 and below 1"),
        ({"visible_share": float("nan")}, "visible_share=nan"),
        ({"visible_share": 0.005}, r"visible_share=0.005 leaves no visible patch on grid_size=\(8, 8\): raise"),
        ({"visible_share": 0.995}, r"visible_share=0.995 leaves no hidden patch on grid_size=\(8, 8\): lower"),
        ({"num_contexts": 0}, "num_contexts=0"),
        ({"grid_size": (0, 8)}, "grid_height=0"),
        ({"grid_size": (8,)}, "grid_size"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(mode, settings, message):
    with pytest.raises(ValueError, match=message):
        build_masking(**{"grid_size": (8, 8), "mode": mode, **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visible_aspect_ratio": (2, 1)}, "visible_aspect_ratio=.2, 1."),
        ({"visible_aspect_ratio": (30, 40)}, "visible_share=0.3 .* has 0"),
        ({"grid_size": (1, 12)}, "visible_share=0.3 asks for about 3.6 patches.* has 1"),
        ({"grid_size": (4, 4), "num_contexts": 10}, "num_contexts=10, but only 9 different blocks of 4 patches"),
    ],
    ids=str,
)
def test_blocks_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        InverseBlockMasking(**{"grid_size": (8, 8), **settings})


@pytest.mark.parametrize("mode", NEW_MODES)
def test_sample_refuses_arguments_that_make_no_sense(mode):
    for arguments in ({"batch_size": 0}, {"seed": -1}, {"step": -1}, {"rank": -1}, {"seed": 2**64}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            build_masking((8, 8), mode).sample(**{"batch_size": 2, "seed": 0, **arguments})
