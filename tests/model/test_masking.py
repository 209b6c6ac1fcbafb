# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Laws of the multi-block masks. Shapes: B images, C contexts, M targets, see `ijepa_transformers/masking.py`."""

import itertools
import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from ijepa_transformers.masking import MaskingCollator, MultiBlockMasking
from ijepa_transformers.masking.multi_block import _MAX_POSITION_DRAWS, MODES


FIXTURES = Path(__file__).parents[1] / "fixtures"
MANIFEST = json.loads((FIXTURES / "MANIFEST.json").read_text())
STATISTICS = json.loads((FIXTURES / "masks_statistics.json").read_text())
TOLERANCES = MANIFEST["tolerances"]
CONFIGS = {**STATISTICS["configs"], **STATISTICS["published_batch_sizes"]}
GRIDS = {name: tuple(config["grid"]) for name, config in CONFIGS.items()}
PUBLISHED_GRIDS = [(14, 14), (16, 16), (28, 28), (12, 12), (32, 32)]


def canvas(indices, grid_size):
    """(B, K, n) -> (B, K, H, W) bool."""
    flat = torch.zeros(*indices.shape[:2], grid_size[0] * grid_size[1], dtype=torch.bool)
    return flat.scatter_(2, indices, True).unflatten(2, tuple(grid_size))


def union(indices, grid_size):
    return canvas(indices, grid_size).any(dim=1)  # (B, H, W)


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- the function --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_masks_are_a_pure_function_of_seed_step_and_rank(mode):
    masking = MultiBlockMasking((14, 14), mode=mode)
    first = masking.sample(8, seed=3, step=5, rank=2)
    np.random.seed(0)
    torch.manual_seed(0)
    masking.sample(4, seed=9)
    again = pickle.loads(pickle.dumps(masking)).sample(8, seed=3, step=5, rank=2)
    assert same(first, again)
    state = torch.get_rng_state()
    masking.sample(8, seed=3)
    assert torch.equal(state, torch.get_rng_state()), "the global generator must not move"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("other", [{"seed": 1}, {"step": 2}, {"rank": 1}], ids=str)
def test_another_seed_step_or_rank_gives_other_masks(mode, other):
    masking = MultiBlockMasking((14, 14), mode=mode)
    arguments = {"seed": 0, "step": 0, "rank": 0}
    assert not same(masking.sample(16, **arguments), masking.sample(16, **{**arguments, **other}))


@pytest.mark.parametrize("mode", MODES)
def test_images_of_a_batch_differ(mode):
    _, targets = MultiBlockMasking((14, 14), mode=mode).sample(64, seed=0)
    assert len({tuple(blocks.flatten().tolist()) for blocks in targets}) == 64


@pytest.mark.parametrize("mode", MODES)
def test_block_sizes_do_not_depend_on_the_rank(mode):
    masking = MultiBlockMasking((14, 14), mode=mode)
    for step in range(30):
        height, width = masking.block_sizes(seed=7, step=step)[0]
        widths = {masking.sample(2, seed=7, step=step, rank=rank)[1].shape[-1] for rank in range(4)}
        assert widths == {height * width}


