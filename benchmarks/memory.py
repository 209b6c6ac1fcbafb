# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Memory of pretraining at the published sizes: the estimate of `pretraining/memory.py`, and what it is compared with.

    python benchmarks/memory.py                the tables of docs/memory.md (nothing is built, no GPU needed)
    python benchmarks/memory.py --count        the estimate beside the peak of whole steps, counted on tensors without
                                               content: CPU kernels, so neither CUDA's workspaces nor its allocator
    python benchmarks/memory.py --measure      the estimate beside torch.cuda.max_memory_allocated; needs a GPU

`--sizes S/16 H/14`, `--batches 16 64` and `--mode meta` choose among the settings.
"""

import argparse
import gc
import sys
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works without installation

from ijepa_transformers import IJEPA_SIZES, IJepaConfig, IJepaForPretraining
from ijepa_transformers.masking import MultiBlockMasking
from ijepa_transformers.optimization import build_optimizer, parameter_groups
from ijepa_transformers.pretraining.memory import (
    GIB,
    TokenCounts,
    estimate_memory,
    largest_batch_size,
    parameter_counts,
    sampled_tokens,
    worst_case_tokens,
)


# name -> size, patch, image
PUBLISHED = {
    "S/16": ("small", 16, 224),
    "B/16": ("base", 16, 224),
    "L/16": ("large", 16, 224),
    "H/14": ("huge", 14, 224),
    "H/16-448": ("huge", 16, 448),
    "g/16": ("giant", 16, 224),
}

COLUMNS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "+ 8-bit": {"gradient_checkpointing": True, "optimizer": "adamw_8bit"},
    "FSDP2 x 8": {"mode": "fsdp2", "num_processes": 8},
    "ZeRO-2 x 8": {"mode": "zero2", "num_processes": 8},
    "ZeRO-3 x 8": {"mode": "zero3", "num_processes": 8},
}

MACHINES = ((1, 24), (1, 80), (8, 24), (8, 80), (64, 80))  # GPUs, GB of each
DEVICES = (16, 24, 40, 80)  # GB on the label, taken for GiB less half a GiB


def published_config(name: str) -> IJepaConfig:
    size, patch_size, image_size = PUBLISHED[name]
    return IJepaConfig(**IJEPA_SIZES[size], patch_size=patch_size, image_size=image_size)


# One step, on real or on empty tensors


def random_batch(config, tokens: TokenCounts, batch_size: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Black images and the first patches; nothing in a step's memory depends on what they are."""
    shapes = (tokens.num_contexts, tokens.context), (tokens.num_targets, tokens.target)
    pixel_values = torch.zeros(batch_size, config.num_channels, *config.image_height_and_width, device=device)
    indices = (torch.zeros(batch_size, *shape, dtype=torch.int64, device=device) for shape in shapes)
    return pixel_values, *indices


