# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Contenders in turns, medians and quartiles, and the machine they ran on: what several benchmarks share."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ijepa_transformers import IJepaConfig, IJepaForPretraining
from ijepa_transformers.execution import choose_attention
from ijepa_transformers.masking import build_masking
from ijepa_transformers.optimization import build_optimizer, parameter_groups


def take_turns(
    contenders: dict[str, Callable[[], object]], seconds: float, least_turns: int = 3, device_type: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call, contender by contender.

    Each turn calls every contender once, in an order that moves on by one, so that other load on the machine and a
    processor that grows warm meet all of them. Turns are taken until `seconds` have passed, at least `least_turns`.
    """
    names, taken = list(contenders), {name: [] for name in contenders}
    start, turn = time.perf_counter(), 0
    while turn < least_turns or time.perf_counter() - start < seconds:
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken[name].append(seconds_of(contenders[name], device_type))
        turn += 1
    return taken


def seconds_of(function: Callable[[], object], device_type: str = "cpu") -> float:
    """Of one call, until the device is done."""
    synchronize(device_type)
    start = time.perf_counter()
    function()
    synchronize(device_type)
    return time.perf_counter() - start


def synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def quartiles(values: list[float]) -> dict[str, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"q1": low, "median": middle, "q3": high}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's precision of float32 matrix products is global: each contender has its own while it works."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def environment(device_type: str = "cpu", peers: tuple[str, ...] = ()) -> dict:
    """Versions, hardware, threads, load and date, for the JSON object of a benchmark."""
    packages = ("torch", "transformers", "numpy", *peers)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device_type == "cuda" else "cpu",
    }


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    """Such as "AMD EPYC"; the architecture where the system does not tell more."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


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
    masking = build_masking(config.grid_size, **arguments.mask_fields())
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
