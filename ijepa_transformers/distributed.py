# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The differences between one process, DDP, FSDP2 and DeepSpeed ZeRO, in one place.

The training loop is the same in every mode. If each process holds only a part of the weights, four steps need help:
the moving average, the norm of the gradient, evaluation of an encoder, and saving. If there are several processes,
they must decide together: whether to stop, which checkpoint is complete, whether something has failed.

Launch mode     weights             configuration (ijepa_transformers/recipes/accelerate/)
single, ddp     whole               none
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
from typing import Any, TypeVar, cast

import datasets
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
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
from .modeling_ijepa import IJepaForPretraining


Result = TypeVar("Result")
_CPU_REMEDY = "set ACCELERATE_USE_CPU=true"
_PROCESS_GROUP_TIMEOUT = timedelta(hours=2)  # how long processes wait for one another


@dataclass(frozen=True)
class Launch:
    """How a run was launched. Made once, in `build_accelerator`; every checkpoint records it.

    Args:
        mode: single, ddp, fsdp2, zero1, zero2 or zero3.
        num_processes: of all machines.
        precision: no, bf16 or fp16.
    """

    mode: str
    num_processes: int
    precision: str

    @property
    def uses_deepspeed(self) -> bool:
        return self.mode.startswith("zero")

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds only a part of the weights."""
        return self.mode in ("fsdp2", "zero3")

    @property
    def writes_whole_weights(self) -> bool:
        """Whether a checkpoint holds the weights whole, in the files of a model, written by the main process."""
        return self.mode in ("single", "ddp")


def uses_deepspeed() -> bool:
    """Whether `accelerate launch` asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def _uses_fsdp() -> bool:
    """Whether `accelerate launch` asked for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def launched_mode() -> tuple[str, int]:
    """The mode and the number of processes from the environment of the launcher, before anything is started."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if uses_deepspeed():
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}", num_processes
    if _uses_fsdp():
        return "fsdp2", num_processes
    return "ddp" if num_processes > 1 else "single", num_processes


def computing_precision(mixed_precision: str | None) -> str:
    """no, bf16 or fp16, from the recipe or else from the launcher."""
    return mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def _deepspeed_plugin(
    per_device_batch_size: int, accumulation_steps: int, mixed_precision: str | None, max_grad_norm: float | None
) -> DeepSpeedPlugin:
    """The settings of DeepSpeed from the launch, completed by those of the recipe.

    The weights stay float32 in every precision. `torch_autocast` computes in bfloat16; DeepSpeed's own `bf16` would
    round the weights, and a moving average of rounded weights does not move. For the same reason weights are not
    communicated in low precision: under ZeRO-3 the moving average is taken on gathered weights.

    Raises:
        ValueError: if DeepSpeed is not installed, or fp16 is asked for.
    """
    try:
        plugin = DeepSpeedPlugin()
    except ImportError as error:
        raise ValueError(f"The launch asks for DeepSpeed: {error}; pip install deepspeed.") from None
    config = plugin.deepspeed_config
    asked = computing_precision(mixed_precision)
    if asked == "fp16" or config.get("fp16", {}).get("enabled") is True:
        raise ValueError("DeepSpeed's fp16 keeps half-precision weights; use mixed_precision bf16 or no.")
    low_precision = asked == "bf16" or config.get("bf16", {}).get("enabled") is True
    config["bf16"], config["fp16"] = {"enabled": False}, {"enabled": False}
    if low_precision:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config["train_micro_batch_size_per_gpu"] = per_device_batch_size
    config["gradient_accumulation_steps"] = accumulation_steps
    config["gradient_clipping"] = max_grad_norm or 0.0
    config.setdefault("zero_optimization", {})["stage3_gather_16bit_weights_on_model_save"] = True
    config["zero_force_ds_cpu_optimizer"] = False  # the recipe's optimizer runs, also with offloading
    return plugin


def fsdp_plugin(precision: str) -> FullyShardedDataParallelPlugin:
    """The settings of FSDP from the launch, with the precision of products left to autocast, as in every other mode.

    In bfloat16 the weights are gathered in bfloat16, which halves what is sent. Autocast would round them anyway, but
    for norms and the mask token. Gradients are summed in float32, and tokens go from layer to layer in float32.
    Accelerate's own policy would do both in bfloat16.

    Args:
        precision: no, bf16 or fp16.
    """
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version == 2:
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        if precision == "bf16":
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
    return plugin


