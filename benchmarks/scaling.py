# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Cost of a pretraining step and of feature extraction against image size, batch, depth, loader workers and processes.

    python benchmarks/scaling.py [--device cuda] [--sweeps image_size batch depth workers processes]

Each is swept alone, from one middle point (`BASES`). The points of a sweep take turns; figures are medians. Between
neighbours, `exponent` is how the time grows (1: in proportion to what is swept, 2: with its square) and
`flops_exponent` how the operations do; for images what is swept is the number of patches. `why` says, where it is
known, why time and what is swept are not in proportion. Loader workers read JPEG files made for this; processes are
started with torchrun, one thread each on CPUs, with the same batch per process. The last line is one JSON object.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from benchmarks.flops import embedding_flops, encoder_flops, step_flops
from benchmarks.timing import environment, quartiles, seconds_of, take_turns
from ijepa import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa.data import PretrainingBatchSampler, PretrainingImages, load_image_dataset
from ijepa.execution import choose_attention, set_matmul_precision
from ijepa.masking import MultiBlockMasking
from ijepa.memory import TokenCounts
from ijepa.optimization import build_optimizer, parameter_groups


PATCH_SIZE = 16
PREDICTOR = {"predictor_num_hidden_layers": 6}
TINY_PREDICTOR = {**PREDICTOR, "predictor_hidden_size": 192}  # not wider than the encoder
CONTEXT_SHARE = 0.35  # of the patches, what is left in the published recipe with a batch of 128
MANY_STEPS = 10**6
PROCESS_TURNS = 5

# Exponents this far from 1 are not called a proportion.
MARGIN = 0.1


@dataclass(frozen=True)
class Point:
    """One setting of everything but workers and processes."""

    size: str
    image_size: int
    batch: int
    depth: int
    precision: str  # Accelerate's name
    device_type: str

    @property
    def config(self) -> IJepaConfig:
        predictor = TINY_PREDICTOR if self.size == "tiny" else PREDICTOR
        size = {**IJEPA_SIZES[self.size], **predictor, "num_hidden_layers": self.depth}
        return IJepaConfig(**size, patch_size=PATCH_SIZE, image_size=self.image_size)

    def autocast(self):
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "bf16")


BASES = {
    "cpu": Point(size="tiny", image_size=224, batch=8, depth=12, precision="no", device_type="cpu"),
    "cuda": Point(size="base", image_size=224, batch=64, depth=12, precision="bf16", device_type="cuda"),
}
SWEEPS = {
    "cpu": {"image_size": [64, 96, 128, 176, 224, 320, 448], "batch": [1, 2, 4, 8, 16, 32], "depth": [3, 6, 12, 24]},
    "cuda": {
        "image_size": [64, 96, 128, 176, 224, 320, 448],
        "batch": [1, 4, 16, 64, 128, 256],
        "depth": [6, 12, 24, 48],
    },
}
WORKERS = [0, 1, 2, 4, 8]


# One step, one extraction


def masks(point: Point) -> tuple[torch.Tensor, torch.Tensor]:
    """With as many context patches for every batch: left alone, a larger batch would have shorter contexts."""
    num_context_tokens = max(10, round(CONTEXT_SHARE * point.config.num_patches))
    return MultiBlockMasking(point.config.grid_size, num_context_tokens=num_context_tokens).sample(point.batch, seed=0)


def build(point: Point, training: bool = True) -> IJepaForPretraining:
    attention = choose_attention(point.device_type, point.precision, training)
    with torch.device(point.device_type):
        return IJepaForPretraining._from_config(point.config, attn_implementation=attention).train()


def build_step(point: Point, wrap: Callable = lambda model: model) -> Callable[[], None]:
    """A whole optimizer step on one random batch. `wrap` makes the model one of several processes'."""
    networks = build(point)
    model = wrap(networks)
    optimizer = build_optimizer(
        parameter_groups(networks),
        name="adamw",
        learning_rate=1e-5,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        device_type=point.device_type,
    )
    pixel_values = torch.randn(point.batch, 3, point.image_size, point.image_size, device=point.device_type)
    context_indices, target_indices = (indices.to(point.device_type) for indices in masks(point))

    def step():
        with point.autocast():
            loss = model(pixel_values, context_indices, target_indices).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        networks.update_target_encoder(0.996)

    return step


def build_extraction(point: Point) -> Callable[[], None]:
    """Features of one random batch, with weights in the point's precision."""
    dtype = torch.bfloat16 if point.precision == "bf16" else torch.float32
    encoder = build(point, training=False).ijepa.to(dtype).eval()
    shape = (point.batch, 3, point.image_size, point.image_size)
    pixel_values = torch.randn(shape, device=point.device_type, dtype=dtype)

    @torch.inference_mode()
    def extract():
        encoder(pixel_values)

    return extract


