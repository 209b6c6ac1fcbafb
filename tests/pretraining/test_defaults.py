# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`auto` follows from the grid and from the length of the run, and the run says what it came to."""

import pytest
import yaml

from ijepa_transformers.optimization import half_life_of_momentum, momentum_of_half_life
from ijepa_transformers.pretraining.arguments import PretrainingArguments
from ijepa_transformers.pretraining.defaults import half_life_steps, with_masks_for
from tests.runs import TINY, assert_equal_weights, cut_back, pretrain


def arguments(**changes):
    return PretrainingArguments(data="digits", output_dir="unused", max_steps=10, **changes)


@pytest.mark.parametrize(
    "grid_size, length, mode",
    [
        ((8, 8), {"max_steps": 10_000}, "random"),
        ((8, 8), {"max_steps": 10_001}, "unbiased"),
        ((8, 8), {"epochs": 1}, "unbiased"),
        ((10, 10), {"max_steps": 10}, "random"),
        ((14, 14), {"max_steps": 10}, "unbiased"),
        ((6, 8), {"epochs": 300}, "random"),
        ((7, 7), {"epochs": 300}, "unbiased"),
    ],
)
def test_masks_follow_from_the_grid_and_the_length_of_the_run(grid_size, length, mode):
    settings = {"mask_mode": "auto", "visible_share": 0.25, "num_contexts": 4, "num_targets": 2}
    asked = PretrainingArguments(data="digits", output_dir="unused", **settings, **length)
    chosen, why = with_masks_for(asked, grid_size)
    grid = f"{grid_size[0]} x {grid_size[1]}"
    assert chosen.mask_mode == mode and f"Masks are {mode} (mask_mode), because the grid of {grid} has" in why
    if mode == "random":
        assert (chosen.visible_share, chosen.num_contexts, chosen.num_targets) == (0.25, 4, 4)
        assert why.endswith(" Left out: num_targets.")
    else:
        assert (chosen.visible_share, chosen.num_contexts, chosen.num_targets) == (0.3, 1, 2)
        assert why.endswith(" Left out: num_contexts, visible_share.")


def test_a_resumed_run_keeps_the_masks_that_auto_had(tmp_path, capsys):
    """An earlier version may have chosen other masks for the same run."""
    whole = pretrain(tmp_path / "run", mask_mode="unbiased", save_steps=3)
    cut = cut_back(tmp_path, tmp_path / "cut") / "run"
    resumed = pretrain(cut, mask_mode="auto", save_steps=3, resume="true", verbose="true")
    assert "Masks are unbiased (mask_mode), as in the run that is resumed." in capsys.readouterr().out
    assert_equal_weights(resumed, whole)


def test_masks_that_were_asked_for_stay():
    asked = arguments(mask_mode="meta", num_contexts=2)
    assert with_masks_for(asked, (8, 8)) == (asked, "")


def test_the_half_life_follows_from_the_length_of_the_run():
    assert half_life_steps("auto", 20) == 1
    assert half_life_steps("auto", 2000) == pytest.approx(20)
    published = half_life_of_momentum(0.996)
    assert half_life_steps("auto", 10**6) == pytest.approx(published)
    assert momentum_of_half_life(published) == pytest.approx(0.996)
    assert half_life_steps(0.03, 2000) == pytest.approx(60)


@pytest.mark.parametrize("value", [0, 1.5, "long"])
def test_other_half_lives_are_refused(value):
    with pytest.raises(ValueError, match=f"momentum_half_life.*{value}"):
        arguments(momentum_half_life=value)


def test_a_run_says_what_auto_is_and_records_it(tmp_path, capsys):
    settings = {
        **TINY,
        "mask_mode": "auto",
        "num_contexts": 2,
        "momentum_half_life": "auto",
        "momentum": None,
        "verbose": "true",
    }
    pretrain(tmp_path / "run", **settings)
    printed = capsys.readouterr().out
    assert "Masks are random (mask_mode), because the grid of" in printed and "2 contexts" in printed
    assert "forgets half within 1 step (momentum_half_life), because the run has 6 steps." in printed
    recipe = yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())
    assert recipe["mask_mode"] == "random" and recipe["momentum_half_life"] == "auto"
    pretrain(tmp_path / "run", **{**settings, "resume": True})  # auto is no other setting than what it came to
