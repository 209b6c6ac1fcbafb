# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What one process of a pretraining needs of its GPU's memory, known before the run.

Activations are counted in dry runs of the real model (`dry_run.py`). The optimizer's states, and what a launch mode
divides among processes, follow from the sizes of the weights. The total is for the second of several accumulated
forward passes, when gradients and activations exist together. A run without accumulation stays below it.

Bytes everywhere, GiB only where a table is printed.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from ..configuration_ijepa import IJepaConfig
from .dry_run import Weights, dry_runs
from .token_counts import TokenCounts


GIB = 2**30
FLOAT32, BFLOAT16 = 4, 2  # bytes

MODES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
PRECISIONS = ("no", "bf16", "fp16")  # Accelerate's names
OPTIMIZERS = ("adamw", "adamw_8bit")

# bitsandbytes: smaller tensors keep 32-bit states; the others have one byte per state and one scale per block.
MIN_8BIT_SIZE = 4096
BLOCK_8BIT = 256

# DeepSpeed's default `reduce_bucket_size`, in numbers.
DEEPSPEED_BUCKET = 500_000_000

# Not computed: CUDA's context, workspaces of the matrix libraries, NCCL's buffers, gaps in the caching allocator.
FIXED_MARGIN = GIB
MARGIN_SHARE = 0.05


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of one process by parts, in bytes; `total` is their sum.

    Args:
        parameters: float32 weights and position tables of target encoder, context encoder and predictor.
        gradients: of context encoder and predictor, float32.
        optimizer: states of AdamW, and DeepSpeed's second copy of the weights it trains.
        activations: what the forward pass saves for the backward pass.
        autocast: low-precision copies of weights, which autocast keeps at least until the forward pass ends. There are
            none under FSDP2 with bf16, which gathers weights in bfloat16.
        working: the rest of what is alive at the fullest moment of a pass, such as the outputs and the tensors of the
            layer at work.
        batch: images and indices.
        communication: buckets of gradients, weights gathered for the layer at work. DDP's buckets are the gradients,
            so it adds nothing, unless the first two steps need more than all later ones.
        margin: a flat GiB and 5 % of the rest, for what cannot be computed. A guess.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    autocast: int
    working: int
    batch: int
    communication: int
    margin: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, entry.name) for entry in fields(self))

    @property
    def allocated(self) -> int:
        """The total without the margin: what `torch.cuda.max_memory_allocated` should be near."""
        return self.total - self.margin


def estimate_memory(
    config: IJepaConfig,
    tokens: TokenCounts,
    per_device_batch_size: int,
    precision: str = "bf16",
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    attention: str = "sdpa",
    mode: str = "single",
    num_processes: int = 1,
) -> MemoryEstimate:
    """Peak memory of one process of `run_pretraining.py`, by parts, in bytes.

    Args:
        config: an `IJepaConfig`.
        tokens: patches per context and target block, of `worst_case_tokens` or `sampled_tokens`.
        per_device_batch_size: images per process and forward pass.
        precision: of `mixed_precision`: "no" (float32), "bf16" or "fp16"; weights are float32 in any case.
        optimizer: "adamw" or "adamw_8bit".
        gradient_checkpointing: whether every layer is recomputed in the backward pass.
        attention: "eager"; every other implementation is taken for one that never holds all scores.
        mode: "single", "ddp", "fsdp2", "zero1", "zero2" or "zero3". Under ZeRO-3 DeepSpeed is taken to let go of
            gathered weights at once (its own `stage3_max_live_parameters` keeps up to 4 GB of them).
        num_processes: over which sharded parts are divided.

    Raises:
        ValueError: for an unknown name, sizes below 1, or bitsandbytes under FSDP2, which does not work.
    """
    _check_settings(per_device_batch_size, precision, optimizer, mode, num_processes)
    runs = dry_runs(config, tokens, precision, gradient_checkpointing, attention)
    counted = runs.pass_of(per_device_batch_size)
    gathers_bfloat16 = mode == "fsdp2" and precision == "bf16"
    shared = _shared_parts(runs.weights, optimizer, mode, num_processes, gathers_bfloat16)
    own = {
        "activations": counted.saved,
        "autocast": 0 if gathers_bfloat16 else counted.casts,
        "working": max(counted.forward_peak, counted.backward_peak) - counted.saved - counted.casts,
        "batch": per_device_batch_size * _image_bytes(config, tokens),
    }
    if mode == "ddp":
        in_a_pass = own["activations"] + own["autocast"] + own["working"]
        shared["communication"] = _second_gradient(shared["gradients"], shared["optimizer"], in_a_pass)
    computed = sum(shared.values()) + sum(own.values())
    return MemoryEstimate(**shared, **own, margin=FIXED_MARGIN + round(MARGIN_SHARE * computed))


def _image_bytes(config: IJepaConfig, tokens: TokenCounts) -> int:
    """Bytes of one image, as it comes and normalised to float32, and of its indices."""
    pixels = config.num_channels * math.prod(config.image_height_and_width)
    indices = tokens.num_contexts * tokens.context + math.prod(tokens.target_shape)
    return pixels * (1 + FLOAT32) + indices * torch.int64.itemsize