def accumulation(num_steps: int) -> GradientAccumulationPlugin:
    """How the gradients of several forward passes are summed.

    FSDP2 reduces them after each pass. If they were reduced after the last one only, every process would hold whole
    gradients until then, which FSDP2 is there to avoid.
    """
    return GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False, sync_each_batch=_uses_fsdp())


def process_group_settings() -> InitProcessGroupKwargs:
    """A long timeout, because the others wait while the main process evaluates or indexes the data. For DeepSpeed on a
    machine without accelerators also the backend."""
    if uses_deepspeed() and not torch.accelerator.is_available():
        return InitProcessGroupKwargs(backend="gloo", timeout=_PROCESS_GROUP_TIMEOUT)
    return InitProcessGroupKwargs(timeout=_PROCESS_GROUP_TIMEOUT)


def _mode_of(accelerator: Accelerator) -> str:
    """single, ddp, fsdp2, zero1, zero2 or zero3.

    Raises:
        ValueError: for FSDP version 1, which cannot take the moving average, and for every other mode.
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
    raise ValueError(f"Pretraining under {kind.value} is not supported; see docs/clusters.md.")


def _build_models_whole() -> None:
    """Makes Transformers build whole models under ZeRO-3. Call this after the accelerator is made.

    Otherwise it would divide a model among the processes while it is built, and so draw other weights than in other
    modes. DeepSpeed divides the model later, when it is prepared.
    """
    if uses_deepspeed():
        unset_hf_deepspeed_config()


def check_launch(num_processes: int, cpu_remedy: str = _CPU_REMEDY) -> None:
    """Checks that all launched processes work together.

    By default Accelerate and Trainer treat several processes on the CPU as separate runs, which would write to the
    same files.

    Args:
        num_processes: number of processes that the training library sees.
        cpu_remedy: how to make it see all processes on the CPU, for the message.

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
    """Builds the accelerator, and records how the run was launched.

    Args:
        batch_size: images per optimizer step, over all processes.
        per_device_batch_size: images per process and forward pass.
        mixed_precision: no, bf16 or fp16; None for that of the launcher.
        max_grad_norm: to which DeepSpeed clips the gradient; None for no clipping.
        trackers: names of experiment trackers.
        project_dir: for files of the trackers.

    Raises:
        ValueError: if `batch_size` is not a multiple of a forward pass of all processes, or the launch mode is not
            supported.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if batch_size % (per_device_batch_size * num_processes):
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of per_device_batch_size {per_device_batch_size} x"
            f" {num_processes} processes."
        )
    steps = batch_size // (per_device_batch_size * num_processes)
    deepspeed = (
        _deepspeed_plugin(per_device_batch_size, steps, mixed_precision, max_grad_norm) if uses_deepspeed() else None
    )
    accelerator = Accelerator(
        mixed_precision="no" if deepspeed else mixed_precision,
        gradient_accumulation_plugin=accumulation(steps),
        deepspeed_plugin=deepspeed,
        fsdp_plugin=fsdp_plugin(computing_precision(mixed_precision)) if _uses_fsdp() else None,
        log_with=list(trackers) or None,
        project_dir=project_dir,
        kwargs_handlers=[
            # Position tables never change. Gradients are averaged where they lie, without a second copy of them.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            process_group_settings(),
        ],
    )
    _build_models_whole()
    check_launch(accelerator.num_processes)
    launch = Launch(_mode_of(accelerator), accelerator.num_processes, computing_precision(mixed_precision))
    set_matmul_precision(accelerator.device.type, launch.precision)
    return accelerator, launch


def update_target_encoder(launch: Launch, networks: IJepaForPretraining, momentum: float) -> None:
    """Updates the moving average, in any mode; `networks` is the unwrapped model.

    The average is taken element by element, so under FSDP2 each process takes it on its own shards. ZeRO-3 keeps small
    weights twice, sharded and whole. So there the weights are gathered, layer by layer, and the result of the first
    process counts.
    """
    gathering = gathered_on_first_process if launch.mode == "zero3" else None
    networks.update_target_encoder(momentum, gathering)


def gathered_on_first_process(parameters: Iterable[torch.nn.Parameter]) -> AbstractContextManager:
    """ZeRO-3's weights, whole inside the block. The changes of the first process are kept."""
    import deepspeed  # installed only if it is used

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """L2 norm of the whole gradient, a float32 scalar that is the same on every process. Not for DeepSpeed."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        return cast(DTensor, norm).full_tensor()  # mypy does not narrow `norm` by itself
    return norm


def whole_weights(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of the prepared `model`, on the main process only. A collective call: all processes must call it.

    Other processes may get an empty or incomplete dictionary.
    """
    return dict(accelerator.get_state_dict(model) or {})


