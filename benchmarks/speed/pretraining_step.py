# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Speed of one whole pretraining step, side by side with other implementations:

    python benchmarks/speed/pretraining_step.py                        about 5 minutes on 2 CPU cores
    python benchmarks/speed/pretraining_step.py --device cuda          at most 8 minutes on an H100
    python benchmarks/speed/pretraining_step.py --sizes S/16 --batch 16 --precision bf16 --contenders ours reference

A step is the forward pass of context encoder, predictor and target encoder, the loss, the backward pass, AdamW and
the moving average. All contenders start from the same weights and take the same steps: masks of the published rules,
whose token counts differ from step to step. They take turns of a few steps in rotated order, so that other load on the
machine meets all of them; figures are medians and quartiles over turns. Before anything is timed, loss and gradients
of ours and of the reference are compared in float32. Rates count the operations of the plain recipe for everyone
(benchmarks/speed/flops.py). Data loading is not part of the step: images lie on the device, masks on the host.

Rates and ratios are given by wall time and by processor time (`cpu`). The last line of the output is one JSON object,
which is added to a file too (`--output`).
"""

import argparse
import gc
import importlib
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # works without installation

from benchmarks.speed.flops import step_flops
from benchmarks.speed.peers import (
    STABLE_PRETRAINING_LEFT_OUT,
    Batch,
    Contender,
    Lightly,
    Ours,
    Reference,
    automatic_execution,
)
from benchmarks.speed.timing import Seconds, add_common_arguments, quartiles, report
from benchmarks.speed.timing import prepare as prepare_process
from ijepa_transformers import IJEPA_SIZES, IJepaConfig
from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.pretraining.arguments import pretraining_arguments
from ijepa_transformers.pretraining.token_counts import TokenCounts


# name -> size, patch, image
SIZES = {
    "tiny/16": ("tiny", 16, 224),
    "S/16": ("small", 16, 224),
    "B/16": ("base", 16, 224),
    "L/16": ("large", 16, 224),
    "H/14": ("huge", 14, 224),
    "H/16-448": ("huge", 16, 448),
    "g/16": ("giant", 16, 224),
}
SMOKE = {  # to try the benchmark, not the machine
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "predictor_hidden_size": 32,
    "predictor_num_hidden_layers": 2,
    "image_size": 96,
    "patch_size": 8,
}
RECIPES = ("quickstart", "small_images", "fashion_mnist", "cifar10")  # whose models are sizes too


@dataclass(frozen=True)
class Case:
    size: str
    batch_size: int
    precision: str
    share: float = 1.0  # of the time that is left, beside the cases after it


DEFAULT_CASES = {  # the most important first: when time runs out, the last ones are dropped
    "cpu": [
        Case("S/16", 16, "fp32", 6),
        Case("S/16", 16, "bf16", 3),
        Case("tiny/16", 16, "fp32", 1),
        Case("tiny/16", 16, "bf16", 1),
        Case("B/16", 4, "bf16", 1.5),
    ],
    "cuda": [Case("L/16", 128, "bf16", 2), Case("H/14", 128, "bf16", 3), Case("B/16", 128, "bf16", 1.5)],
}
PEERS = ("lightly", "timm", "stable-pretraining")
DEFAULT_BATCH_SIZE = {"cpu": 16, "cuda": 128}
DEFAULT_PRECISIONS = {"cpu": ["fp32", "bf16"], "cuda": ["bf16"]}
DEFAULT_TURNS = {"cpu": (12, 1), "cuda": (10, 10)}  # turns, steps of each
DEFAULT_MINUTES = {"cpu": 5.0, "cuda": 8.0}

CONTENDERS = (  # in the order in which they are prepared: the ones that may be left out for want of time come last
    "ours",
    "reference",
    "lightly",
    "ours-compiled",
    "ours-highest",
    "reference-automatic",
    "lightly-automatic",
)
ESSENTIAL = ("ours", "reference")
# Of a case's time, what preparing may take before the contenders beyond the essential are left out.
PREPARING_SHARE = 0.6
LEAST_TURNS = 2
# Of loss and gradients in float32, relative. Device kernels sum in other orders, over all the layers of a large model.
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-4}


class LeftOut(Exception):
    """A contender that cannot or should not run in this case; the message says why."""


def build_config(size: str, **fields) -> IJepaConfig:
    if size == "smoke":
        return IJepaConfig(**SMOKE, **fields)
    if size in RECIPES:
        recipe = pretraining_arguments(recipe=size, data="digits", output_dir="-")
        return IJepaConfig(**recipe.model_fields(), **fields)
    name, patch_size, image_size = SIZES[size]
    return IJepaConfig(**IJEPA_SIZES[name], patch_size=patch_size, image_size=image_size, **fields)


# The steps that all contenders take


class Steps:
    """The same images with the masks of step 0, 1, ...: token counts vary as in a run."""

    def __init__(self, config: IJepaConfig, batch_size: int, device: torch.device):
        self.config, self.batch_size, self.device = config, batch_size, device
        mode = "meta" if min(config.grid_size) > 8 else "unbiased"  # blocks of smaller grids are too small for meta
        self.masking = MultiBlockMasking(config.grid_size, mode=mode)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, config.num_channels, *config.image_height_and_width)
        self.pixel_values = torch.randn(shape, generator=generator).to(device)
        self.sampled = {}

    def batch(self, number: int) -> Batch:
        if number not in self.sampled:
            indices = self.masking.sample(self.batch_size, seed=0, step=number)
            pinned = self.device.type == "cuda"
            self.sampled[number] = [index.pin_memory() if pinned else index for index in indices]
        return Batch(self.pixel_values, *self.sampled[number])

    def tokens(self, number: int) -> TokenCounts:
        _, context, target = self.batch(number)
        return TokenCounts(context.shape[2], target.shape[2], context.shape[1], target.shape[1])

    def flops(self, number: int) -> int:
        """Operations per image."""
        return step_flops(self.config, self.tokens(number)).total

    def largest(self, count: int) -> int:
        """Of the first `count` steps, the one with most work."""
        return max(range(count), key=self.flops)


# Contenders


@dataclass
class Entry:
    """A contender in a case, and what was measured of it."""

    name: str
    contender: Contender
    batch_size: int
    loss_difference: float = 0.0  # from ours, relative, in the precision of the case
    warm_up_seconds: float = math.nan
    saved_bytes: int = 0  # of activations, per image; CPU only
    peak_bytes: int = 0
    seconds_per_image: list[Seconds] = field(default_factory=list)  # of each turn
    notes: list[str] = field(default_factory=list)

    def batch(self, steps: Steps, number: int) -> Batch:
        return steps.batch(number).first(self.batch_size)


def build_contender(name: str, case: Case, config: IJepaConfig, device: torch.device, ours: Ours | None) -> Contender:
    """Raises LeftOut."""
    automatic, _ = automatic_execution(device, case.precision)
    if name == "ours":
        return Ours(config, device, case.precision)
    if name == "ours-compiled":
        description = "ours, every layer compiled with dynamic token counts"
        return Ours(config, device, case.precision, name=name, description=description, weights_of=ours, compiled=True)
    if name == "reference":
        return Reference(config, device, case.precision, ours, "highest")
    if name == "lightly":
        return Lightly(config, device, case.precision, ours, "highest")
    if case.precision != "fp32" or automatic == "highest":
        raise LeftOut(f"the automatic precision of float32 products, {automatic}, changes nothing in this case.")
    if name == "ours-highest":
        description = "ours with torch's default precision of float32 products"
        return Ours(
            config,
            device,
            case.precision,
            name=name,
            description=description,
            weights_of=ours,
            matmul_precision="highest",
        )
    peer = Lightly if name == "lightly-automatic" else Reference
    contender = peer(config, device, case.precision, ours, automatic)
    contender.name, contender.description = name, f"{peer.name} with our precision of float32 products"
    return contender


def default_contenders(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Names, and what is left out with the reason."""
    left_out = {"stable-pretraining": STABLE_PRETRAINING_LEFT_OUT}
    if device.type == "cpu":
        left_out["ours-compiled"] = (
            "compiling takes most of a CPU run's minutes; ask for it with --contenders and a longer --minutes."
        )
    try:
        importlib.import_module("lightly.models.modules")
        importlib.import_module("timm")
    except ImportError as error:
        left_out |= dict.fromkeys(("lightly", "lightly-automatic"), f"not importable here: {error}")
    return [name for name in CONTENDERS if name not in left_out], left_out


