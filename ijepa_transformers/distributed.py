# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What differs between one process, DDP, FSDP2 and DeepSpeed ZeRO, in one place.

The training loop is the same in every mode. Where the weights of a process are not whole, four things need help: the
moving average, the norm of the gradient, an encoder to evaluate, and saving. And where several processes run, they
must decide together: whether to stop, which checkpoint is whole, whether something has failed.

Launch mode     weights             how the loop is told (ijepa_transformers/recipes/accelerate/)
single, ddp     whole               nothing to tell
fsdp2           sharded (DTensor)   fsdp_config with fsdp_version: 2
zero1, zero2    whole               deepspeed_config with zero_stage: 1 or 2
zero3           sharded (DeepSpeed) deepspeed_config with zero_stage: 3
"""

import gc
import os
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .execution import set_matmul_precision


CPU_REMEDY = "set ACCELERATE_USE_CPU=true"
PATIENCE = timedelta(hours=2)  # that processes have with one another


@dataclass(frozen=True)
class Launch:
    """How a run was launched. Made once, in `build_accelerator`; every checkpoint records it.

    `mode` is single, ddp, fsdp2, zero1, zero2 or zero3; `precision` is no, bf16 or fp16.
    """

    mode: str
    num_processes: int
    precision: str

    @property
    def uses_deepspeed(self) -> bool:
        return self.mode.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether no process holds the weights whole."""
        return self.mode in ("fsdp2", "zero3")


# Starting
def uses_deepspeed() -> bool:
    """Whether `accelerate launch` asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def uses_fsdp() -> bool:
    """Whether `accelerate launch` asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launched_mode() -> tuple[str, int]:
    """The mode and the number of processes as the launcher's environment says, before anything is started."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if uses_deepspeed():
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", num_processes
    if uses_fsdp():
        return "fsdp2", num_processes
    return "ddp" if num_processes > 1 else "single", num_processes


def computing_precision(mixed_precision: str | None) -> str:
    """no, bf16 or fp16: what the recipe says, or else the launcher."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def deepspeed_plugin(
    per_device_batch_size: int, accumulation_steps: int, mixed_precision: str | None, max_grad_norm: float | None
) -> DeepSpeedPlugin:
    """DeepSpeed as launched, with what the recipe decides filled in.

    The weights stay float32 whatever the precision: `torch_autocast` computes in bfloat16, where DeepSpeed's own
    `bf16` would round the weights, and a moving average of rounded weights does not move. For the same reason nothing
    is communicated in low precision: under ZeRO-3 the moving average is taken on gathered weights.

    Raises:
        ValueError: if DeepSpeed is absent, or fp16 is asked for.
    """
    try:
        plugin = DeepSpeedPlugin()
    except ImportError as error:
        raise ValueError(f"The launch asks for DeepSpeed: {error}; pip install deepspeed.") from None
    config = plugin.deepspeed_config
    asked = computing_precision(mixed_precision)
    if asked == "fp16" or config.get("fp16", {}).get("enabled") is True:
        raise ValueError("DeepSpeed's fp16 keeps half-precision weights; take mixed_precision bf16 or no.")
    low_precision = asked == "bf16" or config.get("bf16", {}).get("enabled") is True
    config["bf16"], config["fp16"] = {"enabled": False}, {"enabled": False}
    if low_precision:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["train_micro_batch_size_per_gpu"] = per_device_batch_size
    config["gradient_accumulation_steps"] = accumulation_steps
    config["gradient_clipping"] = max_grad_norm or 0.0
    config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    config["zero_force_ds_cpu_optimizer"] = False  # with offloading too the recipe's optimizer is the one that runs
    return plugin


def fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP as launched, but what is computed in which precision is left to autocast, as in every other mode.

    Accelerate's own policy for bfloat16 would add up the gradients, and pass tokens from layer to layer, in bfloat16.
    The price is that weights are gathered in float32.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return plugin


def accumulation(num_steps: int) -> GradientAccumulationPlugin:
    """How gradients of several forward passes are added up. Under FSDP2 they are reduced after each of them: left for
    the last one, every process would hold whole gradients meanwhile, which is what FSDP2 is there to avoid."""
    return GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False, sync_each_batch=uses_fsdp())


def process_group_settings() -> InitProcessGroupKwargs:
    """Patience while the main process evaluates, or indexes the data, alone; and, for DeepSpeed on a machine without
    accelerators, which backend is left."""
    backend = {"backend": "gloo"} if uses_deepspeed() and not torch.accelerator.is_available() else {}
    return InitProcessGroupKwargs(timeout=PATIENCE, **backend)