def norm_and_agreement(
    accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter], condition: bool
) -> tuple[float, bool]:
    """`gradient_norm`, and whether `condition` is true on any process. Waits for the device once, for both.

    A collective call. Not for DeepSpeed.
    """
    norm = gradient_norm(parameters)
    if accelerator.num_processes == 1:
        return float(norm), bool(condition)
    flag = torch.tensor(float(bool(condition)), device=norm.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    found, agreed = torch.stack([norm.float(), flag]).tolist()
    return found, bool(agreed)


def any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether `condition` is true on any process. A collective call: all processes must make it at the same place."""
    if accelerator.num_processes == 1:
        return bool(condition)
    flag = torch.tensor(float(bool(condition)), device=accelerator.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


def gathered_on_main_process(accelerator: Accelerator, value: Any) -> list[Any] | None:
    """The values of all processes, in their order, on the main process; None on the others. A collective call.

    Args:
        value: anything that can be pickled. Tensors should be on the CPU.
    """
    if accelerator.num_processes == 1:
        return [value]
    values = [None] * accelerator.num_processes if accelerator.is_main_process else None
    torch.distributed.gather_object(value, values)
    return values


def send_to_all(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> None:
    """Fills the tensors of all processes, on their devices, with those of the main process. A collective call."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)


def on_main_process(accelerator: Accelerator | PartialState, function: Callable[[], Result]) -> Result:
    """Calls `function` on the main process and returns its result on all processes.

    So all processes agree, although a file system may show them different files for a while. An error of the function
    is raised on all processes; otherwise the others would wait for ever.
    """
    outcome: list[Any] = [None, None]  # result, error
    if accelerator.is_main_process:
        try:
            outcome = [function(), None]
        except (ValueError, OSError) as error:
            outcome = [None, error]
        except Exception as error:  # unexpected, so its traceback is printed; it may be impossible to pickle
            traceback.print_exc()
            outcome = [None, RuntimeError(f"the main process failed: {type(error).__name__}: {error}")]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def shared_dataset(accelerator: Accelerator, open_dataset: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """Opens a data set on the main process, and gives its table to the others, so that a folder is listed once and all
    processes have the same order. A data set in files of `datasets` is opened by all, the main process first.

    A collective call. Errors are raised on all processes, as in `on_main_process`.
    """
    if accelerator.num_processes == 1:
        return open_dataset()
    opened: list[datasets.Dataset] = []

    def open_first() -> datasets.Dataset | None:
        opened.append(open_dataset())
        return None if opened[0].cache_files else opened[0]

    shared = on_main_process(accelerator, open_first)
    if shared is not None:
        return shared
    return opened[0] if opened else open_dataset()


def end_process_group(accelerator: Accelerator) -> None:
    """Ends the process group. Gloo workers that are still alive at exit sometimes abort the process.

    The caller must first delete everything that holds the group: models wrapped for several processes, and a Trainer.
    PyTorch itself may still hold the workers (2.13 under FSDP2, 2.15 under DDP too), but they are idle then.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def check_same_launch(checkpoint: Path, before: Launch, launch: Launch) -> None:
    """Checks that a checkpoint can be continued under this launch.

    DDP and FSDP2 can continue with any number of processes. Under ZeRO each process reads the files that it wrote, so
    their number must stay the same.

    Raises:
        ValueError: if it cannot be continued.
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
