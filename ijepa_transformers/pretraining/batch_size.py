# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What fits the GPU: the printed estimate of memory, and the number that `per_device_batch_size auto` stands for."""

import dataclasses
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from ..configuration_ijepa import IJepaConfig
from ..distributed import computing_precision, launched_mode, on_main_process, process_group_settings
from ..hub import hub_or_cache
from ..masking import Masking, build_masking
from .arguments import AUTO, PretrainingArguments
from .defaults import with_masks_for
from .memory import GIB, LESS_MEMORY, estimate_memory, format_memory_estimate, largest_batch_size
from .state import recorded_setting
from .token_counts import sampled_tokens, worst_case_tokens


def memory_estimate(arguments: PretrainingArguments) -> str:
    """What one process of this launch will need, for the largest batch that the masks can make.

    Raises:
        ValueError: if `per_device_batch_size` is auto and PyTorch sees no GPU, or nothing fits.
    """
    device_bytes = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    if arguments.per_device_batch_size == AUTO:
        size = fitting_batch_size(arguments, _smallest([device_bytes]), launched_mode()[1])
        arguments = dataclasses.replace(arguments, per_device_batch_size=size)
    config, masking, settings = _measured(arguments)
    tokens, batch_size = worst_case_tokens(masking), arguments.images_per_pass
    estimate = estimate_memory(config, tokens, batch_size, **settings)
    fits = largest_batch_size(device_bytes, config, tokens, **settings) if device_bytes else None
    text = (
        f"{settings['mode']}, {settings['num_processes']} processes, per_device_batch_size {batch_size}, at most"
        f" {tokens} per image\n\n{format_memory_estimate(estimate, device_bytes, fits)}"
    )
    likely = sampled_tokens(masking, batch_size)
    if likely == tokens:  # as with masks of fixed lengths
        return text
    met = estimate_memory(config, likely, batch_size, **settings)
    return (
        f"{text}\n\n200 sampled batches had at most {likely.context} and {tokens.num_targets} x {likely.target}"
        f" patches: {met.total / GIB:.2f} GiB. Others may have more."
    )


def _measured(arguments: PretrainingArguments) -> tuple[IJepaConfig, Masking, dict[str, Any]]:
    """The configuration, the masks and the other settings of `estimate_memory`."""
    fields = arguments.model_fields()
    if arguments.init_from:
        with hub_or_cache(arguments.init_from):
            config = IJepaConfig.from_pretrained(arguments.init_from, **fields)
    else:
        config = IJepaConfig(**fields)
    mode, num_processes = launched_mode()
    settings = {
        "precision": computing_precision(arguments.mixed_precision),
        "optimizer": arguments.optimizer,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "attention": arguments.attn_implementation or "sdpa",
        "mode": mode,
        "num_processes": num_processes,
    }
    arguments, _ = with_masks_for(arguments, config.grid_size, recorded_setting(arguments, "mask_mode"))
    return config, build_masking(config.grid_size, **arguments.mask_fields()), settings


def with_batch_size(arguments: PretrainingArguments) -> PretrainingArguments:
    """The arguments with a number in place of `per_device_batch_size` auto, the same on all processes.

    It is the number that a run to be resumed has recorded, if it suits the processes. Otherwise it is the largest that
    fits the free memory of every GPU (`fitting_batch_size`). Call it on all processes.

    Raises:
        ValueError: on all processes, if some process has no GPU or nothing fits.
    """
    if arguments.per_device_batch_size != AUTO:
        return arguments
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    processes = PartialState(on_cpu, **process_group_settings().to_kwargs())  # as `Accelerator` will, after this
    available = gather_object([free_bytes(processes.device)])

    def choose() -> int:
        recorded = recorded_setting(arguments, "per_device_batch_size")
        if recorded and arguments.batch_size % (recorded * processes.num_processes) == 0:
            print(f"per_device_batch_size auto: {recorded}, as recorded in {arguments.output_dir}")
            return recorded
        device_bytes = _smallest(available)
        size = fitting_batch_size(arguments, device_bytes, processes.num_processes)
        print(f"per_device_batch_size auto: {size}, for {device_bytes / GIB:.1f} GiB of free GPU memory")
        return size

    return dataclasses.replace(arguments, per_device_batch_size=on_main_process(processes, choose))


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a GPU; None for a device of another kind."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _smallest(device_bytes: list[int | None]) -> int:
    sizes = [size for size in device_bytes if size is not None]
    if len(sizes) < len(device_bytes):
        raise ValueError("per_device_batch_size auto needs a GPU that PyTorch can use; give a number.")
    return min(sizes)


def fitting_batch_size(arguments: PretrainingArguments, device_bytes: int, num_processes: int) -> int:
    """The largest number of images per pass and process that divides `batch_size` evenly and fits.

    Args:
        device_bytes: memory that the estimate, for the largest batch that the masks can make, must not exceed.

    Raises:
        ValueError: if `batch_size` cannot be divided among the processes, or not even one image fits.
    """
    share, rest = divmod(arguments.batch_size, num_processes)
    if rest:
        raise ValueError(f"batch_size {arguments.batch_size} is not a multiple of {num_processes} processes.")
    config, masking, settings = _measured(arguments)
    tokens = worst_case_tokens(masking)
    largest = largest_batch_size(device_bytes, config, tokens, limit=share, **settings)
    if not largest:
        need = estimate_memory(config, tokens, 1, **settings).total
        raise ValueError(
            f"per_device_batch_size auto: not even one image fits. It needs {need / GIB:.1f} GiB, and"
            f" {device_bytes / GIB:.1f} GiB are free. To need less, {LESS_MEMORY}."
        )
    return max(size for size in range(1, largest + 1) if share % size == 0)