def build(config, attention: str = "sdpa", checkpointing: bool = False) -> IJepaForPretraining:
    model = IJepaForPretraining._from_config(config, attn_implementation=attention).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train_two_steps(model, optimizer, batch, precision: str):
    """Two optimizer steps of two accumulated passes each: the second step has gradients, states and activations."""
    for index in range(4):
        with torch.autocast(batch[0].device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            output = model(*batch)
        output.loss.backward()
        del output  # as in run_pretraining.py
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


class PeakOfStorages(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, from one operation to the next."""

    def __init__(self, tensors):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key, size):
        self.alive.discard(key)
        self.bytes -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result


def counted_peak(config, tokens, batch_size, precision="bf16", attention="sdpa", checkpointing=False) -> int:
    """Peak bytes of two steps with AdamW in one process, without computing them."""
    with FakeTensorMode():
        model = build(config, attention, checkpointing)
        # One tensor at a time, as fused AdamW works; the variant for many tensors would make copies of all.
        optimizer = torch.optim.AdamW(parameter_groups(model), foreach=False)
        batch = random_batch(config, tokens, batch_size)
        with PeakOfStorages([*model.parameters(), *model.buffers(), *batch]) as counter:
            train_two_steps(model, optimizer, batch, precision)
        return counter.peak


def measured_peak(config, tokens, batch_size, precision="bf16", checkpointing=False, optimizer="adamw") -> int:
    """Peak bytes that PyTorch allocates on the GPU in two steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    model = build(config, "sdpa", checkpointing).cuda()
    rates = {"learning_rate": 1e-3, "betas": (0.9, 0.999), "epsilon": 1e-8}
    optimizer = build_optimizer(parameter_groups(model), name=optimizer, device_type="cuda", **rates)
    train_two_steps(model, optimizer, random_batch(config, tokens, batch_size, "cuda"), precision)
    return torch.cuda.max_memory_allocated()


# Tables


def row(*cells) -> None:
    print("| " + " | ".join(str(cell) for cell in cells) + " |")


def head(*cells) -> None:
    row(*cells)
    row(*("---" for _ in cells))


def print_totals(names, batches, mode, tokens_of, title):
    print(f"\n{title}\n")
    head("size", "parameters", "context + target tokens", "batch", *COLUMNS)
    for name in names:
        config = published_config(name)
        counts = parameter_counts(config)
        millions = f"2 x {counts['encoder'] / 1e6:.0f} M + {counts['predictor'] / 1e6:.0f} M"
        for batch in batches:
            tokens = tokens_of(config, mode, batch)
            totals = [estimate_memory(config, tokens, batch, **settings).total / GIB for settings in COLUMNS.values()]
            row(name, millions, f"{tokens.context} + {tokens.target}", batch, *(f"{total:.1f}" for total in totals))


def print_largest_batches(names, mode):
    print("\nLargest per-device batch, bf16, worst-case tokens: plain / checkpointing / checkpointing and 8-bit\n")
    head("size", *(f"{device} GB" for device in DEVICES))
    for name in names:
        config = published_config(name)
        tokens = worst_case(config, mode, None)
        cells = []
        for device in DEVICES:
            sizes = [
                largest_batch_size(int((device - 0.5) * GIB), config, tokens, **COLUMNS[column])
                for column in ("plain", "checkpointing", "+ 8-bit")
            ]
            cells.append(" / ".join(str(size) if size else "-" for size in sizes))
        row(name, *cells)


def print_launches(names, mode):
    print("\nThe simplest launch of 2048 images per step that fits: mode, images per pass, passes per step (GiB)\n")
    head("size", *(f"{count} x {device} GB" for count, device in MACHINES))
    for name in names:
        config = published_config(name)
        tokens = worst_case(config, mode, None)
        row(name, *(simplest_launch(config, tokens, count, device) for count, device in MACHINES))


def simplest_launch(config, tokens, num_processes, device) -> str:
    """Without checkpointing before with, ddp before fsdp2, large passes before small ones."""
    modes = ["ddp", "fsdp2"] if num_processes > 1 else ["single"]
    for checkpointing in (False, True):
        for mode in modes:
            for batch in (size for size in (128, 64, 32, 16) if size * num_processes <= 2048):
                settings = {"mode": mode, "num_processes": num_processes, "gradient_checkpointing": checkpointing}
                total = estimate_memory(config, tokens, batch, **settings).total / GIB
                if total <= device - 0.5:
                    passes = 2048 // (batch * num_processes)
                    return f"{mode}{', checkpointing' * checkpointing}, {batch} x {passes} ({total:.0f})"
    return "-"


def worst_case(config, mode, batch) -> TokenCounts:
    return worst_case_tokens(MultiBlockMasking(config.grid_size, mode=mode))


def sampled(config, mode, batch) -> TokenCounts:
    return sampled_tokens(MultiBlockMasking(config.grid_size, mode=mode), batch, num_batches=200)


def print_comparison(names, batches, mode, truth, title):
    print(f"\nGiB in one process, bf16, worst-case tokens: {title}\n")
    head("size", "batch", "checkpointing", "estimate without margin", title, "ratio")
    for name in names:
        config = published_config(name)
        tokens = worst_case(config, mode, None)
        for batch in batches:
            for checkpointing in (False, True):
                estimate = estimate_memory(config, tokens, batch, gradient_checkpointing=checkpointing).allocated
                try:
                    peak = truth(config, tokens, batch, checkpointing=checkpointing)
                except torch.OutOfMemoryError:
                    row(name, batch, checkpointing, f"{estimate / GIB:.1f}", "out of memory", "")
                    continue
                cells = f"{estimate / GIB:.1f}", f"{peak / GIB:.1f}", f"{estimate / peak:.3f}"
                row(name, batch, checkpointing, *cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--mode", default="meta", choices=["unbiased", "meta"])
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--measure", action="store_true")
    arguments = parser.parse_args()
    chosen = arguments.sizes, arguments.batches, arguments.mode
    if arguments.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU that PyTorch can use.")
    if arguments.measure:
        print_comparison(*chosen, measured_peak, f"measured on {torch.cuda.get_device_name()}")
    elif arguments.count:
        print_comparison(*chosen, counted_peak, "counted")
    else:
        print_totals(*chosen, worst_case, "GiB of one process, bf16, worst-case tokens")
        print_totals(*chosen, sampled, "GiB of one process, bf16, longest of 200 sampled batches")
        print_largest_batches(arguments.sizes, arguments.mode)
        print_launches(arguments.sizes, arguments.mode)


if __name__ == "__main__":
    main()
