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