def optimizer_bytes(sizes: Iterable[int], optimizer: str) -> int:
    """Two states of every parameter: float32, or ("adamw_8bit") one byte each, with a float32 scale per block."""
    if optimizer == "adamw":
        return 2 * FLOAT32 * sum(sizes)
    return sum(_state_bytes_8bit(size) for size in sizes)


def _state_bytes_8bit(size: int) -> int:
    if size < MIN_8BIT_SIZE:
        return 2 * FLOAT32 * size
    return 2 * (size + FLOAT32 * -(-size // BLOCK_8BIT))


def _check_settings(batch_size: int, precision: str, optimizer: str, mode: str, num_processes: int) -> None:
    choices = (("precision", precision, PRECISIONS), ("optimizer", optimizer, OPTIMIZERS), ("mode", mode, MODES))
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
    if batch_size < 1:
        raise ValueError(f"per_device_batch_size must be at least 1, got {batch_size}.")
    if num_processes < 1 or (mode == "single" and num_processes > 1):
        raise ValueError(f"{num_processes} processes do not make mode {mode!r}.")
    if mode == "fsdp2" and optimizer == "adamw_8bit":
        raise ValueError("optimizer adamw_8bit does not work under FSDP2: bitsandbytes cannot read sharded weights.")


def _shared_parts(
    weights: Weights, optimizer: str, mode: str, num_processes: int, gathers_bfloat16: bool
) -> dict[str, int]:
    """The parts that a launch mode may divide among processes."""
    trained = sum(weights.trained)
    states = optimizer_bytes(weights.trained, optimizer)
    if mode.startswith("zero"):
        states += FLOAT32 * trained  # DeepSpeed trains a copy of the weights
    divided = {"fsdp2": "pgs", "zero1": "s", "zero2": "gs", "zero3": "pgs"}.get(mode, "")

    def part(letter: str, size: int) -> int:
        return -(-size // num_processes) if letter in divided else size

    return {
        "parameters": part("p", FLOAT32 * weights.parameters) + FLOAT32 * weights.tables,
        "gradients": part("g", FLOAT32 * trained),
        "optimizer": part("s", states),
        "communication": _communication(weights, mode, gathers_bfloat16),
    }


def _communication(weights: Weights, mode: str, gathers_bfloat16: bool) -> int:
    """Bytes of gradient buckets, or of the weights and gradients that are whole for a moment. For DDP see
    `_second_gradient`."""
    trained = sum(weights.trained)
    if mode in ("single", "ddp"):
        return 0
    if gathers_bfloat16:  # as below, but weights and gradients have two bytes, and the bucket, which is summed, four
        return BFLOAT16 * (3 * weights.layer + weights.outside) + FLOAT32 * weights.layer
    bucket = FLOAT32 * min(DEEPSPEED_BUCKET, trained) if mode.startswith("zero") else 0
    if mode in ("zero1", "zero2"):
        return bucket
    # The layer at work and the next one, the gradients of one and their bucket, and what belongs to no layer.
    return FLOAT32 * (4 * weights.layer + weights.outside) + bucket


def _second_gradient(gradients: int, optimizer: int, in_a_pass: int) -> int:
    """What DDP needs beyond one process, in bytes. Mostly nothing.

    Its buckets are the gradients themselves (`gradient_as_bucket_view`), also while they accumulate. There is a second
    copy of them twice: in the first step, before there are optimizer states, and for a moment before the second step,
    while no pass is at work.
    """
    return max(0, gradients - min(optimizer, in_a_pass))


def largest_batch_size(
    device_bytes: int, config: IJepaConfig, tokens: TokenCounts, limit: int = 4096, **settings
) -> int:
    """The largest `per_device_batch_size` up to `limit` whose total fits; 0 if one image does not.

    `settings` and errors are those of `estimate_memory`.
    """

    def total(batch_size: int) -> int:
        return estimate_memory(config, tokens, batch_size, **settings).total

    return bisect_right(range(1, limit + 1), device_bytes, key=total)


LABELS = {
    "parameters": "weights, float32",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "saved activations",
    "autocast": "low-precision weights",
    "working": "layer at work, outputs",
    "batch": "batch",
    "communication": "communication",
    "margin": "margin (a guess)",
}

LESS_MEMORY = "set gradient_checkpointing, take optimizer adamw_8bit, or shard over several GPUs with FSDP2"
ADVICE = f"Lower per_device_batch_size (accumulation makes up for it), {LESS_MEMORY}."

NOTHING_FITS = "With all else as it is, not even one image fits."


def format_memory_estimate(
    estimate: MemoryEstimate, device_bytes: int | None = None, largest: int | None = None
) -> str:
    """The parts and their total in GiB, one a line, and whether they fit into a device's memory.

    Args:
        device_bytes: memory of the device; None leaves the comparison out.
        largest: of `largest_batch_size`, named where the total does not fit.
    """
    lines = [f"{label:22} {getattr(estimate, name) / GIB:8.2f} GiB" for name, label in LABELS.items()]
    lines.append(f"{'peak of one process':22} {estimate.total / GIB:8.2f} GiB")
    if device_bytes is not None:
        lines.append(f"{'memory of the device':22} {device_bytes / GIB:8.2f} GiB")
    if device_bytes is not None and estimate.total > device_bytes:
        lines.append(f"This does not fit. {ADVICE}")
        if largest is not None:
            lines.append(f"With all else as it is, per_device_batch_size {largest} fits." if largest else NOTHING_FITS)
    return "\n".join(lines)