@contextmanager
def exact_float32(contender: Contender) -> Iterator[None]:
    """float32 without shortcuts, for comparing mathematics."""
    precision, matmul_precision = contender.precision, contender.matmul_precision
    allow_tf32 = torch.backends.cudnn.allow_tf32
    contender.precision, contender.matmul_precision = "fp32", "highest"
    torch.backends.cudnn.allow_tf32 = False
    try:
        with contender.settings():
            yield
    finally:
        contender.precision, contender.matmul_precision = precision, matmul_precision
        torch.backends.cudnn.allow_tf32 = allow_tf32


def loss_and_gradients(contender: Contender, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    with exact_float32(contender):
        loss = contender.loss(batch)
        loss.backward()
        gradients = contender.gradients()
        contender.optimizer.zero_grad()
        return loss.item(), gradients


def compare(ours: Contender, other: Contender, batch: Batch) -> dict:
    """Relative differences of loss and gradients from the same weights, in float32.

    Where parameters have other names and shapes, gradients are compared by their total norm.
    """
    (loss, gradients), (other_loss, other_gradients) = (loss_and_gradients(each, batch) for each in (ours, other))
    norm = torch.nn.utils.get_total_norm(gradients.values())
    if gradients.keys() == other_gradients.keys():
        error = torch.nn.utils.get_total_norm([gradients[name] - other_gradients[name] for name in gradients])
    else:
        error = (norm - torch.nn.utils.get_total_norm(other_gradients.values())).abs()
    return {"loss": abs(loss - other_loss) / abs(other_loss), "gradients": float(error / norm)}


def assert_equal(name: str, differences: dict, device: torch.device) -> None:
    if not max(differences.values()) <= TOLERANCE[device.type]:
        raise AssertionError(f"ours and {name} do not compute the same: relative differences {differences}.")


# Measuring


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def saved_for_backward(contender: Contender, batch: Batch) -> int:
    """Bytes of activations that a forward pass keeps for the backward pass, weights and images not counted."""
    kept_anyway = [*contender.networks.parameters(), batch.pixel_values]
    kept_anyway = {tensor.untyped_storage().data_ptr() for tensor in kept_anyway}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with contender.settings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = contender.loss(batch)
    total = sum(size for pointer, size in saved.items() if pointer not in kept_anyway)
    del loss
    return total


def with_smaller_batches(entry: Entry, action: Callable[[], None]) -> None:
    """Does the action; for want of device memory again with half the entry's batch, and so on.

    Raises LeftOut when not even one image fits."""
    while True:
        try:
            return action()
        except torch.OutOfMemoryError:
            pass  # outside of the handler, whose traceback keeps the activations alive
        entry.contender.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
        if entry.batch_size == 1:
            raise LeftOut("not even one image fits the device's memory.")
        entry.batch_size //= 2
        entry.seconds_per_image.clear()
        entry.notes.append(f"out of memory, so with a batch of {entry.batch_size}")
        print(f"    {entry.name}: {entry.notes[-1]}", flush=True)


def warm_up(entry: Entry, ours: Contender, steps: Steps, planned: int) -> None:
    """Steps until everything is compiled and cached: the largest planned one, then others. Also compares the loss with
    that of ours, before the weights move, and measures the memory of activations."""
    contender, device = entry.contender, entry.contender.device
    numbers = [steps.largest(planned), 0, 1] if device.type == "cuda" or "compiled" in entry.name else [0]
    started = time.perf_counter()
    few = steps.batch(0).first(2)
    entry.loss_difference = loss_now(contender, few) / loss_now(ours, few) - 1

    def action():
        with contender.settings():
            for number in numbers:
                contender.step(entry.batch(steps, number))
        synchronize(device)

    with_smaller_batches(entry, action)
    entry.warm_up_seconds = time.perf_counter() - started
    if device.type == "cpu" and "compiled" not in entry.name:
        entry.saved_bytes = saved_for_backward(contender, few) / len(few.pixel_values)


def loss_now(contender: Contender, batch: Batch) -> float:
    with contender.settings():  # and with gradients, so that layers are compiled as they are for a step
        return contender.loss(batch).item()


def take_turn(entry: Entry, steps: Steps, numbers: range) -> None:
    """A few timed steps; on a GPU after one that is not, the largest, which fills the memory allocator's cache."""
    contender, device = entry.contender, entry.contender.device
    batches = [entry.batch(steps, number) for number in numbers]
    gc.collect()
    with contender.settings():
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what the contender before used
            torch.cuda.reset_peak_memory_stats()
            contender.step(entry.batch(steps, max(numbers, key=steps.flops)))
            synchronize(device)
        started = Seconds.now()
        for batch in batches:
            contender.step(batch)
        synchronize(device)
        seconds = Seconds.now().since(started)
    entry.seconds_per_image.append(Seconds(*(each / (len(batches) * entry.batch_size) for each in seconds)))
    if device.type == "cuda":
        entry.peak_bytes = max(entry.peak_bytes, torch.cuda.max_memory_allocated())


def take_turns(
    entries: list[Entry], steps: Steps, options: "Options", deadline: float, left_out: dict[str, str]
) -> list[range]:
    """Turns in rotated order until their number or the time is reached; the step numbers of each.

    An entry that cannot go on leaves `entries`, and its reason goes to `left_out`."""
    turns, longest = [], 0.0
    while len(turns) < options.turns:
        if len(turns) >= LEAST_TURNS and time.perf_counter() + longest > deadline:
            break
        started = time.perf_counter()
        numbers = range(len(turns) * options.steps_per_turn, (len(turns) + 1) * options.steps_per_turn)
        first = len(turns) % len(entries)
        for entry in entries[first:] + entries[:first]:
            try:
                with_smaller_batches(entry, partial(take_turn, entry, steps, numbers))
            except LeftOut as reason:
                if entry.name in ESSENTIAL:
                    raise
                left_out[entry.name] = str(reason)
                entries.remove(entry)
        turns.append(numbers)
        longest = max(longest, time.perf_counter() - started)
    for entry in entries:  # turns before a batch was halved do not count
        missing = len(turns) - len(entry.seconds_per_image)
        entry.seconds_per_image = [Seconds(math.nan, math.nan)] * missing + entry.seconds_per_image
    return turns


def resident_bytes(entry: Entry, entries: list[Entry]) -> int:
    """What the other contenders keep on the device and this one does not use."""

    def storages(one):
        tensors = (tensor for tensor in one.contender.resident_tensors() if tensor.device.type == "cuda")
        return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}

    own = storages(entry)
    others = {}
    for other in entries:
        others.update(storages(other))
    return sum(size for pointer, size in others.items() if pointer not in own)


