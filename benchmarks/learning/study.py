# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains every line of a study with several seeds and writes one table. A study that was stopped goes on.

    python benchmarks/learning/study.py STUDY.yaml --output_dir DIRECTORY
        [--part selection] [--jobs 2] [--threads 1] [--only LINE ...] [--seeds 0 1 2]

A study is a YAML file:

    seconds: 300                        of processor time for each run; or steps: 2000
    seeds: [0, 1, 2]
    settings: {data: PATH, rate: 1e-3}  of all lines: keys of `Settings` in learners.py
    runs:                               name -> what this line changes; `seconds` and `steps` too
      ours: {}
      MAE: {method: mae}

`--part selection` trains on nine tenths of the training images and judges by its other tenth. Settings are chosen so.
`--part final` trains on all training images and judges by the validation images. Tables are made so, once.

Each run is a process of its own. Its row goes to `results.jsonl` in the output directory as soon as it is there. A run
is not repeated if a row with the same settings, budget and part is there. Lines "raw pixels" and "random encoder" are
`method: pixels` and `method: random`; they train nothing. The table goes to `table.md`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.learning.images import load_parts
from benchmarks.learning.learners import Settings, build_learner, built, embedding_of
from benchmarks.learning.training import Clock, Training, judge, pixel_features
from benchmarks.speed.timing import environment
from ijepa_transformers import IJepaForPretraining
from ijepa_transformers.execution import set_matmul_precision


CACHE = Path(os.environ.get("IJEPA_STUDY_CACHE", "/tmp/ijepa_study"))
# glibc gives large blocks back to the system at once, and fetches them again in the next step. This keeps them.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**31), "MALLOC_TOP_PAD_": str(2**26)}


def run(wanted: dict) -> dict:
    settings = Settings(**wanted["settings"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    set_matmul_precision(device, "no")
    parts = load_parts(settings.data, wanted["part"], settings.stored_size, settings.num_channels, CACHE, settings.held_out_block)
    train_images, test_images = (part.to(device) for part in parts)
    torch.manual_seed(settings.seed)
    if settings.method == "pixels":
        return judge(pixel_features, train_images, test_images, settings.image_size)
    if settings.method == "random":
        born = built(IJepaForPretraining, settings.config(), device, "no").ijepa
        return judge(embedding_of(born), train_images, test_images, settings.image_size)
    learner = build_learner(settings, int(train_images.labels.max()) + 1, device)
    clock = Clock(steps=wanted.get("steps"), seconds=wanted.get("seconds"), device=device)
    row = Training(learner, settings, train_images, clock).run()
    for name, encoder in learner.encoders.items():
        found = judge(encoder(), train_images, test_images, settings.image_size)
        row |= {f"{name} {key}": value for key, value in found.items()}
    return row


def measure(wanted: dict, threads: int) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--run", json.dumps(wanted)]
    began = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **MALLOC, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    )
    row = {**wanted, "threads": threads, "wall_seconds": round(time.perf_counter() - began, 1)}
    if done.returncode:
        return {**row, "error": done.stderr.strip().splitlines()[-3:]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def wanted_runs(study: dict, part: str, seeds: list[int], only: list[str] | None) -> list[dict]:
    runs = []
    for seed in seeds:
        for name, changes in study["runs"].items():
            if only and name not in only:
                continue
            changes = dict(changes or {})
            budget = {key: changes.pop(key, None) for key in ("seconds", "steps")}
            budget = {k: v for k, v in budget.items() if v} or {k: study[k] for k in ("seconds", "steps") if k in study}
            settings = {**study.get("settings", {}), **changes, "seed": seed}
            full = json.loads(json.dumps(dataclasses.asdict(Settings(**settings))))
            if full["method"] in ("pixels", "random"):
                budget = {}
            runs.append({"name": name, "part": part, **budget, "settings": full})
    return runs


def same(wanted: dict, row: dict) -> bool:
    return "error" not in row and all(row.get(key) == value for key, value in wanted.items() if key != "name") and {k for k in ("seconds","steps") if k in wanted} <= set(row)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("study", nargs="?", type=Path)
    parser.add_argument("--output_dir", type=Path)
    parser.add_argument("--part", choices=("selection", "final"), default="selection")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    own = parser.parse_args()
    if own.run:
        print(json.dumps(run(json.loads(own.run))))
        return
    study = yaml.safe_load(own.study.read_text())
    own.output_dir.mkdir(parents=True, exist_ok=True)
    results = own.output_dir / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    runs = wanted_runs(study, own.part, own.seeds or study.get("seeds", [0]), own.only)

    def finish(wanted):
        if any(same(wanted, row) for row in rows):
            return
        row = measure(wanted, own.threads)
        with results.open("a") as file:
            file.write(json.dumps({**row, "machine": environment("cpu")}) + "\n")
        shown = {k: (round(v, 3) if isinstance(v, float) else v) for k, v in row.items() if k not in ("settings", "threads", "part", "machine")}
        print(shown, flush=True)

    with ThreadPoolExecutor(own.jobs) as pool:
        list(pool.map(finish, runs))


if __name__ == "__main__":
    main()
