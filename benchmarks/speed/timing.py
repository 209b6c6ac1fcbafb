# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What several benchmarks share: contenders in turns, wall and processor time, medians, the machine, the result file.

Processor time is that of all threads of this process. It gives an answer also on a machine that other programs use.
With several threads it is not the time that a user waits.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ijepa_transformers.process import keep_freed_memory


RESULTS = Path(__file__).resolve().parents[1] / "results"
NO_FILE = "-"
VARIABLES = ("OMP_", "GOMP_", "MKL_", "MALLOC_", "GLIBC_", "PYTORCH_")  # of the environment, that change speed


class Seconds(NamedTuple):
    """Of a call."""

    wall: float
    cpu: float  # processor time of all threads of this process

    @classmethod
    def now(cls) -> "Seconds":
        """On clocks that start anywhere."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: "Seconds") -> "Seconds":
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


STARTED = Seconds.now()


def take_turns(
    contenders: dict[str, Callable[[], object]], seconds: float, least_turns: int = 3, device_type: str = "cpu"
) -> dict[str, list[Seconds]]:
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


def seconds_of(function: Callable[[], object], device_type: str = "cpu") -> Seconds:
    """Of one call, until the device is done."""
    synchronize(device_type)
    start = Seconds.now()
    function()
    synchronize(device_type)
    return Seconds.now().since(start)


def synchronize(device_type: str) -> None:
    if device_type == "cuda":
        torch.cuda.synchronize()


def rounded(values: Iterable[float], digits: int) -> dict[str, float]:
    """`quartiles`, rounded."""
    return {name: round(value, digits) for name, value in quartiles([*values]).items()}


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
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
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


# The command line and the result that all benchmarks have


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """`--output` and `--allocator`."""
    parser.add_argument(
        "--output",
        default="",
        help="file that a line of JSON is added to, - for none; by default one of today in benchmarks/results",
    )
    parser.add_argument(
        "--allocator",
        choices=("system", "keep"),
        default="system",
        help="keep: glibc keeps freed memory, for all contenders, as the commands of the package let it",
    )


def prepare(arguments: argparse.Namespace) -> None:
    """Sets the allocator. Call it before anything is computed.

    Raises:
        SystemExit: where the allocator cannot be set.
    """
    if arguments.allocator == "keep" and not keep_freed_memory():
        raise SystemExit("--allocator keep needs glibc")


def report(
    name: str,
    arguments: argparse.Namespace,
    result: dict[str, Any],
    device_type: str = "cpu",
    peers: tuple[str, ...] = (),
) -> None:
    """Prints wall and processor time of this process since its imports, and as the last line one JSON object, which is
    added to the result file too.

    The object has the name, the command, the allocator, what `environment` tells, and the result.
    """
    taken, children = Seconds.now().since(STARTED), resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {
        "wall": round(taken.wall, 2),
        "cpu": round(taken.cpu, 2),
        "cpu_of_ended_children": round(children.ru_utime + children.ru_stime, 2),
    }
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    line = {"benchmark": name, "command": " ".join(words), "allocator": arguments.allocator}
    text = json.dumps({**line, "process_seconds": seconds, **environment(device_type, peers), **result})
    print(
        f"{seconds['wall']} s, {seconds['cpu']} s of processor time, {seconds['cpu_of_ended_children']} s of that of"
        " ended child processes"
    )
    if arguments.output != NO_FILE:
        date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
        path = Path(arguments.output or RESULTS / f"{name}_{device_type}_{date}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
        print(f"added to {path}")
    print(text, flush=True)