class PartTimer:
    """Milliseconds of the named parts of a step; on a GPU between device events, so without waiting in the step."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, []

    def now(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.spans.append((name, started, self.now()))

    def milliseconds(self) -> dict[str, float]:
        synchronize(self.device)
        parts = {}
        for name, start, end in self.spans:
            length = start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3
            parts[name] = parts.get(name, 0.0) + length
        inside = sum(value for name, value in parts.items() if name.endswith(" forward"))
        parts["rest of the forward pass"] = parts.pop("forward") - inside
        return parts


def breakdown(entry: Entry, steps: Steps, numbers: range) -> dict[str, float]:
    """Mean milliseconds of each part of a step."""
    timer = PartTimer(entry.contender.device)
    with entry.contender.settings():
        for number in numbers:
            entry.contender.step(entry.batch(steps, number), timer)
    return {name: round(value / len(numbers), 3) for name, value in timer.milliseconds().items()}


def profile(entry: Entry, batch: Batch, num_rows: int = 25) -> list[dict]:
    """Prints where one step's time goes, kernel by kernel, and returns the top of it."""
    device = entry.contender.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with entry.contender.settings(), torch.profiler.profile(activities=activities) as profiler:
        entry.contender.step(batch)
        synchronize(device)
    key = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    averages = profiler.key_averages()
    print(f"    profile of {entry.name}\n{averages.table(sort_by=key, row_limit=num_rows)}", flush=True)
    rows = sorted(averages, key=lambda row: getattr(row, key), reverse=True)[:num_rows]
    return [{"name": row.key, "milliseconds": round(getattr(row, key) / 1e3, 3), "calls": row.count} for row in rows]


