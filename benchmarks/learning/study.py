# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains every line of a study with several seeds and writes one table. A study that was stopped goes on.

    python benchmarks/learning/study.py STUDY.yaml --output_dir DIRECTORY
        [--part selection] [--jobs 2] [--threads 1] [--only LINE ...] [--seeds 0 1 2] [--table]

A study is a YAML file:

    seconds: 300                        processor time of each run (wall time on a GPU); or steps: 2000
    seeds: [0, 1, 2]
    settings: {data: PATH, rate: 1e-3}  of all lines: keys of `Settings` in learners.py
    runs:                               name -> what this line changes; `seconds` and `steps` too
      raw pixels: {method: pixels}      trains nothing
      random encoder: {method: random}  trains nothing
      ours: {}
      MAE: {method: mae}

`--part selection` trains on nine tenths of the training images and judges by the other tenth. Choose settings so.
`--part final` trains on all training images and judges by the validation (or test) images. Make tables so, once.

Each run is a process of its own. Its row goes to `results.jsonl` in the output directory as soon as it is there, and
is not repeated: settings, budget and part tell which row belongs to a run. A run that fails is a row too, and is
repeated; then the exit code is 1. The table goes to `table.md`. `--table` runs nothing and shows the rows that are
there. Decoded images are kept in the directory of the variable IJEPA_STUDY_CACHE.
"""

import argparse
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.learning.images import load_parts
from benchmarks.learning.learners import Settings, build_learner, built, embedding_of
from benchmarks.learning.training import Clock, Training, judge, pixel_features
from benchmarks.speed.timing import environment
from ijepa_transformers import IJepaForPretraining, process
from ijepa_transformers.arguments import require
from ijepa_transformers.execution import set_matmul_precision
from ijepa_transformers.files import read_rows, write_rows, write_text
from ijepa_transformers.recipe_files import near, read_yaml


BUDGETS = ("seconds", "steps")
KEYS = (*BUDGETS, "seeds", "settings", "runs")
SETTINGS = tuple(entry.name for entry in dataclasses.fields(Settings) if entry.name != "seed")
UNTRAINED = ("pixels", "random")
COLUMNS = {"20-NN": "knn", "5-shot": "shot5", "linear": "linear", "effective rank": "effective_rank"}
# Memory is kept as the package's commands keep it. All methods have this.
MALLOC = {variable: str(value) for variable, value in process.MALLOC.items()}


# ------------------------------------------------------------------------------------------------------------ one run


def run(wanted: dict[str, Any]) -> dict[str, float]:
    """What came of a run, in the process that is its own."""
    settings, device = Settings(**wanted["settings"]), "cuda" if torch.cuda.is_available() else "cpu"
    set_matmul_precision(device, "no")
    cache = Path(os.environ.get("IJEPA_STUDY_CACHE", Path(tempfile.gettempdir()) / "ijepa_study"))
    sizes = settings.stored_size, settings.num_channels
    parts = load_parts(settings.data, wanted["part"], *sizes, cache, settings.held_out_block)
    train, test = (part.to(device) for part in parts)
    torch.manual_seed(settings.seed)
    if settings.method == "pixels":
        return judge(pixel_features, train, test, settings.image_size)
    if settings.method == "random":
        born = built(IJepaForPretraining, settings.config(), device, "no").ijepa
        return judge(embedding_of(born), train, test, settings.image_size)
    learner = build_learner(settings, int(train.labels.max()) + 1, device)
    clock = Clock(steps=wanted.get("steps"), seconds=wanted.get("seconds"), device=device)
    row = Training(learner, settings, train, clock).run()
    for name, encoder in learner.encoders.items():
        found = judge(encoder(), train, test, settings.image_size)
        row |= {f"{name} {key}": value for key, value in found.items()}
    return row


def end_with(parent: int) -> None:
    """Ends this process when its parent has ended: nobody would keep its row, and it would slow down the next runs."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def measure(wanted: dict[str, Any], threads: int) -> dict[str, Any]:
    """A line of results.jsonl."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--run",
        json.dumps(wanted),
        "--parent",
        str(os.getpid()),
    ]
    variables = {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables)
    row = {**wanted, "threads": threads, "wall_seconds": round(time.perf_counter() - began, 1)}
    row["machine"] = environment("cuda" if torch.cuda.is_available() else "cpu")
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-3:]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


# ----------------------------------------------------------------------------------------------------------- all runs


def read_study(path: Path) -> dict[str, Any]:
    """The content of a study.

    Raises:
        ValueError: with the wrong key or value, if it is no study.
        OSError: if the file cannot be read.
    """
    try:
        study = read_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML file: {' '.join(str(error).split())}") from None
    require(isinstance(study, dict), f"{path} must hold `key: value` lines.")
    _check_keys(study, KEYS, str(path))
    settings, runs, seeds = study.get("settings") or {}, study.get("runs"), study.get("seeds", [0])
    require(isinstance(settings, dict), f"settings of {path} must be a mapping, got {settings!r}.")
    require(isinstance(runs, dict) and runs, f"{path} must have runs: names of lines, and what each changes.")
    are_seeds = isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)
    require(are_seeds, f"seeds of {path} must be a list of whole numbers, got {seeds!r}.")
    _check_keys(settings, SETTINGS, f"settings of {path}")
    for name, changes in runs.items():
        line = f"the line {name!r} of {path}"
        require(changes is None or isinstance(changes, dict), f"{line} must be a mapping, got {changes!r}.")
        _check_keys(changes or {}, (*SETTINGS, *BUDGETS), line)
        both = {**settings, **(changes or {})}
        require("data" in both, f"{line} has no data.")
        budgets = [values for values in (changes or {}, study) if values.keys() & set(BUDGETS)][:1]
        if both.get("method") not in UNTRAINED:
            _check_budget(budgets[0] if budgets else {}, line)
        _check_values({key: value for key, value in both.items() if key not in BUDGETS}, line)
    return {**study, "settings": settings}


def _check_keys(values: dict, known: Sequence[str], where: str) -> None:
    for key in values:
        require(key in known, f"{where} has the unknown key {key!r}.{near(str(key), known)}")


def _check_values(values: dict, line: str) -> None:
    try:
        Settings(**values)
    except ValueError as error:
        raise ValueError(f"{line}: {error}") from None


def _check_budget(values: dict, line: str) -> None:
    given = [key for key in BUDGETS if key in values]
    require(len(given) == 1, f"{line} needs seconds or steps, one of them.")
    value = values[given[0]]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
    require(is_number, f"{given[0]} of {line} must be a number above 0, got {value!r}.")


def wanted_runs(study: dict[str, Any], part: str, seeds: Iterable[int], only: list[str] | None) -> list[dict]:
    """The runs of a study, seed by seed, so that a study that is stopped early has every line."""
    lines = {name: changes or {} for name, changes in study["runs"].items() if not only or name in only}
    return [
        wanted_run(study, name, changes, part, seed)
        for place, seed in enumerate(seeds)
        for name, changes in lines.items()
        if place == 0 or changes.get("method") != "pixels"  # which are the same for every seed
    ]


def wanted_run(study: dict[str, Any], name: str, changes: dict[str, Any], part: str, seed: int) -> dict[str, Any]:
    own = {key: changes[key] for key in BUDGETS if key in changes}
    budget = own or {key: study[key] for key in BUDGETS if key in study}
    changes = {key: value for key, value in changes.items() if key not in BUDGETS}
    settings = Settings(**{**study.get("settings", {}), **changes, "seed": seed})
    if settings.method in UNTRAINED:
        budget = {}
    return {"name": name, "part": part, **budget, "settings": json.loads(json.dumps(dataclasses.asdict(settings)))}


def is_row_of(wanted: dict[str, Any], row: dict[str, Any]) -> bool:
    """A row of an older version lacks the settings that came later; they had their defaults."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Settings(data=""))))
    settings = {**defaults, **(row.get("settings") or {})}
    same = settings == wanted["settings"] and all(row.get(key) == wanted.get(key) for key in ("part", *BUDGETS))
    return same and "error" not in row


