# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A grid of runs: every line with every seed, once, in one table that hides no failure."""

import dataclasses
import json
import subprocess

import pytest
import yaml

from benchmarks.learning import experiment_grid
from ijepa_transformers import IJepaConfig
from ijepa_transformers.masking import build_masking
from ijepa_transformers.pretraining.arguments import parse_pretraining_arguments


GRID = {
    "recipe": "ijepa_transformers/recipes/quickstart.yaml",
    "settings": {"max_steps": 10, "warmup_steps": 1, "crop_scale": [0.5, 1.0]},
    "seeds": [0, 1],
    "runs": {"as it is": None, "other momentum": {"momentum": 0.9, "max_steps": 20}},
}
TABLE = """done

| features               | 20-NN | 5-shot | 5-shot std |
| ---------------------- | ----: | -----: | ---------: |
| raw pixels             | 0.938 |  0.798 |      0.033 |
| random encoder         | 0.506 |  0.437 |      0.038 |
| I-JEPA target encoder  | 0.844 |  0.771 |      0.016 |
| I-JEPA context encoder | 0.872 |  0.776 |      0.021 |
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(GRID, sort_keys=False), encoding="utf-8")
    return path


@pytest.fixture
def measured(monkeypatch):
    """Runs are not made but noted; those with a momentum of .9 fail for seed 1."""
    made = []

    def measure(run, threads):
        made.append((run.name, run.seed))
        row = {"run": run.name, "seed": run.seed, "all_settings": run.all_settings, "seconds": 60.0}
        if run.settings.get("momentum") == 0.9 and run.seed == 1:
            return {**row, "error": ["no such thing"]}
        watched = {"loss": 0.1, "target_std": 0.5, "effective_rank": 10.0, "collapsing": False}
        cells = experiment_grid.table_cells(TABLE)
        return {**row, **watched, **cells, "target 20-NN": 0.8 + 0.1 * run.seed}

    monkeypatch.setattr(experiment_grid, "measure", measure)
    return made


def test_every_line_is_run_with_every_seed_and_its_own_settings(grid):
    runs = experiment_grid.read_grid(grid)
    assert [(run.name, run.seed) for run in runs] == [
        ("as it is", 0), ("other momentum", 0), ("as it is", 1), ("other momentum", 1),
    ]  # fmt: skip
    assert runs[0].settings == GRID["settings"]
    assert runs[3].settings == {**GRID["settings"], "max_steps": 20, "momentum": 0.9}


def test_a_line_can_take_back_what_all_lines_share(grid):
    changed = {**GRID, "runs": {"long": {"max_steps": None, "warmup_steps": None}}}
    grid.write_text(yaml.safe_dump(changed), encoding="utf-8")
    assert experiment_grid.read_grid(grid)[0].settings == {"crop_scale": [0.5, 1.0]}


def test_the_grids_of_this_repository_are_understood_by_the_pretraining_command():
    grids = sorted((experiment_grid.REPOSITORY / "benchmarks/learning/grids").glob("*.yaml"))
    assert grids
    for run in (run for path in grids for run in experiment_grid.read_grid(path)):
        arguments = parse_pretraining_arguments(run.words("somewhere"))
        build_masking(IJepaConfig(**arguments.model_fields()).grid_size, **arguments.mask_fields())


def test_the_words_of_a_run_are_understood_by_the_pretraining_command(grid):
    run = experiment_grid.read_grid(grid)[3]
    arguments = parse_pretraining_arguments(run.words("somewhere"))
    assert (arguments.max_steps, arguments.momentum, arguments.seed) == (20, 0.9, 1)
    assert list(arguments.crop_scale) == [0.5, 1.0] and arguments.output_dir == "somewhere"


def test_the_table_has_mean_and_spread_and_names_failures(grid, measured, tmp_path, capsys):
    experiment_grid.main([str(grid), "--output_dir", str(tmp_path / "out")])
    lines = {cells[0]: cells for cells in map(split, (tmp_path / "out/table.md").read_text().splitlines())}
    assert lines["as it is"][1] == "0.850 ± 0.071" and lines["as it is"][-2] == "0 of 2"
    assert lines["other momentum"][1] == "0.800" and lines["other momentum"][-2] == "0 of 1, 1 failed"
    assert lines["raw pixels"][1] == "0.938 ± 0.000" and lines["random"][2] == "0.437 ± 0.000"
    assert "no such thing" in capsys.readouterr().out


def split(line):
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_what_was_measured_is_not_run_again_but_failures_and_new_settings_are(grid, measured, tmp_path):
    words = [str(grid), "--output_dir", str(tmp_path / "out")]
    experiment_grid.main(words)
    assert len(measured) == 4
    experiment_grid.main(words)
    assert measured[4:] == [("other momentum", 1)], "it had failed"
    changed = {**GRID, "runs": {"a new name": {}, "new": {"momentum": 0.8}}}
    grid.write_text(yaml.safe_dump(changed), encoding="utf-8")
    experiment_grid.main(words)
    assert measured[5:] == [("new", 0), ("new", 1)]
    assert "a new name" in (tmp_path / "out/table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert len(rows) == 7 and all(row["commit"] and row["machine"]["cpu"] for row in rows)


def test_what_was_measured_before_the_recipe_changed_is_measured_again(grid, measured, tmp_path, monkeypatch):
    recipe = tmp_path / "repository" / GRID["recipe"]
    recipe.parent.mkdir(parents=True)
    monkeypatch.setattr(experiment_grid, "REPOSITORY", tmp_path / "repository")
    for text, runs in (("num_targets: 2", 4), ("num_targets: 2\noutput_dir: elsewhere", 1), ("num_targets: 4", 4)):
        recipe.write_text(text, encoding="utf-8")
        measured.clear()
        experiment_grid.main([str(grid), "--output_dir", str(tmp_path / "out")])
        assert len(measured) == runs, "the one that failed is made again each time"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sedes": [1]}, "sedes"),
        ({"recipe": "ijepa_transformers/recipes/none.yaml"}, "ijepa_transformers/recipes/none.yaml"),
        ({"runs": {"typo": {"max_step": None}}}, "the line 'typo' takes back ['max_step']"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(grid, changes, words, tmp_path, capsys):
    grid.write_text(yaml.safe_dump({**GRID, **changes}), encoding="utf-8")
    with pytest.raises(SystemExit):
        experiment_grid.main([str(grid), "--output_dir", str(tmp_path / "out")])
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiment_grid.main([str(grid), "--output_dir", str(tmp_path / "out"), "--only", "nothing"])


def test_cells_of_the_final_table():
    cells = experiment_grid.table_cells(TABLE)
    assert cells["pixels 5-shot"] == 0.798 and cells["context 20-NN"] == 0.872 and len(cells) == 8


def test_a_run_that_nothing_judged_is_named_as_one(monkeypatch):
    done = subprocess.CompletedProcess([], 0, stdout="model  outputs/run\n", stderr="")
    monkeypatch.setattr(experiment_grid.subprocess, "run", lambda *_, **__: done)
    row = experiment_grid.measure(run_of("ijepa_transformers/recipes/small_images.yaml"), threads=1)
    assert "name a validation_split" in row["error"][0]


def test_a_run_whose_recipe_changes_meanwhile_is_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_grid, "REPOSITORY", tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_targets: 2")
    run = run_of("recipe.yaml")

    def process(*_, **__):
        recipe.write_text("num_targets: 4")
        return subprocess.CompletedProcess([], 0, stdout=TABLE, stderr="")

    monkeypatch.setattr(experiment_grid.subprocess, "run", process)
    row = experiment_grid.measure(run, threads=1)
    assert row["error"] == ["recipe.yaml was changed while the grid ran"]
    assert row["all_settings"]["num_targets"] == 2


def run_of(recipe, **settings):
    return experiment_grid.Run("a run", 0, recipe, settings, experiment_grid.read_recipe(recipe))


@pytest.mark.slow
def test_a_real_run_becomes_a_row():
    settings = {"max_steps": 2, "warmup_steps": 1, "num_workers": 0, "max_probe_images": 100, "mixed_precision": "no"}
    run = dataclasses.replace(run_of("ijepa_transformers/recipes/quickstart.yaml", **settings), seed=3)
    row = experiment_grid.measure(run, threads=1)
    assert "error" not in row and row["collapsing"] in (True, False) and "--seed=3" in row["command"]
    assert set(experiment_grid.COLUMNS) <= row.keys()
    broken = run_of("ijepa_transformers/recipes/quickstart.yaml", learning_rate=-1)
    assert "learning_rate must be at least 0" in experiment_grid.measure(broken, threads=1)["error"][0]