@pytest.mark.parametrize(
    "settings",
    [
        {"num_context_tokens": 60},
        {"num_context_tokens": 100},  # most images are drawn again, some fall back to stacked targets
        {"num_context_tokens": 60, "num_target_tokens": 20, "num_contexts": 2},
        {"num_context_tokens": 60, "mode": "meta"},
        {"num_context_tokens": 100, "mode": "meta", "num_contexts": 2},
    ],
    ids=str,
)
def test_slicing_a_global_batch_does_not_change_an_image(settings):
    masking = MultiBlockMasking((14, 14), **settings)
    for step in range(10):
        whole = masking.sample(8, seed=1, step=step)
        for slices in (2, 4, 8):
            parts = [masking.sample(8 // slices, seed=1, step=step, rank=rank) for rank in range(slices)]
            assert same(whole, [torch.cat(pieces) for pieces in zip(*parts, strict=True)])


@pytest.mark.parametrize("mode", MODES)
def test_slicing_cuts_only_the_end_of_the_contexts(mode):
    masking = MultiBlockMasking((14, 14), mode=mode)
    whole, first = masking.sample(8, seed=1), masking.sample(4, seed=1)
    assert torch.equal(whole[1][:4], first[1])
    shorter = canvas(whole[0][:4], (14, 14)) & canvas(first[0], (14, 14))
    assert (shorter.sum(dim=(2, 3)) == whole[0].shape[-1]).all()  # the shorter list is a part of the longer one


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_contexts", [1, 3])
def test_indices_are_sorted_unique_int64_of_the_promised_shape(mode, num_contexts):
    masking = MultiBlockMasking((10, 14), mode=mode, num_contexts=num_contexts, num_targets=3)
    contexts, targets = masking.sample(6, seed=0)
    assert contexts.shape[:2] == (6, num_contexts) and targets.shape[:2] == (6, 3)
    for indices in (contexts, targets):
        assert indices.dtype == torch.int64 and indices.is_contiguous()
        assert (indices.diff(dim=-1) > 0).all()
        assert indices.min() >= 0 and indices.max() < 140


@pytest.mark.parametrize("mode", MODES)
def test_targets_are_whole_blocks_of_the_drawn_size(mode):
    masking = MultiBlockMasking((10, 18), mode=mode)
    for step in range(20):
        height, width = masking.block_sizes(0, step)[0]
        targets = canvas(masking.sample(4, seed=0, step=step)[1], (10, 18))
        assert (targets.any(dim=-1).sum(dim=-1) == height).all() and (targets.any(dim=-2).sum(dim=-1) == width).all()
        assert (targets.sum(dim=(-1, -2)) == height * width).all()


# ---- mode "unbiased" -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", [(4, 4), (8, 8), (14, 14), (6, 20), (20, 6), (1, 40)], ids=str)
@pytest.mark.parametrize("num_contexts", [1, 2])
def test_context_never_meets_targets(grid_size, num_contexts):
    masking = MultiBlockMasking(grid_size, num_contexts=num_contexts)
    for step in range(40):
        contexts, targets = masking.sample(32, seed=0, step=step)
        assert not (union(contexts, grid_size) & union(targets, grid_size)).any()
        assert contexts.shape[-1] >= masking.min_patches


@pytest.mark.parametrize("grid_size", [(4, 4), (8, 8), (14, 14), (6, 20), (20, 6), (1, 40)], ids=str)
def test_every_patch_is_sometimes_a_target_and_sometimes_context(grid_size):
    masking = MultiBlockMasking(grid_size)
    batches = [masking.sample(64, seed=0, step=step) for step in range(40)]
    for indices in zip(*batches, strict=True):
        assert torch.stack([union(block, grid_size).any(dim=0) for block in indices]).any(dim=0).all()


def test_corners_are_uniform_over_all_valid_positions():
    masking = MultiBlockMasking((8, 8), target_scale=(0.25, 0.25), target_aspect_ratio=(1, 1))  # 4x4 blocks
    targets = torch.cat([masking.sample(128, seed=0, step=step)[1] for step in range(50)])
    counts = torch.bincount(targets[..., 0].flatten(), minlength=64).reshape(8, 8)
    assert counts[:5, :5].sum() == targets.shape[0] * targets.shape[1]
    expected = targets.shape[0] * targets.shape[1] / 25
    # The bound is on the 25 positions together: chi-square with 24 degrees of freedom, 1e-6 quantile 72.
    assert ((counts[:5, :5] - expected) ** 2 / expected).sum() < 72


@pytest.mark.parametrize(("mode", "low", "high"), [("unbiased", -0.1, 0.1), ("meta", 0.9, 1.0)])
def test_scale_and_aspect_ratio_are_independent_or_coupled(mode, low, high):
    # A fine grid, so that rounding to whole patches does not hide the draws.
    masking = MultiBlockMasking((200, 200), mode=mode)
    sizes = np.array([masking.block_sizes(seed=0, step=step)[0] for step in range(1500)])
    correlation = np.corrcoef(sizes[:, 0] * sizes[:, 1], sizes[:, 0] / sizes[:, 1])[0, 1]
    assert low < correlation < high


@pytest.mark.parametrize("mode", MODES)
def test_blocks_fill_the_ranges_of_scale_and_aspect_ratio(mode):
    masking = MultiBlockMasking((200, 200), mode=mode)
    targets, contexts = np.array([masking.block_sizes(0, step) for step in range(1000)]).transpose(1, 2, 0)
    for values, bounds in [
        (targets[0] * targets[1] / 40000, (0.15, 0.2)),
        (targets[0] / targets[1], (0.75, 1.5)),
        (contexts[0] * contexts[1] / 40000, (0.85, 1.0)),
    ]:
        assert np.allclose([values.min(), values.max()], bounds, rtol=0.02)
        assert abs(values.mean() - sum(bounds) / 2) < 0.05 * (bounds[1] - bounds[0])


@pytest.mark.parametrize("grid_size", [(14, 14), (6, 20), (20, 6)], ids=str)
def test_a_context_of_scale_one_is_the_whole_grid(grid_size):
    masking = MultiBlockMasking(grid_size, context_scale=(1, 1), allow_overlap=True)
    assert torch.equal(masking.sample(3, seed=0)[0], torch.arange(grid_size[0] * grid_size[1]).expand(3, 1, -1))


def test_targets_keep_their_shape_on_a_rectangular_grid():
    masking = MultiBlockMasking((40, 160))
    sizes = [masking.block_sizes(0, step)[0] for step in range(200)]
    ratios = [height / width for height, width in sizes]
    assert min(ratios) > 0.7 and max(ratios) < 1.6


def lost_share_by_row(mode):
    """Share of the context patches of each row that the cut to the shortest list takes away."""
    grid_size, kept, before = (14, 14), torch.zeros(14), torch.zeros(14)
    masking = MultiBlockMasking(grid_size, mode=mode, context_scale=(1, 1))
    for step in range(40):
        contexts, targets = masking.sample(64, seed=0, step=step)
        usable = ~union(targets, grid_size)
        if mode == "meta":
            usable[:, -1], usable[:, :, -1] = False, False
        before += usable.sum(dim=(0, 2))
        kept += union(contexts, grid_size).sum(dim=(0, 2))
    return (1 - kept / before).nan_to_num()


def test_surplus_context_is_dropped_uniformly():
    lost = lost_share_by_row("unbiased")
    assert lost.mean() > 0.2, "something must be lost, or there is nothing to test"
    assert lost.max() - lost.min() < 0.04


def test_meta_drops_the_raster_tail():
    lost = lost_share_by_row("meta")[:-1]
    assert lost[:3].max() < 0.02 and lost[-1] > 0.8
    assert (lost.diff() > -0.01).all()


def test_random_trimming_reaches_every_subset_equally():
    # One target, no choice of position: what is kept of the context is up to the trimming alone.
    masking = MultiBlockMasking(
        (4, 4), target_scale=(1 / 16, 1 / 16), target_aspect_ratio=(1, 1), num_targets=1, context_scale=(1, 1),
        min_patches=1, allow_overlap=True, num_context_tokens=2,
    )  # fmt: skip
    contexts = torch.cat([masking.sample(1200, seed=0, step=step)[0] for step in range(10)])
    counts = Counter(map(tuple, contexts[:, 0].tolist()))
    assert len(counts) == 120
    assert max(counts.values()) < 160 and min(counts.values()) > 50  # 100 expected, standard deviation 10


@pytest.mark.parametrize("settings", [{}, {"num_contexts": 2}, {"allow_overlap": True}], ids=str)
@pytest.mark.parametrize("num_context_tokens", [12, 60, 110])
def test_fixed_token_counts_hold_in_every_batch(settings, num_context_tokens):
    masking = MultiBlockMasking((14, 14), num_context_tokens=num_context_tokens, num_target_tokens=20, **settings)
    for step in range(30):
        contexts, targets = masking.sample(16, seed=0, step=step)
        assert contexts.shape[-1] == num_context_tokens and targets.shape[-1] == 20
        assert (contexts.diff(dim=-1) > 0).all() and (targets.diff(dim=-1) > 0).all()


def test_fixed_targets_are_random_subsets_of_the_whole_blocks():
    whole, subset = MultiBlockMasking((14, 14)), MultiBlockMasking((14, 14), num_target_tokens=20)
    places = torch.zeros(196)
    for step in range(20):
        blocks, kept = whole.sample(32, seed=0, step=step)[1], subset.sample(32, seed=0, step=step)[1]
        inside = canvas(kept, (14, 14)).flatten(2).gather(2, blocks)
        assert (inside.sum(dim=-1) == 20).all()
        places[: inside.shape[-1]] += inside.float().mean(dim=(0, 1)) * blocks.shape[-1] / 20 / 20
    assert (places[:28] - 1).abs().max() < 0.15


def test_allowed_overlap_leaves_targets_in_the_context():
    contexts, targets = MultiBlockMasking((14, 14), allow_overlap=True).sample(64, seed=0)
    assert (union(contexts, (14, 14)) & union(targets, (14, 14))).any(dim=(1, 2)).all()


def test_new_positions_are_tried_before_targets_are_stacked():
    masking = MultiBlockMasking((14, 14), num_context_tokens=85)  # too much for about a third of the first draws
    targets = torch.cat([masking.sample(128, seed=0, step=step)[1][..., 0] for step in range(4)])
    assert (targets != targets[:, :1]).any(dim=1).all()


def test_the_smallest_block_is_one_patch():
    masking = MultiBlockMasking((14, 14), target_scale=(0.0005, 0.001))
    assert masking.sample(4, seed=0)[1].shape == (4, 4, 1)


def test_an_image_without_room_falls_back_to_stacked_targets():
    # Two different 8x8 quarters leave too little: only stacked targets do, which chance alone rarely gives.
    masking = MultiBlockMasking(
        (20, 20), target_scale=(0.3, 0.3), target_aspect_ratio=(1, 1), context_scale=(1, 1), num_context_tokens=275
    )
    contexts, targets = masking.sample(64, seed=0)
    stacked = (targets == targets[:, :1]).all(dim=2).all(dim=1)
    assert stacked.float().mean() > 0.5 and len(targets[:, 0, 0].unique()) > 10
    assert contexts.shape[-1] == 275 and not (union(contexts, (20, 20)) & union(targets, (20, 20))).any()


# ---- mode "meta" ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid_size", [(14, 14), (16, 16), (10, 18)], ids=str)
@pytest.mark.parametrize("allow_overlap", [False, True])
def test_meta_never_uses_the_last_row_and_column(grid_size, allow_overlap):
    masking = MultiBlockMasking(grid_size, mode="meta", allow_overlap=allow_overlap, context_scale=(0.5, 1.0))
    for step in range(40):
        for indices in masking.sample(32, seed=0, step=step):
            used = union(indices, grid_size)
            assert not used[:, -1].any() and not used[:, :, -1].any()


@pytest.mark.parametrize("name", ["224_14", "224_16", "448_16"])
def test_meta_block_sizes_are_the_published_sequence(name):
    masking = MultiBlockMasking(GRIDS[name], mode="meta")
    rows = STATISTICS["configs"][name]["block_size_by_seed"]["rows"]
    assert [[*target, *context] for target, context in (masking.block_sizes(99, s) for s in range(len(rows)))] == rows
    law = STATISTICS["block_size_law"][name]["target"]
    counts = Counter("{}x{}".format(*masking.block_sizes(0, step)[0]) for step in range(1000, 3000))
    distance = sum(abs(counts[size] / 2000 - law.get(size, 0)) for size in counts | law) / 2
    assert distance < TOLERANCES["mask_tv"] / 3


class PublishedStream:
    """The words of torch's global generator, in the order in which the published sampler uses them.

    torch's generator is mt19937, as numpy's legacy one; `torch.randint` takes one word modulo its range.
    """

    def __init__(self, seed, num_images):
        self.generator, self.num_images = np.random.RandomState(seed), num_images

    def position_words(self, attempt, num_blocks):
        assert attempt == 0, "no published case draws again"
        return self.generator.randint(2**32, size=(self.num_images, num_blocks, 2), dtype=np.uint32).astype(np.uint64)


@pytest.mark.parametrize("name", list(MANIFEST["exact_mask_cases"]))
def test_meta_replays_published_masks_exactly(name):
    case, expected = MANIFEST["exact_mask_cases"][name], load_file(FIXTURES / "masks_exact.safetensors")
    masking, stream = MultiBlockMasking(GRIDS[name], mode="meta"), PublishedStream(case["seed"], case["batch"])
    for batch in range(case["n_batches"]):
        contexts, targets = masking._masks(*masking.block_sizes(seed=0, step=batch), stream)
        assert torch.equal(contexts[:, 0], expected[f"{name}.batch{batch}.context.0"].long())
        for block in range(4):
            assert torch.equal(targets[:, block], expected[f"{name}.batch{batch}.target.{block}"].long())


def batch_statistics(name, num_batches):
    """Per-batch values of our "meta" sampler under the keys of the reference file, and per-batch maps."""
    config, grid_size = CONFIGS[name], GRIDS[name]
    masking, values, maps = MultiBlockMasking(grid_size, mode="meta"), [], []
    for step in range(num_batches):
        contexts, targets = masking.sample(config["batch"], seed=0, step=step)
        blocks = canvas(targets, grid_size).float()  # (B, M, H, W)
        covered = blocks.amax(dim=1)
        before = 1 - covered
        before[:, -1], before[:, :, -1] = 0, 0  # valid where the context block is one below the grid's sides
        above = torch.triu_indices(4, 4, 1)
        shared = blocks.flatten(2) @ blocks.flatten(2).transpose(1, 2)  # (B, M, M)
        values.append(
            {
                "target_kept": targets.shape[-1],
                "target_union_batch_mean": covered.sum(dim=(1, 2)).mean().item(),
                "target_pair_overlap_batch_mean": shared[:, above[0], above[1]].mean().item(),
                "context_kept_before_truncation_batch_mean": before.sum(dim=(1, 2)).mean().item(),
                "context_kept_after_truncation_per_batch": contexts.shape[-1],
            }
        )
        maps.append(
            {
                "target_frequency_per_block": blocks.mean(dim=(0, 1)),
                "target_union_frequency": covered.mean(dim=0),
                "context_frequency_before_truncation": before.mean(dim=0),
                "context_frequency_after_truncation": union(contexts, grid_size).float().mean(dim=0),
            }
        )
    return values, maps


@pytest.mark.parametrize("name", ["224_14", "224_16", "224_14_batch128", "224_16_batch16"])
def test_meta_agrees_with_published_statistics(name):
    config = CONFIGS[name]
    values, maps = batch_statistics(name, num_batches=120)
    for key in values[0]:
        ours, theirs = np.array([row[key] for row in values]), config[key]
        error = np.sqrt(ours.var(ddof=1) / len(ours) + theirs["std"] ** 2 / theirs["n"])
        assert abs(ours.mean() - theirs["mean"]) < TOLERANCES["mask_z"] * error, key
    before, after = (
        np.mean([row[f"context_kept_{when}"] for row in values])
        for when in ("before_truncation_batch_mean", "after_truncation_per_batch")
    )
    assert abs(1 - after / before - config["fraction_of_context_patches_lost_by_truncation"]) < 0.02
    for key in set(maps[0]) & set(config):
        ours = torch.stack([row[key] for row in maps]).numpy()
        theirs, their_error = (np.array(config[key][k]) for k in ("mean_map", "standard_error_map"))
        error = np.sqrt(ours.var(axis=0, ddof=1) / len(ours) + their_error**2)
        assert (abs(ours.mean(axis=0) - theirs) <= TOLERANCES["mask_cell_z"] * error + 1e-4).all(), key
        assert (ours.sum(axis=0) == 0).sum() == config[key]["cells_never_used"]


def overlap_share(**settings):
    """Share of the images whose context meets target block 0, 1, 2, 3."""
    masking, shares = MultiBlockMasking((14, 14), mode="meta", **settings), torch.zeros(4)
    for step in range(10):
        contexts, targets = masking.sample(32, seed=0, step=step)
        assert contexts.shape[-1] > masking.min_patches
        meets = canvas(contexts, (14, 14)) & canvas(targets, (14, 14))  # (B, M, H, W)
        shares += meets.any(dim=(2, 3)).float().mean(dim=0) / 10
    return shares


def test_meta_forgives_the_last_targets_first_and_only_when_it_must():
    assert overlap_share().sum() == 0
    some = overlap_share(target_scale=(0.45, 0.5), min_patches=59)
    assert some[0] == 0 and some[3] > 0.1 and (some.diff() >= 0).all()
    assert (overlap_share(num_context_tokens=168) > 0.5).all()


class RecordingStream:
    """Gives the same corners at every attempt and records the attempts."""

    def __init__(self, corners):
        self.words, self.attempts = np.array([corners], dtype=np.uint64), []

    def position_words(self, attempt, num_blocks):
        self.attempts.append(attempt)
        return self.words.copy()

    def distinct_keys(self, purpose, num_rows, num_choices):
        return np.arange(num_rows * num_choices, dtype=np.uint32).reshape(1, num_rows, num_choices)


def test_meta_forgives_one_target_after_each_twenty_failed_tries():
    # All blocks have one size and lie on one place, so the context is empty until the last target is forgiven.
    masking = MultiBlockMasking((14, 14), mode="meta")
    stream = RecordingStream([[0, 0]] * 5)
    contexts, targets = masking._masks((6, 6), (6, 6), stream)
    assert stream.attempts == list(range(4 * 20 + 1))
    assert torch.equal(contexts[:, 0], targets[:, 0])
    stream = RecordingStream([[0, 0], [6, 6], [0, 0], [6, 6], [0, 0]])  # the third and the first must go: 60 + 20
    masking._masks((6, 6), (6, 6), stream)
    assert len(stream.attempts) == 81
    stream = RecordingStream([[6, 6], [6, 6], [6, 6], [0, 0], [0, 0]])  # the last alone must go
    masking._masks((6, 6), (6, 6), stream)
    assert stream.attempts == list(range(21))


def test_unbiased_stops_drawing_and_stacks_the_targets():
    masking = MultiBlockMasking((20, 20), target_scale=(0.15, 0.25), context_scale=(1, 1), num_context_tokens=290)
    stream = RecordingStream([[0, 0], [0, 10], [10, 0], [10, 10], [0, 0]])  # the four quarters: nothing is left
    contexts, targets = masking._masks((10, 10), (20, 20), stream)
    assert stream.attempts == list(range(_MAX_POSITION_DRAWS + 1))
    assert contexts.shape[-1] == 290 and (targets == targets[:, :1]).all()


def test_meta_keeps_more_than_min_patches():
    # 5x5 targets and a 6x6 context: without them 36 patches, with a whole target taken out at most 11 + edges.
    settings = {"mode": "meta", "target_aspect_ratio": (1, 1), "num_targets": 1, "context_scale": (0.75, 0.75)}
    masking = MultiBlockMasking((7, 7), target_scale=(0.52, 0.52), min_patches=10, **settings)
    counts = {masking.sample(1, seed=0, step=step)[0].shape[-1] for step in range(60)}
    assert min(counts) == 11
    masking = MultiBlockMasking((7, 7), target_scale=(0.52, 0.52), min_patches=11, **settings)
    assert min(masking.sample(1, seed=0, step=step)[0].shape[-1] for step in range(60)) > 11


def test_several_meta_contexts_share_a_size_and_are_drawn_independently():
    masking = MultiBlockMasking((16, 16), mode="meta", num_contexts=2, context_scale=(0.4, 0.5), allow_overlap=True)
    contexts, _ = masking.sample(32, seed=0)
    height, width = masking.block_sizes(0)[1]
    assert contexts.shape == (32, 2, height * width)
    assert (contexts[:, 0] != contexts[:, 1]).any(dim=1).float().mean() > 0.8


# ---- what cannot work is refused at construction --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "paper"}, "mode='paper'"),
        ({"grid_size": (0, 14)}, "grid_height=0"),
        ({"grid_size": (14,)}, "grid_size"),
        ({"num_targets": 0}, "num_targets=0"),
        ({"num_targets": 2.0}, "num_targets=2.0"),
        ({"num_contexts": 0}, "num_contexts=0"),
        ({"min_patches": 0}, "min_patches=0"),
        ({"target_scale": (0.2, 0.15)}, "target_scale="),
        ({"target_scale": (0.0, 0.15)}, "target_scale="),
        ({"context_scale": (0.85, 1.1)}, "context_scale="),
        ({"context_scale": (float("nan"), 1.0)}, "context_scale="),
        ({"target_aspect_ratio": (-1, 1)}, "target_aspect_ratio="),
        ({"target_scale": (0.9, 0.95)}, "min_patches=10.*target_scale"),
        ({"min_patches": 180}, "min_patches=180"),
        ({"min_patches": 150, "mode": "meta"}, "min_patches=150"),
        ({"min_patches": 30, "mode": "meta"}, "min_patches=30.*5x6=30"),  # more than 30 are needed
        ({"num_context_tokens": 5}, "num_context_tokens=5.*min_patches=10"),
        ({"num_context_tokens": 10, "mode": "meta"}, "num_context_tokens=10.*min_patches=10"),
        ({"num_context_tokens": 150}, "num_context_tokens=150"),
        ({"num_context_tokens": 0}, "num_context_tokens=0"),
        ({"num_target_tokens": 60}, "num_target_tokens=60"),
        ({"num_target_tokens": 20, "mode": "meta"}, "num_target_tokens=20"),
        ({"grid_size": (8, 8), "mode": "meta"}, "min_patches=10.*target_scale=.*3x3"),
        ({"grid_size": (6, 6), "mode": "meta"}, "min_patches=10.*target_scale="),
        ({"grid_size": (1, 40), "mode": "meta"}, r"grid_size=\(1, 40\)"),
        ({"grid_size": (3, 3)}, "min_patches=10"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiBlockMasking(**{"grid_size": (14, 14), **settings})


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"seed": -1}, {"step": -1}, {"rank": -1}, {"seed": 2**64}])
def test_sample_refuses_arguments_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MultiBlockMasking((14, 14)).sample(**{"batch_size": 2, "seed": 0, **arguments})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [9, 12, 14, 16, 28])
def test_extreme_blocks_at_construction_are_those_of_the_formula(mode, side):
    masking = MultiBlockMasking((side, side), mode=mode, min_patches=1)
    draws = np.linspace(0, 1, 1501)
    scale, aspect_ratio = 0.15 + 0.05 * draws, 0.75 + 0.75 * draws
    height, width = masking._target_sides(scale[:, None] if mode == "unbiased" else scale, aspect_ratio)
    targets = masking.extreme_block_sides()[0]
    assert np.prod(targets.smallest) == (height * width).min() and np.prod(targets.largest) == (height * width).max()
    for cells in (1, 2, 3):  # coarse cells may only widen the bounds
        coarse = masking.extreme_block_sides(cells)[0]
        assert np.prod(coarse.smallest) <= np.prod(targets.smallest)
        assert np.prod(coarse.largest) >= np.prod(targets.largest)