def all_rows(runs: list[dict], output_dir: Path, jobs: int, threads: int) -> list[dict]:
    """The row of each run: the one of results.jsonl, or a new one, which is written there."""
    output_dir.mkdir(parents=True, exist_ok=True)
    results = output_dir / "results.jsonl"
    known, num_damaged = read_rows(results, lambda row: isinstance(row.get("settings"), dict))
    if num_damaged:  # a process was killed while it wrote
        print(f"{results}: {num_damaged} damaged lines are dropped.", flush=True)
        write_rows(results, known)

    def row_of(wanted: dict[str, Any]) -> dict[str, Any]:
        if found := next((row for row in known if is_row_of(wanted, row)), None):
            return {**found, "name": wanted["name"]}
        row = measure(wanted, threads)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(describe(row), flush=True)
        return row

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(row_of, runs))


def finished_rows(runs: list[dict], results: Path) -> list[dict]:
    """The rows of `results` that belong to these runs, each with the name that its line has today."""
    known, _ = read_rows(results, lambda row: isinstance(row.get("settings"), dict))
    found = ((wanted, next((row for row in known if is_row_of(wanted, row)), None)) for wanted in runs)
    return [{**row, "name": wanted["name"]} for wanted, row in found if row]


def describe(row: dict[str, Any]) -> str:
    left_out = ("name", "part", "settings", "machine", "threads", *BUDGETS)
    shown = {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}
    found = ", ".join(f"{key} {value}" for key, value in shown.items() if key not in left_out)
    return f"{row['name']}, seed {row['settings']['seed']}: {found}"