def _mode_of(accelerator: Accelerator) -> str:
    """single, ddp, fsdp2, zero1, zero2 or zero3.

    Raises:
        ValueError: for FSDP version 1, which cannot take the moving average, and for what else is not in the list.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.NO:
        return "single"
    if kind == DistributedType.DEEPSPEED:
        stage = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"].get("stage", 0)
        if stage in (1, 2, 3):
            return f"zero{stage}"
        raise ValueError(f"DeepSpeed's ZeRO stage must be 1, 2 or 3, got {stage}; launch without DeepSpeed for DDP.")
    if kind == DistributedType.FSDP:
        if accelerator.is_fsdp2:
            return "fsdp2"
        raise ValueError(
            "FSDP version 1 cannot keep the moving average of a sharded encoder; set fsdp_version: 2, as in"
            " ijepa_transformers/recipes/accelerate/fsdp2.yaml."
        )
    if kind.value.startswith("MULTI_"):
        return "ddp"
    raise ValueError(f"Pretraining under {kind.value} is not supported; see docs/scale.md.")


def leave_models_whole() -> None:
    """Under ZeRO-3, Transformers would cut a model up while it is built, and draw its weights otherwise than in other
    modes. DeepSpeed cuts it up when it is prepared; call this once there is an accelerator."""
    if uses_deepspeed():
        unset_hf_deepspeed_config()


def check_launch(num_processes: int, cpu_remedy: str = CPU_REMEDY) -> None:
    """Left alone, Accelerate and Trainer take several processes on the CPU for several runs, which would collide.

    Args:
        num_processes: as many as the training library sees.
        cpu_remedy: what makes it see all of them on the CPU.

    Raises:
        ValueError: if another number was launched.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise ValueError(
            f"{launched} processes were launched, but {num_processes} would work together; on the CPU, {cpu_remedy}."
        )


def build_accelerator(
    *,
    batch_size: int,
    per_device_batch_size: int,
    mixed_precision: str | None,
    max_grad_norm: float | None,
    trackers: Sequence[str] = (),
    project_dir: str | os.PathLike | None = None,
) -> tuple[Accelerator, Launch]:
    """The accelerator, set to as many forward passes per optimizer step as the global batch needs, and its launch.

    Raises:
        ValueError: if `batch_size` cannot be divided so, or the launch mode is not supported.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % (per_device_batch_size * num_processes):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of per_device_batch_size {per_device_batch_size} x"
            f" {num_processes} processes."
        )
    steps = batch_size // (per_device_batch_size * num_processes)
    deepspeed = (
        deepspeed_plugin(per_device_batch_size, steps, mixed_precision, max_grad_norm) if uses_deepspeed() else None
    )
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else mixed_precision,
        gradient_accumulation_plugin=accumulation(steps),
        deepspeed_plugin=deepspeed,
        fsdp_plugin=fsdp_plugin() if uses_fsdp() else None,
        log_with=list(trackers) or None,
        project_dir=project_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # position tables never change
            process_group_settings(),
        ],
    )
    leave_models_whole()
    check_launch(accelerator.num_processes)
    launch = Launch(_mode_of(accelerator), accelerator.num_processes, computing_precision(mixed_precision))
    set_matmul_precision(accelerator.device.type, launch.precision)
    return accelerator, launch


# Weights that no process holds whole
def update_target_encoder(launch: Launch, networks: torch.nn.Module, momentum: float) -> None:
    """The moving average, in any mode; `networks` is the unwrapped `IJepaForPretraining`.

    The average is taken element by element, so FSDP2 takes it on each process's shards. ZeRO-3 keeps small weights
    twice, sharded and whole, so there they are gathered, piece by piece, and the first process's result counts.
    """
    gathering = _zero3_gathering if launch.mode == "zero3" else None
    networks.update_target_encoder(momentum, gathering)


def _zero3_gathering(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager:
    import deepspeed  # only where it was launched

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm of the whole gradient, the same on every process; float32 scalar. Not for DeepSpeed."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of the prepared `model` on the main process, something of no use on the others. Call it on all."""
    return dict(accelerator.get_state_dict(model) or {})


# Deciding together
def any_process(accelerator: Accelerator, condition: bool) -> bool:
    """True on all processes if it is on one. A collective call: all processes, at the same place."""
    if accelerator.num_processes == 1:
        return bool(condition)
    flag = torch.tensor(float(bool(condition)), device=accelerator.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def on_main_process(accelerator: Accelerator, function: Callable):
    """What `function` gives on the main process, on all processes; an error there is raised on all of them.

    A file system may show the processes different things for a while, and a failure of one process would leave the
    others waiting.
    """
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
        except Exception as error:  # nobody expected it, so its traceback is wanted, and it may not travel
            traceback.print_exc()
            outcome = [None, RuntimeError(f"the main process failed: {type(error).__name__}: {error}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


# Ending
def end_process_group(accelerator: Accelerator) -> None:
    """Ends the trackers and the process group; gloo workers left to the interpreter's exit abort now and then.

    The caller first drops what holds the group: models wrapped for several processes, and a Trainer. PyTorch itself
    may still hold the workers (2.13 under FSDP2, 2.15 under DDP too), but by then they are idle.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def check_same_launch(checkpoint: Path, before: Launch, launch: Launch) -> None:
    """Raises ValueError if a checkpoint cannot be continued under this launch.

    DDP and FSDP2 go on with any number of processes. The files of ZeRO belong to the processes that wrote them.
    """
    remedy = "or start a new run from the weights in output_dir with --init_from (fresh optimizer and schedules)."
    modes = {before.mode, launch.mode}
    if len(modes) > 1 and not modes <= {"single", "ddp"}:
        raise ValueError(
            f"{checkpoint} was written under {before.mode}, but this is {launch.mode}: launch it as before, {remedy}"
        )
    if launch.uses_deepspeed and before.num_processes != launch.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {before.num_processes} processes, and DeepSpeed cannot go on with"
            f" {launch.num_processes}: launch {before.num_processes} again, {remedy}"
        )
    if before.precision != launch.precision:
        raise ValueError(
            f"{checkpoint} was computed with mixed_precision {before.precision}, but this is {launch.precision}:"
            f" launch it as before, {remedy}"
        )