@pytest.mark.parametrize("mode", MODES)
def test_extreme_blocks_surround_every_block_drawn(mode):
    masking = MultiBlockMasking((14, 11), mode=mode, context_scale=(0.6, 1.0), min_patches=1)
    for step in range(300):
        for bounds, (height, width) in zip(masking.extreme_block_sides(), masking.block_sizes(0, step), strict=True):
            assert any(low[0] <= height and low[1] <= width for low in bounds.lower)
            assert any(high[0] >= height and high[1] >= width for high in bounds.upper)


SMALL_GRIDS = [*itertools.combinations_with_replacement(range(1, 17), 2), (16, 5), (12, 3), *PUBLISHED_GRIDS]


@pytest.mark.parametrize("mode", MODES)
def test_every_grid_is_refused_or_works(mode):
    worked = 0
    for grid_size in SMALL_GRIDS:
        try:
            masking = MultiBlockMasking(grid_size, mode=mode)
        except ValueError:
            continue
        worked += 1
        least_context, least_target = (10, 1) if mode == "unbiased" else (11, 11)
        for step in range(50):
            contexts, targets = masking.sample(2, seed=0, step=step)
            assert contexts.shape[-1] >= least_context and targets.shape[-1] >= least_target
    assert worked > 30


def test_published_grids_are_accepted_in_both_modes():
    for grid_size, mode in itertools.product([(14, 14), (16, 16), (28, 28)], MODES):
        MultiBlockMasking(grid_size, mode=mode)