# ---------------------------------------------------------------------------------------------------------- the table


def table(rows: list[dict]) -> str:
    """A line for each encoder of each line of the study: mean and standard deviation over the seeds."""
    header = ["features", "seeds", "steps", "CPU minutes", *COLUMNS]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = [row for row in rows if row["name"] == name and "error" not in row]
        for encoder in encoders_of(of_name):
            lines.append(table_line(name, encoder, of_name))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def encoders_of(rows: list[dict]) -> list[str]:
    """The prefixes of the accuracies: "" for raw pixels and a random encoder."""
    return list(dict.fromkeys(key.removesuffix("knn") for row in rows for key in row if key.endswith("knn")))


def table_line(name: str, encoder: str, rows: list[dict]) -> list[str]:
    title = f"{name}, {encoder.strip()}" if encoder.strip() in ("target", "context") else name
    minutes = [row["seconds_used"] / 60 for row in rows if "seconds_used" in row]
    steps = [row["steps_taken"] for row in rows if "steps_taken" in row]
    cells = [
        spread([row[f"{encoder}{key}"] for row in rows], digits=1 if key == "effective_rank" else 3)
        for key in COLUMNS.values()
    ]
    length = f"{statistics.mean(steps):,.0f}" if steps else ""
    return [title, str(len(rows)), length, spread(minutes, digits=1), *cells]


def spread(values: list[float], digits: int) -> str:
    """Mean, and standard deviation where there are several values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", nargs="?", type=Path)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--part", choices=("selection", "final"), default="selection")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--only", nargs="+", help="names of the lines to run")
    parser.add_argument("--seeds", type=int, nargs="+", help="the study's by default")
    parser.add_argument("--table", action="store_true", help="show the rows that are there, run nothing")
    # For the processes of runs.
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    own = parser.parse_args(words)
    if not own.run and (own.study is None or own.output_dir is None):
        parser.error("name a study and an --output_dir.")
    return own


def main(words: list[str] | None = None) -> None:
    own = parse(words)
    if own.run:
        end_with(own.parent)
        print(json.dumps({**run(json.loads(own.run)), "cpu_seconds": round(time.process_time(), 1)}))
        return
    try:
        study = read_study(own.study)
        unknown = sorted(set(own.only or ()) - study["runs"].keys())
        require(not unknown, f"{own.study} has no lines {unknown}; it has {sorted(map(str, study['runs']))}")
        runs = wanted_runs(study, own.part, own.seeds or study.get("seeds", [0]), own.only)
        if own.table:
            print(table(finished_rows(runs, own.output_dir / "results.jsonl")))
            return
        rows = all_rows(runs, own.output_dir, own.jobs, own.threads)
        write_text(own.output_dir / "table.md", f"{table(rows)}\n")
    except (ValueError, OSError) as error:
        sys.exit(f"study.py: error: {error}")
    print(f"\n{table(rows)}")
    if failed := [row for row in rows if "error" in row]:
        sys.exit(f"study.py: error: {len(failed)} of {len(rows)} runs failed; the first is {describe(failed[0])}")


if __name__ == "__main__":
    main()
