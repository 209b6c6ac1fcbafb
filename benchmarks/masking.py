# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Time of `MultiBlockMasking.sample` against a straightforward loop over images, blocks and tries.

    python benchmarks/masking.py [--turns 12]

The loop follows the published rules with one torch operation at a time, as a collator is usually written. The samplers
take turns of a few batches, so that other load on the machine meets all of them; figures are medians over all batches.
`first` is the median of each turn's first batch, with the processor's caches full of another sampler's work, as after
decoding images. The last line of the output is one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from ijepa.masking import MultiBlockMasking


CASES = [((14, 14), 128), ((16, 16), 128), ((14, 14), 16), ((16, 16), 16), ((28, 28), 16)]

BATCHES_PER_TURN = 5


def random_block(grid_size, block_size):
    """One block as a (H, W) canvas of zeros and ones."""
    top, left = (int(torch.randint(side - length, (1,))) for side, length in zip(grid_size, block_size, strict=True))
    canvas = torch.zeros(grid_size, dtype=torch.int32)
    canvas[top : top + block_size[0], left : left + block_size[1]] = 1
    return canvas


def one_image(grid_size, target_size, context_size, num_targets=4, min_patches=10):
    targets = [random_block(grid_size, target_size) for _ in range(num_targets)]
    for attempt in range(20 * num_targets + 1):
        context = random_block(grid_size, context_size)
        for target in targets[: num_targets - attempt // 20]:
            context = context * (1 - target)
        indices = context.flatten().nonzero().squeeze(1)
        if len(indices) > min_patches:
            break
    return indices, [target.flatten().nonzero().squeeze(1) for target in targets]


def loop_sample(masking, batch_size, step):
    target_size, context_size = masking.block_sizes(seed=0, step=step)
    images = [one_image(masking.grid_size, target_size, context_size) for _ in range(batch_size)]
    shortest = min(len(context) for context, _ in images)
    contexts = torch.stack([context[:shortest] for context, _ in images])[:, None]
    return contexts, torch.stack([torch.stack(targets) for _, targets in images])


def microseconds(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e6


def measure(grid_size, batch_size, num_turns):
    meta, unbiased = (MultiBlockMasking(grid_size, mode=mode) for mode in ("meta", "unbiased"))
    samplers = {
        "loop": lambda step: loop_sample(meta, batch_size, step),
        "meta": lambda step: meta.sample(batch_size, seed=0, step=step),
        "unbiased": lambda step: unbiased.sample(batch_size, seed=0, step=step),
    }
    turns = {name: [] for name in samplers}
    for turn in range(num_turns + 1):
        for name, sampler in samplers.items():
            steps = range(turn * BATCHES_PER_TURN, (turn + 1) * BATCHES_PER_TURN)
            turns[name].append([microseconds(partial(sampler, step)) / batch_size for step in steps])
    return {"grid": list(grid_size), "batch": batch_size, **figures({name: turns[name][1:] for name in samplers})}


def figures(turns):
    """Microseconds per image, turn by turn -> medians and speed-ups. The warm-up turn is already dropped."""
    medians = {name: statistics.median(chain.from_iterable(values)) for name, values in turns.items()}
    firsts = {name: statistics.median(values[0] for values in turns[name]) for name in turns}
    return {
        **{f"{name}_us_per_image": round(value, 2) for name, value in medians.items()},
        **{f"{name}_first_us_per_image": round(value, 2) for name, value in firsts.items()},
        **{f"{name}_speedup": round(medians["loop"] / medians[name], 1) for name in ("meta", "unbiased")},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--turns", type=int, default=12, help=f"timed turns per case, of {BATCHES_PER_TURN} batches each"
    )
    num_turns = parser.parse_args().turns
    torch.set_num_threads(1)  # a data-loading worker has one
    results = []
    for grid_size, batch_size in CASES:
        results.append(measure(grid_size, batch_size, num_turns))
        print(results[-1], flush=True)
    environment = {"torch": torch.__version__, "numpy": np.__version__, "machine": platform.machine()}
    print(json.dumps({"benchmark": "masking", "turns": num_turns, **environment, "results": results}))


if __name__ == "__main__":
    main()