# ---- the collator --------------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        step, place = divmod(index, 4)
        return {
            "pixel_values": torch.full((3, 4, 4), index, dtype=torch.uint8),
            "step": step,
            "slot_block": place // 4,
        }


def test_collator_gives_the_same_batches_with_and_without_workers():
    collator = MaskingCollator(MultiBlockMasking((14, 14)), seed=3)
    alone, workers = (
        list(DataLoader(Samples(), batch_size=4, collate_fn=collator, num_workers=num_workers))
        for num_workers in (0, 2)
    )
    assert len(alone) == len(workers) == 4
    for one, other in zip(alone, workers, strict=True):
        assert one.keys() == other.keys() == {"pixel_values", "context_indices", "target_indices"}
        assert same(one.values(), other.values())
    assert alone[0]["pixel_values"].dtype == torch.uint8 and alone[0]["pixel_values"].shape == (4, 3, 4, 4)


def test_collator_uses_the_step_and_the_slice_of_its_samples():
    masking = MultiBlockMasking((14, 14))
    samples = [{"pixel_values": torch.zeros(1), "step": 7, "slot_block": 3} for _ in range(5)]
    batch = pickle.loads(pickle.dumps(MaskingCollator(masking, seed=2)))(samples)
    assert same((batch["context_indices"], batch["target_indices"]), masking.sample(5, seed=2, step=7, rank=3))
    assert samples[0].keys() == {"pixel_values", "step", "slot_block"}, "samples are left alone"


@pytest.mark.parametrize("name", ["step", "slot_block"])
def test_collator_refuses_samples_of_two_batches(name):
    samples = [{"pixel_values": torch.zeros(1), "step": 0, "slot_block": 0, name: value} for value in (0, 1)]
    with pytest.raises(ValueError, match="one batch must have one"):
        MaskingCollator(MultiBlockMasking((14, 14)), seed=0)(samples)
