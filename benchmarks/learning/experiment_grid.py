# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretrains every line of a grid with several seeds, and prints one table: mean and spread of what was learned.

    python benchmarks/learning/experiment_grid.py GRID.yaml --output_dir DIRECTORY
        [--jobs 2] [--threads 1] [--only LINE ...]

A grid is a YAML file of four keys:

    recipe: ijepa_transformers/recipes/quickstart.yaml    what all runs share, relative to the repository
    settings: {max_steps: 1000}         what the grid changes for all of them; a key of run_pretraining.py each
    seeds: [0, 1, 2]
    runs:                               name -> what this line changes
      as it is: {}
      published momentum: {momentum: 0.996}
      as the recipe is: {max_steps: null}     takes back what `settings` say

Every run is a process of its own with as many threads as `--threads` says, `--jobs` at a time. What it found goes as a
line into `results.jsonl` of the output directory, with settings, command, wall seconds, versions and the commit; a run
that is found there with the same settings, those of the recipe included (not the defaults of run_pretraining.py), is
not repeated, so a grid that was stopped goes on where it was. A run that fails is a line too, and is repeated. The
table is written to `table.md`.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.timing import environment


REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = {"recipe", "settings", "seeds", "runs"}
FEATURES = {  # rows of the table that a run ends with
    "raw pixels": "pixels",
    "random encoder": "random",
    "I-JEPA target encoder": "target",
    "I-JEPA context encoder": "context",
}
WATCHED = ("loss", "target_std", "effective_rank", "collapsing")  # of the last line of metrics
COLUMNS = ("target 20-NN", "target 5-shot", "context 20-NN", "context 5-shot", "target_std", "effective_rank")
HEADER = ("run", *COLUMNS, "collapsed", "minutes")


class GridError(Exception):
    """The grid cannot be run as written."""


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    recipe: str
    settings: dict  # what the grid changes in the recipe
    recipe_settings: dict  # what the recipe said when the grid was read

    def words(self, output_dir: str) -> list[str]:
        """Arguments of run_pretraining.py."""
        settings = {**self.settings, "seed": self.seed, "output_dir": output_dir}
        recipe = ["--recipe", str(REPOSITORY / self.recipe)]
        return [*recipe, *chain.from_iterable(as_words(*setting) for setting in settings.items())]

    @property
    def all_settings(self) -> dict:
        """By which a row is known: a recipe may change while rows are kept."""
        return {**self.recipe_settings, **self.settings, "seed": self.seed, "output_dir": None}

    def is_that_of(self, row: dict) -> bool:
        return row.get("all_settings") == self.all_settings


def as_words(key: str, value) -> list[str]:
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}"]


def read_grid(path: Path) -> list[Run]:
    """All runs, seed by seed, so that a grid that is stopped early has every line.

    Raises:
        GridError: if keys are unknown or missing.
    """
    grid = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(grid, dict) or grid.keys() - KEYS or {"recipe", "runs"} - grid.keys():
        found = sorted(grid) if isinstance(grid, dict) else grid
        raise GridError(f"{path} has the keys {found}, but a grid has {sorted(KEYS)} (settings and seeds may lack).")
    if not (REPOSITORY / grid["recipe"]).is_file():
        raise GridError(f"{path} names the recipe {grid['recipe']!r}, and there is no such file in {REPOSITORY}.")
    shared = grid.get("settings") or {}
    recipe_settings = read_recipe(grid["recipe"])
    return [
        Run(name, seed, grid["recipe"], _settings(name, shared, changes or {}), recipe_settings)
        for seed in grid.get("seeds", [0, 1, 2])
        for name, changes in grid["runs"].items()
    ]


def read_recipe(recipe: str) -> dict:
    return yaml.safe_load((REPOSITORY / recipe).read_text(encoding="utf-8"))


def _settings(name: str, shared: dict, changes: dict) -> dict:
    """Of a line; null takes back what all lines share."""
    nothing = sorted(key for key, value in changes.items() if value is None and key not in shared)
    if nothing:
        raise GridError(f"the line {name!r} takes back {nothing}, which `settings` do not say.")
    return {key: value for key, value in {**shared, **changes}.items() if value is not None}


# One run


def measure(run: Run, threads: int) -> dict:
    """A line of results.jsonl."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, str(REPOSITORY / "run_pretraining.py"), *run.words(f"{directory}/run")]
        began = time.perf_counter()
        done = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, env=with_threads(threads), check=False
        )
        row = {
            "run": run.name,
            "seed": run.seed,
            "recipe": run.recipe,
            "settings": run.settings,
            "all_settings": run.all_settings,
            "command": shlex.join(["run_pretraining.py", *run.words("OUTPUT")]),
            "seconds": round(time.perf_counter() - began, 1),
        }
        if done.returncode:
            return {**row, "error": error_of(done)}
        if read_recipe(run.recipe) != run.recipe_settings:
            return {**row, "error": [f"{run.recipe} was changed while the grid ran"]}
        if "| features" not in done.stdout:
            return {**row, "error": ["the run ended without a table: name a validation_split"]}
        metrics = (Path(directory) / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        last = json.loads(metrics[-1])
        return {**row, **{key: last[key] for key in WATCHED}, **table_cells(done.stdout)}


def with_threads(threads: int) -> dict[str, str]:
    """Environment of a process that computes with as many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}


