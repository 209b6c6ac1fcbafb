# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Does an encoder learn as much with the cheaper predictor, `predictor_attention: shared_context`?

    python benchmarks/predictor_attention.py --fashion_mnist DIRECTORY [--steps 1000] [--seeds 3]

Pretrains the recipe of each data set, with a predictor of 4 layers and for fewer steps, three times per seed: with the
published predictor, with the shared context for as many steps, and with the shared context for as long as the
published one takes. How much faster a step is, is measured first: both kinds take turns, in processor time of one
thread, which other work on the machine disturbs least. The momentum is the recipe's, made shorter as the run is, so
that the target encoder's memory is the same share of the run. DIRECTORY is what
`examples/datasets/build_fashion_mnist.py` wrote.
The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from benchmarks.learning.experiment_grid import table_cells
from benchmarks.speed.timing import environment, seconds_of
from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.execution import choose_attention, set_matmul_precision
from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.optimization import build_optimizer, parameter_groups
from ijepa_transformers.pretraining.arguments import parse_pretraining_arguments


REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = {"digits": "quickstart.yaml", "fashion_mnist": "fashion_mnist.yaml"}
CHANGES = ["--predictor_num_hidden_layers=4", "--num_workers=0", "--mixed_precision=no"]
CHANGES += ["--eval_steps=100000", "--save_steps=100000", "--max_probe_images=4000"]
KINDS = ("full", "shared_context")


def words_of(name, directory, *more):
    words = ["--recipe", str(REPOSITORY / "recipes" / RECIPES[name]), *CHANGES, *more]
    return [*words, "--data", directory] if directory else words


def seconds_per_step(words, num_turns=9, steps_per_turn=4):
    """Median processor time of a step on random pixels, one per kind of predictor, in turns."""
    steps = {}
    for kind in KINDS:
        arguments = parse_pretraining_arguments([*words, "--output_dir=unused", f"--predictor_attention={kind}"])
        steps[kind] = stepper(arguments)
    return median_seconds(steps, num_turns, steps_per_turn)


def median_seconds(steps, num_turns=9, steps_per_turn=4, device_type="cpu"):
    """Median time of each of `steps`, functions of the step's number, in turns of which the first warms up."""
    times = {kind: [] for kind in steps}
    for turn in range(num_turns + 1):
        for kind, step in steps.items():
            for number in range(turn * steps_per_turn, (turn + 1) * steps_per_turn):
                seconds = seconds_of_step(step, number, device_type)
                times[kind] += [seconds] if turn else []
    return {kind: statistics.median(values) for kind, values in times.items()}


def seconds_of_step(step, number, device_type):
    """Processor time, which other work on the machine disturbs least; on a GPU wall time, until it is done."""
    if device_type == "cuda":
        return seconds_of(lambda: step(number), device_type)
    began = time.process_time()
    step(number)
    return time.process_time() - began


def stepper(arguments, device_type="cpu", precision="no"):
    """A function that takes an optimizer step, given its number."""
    torch.manual_seed(0)
    config = IJepaConfig(**arguments.model_fields())
    model = IJepaForPretraining._from_config(config, attn_implementation=choose_attention(device_type, precision))
    model.to(device_type).train()
    optimizer = build_optimizer(
        parameter_groups(model),
        name="adamw",
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        device_type=device_type,
    )
    masking = MultiBlockMasking(config.grid_size, **arguments.mask_fields())
    size, passes = arguments.per_device_batch_size, arguments.batch_size // arguments.per_device_batch_size
    pixels = torch.randn(size, config.num_channels, *config.image_height_and_width, device=device_type)

    def step(number):
        for slot_block in range(passes):
            masks = [indices.to(device_type) for indices in masking.sample(size, 0, number, rank=slot_block)]
            with torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(pixels, *masks).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_encoder(0.99)

    return step


def pretrain(words):
    """Cells of the table that a run ends with, and the wall time in seconds."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "run_pretraining.py", *words, "--output_dir", f"{directory}/run"]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=one_thread, check=False)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return table_cells(done.stdout), seconds


def schedule(words, steps):
    """The recipe's, for fewer steps."""
    recipe = parse_pretraining_arguments([*words, "--output_dir=unused"])
    length = [f"--max_steps={steps}", f"--warmup_steps={steps // 10}"]
    if recipe.momentum_half_life is not None:  # a share of the run already
        return length
    return [*length, f"--momentum={recipe.momentum ** (recipe.max_steps / steps):.4f}"]


def compare(name, directory, steps, num_seeds):
    words = words_of(name, directory)
    seconds = seconds_per_step(words)
    speedup = seconds["full"] / seconds["shared_context"]
    contenders = {
        "full": ("full", steps),
        "shared_context, equal steps": ("shared_context", steps),
        "shared_context, equal time": ("shared_context", round(steps * speedup)),
    }
    result = {"data": name, "speedup": round(speedup, 3), "steps": {}, "runs": {}}
    for contender, (kind, length) in contenders.items():
        rows, result["steps"][contender] = [], length
        for seed in range(num_seeds):
            more = [f"--seed={seed}", f"--predictor_attention={kind}", *schedule(words, length)]
            row, wall = pretrain([*words, *more])
            rows.append({**row, "seconds": round(wall)})
            print(name, contender, seed, rows[-1], flush=True)
        result["runs"][contender] = {key: [row[key] for row in rows] for key in rows[0]}
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--fashion_mnist", help="directory of build_fashion_mnist.py")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if "fashion_mnist" in arguments.data and not arguments.fashion_mnist:
        parser.error("--fashion_mnist names the directory that examples/datasets/build_fashion_mnist.py wrote.")
    torch.set_num_threads(1)
    set_matmul_precision("cpu", "no")
    directories = {"digits": None, "fashion_mnist": arguments.fashion_mnist}
    steps, seeds = arguments.steps, arguments.seeds
    results = [compare(name, directories[name], steps, seeds) for name in arguments.data]
    print(json.dumps({"benchmark": "predictor_attention", **environment(), "results": results}))


if __name__ == "__main__":
    main()
