# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Time of `sample` of all our masks against a straightforward loop over images, blocks and tries, and lightly.

    python benchmarks/speed/masking.py [--turns 12] [--allocator keep] [--output FILE]

The loop follows the published rules with one torch operation at a time, as a collator is usually written. `lightly` is
`lightly.data.IJEPAMaskCollator` with the published settings, where lightly is installed. Both draw multi-block masks;
our modes `random` and `inverse_block` have no peer here. The samplers take turns of a few batches, so that other load
on the machine meets all of them; figures are medians over all batches. `first` is the median of each turn's first
batch, with the processor's caches full of another sampler's work, as after decoding images. All figures are given by
wall and by processor time (`cpu`). The last line of the output is one JSON object, which is added to a file too.
"""

import argparse
import importlib.util
import statistics
import sys
from functools import partial
from itertools import chain
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.timing import add_common_arguments, prepare, quartiles, report, rounded, seconds_of
from ijepa_transformers.masking import MODES, build_masking


CASES = [((14, 14), 128), ((16, 16), 128), ((14, 14), 16), ((16, 16), 16), ((28, 28), 16)]

BATCHES_PER_TURN = 5

LIGHTLY = "lightly"
LIGHTLY_DEVIATIONS = [
    "by default 2 targets of scale 0.2 to 0.8 and aspect ratio 0.3 to 3, a context of scale 0.2 to 0.8 and at least 5"
    " patches; here it is given the published settings, and then follows the published rules",
    "positions come from torch's global generator: they are no function of a seed and a step, so a resumed run or"
    " another number of workers has other masks",
    "the counter that sets the block sizes is shared by the workers of a loader, which take numbers in the order in"
    " which they happen to come; it starts again from 0 in a resumed run",
    "a call also collates the batch, here B integers",
]


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


def lightly_sampler(grid_size, batch_size):
    """Contexts and targets of B images from lightly's collator with the published settings; it counts steps itself."""
    from lightly.data import IJEPAMaskCollator  # a peer, only there when somebody installed it

    collator = IJEPAMaskCollator(
        input_size=tuple(side * 16 for side in grid_size),
        patch_size=16,
        enc_mask_scale=(0.85, 1.0),
        pred_mask_scale=(0.15, 0.2),
        aspect_ratio=(0.75, 1.5),
        nenc=1,
        npred=4,
        min_keep=10,
    )
    return lambda step: collator([0] * batch_size)[1:]


def build_samplers(grid_size, batch_size):
    """Name -> function of the step."""
    maskings = {mode: build_masking(grid_size, mode) for mode in MODES}
    samplers = {"loop": partial(loop_sample, maskings["meta"], batch_size)}
    samplers |= {mode: partial(masking.sample, batch_size, 0) for mode, masking in maskings.items()}
    if importlib.util.find_spec(LIGHTLY):
        samplers[LIGHTLY] = lightly_sampler(grid_size, batch_size)
    return samplers


def microseconds_of(function, batch_size):
    """(wall, processor) time per image."""
    return tuple(1e6 * seconds / batch_size for seconds in seconds_of(function))


def measure(grid_size, batch_size, num_turns):
    samplers = build_samplers(grid_size, batch_size)
    turns = {name: [] for name in samplers}
    for turn in range(num_turns + 1):
        for name, sampler in samplers.items():
            steps = range(turn * BATCHES_PER_TURN, (turn + 1) * BATCHES_PER_TURN)
            turns[name].append([microseconds_of(partial(sampler, step), batch_size) for step in steps])
    return {"grid": list(grid_size), "batch": batch_size, **figures({name: turns[name][1:] for name in samplers})}


def figures(turns):
    """Microseconds per image, (wall, processor), turn by turn, without the warm-up -> medians, quartiles, ratios."""
    results = {name: {} for name in turns}
    for clock, prefix, suffix in ((0, "", ""), (1, "cpu_", "_by_cpu")):
        values = {name: [[batch[clock] for batch in turn] for turn in turns[name]] for name in turns}
        medians = {name: quartiles([*chain.from_iterable(values[name])])["median"] for name in values}
        for name, median in medians.items():
            results[name] |= {
                f"{prefix}us_per_image": rounded(chain.from_iterable(values[name]), 2),
                f"{prefix}first_us_per_image": round(statistics.median(turn[0] for turn in values[name]), 2),
                f"images_per_{prefix}second": round(1e6 / median),
                **{f"times_{peer}{suffix}": round(medians[peer] / median, 1) for peer in peers(turns)},
            }
    return results


def peers(turns):
    return [name for name in ("loop", LIGHTLY) if name in turns]


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--turns", type=int, default=12, help=f"timed turns per case, of {BATCHES_PER_TURN} batches each"
    )
    add_common_arguments(parser)
    arguments = parser.parse_args(words)
    prepare(arguments)
    torch.set_num_threads(1)  # a data-loading worker has one
    results = []
    for grid_size, batch_size in CASES:
        results.append(measure(grid_size, batch_size, arguments.turns))
        print(results[-1], flush=True)
    settings = {"turns": arguments.turns, "lightly_deviations": LIGHTLY_DEVIATIONS}
    report("masking", arguments, {**settings, "results": results}, peers=(LIGHTLY,))


if __name__ == "__main__":
    main()