def error_of(done: subprocess.CompletedProcess) -> list[str]:
    """The last line that a failed process has to say."""
    return done.stderr.strip().splitlines()[-1:] or [f"exit {done.returncode}"]


def table_cells(text: str) -> dict[str, float]:
    """Accuracies in the table at the end of a run: {"target 20-NN": accuracy, ...}. Spreads are left out."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if "|" in line]
    header = next(cells for cells in lines if cells[0] == "features")
    rows = {FEATURES[cells[0]]: cells[1:] for cells in lines if cells[0] in FEATURES}
    return {
        f"{features} {column}": float(cell)
        for features, cells in rows.items()
        for column, cell in zip(header[1:], cells, strict=True)
        if not column.endswith(" std")
    }


def commit() -> str:
    """Of this repository, with a plus where files were changed since."""
    described = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(described, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# All runs


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def run_grid(runs: list[Run], output_dir: Path, jobs: int, threads: int) -> list[dict]:
    """Measures what is not in results.jsonl yet, and returns the row of every run, failures included."""
    rows = rows_of_all(runs, output_dir, jobs, lambda run: measure(run, threads), describe)
    return [{**row, "run": run.name} for run, row in zip(runs, rows, strict=True)]


def describe(row: dict) -> str:
    shown = row.get("error") or {key: row[key] for key in COLUMNS if key in row}
    return f"{row['run']}, seed {row['seed']}, {row['seconds']:.0f} s: {shown}"


def rows_of_all(
    runs: list,
    output_dir: Path,
    jobs: int,
    measure: Callable[..., dict],
    describe: Callable[[dict], str],
    device_type: str = "cpu",
) -> list[dict]:
    """The row of every run: of results.jsonl if it is there without an error, else of `measure(run)`, written there.

    A run says with `is_that_of(row)` which row is its own; `jobs` of them are measured at a time.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    results = output_dir / "results.jsonl"
    known = [row for row in rows_of(results) if "error" not in row]
    rows = [next((row for row in known if run.is_that_of(row)), None) for run in runs]
    origin = {"commit": commit(), "jobs": jobs, "machine": environment(device_type)}
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(measure, run): place for place, run in enumerate(runs) if rows[place] is None}
        for done in as_completed(running):
            row = rows[running[done]] = done.result()
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**row, **origin}) + "\n")
            print(describe(row), flush=True)
    return rows


# The table


def table(rows: list[dict]) -> str:
    """A line per run, mean and standard deviation over its seeds; above them pixels and random encoders."""
    whole = [row for row in rows if "error" not in row]
    lines = [HEADER, ["---", *["---:"] * (len(HEADER) - 1)]]
    lines += [baseline(name, features, whole) for name, features in (("raw pixels", "pixels"), ("random", "random"))]
    lines += [
        line(name, [row for row in rows if row["run"] == name]) for name in dict.fromkeys(r["run"] for r in rows)
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def baseline(name: str, features: str, rows: list[dict]) -> list[str]:
    """Beside which the lines are read; the random encoders are those of all lines, each born with its own settings."""
    found = [[row[key] for row in rows if key in row] for key in (f"{features} 20-NN", f"{features} 5-shot")]
    return [name, *map(spread, found), *[""] * (len(HEADER) - 3)]


def line(name: str, rows: list[dict]) -> list[str]:
    whole = [row for row in rows if "error" not in row]
    collapsed = f"{sum(row['collapsing'] for row in whole)} of {len(whole)}"
    if len(whole) < len(rows):
        collapsed += f", {len(rows) - len(whole)} failed"
    minutes = spread([row["seconds"] / 60 for row in whole], digits=1)
    return [name, *(spread([row[key] for row in whole if key in row]) for key in COLUMNS), collapsed, minutes]


def spread(values: list[float], digits: int = 3) -> str:
    """Mean, and standard deviation where there are several values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("grid", type=Path)
    parser.add_argument("--output_dir", type=Path, required=True, help="of results.jsonl and table.md")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--only", nargs="+", help="names of the lines to run")
    arguments = parser.parse_args(words)
    try:
        runs = read_grid(arguments.grid)
    except (GridError, OSError, yaml.YAMLError) as error:
        parser.error(str(error))
    if unknown := set(arguments.only or ()) - {run.name for run in runs}:
        parser.error(f"{arguments.grid} has no lines {sorted(unknown)}.")
    runs = [run for run in runs if not arguments.only or run.name in arguments.only]
    text = table(run_grid(runs, arguments.output_dir, arguments.jobs, arguments.threads))
    (arguments.output_dir / "table.md").write_text(f"{text}\n", encoding="utf-8")
    print(f"\n{text}")


if __name__ == "__main__":
    main()