def flops_of(point: Point, work: str) -> int:
    """Of a batch."""
    if work == "features":
        return point.batch * (encoder_flops(point.config, point.config.num_patches) + embedding_flops(point.config))
    contexts, targets = masks(point)
    tokens = TokenCounts(contexts.shape[2], targets.shape[2], contexts.shape[1], targets.shape[1])
    return point.batch * step_flops(point.config, tokens).total


def attention_share(point: Point) -> float:
    """Share of scores and their mix of values, whose cost grows with the square of the tokens, in an encoder."""
    config = point.config
    tokens, width = config.num_patches, config.hidden_size
    linear = 8 * tokens * width**2 + 4 * tokens * width * config.intermediate_size
    quadratic = 4 * tokens**2 * width
    return quadratic / (linear + quadratic)


# Sweeps of the model


def measure_sweep(base: Point, name: str, values: list[int], work: str, seconds: float) -> list[dict]:
    points = {value: replace(base, **{name: value}) for value in values}
    build_work = build_step if work == "step" else build_extraction
    functions = {value: build_work(point) for value, point in points.items()}
    for function in functions.values():
        seconds_of(function, base.device_type)  # warms up
    times = take_turns(functions, seconds, device_type=base.device_type)
    rows = [describe(points[value], name, value, work, times[value]) for value in values]
    for before, after in pairwise(rows):
        after.update(compare(before, after, points[after["value"]], name))
    return rows


def describe(point: Point, name: str, value: int, work: str, times: list[float]) -> dict:
    seconds, flops = quartiles(times), flops_of(point, work)
    return {
        "value": value,
        "patches": point.config.num_patches,
        "milliseconds": {key: round(1e3 * number, 2) for key, number in seconds.items()},
        "images_per_second": round(point.batch / seconds["median"], 2),
        "gflops_per_second": round(flops / seconds["median"] / 1e9, 1),
        "gflops": round(flops / 1e9, 6),
    }


def exponent(before: dict, after: dict, read: Callable[[dict], float], name: str) -> float:
    """How a figure grows with what is swept, between two neighbours."""
    swept = "patches" if name == "image_size" else "value"
    return math.log(read(after) / read(before)) / math.log(after[swept] / before[swept])


def compare(before: dict, after: dict, point: Point, name: str) -> dict:
    time_exponent = exponent(before, after, lambda row: row["milliseconds"]["median"], name)
    flops_exponent = exponent(before, after, lambda row: row["gflops"], name)
    return {
        "exponent": round(time_exponent, 2),
        "flops_exponent": round(flops_exponent, 2),
        "why": explain(time_exponent, flops_exponent, attention_share(point), name),
    }


def explain(time_exponent: float, flops_exponent: float, attention: float, name: str) -> str:
    """Why the time between two neighbours does not grow in proportion: what the operations tell, and beyond that what
    is usually the cause, not what was observed."""
    reasons = []
    if flops_exponent > 1 + MARGIN:
        reasons.append(f"more operations per patch: attention's square is {attention:.0%} of an encoder's")
    if flops_exponent < 1 - MARGIN:
        constant = "those of predictor and embedding stay" if name == "depth" else "fewer per patch: masks are rounded"
        reasons.append(f"operations grow less: {constant}")
    if time_exponent < flops_exponent - MARGIN:
        fixed = "launching" if name == "depth" else "launching; in a step also optimizer and moving average"
        reasons.append(f"more operations per second: costs that do not grow ({fixed}) weigh less")
    if time_exponent > flops_exponent + MARGIN:
        grown = "memory, launching, optimizer, moving average" if name == "depth" else "memory: caches are left"
        reasons.append(f"fewer operations per second: what is not a product of matrices grows faster ({grown})")
    return "; ".join(reasons) or "in proportion"


# Loader workers


def write_jpegs(folder: Path, count: int) -> None:
    """Smooth pictures of 500 x 375 pixels, whose files are about as large as photographs."""
    generator = np.random.default_rng(0)
    for number in range(count):
        noise = Image.fromarray(generator.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        file = io.BytesIO()
        noise.resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        (folder / f"{number:04}.jpg").write_bytes(file.getvalue())


def loader_speed(dataset, base: Point, num_workers: int, seconds: float) -> float:
    """Images per second after the first batches, which start the workers."""
    loader = DataLoader(
        PretrainingImages(dataset, base.image_size),
        batch_sampler=PretrainingBatchSampler(len(dataset), base.batch, MANY_STEPS, seed=0),
        num_workers=num_workers,
    )
    batches = iter(loader)
    for _ in range(max(1, 2 * num_workers)):
        next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += len(next(batches)["pixel_values"])
    return count / (time.perf_counter() - start)


def measure_workers(base: Point, worker_counts: list[int], seconds: float, num_images: int = 64) -> list[dict]:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "images").mkdir()
        write_jpegs(Path(folder) / "images", num_images)
        dataset = load_image_dataset(Path(folder) / "images", cache_dir=Path(folder) / "cache")
        speeds = {count: [] for count in worker_counts}
        for _ in range(3):
            for count in worker_counts:
                speeds[count].append(loader_speed(dataset, base, count, seconds / 3))
    rows = [
        {"value": count, "images_per_second": {key: round(value, 1) for key, value in quartiles(values).items()}}
        for count, values in speeds.items()
    ]
    for row in rows:
        row["why"] = explain_workers(row["value"])
    return rows


