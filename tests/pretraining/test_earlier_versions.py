# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Directories of earlier versions load. tests/fixtures/run_b85b42c was written by commit b85b42c, before the move to
rooms: a run of 6 steps, its checkpoint after step 3, and the model that it ended with."""

import shutil
from pathlib import Path

import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from ijepa_transformers import IJepaForPretraining, IJepaModel
from ijepa_transformers.pretraining.arguments import parse_pretraining_arguments
from tests.runs import assert_close_weights, pretrain, rows


RUN = Path(__file__).parents[1] / "fixtures" / "run_b85b42c"
# Another processor may round otherwise.
TOLERANCE = 1e-5


def test_a_run_of_an_earlier_version_is_resumed_to_the_same_end(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    ended = pretrain(tmp_path / "run", validation_split="test", resume=True)
    assert_close_weights(ended, load_file(RUN / "model.safetensors"), TOLERANCE)
    for ours, theirs in zip(rows(tmp_path / "run"), rows(RUN), strict=True):
        assert ours["step"] == theirs["step"] and abs(ours["loss"] - theirs["loss"]) < TOLERANCE


def test_a_recipe_of_an_earlier_version_is_read():
    """Removed keys are accepted where they have the value that was the default."""
    recipe = yaml.safe_load((RUN / "recipe.yaml").read_text())
    arguments = parse_pretraining_arguments(["--recipe", str(RUN / "recipe.yaml"), "--output_dir", "elsewhere"])
    assert {"keep_all_context", "token_multiple"} <= set(recipe)
    kept = {key: value for key, value in recipe.items() if hasattr(arguments, key) and key != "output_dir"}
    assert {key: getattr(arguments, key) for key in kept} == {
        key: [value] if isinstance(getattr(arguments, key), list) and not isinstance(value, list) else value
        for key, value in kept.items()
    }


def test_a_model_of_an_earlier_version_opens():
    model = IJepaForPretraining.from_pretrained(RUN)
    encoder = AutoModel.from_pretrained(RUN)
    assert isinstance(encoder, IJepaModel)
    assert_close_weights(encoder.state_dict(), model.ijepa.state_dict(), 0)