# What the hardware can do

MATMUL_SHAPES = {  # rows, inner, columns
    "cpu": [(1024, 1024, 1024), (2048, 2048, 2048), (3136, 384, 1536), (3136, 1536, 384), (3136, 768, 3072)],
    "cuda": [(4096, 4096, 4096), (8192, 8192, 8192), (16384, 1024, 4096), (32768, 5120, 1280), (16384, 8192, 8192)],
}
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**32}
REPEATED_SECONDS = 0.5  # for each shape


def best_seconds(device: torch.device, action: Callable[[], object]) -> float:
    """The shortest of repeated calls; on a GPU of groups of calls, so that launching does not count."""
    calls = 10 if device.type == "cuda" else 1
    action()
    synchronize(device)
    shortest, until = math.inf, time.perf_counter() + REPEATED_SECONDS
    while time.perf_counter() < until or shortest == math.inf:
        started = time.perf_counter()
        for _ in range(calls):
            action()
        synchronize(device)
        shortest = min(shortest, (time.perf_counter() - started) / calls)
    return shortest


def matmul_peak(device: torch.device, precision: str, matmul_precision: str) -> dict:
    """Most operations per second of a plain matrix product, over some large shapes."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul_precision)
    rates = {}
    for rows, inner, columns in MATMUL_SHAPES[device.type]:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        result = torch.empty(rows, columns, device=device, dtype=dtype)
        seconds = best_seconds(device, lambda x=left, y=right, z=result: torch.matmul(x, y, out=z))
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / seconds
    torch.set_float32_matmul_precision(before)
    shape = max(rates, key=rates.get)
    return {"tflops": rates[shape] / 1e12, "shape": shape, "matmul_precision": matmul_precision}


def bandwidth(device: torch.device) -> dict:
    """Bytes read plus bytes written per second, in 10^9: a large copy, and a triad a = b + 2 c."""
    first, second, third = (torch.rand(COPIED_BYTES[device.type] // 4, device=device) for _ in range(3))
    copied = best_seconds(device, lambda: first.copy_(second))
    triad = best_seconds(device, lambda: torch.add(second, third, alpha=2.0, out=first))
    size = first.numel() * 4
    return {"copy_gb_per_s": 2 * size / copied / 1e9, "triad_gb_per_s": 3 * size / triad / 1e9}


class Hardware:
    """Measured peaks, each taken when first asked for."""

    def __init__(self, device: torch.device):
        self.device, self.peaks = device, {}
        self.bandwidth = bandwidth(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self, precision: str, matmul_precision: str) -> dict:
        key = (precision, matmul_precision if precision == "fp32" else "highest")
        if key not in self.peaks:
            self.peaks[key] = matmul_peak(self.device, *key)
            print(f"  matmul peak, {' '.join(key)}: {self.peaks[key]['tflops']:.3f} TFLOP/s", flush=True)
        return self.peaks[key]

    def report(self) -> dict:
        return {
            **{name: round(value, 1) for name, value in self.bandwidth.items()},
            "matmul": [
                {"precision": precision, **peak, "tflops": round(peak["tflops"], 4)}
                for (precision, _), peak in self.peaks.items()
            ],
        }


def update_bytes(ours: Ours) -> int:
    """Traffic of AdamW (reads weight, gradient and two moments, writes all but the gradient) and of the moving
    average (reads both encoders, writes one), all in float32."""
    trained = sum(p.numel() for p in ours.networks.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in ours.networks.ijepa.parameters())
    return 4 * (7 * trained + 3 * averaged)


# A case


def prepare(name, case, config, steps, options, entries, deadline) -> tuple[Entry, dict]:
    """A contender, compared with ours and warmed up. Raises LeftOut."""
    if name not in ESSENTIAL and time.perf_counter() > deadline:
        raise LeftOut("no time left to prepare it within --minutes.")
    ours = entries[0].contender if entries else None
    print(f"  preparing {name}", flush=True)
    contender = build_contender(name, case, config, options.device, ours)
    entry, differences = Entry(name, contender, case.batch_size), {}
    if ours is not None and "compiled" not in name:
        differences = compare(ours, contender, steps.batch(0).first(2))
        assert_equal(name, differences, options.device)
    warm_up(entry, ours or contender, steps, options.turns * options.steps_per_turn)
    return entry, differences


def run_case(case: Case, options: "Options", hardware: Hardware, deadline: float) -> dict:
    started = time.perf_counter()
    config = build_config(case.size)
    steps = Steps(config, case.batch_size, options.device)
    torch._dynamo.reset()  # each case compiles for itself
    entries, left_out, checks = [], {}, {}
    preparing_until = started + PREPARING_SHARE * (deadline - started)
    for name in options.contenders:
        try:
            entry, checks[name] = prepare(name, case, config, steps, options, entries, preparing_until)
            entries.append(entry)
        except LeftOut as reason:
            left_out[name] = str(reason)
        except Exception as error:  # a peer or a compiler that fails must not cost the others their figures
            if name in ESSENTIAL or isinstance(error, AssertionError):
                raise
            traceback.print_exc()
            left_out[name] = f"failed: {type(error).__name__}: {error}"[:500]
        if name in left_out:
            print(f"  {name} left out: {left_out[name]}", flush=True)
    reserve = (deadline - time.perf_counter()) * 0.1
    turns = take_turns(entries, steps, options, deadline - reserve, left_out)
    few = range(3 if options.device.type == "cuda" else 1)
    parts = {entry.name: breakdown(entry, steps, few) for entry in entries if entry.name in ("ours", "reference")}
    profiles = {}
    if options.profile:
        profiles = {e.name: profile(e, e.batch(steps, 0)) for e in entries if e.name in ("ours", "reference")}
    settings = ("highest", entries[0].contender.matmul_precision)
    peak = max((hardware.peak(case.precision, setting) for setting in settings), key=lambda peak: peak["tflops"])
    flops = [statistics.mean(map(steps.flops, numbers)) for numbers in turns]  # per image, of each turn
    result = {
        "size": case.size,
        "batch_size": case.batch_size,
        "precision": case.precision,
        "context_tokens": spread([steps.tokens(n).context for numbers in turns for n in numbers]),
        "target_tokens": spread([steps.tokens(n).target for numbers in turns for n in numbers]),
        "gflop_per_image": round(statistics.mean(flops) / 1e9, 3),
        "turns": len(turns),
        "steps_per_turn": options.steps_per_turn,
        "contenders": {e.name: figures(e, entries, flops, peak["tflops"]) for e in entries},
        "relative_differences_from_ours_in_float32": {name: value for name, value in checks.items() if value},
        "roofline": roofline(entries[0], case, statistics.mean(flops), peak, hardware),
        "milliseconds_by_part": parts,
        "profiles": profiles,
        "left_out": left_out,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print_case(result)
    return result


def spread(values: list[float], digits: int = 4) -> dict[str, float]:
    """Median, first and third quartile, of the values that are numbers."""
    found = quartiles([value for value in values if not math.isnan(value)])
    return {name: round(found[name], digits) for name in ("median", "q1", "q3")}


def figures(entry: Entry, entries: list[Entry], flops: list[float], peak_tflops: float) -> dict:
    """The row of a contender. Its ratio is time over our time, turn by turn: how many times faster ours is."""
    contender, seconds = entry.contender, entry.seconds_per_image
    tflops = [work / each.wall / 1e12 for work, each in zip(flops, seconds, strict=True)]
    pairs = list(zip(seconds, entries[0].seconds_per_image, strict=True))
    on_gpu = contender.device.type == "cuda"
    peak = entry.peak_bytes - resident_bytes(entry, entries) if on_gpu else None
    return {
        "description": contender.description,
        "attention": contender.attention,
        "matmul_precision": contender.matmul_precision,
        "batch_size": entry.batch_size,
        "notes": entry.notes,
        "deviations": list(contender.deviations),
        "images_per_second": spread([1 / each.wall for each in seconds]),
        "images_per_cpu_second": spread([1 / each.cpu for each in seconds]),
        "step_milliseconds": spread([each.wall * entry.batch_size * 1e3 for each in seconds]),
        "step_cpu_milliseconds": spread([each.cpu * entry.batch_size * 1e3 for each in seconds]),
        # Of other mathematics the operations are not the plain recipe's, so there is no rate.
        "tflops": spread(tflops),
        "mfu": spread([rate / peak_tflops for rate in tflops]),
        "ours_is_times_faster": spread([each.wall / own.wall for each, own in pairs]),
        "ours_is_times_faster_by_cpu": spread([each.cpu / own.cpu for each, own in pairs]),
        "loss_difference_from_ours": entry.loss_difference,
        "warm_up_seconds": round(entry.warm_up_seconds, 2),
        "peak_memory_gib": round(peak / 2**30, 3) if on_gpu else None,
        "saved_activations_mib_per_image": round(entry.saved_bytes / 2**20, 2) if entry.saved_bytes else None,
    }


def roofline(ours: Entry, case: Case, flops: float, peak: dict, hardware: Hardware) -> dict:
    """The least time of a step of ours on this hardware, and how far from it the measured one is."""
    products = flops * ours.batch_size / (peak["tflops"] * 1e12) * 1e3
    traffic = update_bytes(ours.contender) / (max(hardware.bandwidth.values()) * 1e9) * 1e3
    walls = [seconds.wall for seconds in ours.seconds_per_image if not math.isnan(seconds.wall)]
    measured = statistics.median(walls) * ours.batch_size * 1e3
    return {
        "matmul_peak_tflops": round(peak["tflops"], 4),
        "matmul_precision": peak["matmul_precision"],
        "products_ms": round(products, 3),
        "optimizer_and_average_gb": round(update_bytes(ours.contender) / 1e9, 4),
        "optimizer_and_average_ms": round(traffic, 3),
        "floor_ms": round(products + traffic, 3),
        "measured_ms": round(measured, 3),
        "measured_over_floor": round(measured / (products + traffic), 3),
    }


def print_case(result: dict) -> None:
    tokens = f"{result['context_tokens']['median']:.0f} + 4 x {result['target_tokens']['median']:.0f} tokens"
    print(
        f"\n{result['size']}, batch {result['batch_size']}, {result['precision']}: {tokens}, {result['turns']} turns"
    )
    print(f"{'':22}{'batch':>6}{'images/s':>10}{'quartiles':>18}{'ms':>10}{'CPU ms':>10}{'TFLOP/s':>9}", end="")
    print(f"{'MFU':>7}{'ours is':>9}{'by CPU':>9}{'warm-up':>10}")
    for name, row in result["contenders"].items():
        rate = row["images_per_second"]
        work = f"{'':16}"
        if row["tflops"]:
            work = f"{row['tflops']['median']:9.3f}{row['mfu']['median']:7.1%}"
        print(
            f"{name:22}{row['batch_size']:6d}{rate['median']:10.2f}{rate['q1']:9.2f}{rate['q3']:9.2f}"
            f"{row['step_milliseconds']['median']:10.1f}{row['step_cpu_milliseconds']['median']:10.1f}{work}"
            f"{row['ours_is_times_faster']['median']:8.2f}x{row['ours_is_times_faster_by_cpu']['median']:8.2f}x"
            f"{row['warm_up_seconds']:8.1f} s"
        )
    floor = result["roofline"]
    print(
        f"floor {floor['floor_ms']} ms = {floor['products_ms']} products + {floor['optimizer_and_average_ms']} update;"
        f" ours takes {floor['measured_over_floor']} times that"
    )
    for name, parts in result["milliseconds_by_part"].items():
        print(f"{name}: " + ", ".join(f"{part} {value:.1f} ms" for part, value in parts.items()))
    print(flush=True)


# The command


@dataclass
class Options:
    device: torch.device
    cases: list[Case]
    contenders: list[str]
    left_out: dict[str, str]
    turns: int
    steps_per_turn: int
    threads: int
    minutes: float
    profile: bool
    common: argparse.Namespace  # with `output` and `allocator`


def parse(words: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    sizes = [*SIZES, "smoke", *RECIPES]
    parser.add_argument("--sizes", nargs="+", choices=sizes, help="default: the cases of the device")
    parser.add_argument("--batch", type=int, help="images per step; default 16 on a CPU, 128 on a GPU")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, help="ours is always among them")
    parser.add_argument("--turns", type=int, help="at most so many; fewer where the time runs out")
    parser.add_argument("--steps-per-turn", type=int)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU only")
    parser.add_argument("--minutes", type=float, help="time for everything; default 5 on a CPU, 8 on a GPU")
    parser.add_argument("--profile", action="store_true", help="print the kernels of a step of ours and the reference")
    add_common_arguments(parser)
    arguments = parser.parse_args(words)
    kind, device = arguments.device, torch.device(arguments.device)
    contenders, left_out = default_contenders(device)
    if arguments.contenders:
        contenders = [name for name in CONTENDERS if name == "ours" or name in arguments.contenders]
    turns, steps_per_turn = DEFAULT_TURNS[kind]
    return Options(
        device=device,
        cases=choose_cases(kind, arguments.sizes, arguments.batch, arguments.precision),
        contenders=contenders,
        left_out={name: reason for name, reason in left_out.items() if name not in contenders},
        turns=arguments.turns or turns,
        steps_per_turn=arguments.steps_per_turn or steps_per_turn,
        threads=arguments.threads,
        minutes=arguments.minutes or DEFAULT_MINUTES[kind],
        profile=arguments.profile,
        common=arguments,
    )


def choose_cases(kind: str, sizes, batch_size, precisions) -> list[Case]:
    if sizes is None:
        cases = [case for case in DEFAULT_CASES[kind] if precisions is None or case.precision in precisions]
        return [Case(c.size, batch_size or c.batch_size, c.precision, c.share) for c in cases]
    batch_size = batch_size or DEFAULT_BATCH_SIZE[kind]
    return [
        Case(size, batch_size, precision) for size in sizes for precision in precisions or DEFAULT_PRECISIONS[kind]
    ]


def main(words: list[str] | None = None) -> None:
    ends = time.perf_counter()
    options = parse(words)
    ends += 60 * options.minutes
    prepare_process(options.common)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print("measuring bandwidth", flush=True)
    hardware = Hardware(options.device)
    results, left_out = [], dict(options.left_out)
    for number, case in enumerate(options.cases):
        now, shares = time.perf_counter(), sum(one.share for one in options.cases[number:])
        name = f"{case.size}, batch {case.batch_size}, {case.precision}"
        if results and ends - now < 0.05 * 60 * options.minutes:
            left_out[name] = "no time left within --minutes"
            print(f"{name} dropped: {left_out[name]}", flush=True)
            continue
        print(f"{name}: {(ends - now) * case.share / shares:.0f} s", flush=True)
        results.append(run_case(case, options, hardware, now + (ends - now) * case.share / shares))
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
    summary = {
        "hardware": hardware.report(),
        "masks": "published rules (mode meta), seed 0",
        "memory": "peak_memory_gib: torch.cuda.max_memory_allocated less what other contenders keep on the device"
        if options.device.type == "cuda"
        else "saved_activations_mib_per_image: tensors kept for the backward pass; torch counts no peak on a CPU",
        "cases": results,
        "left_out": left_out,
    }
    report("pretraining_step", options.common, summary, options.device.type, PEERS)


if __name__ == "__main__":
    main()