def explain_workers(num_workers: int) -> str:
    cores = len(os.sched_getaffinity(0))
    if num_workers == 0:
        return "the training process decodes itself"
    if num_workers == 1:
        return "one worker decodes, the training process takes over its batches"
    return f"more workers than the {cores} cores" if num_workers > cores else "a core for each worker"


# Processes


def measure_processes(base: Point, process_counts: list[int]) -> list[dict]:
    rows = []
    for count in process_counts:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        words += [__file__, "--process", "--device", base.device_type, "--size", base.size]
        words += ["--image_size", str(base.image_size), "--batch", str(base.batch), "--depth", str(base.depth)]
        environment_variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment_variables).stdout
        rows.append(json.loads(output.splitlines()[-1]))
    for row in rows:
        alone = rows[0]["images_per_second"]["median"] / rows[0]["value"]
        row["efficiency"] = round(row["images_per_second"]["median"] / (alone * row["value"]), 3)
        row["why"] = (
            "alone"
            if row["value"] == 1
            else "gradients are summed over the processes, which also share the memory and, on one machine, its cores"
        )
    return rows


def run_process(base: Point) -> None:
    """One of several processes, started by torchrun; the first prints the figures."""
    on_cuda = base.device_type == "cuda"
    torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    set_matmul_precision(base.device_type, base.precision)
    step = build_step(base, DistributedDataParallel)
    step()
    times = [seconds_of(step, base.device_type) for _ in range(PROCESS_TURNS)]
    count = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        speeds = quartiles([count * base.batch / value for value in times])
        print(json.dumps({"value": count, "images_per_second": {key: round(v, 2) for key, v in speeds.items()}}))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads sometimes abort the interpreter's own exit


# The command


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=[*BASES], default="cpu")
    names = ["image_size", "batch", "depth", "workers", "processes"]
    parser.add_argument("--sweeps", nargs="+", choices=names, default=names)
    parser.add_argument("--seconds", type=float, default=15, help="least time of the turns of each sweep")
    parser.add_argument("--size", choices=[*IJEPA_SIZES], help="of the model; on CPUs tiny, on GPUs base")
    parser.add_argument("--image_size", type=int, help="pixels of the middle point")
    parser.add_argument("--batch", type=int, help="images of the middle point, per process")
    parser.add_argument("--depth", type=int, help="encoder layers of the middle point")
    parser.add_argument("--processes", type=int, nargs="+", help="numbers of processes; by default 1 and 2")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def base_point(arguments: argparse.Namespace) -> Point:
    given = {name: getattr(arguments, name) for name in ("size", "image_size", "batch", "depth")}
    return replace(BASES[arguments.device], **{name: value for name, value in given.items() if value is not None})


def process_counts(arguments: argparse.Namespace) -> list[int]:
    if arguments.processes:
        return arguments.processes
    return [1, 2] if arguments.device == "cpu" or torch.cuda.device_count() > 1 else [1]


def measure(arguments: argparse.Namespace, base: Point, sweeps: dict[str, list[int]]) -> dict:
    """All sweeps asked for: name -> rows, of which model sweeps have one list for each work."""
    results = {}
    for name in arguments.sweeps:
        print(f"{name} ...", flush=True)
        if name == "workers":
            results[name] = measure_workers(base, WORKERS, arguments.seconds / len(WORKERS))
        elif name == "processes":
            results[name] = measure_processes(base, process_counts(arguments))
        else:
            results[name] = {
                work: measure_sweep(base, name, sweeps[name], work, arguments.seconds) for work in ("step", "features")
            }
        print_rows(results[name])
    return results


def print_rows(results: dict | list) -> None:
    for work, rows in results.items() if isinstance(results, dict) else [("", results)]:
        for row in rows:
            print(" ", work, row, flush=True)


def main(words: list[str] | None = None) -> None:
    arguments = parse_arguments(words)
    base = base_point(arguments)
    if arguments.process:
        run_process(base)
    precision = set_matmul_precision(base.device_type, base.precision)
    results = measure(arguments, base, SWEEPS[arguments.device])
    settings = {"base": vars(base), "float32_matmul_precision": precision}
    print(json.dumps({"benchmark": "scaling", **environment(base.device_type), **settings, "results": results}))


if __name__ == "__main__":
    main()
