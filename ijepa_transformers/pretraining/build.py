# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Builds a pretraining run from its arguments. Nothing is written yet."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import BaseImageProcessor, BitImageProcessorPil

from ..arguments import require
from ..configuration_ijepa import IJepaConfig
from ..data.bit_depth import setting_of
from ..data.decoding import jpeg_decoder
from ..data.notices import counted
from ..data.sources import opened_once
from ..data.transforms import build_image_processor
from ..distributed import Launch, build_accelerator, check_same_launch, on_main_process
from ..encoders import load_pretraining_model, load_processor, opening_model
from ..evaluation.probes import format_table
from ..execution import choose_attention, computation_of, describe, products_on_gpu, require_compiler, threads_of_step
from ..files import check_output_directory, refuse_among_images, refuse_other_files
from ..mask_arguments import without_removed_keys
from ..masking import Masking, MultiBlockMasking, build_masking
from ..modeling_ijepa import IJepaForPretraining
from ..optimization import Schedules, build_optimizer, half_life_of_momentum, momentum_of_half_life, parameter_groups
from ..preemption import StopRequest
from ..verdict import Spread, Verdict
from .arguments import AUTO, PretrainingArguments
from .batch_size import with_batch_size
from .batches import IndexedData, StreamedData, open_batches
from .checkpointing import CheckpointWriter, DirectoryLock, checkpoint_step, newest_checkpoint
from .collapse_monitor import CollapseMonitor
from .defaults import half_life_steps, with_masks_for
from .evaluate import Probe, unused_labels, with_available_split
from .finished import STATUS_FILE
from .sanity import Plan, plan_of
from .state import check_known_settings, note_on_version, read_state, recorded_setting


@dataclass
class Run:
    """Everything the training loop needs, built by `build_run`."""

    arguments: PretrainingArguments
    accelerator: Accelerator
    launch: Launch
    stop: StopRequest
    lock: DirectoryLock
    config: IJepaConfig
    processor: BitImageProcessorPil
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    masking: Masking
    data: IndexedData | StreamedData
    loader: DataLoader
    probe: Probe | None
    monitor: CollapseMonitor
    checkpoint: Path | None  # to resume from
    checkpoints: CheckpointWriter
    metrics: list[dict[str, Any]] = field(default_factory=list)  # the rows of metrics.jsonl
    baseline: dict[str, float] = field(default_factory=dict)  # the k-NN accuracy of a random encoder
    notes: list[str] = field(default_factory=list)  # what was decided for the user, in sentences
    spread: Spread | None = None  # of the features at the end, on the main process
    random_spread: Spread | None = None  # of the random encoder, for the same images
    rows: list[dict[str, str | float]] | None = None  # of the final table of accuracies, on the main process
    verdict: Verdict | None = None  # at the end, on the main process
    skipped_steps: int = 0
    unused_labels: str = ""  # that labels could judge the run, in sentences

    @property
    def networks(self) -> IJepaForPretraining:
        """The model without the wrapper of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def num_threads(self) -> int:
        """Of this process, for a step."""
        num_values = self.arguments.images_per_pass * self.config.num_patches * self.config.hidden_size
        return threads_of_step(self.accelerator.device.type, num_values)

    @property
    def plan(self) -> Plan:
        """What the run is going to do, for the check of its length."""
        config = self.config
        return plan_of(self.arguments, self.data.num_images, config.image_height_and_width, config.num_channels)

    @property
    def results(self) -> str | None:
        """The final table of accuracies for people, on the main process."""
        return format_table(self.rows) if self.rows else None

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def first_step(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


def _find_checkpoint(arguments: PretrainingArguments, launch: Launch, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from. None for a run that starts at step 0.

    Raises:
        ValueError: if the directory cannot be written to or lies among the images, if it already holds a run and
            `resume` is not set, if it holds other files or a model without a checkpoint, if all checkpoints are
            damaged, or if the checkpoint was written with other settings, under another launch mode, or by a version
            of this package that it cannot be resumed from.
    """
    output_dir = Path(arguments.output_dir)
    check_output_directory(output_dir)
    for data in (arguments.data, arguments.validation_data):
        refuse_among_images(output_dir, data)
    if not arguments.resume:
        if (output_dir / "metrics.jsonl").exists() or any(output_dir.glob("checkpoints/step-*")):
            raise ValueError(f"{output_dir} already holds a run: --resume continues it, or choose another output_dir.")
        _refuse_model(output_dir, "")
        refuse_other_files(output_dir, [STATUS_FILE])
        return None
    checkpoint = newest_checkpoint(output_dir / "checkpoints", report)
    if checkpoint is None:
        _refuse_model(output_dir, ", but no checkpoint to resume from")
        refuse_other_files(output_dir, [STATUS_FILE, "metrics.jsonl", "checkpoints/step-*"])
        anew = ", and metrics.jsonl begins anew" if (output_dir / "metrics.jsonl").exists() else ""
        report(f"{output_dir} holds no complete checkpoint to resume from: the run starts at step 0{anew}.")
        return None
    state = read_state(checkpoint)
    if note := note_on_version(state, checkpoint):
        report(note)
    before = without_removed_keys(state["arguments"], str(checkpoint))
    check_known_settings(before, {entry.name for entry in dataclasses.fields(arguments)}, state)
    differences = arguments.differences(before) and arguments.differences(_with_found(before, arguments, checkpoint))
    if differences:
        recipe = output_dir / "recipe.yaml"
        place = f" (--recipe {recipe} has them)" if recipe.exists() else ""
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(differences)}). Repeat them to resume"
            f"{place}, or start a new run from its weights with --init_from."
        )
    check_same_launch(checkpoint, Launch(**state["launch"]), launch)
    return checkpoint


def _with_found(before: dict[str, Any], arguments: PretrainingArguments, checkpoint: Path) -> dict[str, Any]:
    """The settings of a run to resume, with what it has found (`with_found_values`) where the arguments give the same,
    as its recipe.yaml does."""
    processor = load_processor(str(checkpoint))
    found: dict[str, Any] = {name: list(getattr(processor, name)) for name in ("image_mean", "image_std")}
    found["sixteen_bit_max"] = setting_of(processor)
    same = {name: value for name, value in found.items() if getattr(arguments, name) == value}
    return {**before, **{name: value for name, value in same.items() if before.get(name) is None}}


def _refuse_model(output_dir: Path, what_lacks: str) -> None:
    """Raises ValueError if a run that starts at step 0 would replace a model."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    model = next((name for name in names if (output_dir / name).exists()), None)
    require(
        model is None,
        f"{output_dir} holds a model ({model}){what_lacks}. A new run would replace it: choose another output_dir."
        " --init_from starts from the weights of a model.",
    )


def _build_config(arguments: PretrainingArguments, checkpoint: Path | None) -> IJepaConfig:
    """The configuration of the checkpoint to resume, of `init_from`, or of the recipe."""
    source = checkpoint or arguments.init_from
    fields = {} if checkpoint else arguments.model_fields()
    if not source:
        return IJepaConfig(**fields)
    with opening_model(str(source)):
        return IJepaConfig.from_pretrained(source, **fields)


def _base_processor(arguments: PretrainingArguments, checkpoint: Path | None) -> BaseImageProcessor | None:
    """The image processor that belongs to the weights of `init_from`; None without `init_from`.

    Raises:
        ValueError: if there is none, and image_mean or image_std are not given.
    """
    if not arguments.init_from:
        return None
    try:
        return load_processor(str(checkpoint or arguments.init_from))
    except ValueError as error:
        given = arguments.image_mean and arguments.image_std
        require(given, f"{error} Give image_mean and image_std, with which the weights of init_from were trained.")
        return None


def _with_masks(arguments: PretrainingArguments) -> tuple[PretrainingArguments, str]:
    """The arguments without `mask_mode` auto, and why; see `with_masks_for`."""
    if arguments.mask_mode != AUTO:
        return arguments, ""
    recorded = recorded_setting(arguments, "mask_mode")
    return with_masks_for(arguments, _build_config(arguments, None).grid_size, recorded)


def _attention(arguments: PretrainingArguments, device_type: str, precision: str) -> str:
    """The attention that was asked for, else the fastest one."""
    wanted = arguments.attn_implementation
    require(
        device_type != "cpu" or wanted in (None, "sdpa", "eager"),
        f"attn_implementation {wanted} cannot train on a CPU: choose sdpa or eager, or leave it out.",
    )
    return wanted or choose_attention(device_type, precision)


def _build_model(
    arguments: PretrainingArguments, config: IJepaConfig, attention: str, checkpoint: Path | None
) -> IJepaForPretraining:
    """A model with fresh weights or those of `init_from`. The weights of a checkpoint are loaded later."""
    if arguments.init_from and not checkpoint:
        return load_pretraining_model(arguments.init_from, config=config, attn_implementation=attention)
    return IJepaForPretraining._from_config(config, attn_implementation=attention)


def _start_momentum(arguments: PretrainingArguments, total_steps: int) -> float:
    """The given momentum, or the one with the given half-life, or the published one."""
    if arguments.momentum_half_life is not None:
        return momentum_of_half_life(half_life_steps(arguments.momentum_half_life, total_steps))
    return Schedules.start_momentum if arguments.momentum is None else arguments.momentum


def _build_schedules(arguments: PretrainingArguments, steps_per_epoch: int) -> Schedules:
    total_steps = arguments.total_steps(steps_per_epoch)
    return Schedules(
        total_steps=total_steps,
        warmup_steps=arguments.total_warmup_steps(steps_per_epoch),
        start_learning_rate=arguments.start_learning_rate,
        peak_learning_rate=arguments.learning_rate,
        final_learning_rate=arguments.final_learning_rate,
        start_weight_decay=arguments.weight_decay,
        final_weight_decay=arguments.final_weight_decay,
        start_momentum=_start_momentum(arguments, total_steps),
        final_momentum=arguments.final_momentum,
    )


def _prepare_networks(
    arguments: PretrainingArguments, accelerator: Accelerator, model: IJepaForPretraining
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, wrapped for the launch mode."""
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.compile_layers:
        require_compiler(accelerator.device.type)
        model.compile()
    optimizer = build_optimizer(
        parameter_groups(model),
        name=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        epsilon=arguments.adam_epsilon,
        device_type=accelerator.device.type,
    )
    return accelerator.prepare(model, optimizer)


def _accelerate(arguments: PretrainingArguments) -> tuple[Accelerator, Launch]:
    accelerator, launch = build_accelerator(
        batch_size=arguments.batch_size,
        per_device_batch_size=arguments.images_per_pass,
        mixed_precision=arguments.mixed_precision,
        max_grad_norm=arguments.max_grad_norm,
        trackers=arguments.trackers,
        project_dir=arguments.output_dir,
    )
    if launch.mode == "fsdp2" and arguments.optimizer == "adamw_8bit":
        raise ValueError("optimizer adamw_8bit does not work under FSDP2: bitsandbytes cannot read sharded weights.")
    return accelerator, launch


def _build_processor(
    arguments: PretrainingArguments, config: IJepaConfig, base: BaseImageProcessor | None, sixteen_bit_max: int | None
) -> BitImageProcessorPil:
    """The image processor that the model directory gets; `base` is that of the weights it starts from.

    Raises:
        ValueError: if mean or standard deviation are not one number for each channel.
    """
    processor = build_image_processor(
        config.image_height_and_width,
        config.num_channels,
        arguments.image_mean or getattr(base, "image_mean", None),
        arguments.image_std or getattr(base, "image_std", None),
        arguments.eval_resize_ratio,
        sixteen_bit_max,
    )
    for name in ("image_mean", "image_std"):
        values = list(getattr(processor, name))
        require(
            len(values) == config.num_channels,
            f"{name} must be a number for each of the {counted(config.num_channels, 'channel')}, got {values}.",
        )
    return processor


@opened_once()
def build_run(arguments: PretrainingArguments, lock: DirectoryLock, stop: StopRequest) -> Run:
    """Opens the data, finds the checkpoint to resume, and builds all that is trained.

    Raises:
        ValueError, OSError: if the arguments cannot work with the data, the output directory or the launch mode.
    """
    arguments, why = _with_masks(arguments)
    arguments = with_batch_size(arguments)
    accelerator, launch = _accelerate(arguments)
    attention = _attention(arguments, accelerator.device.type, launch.precision)
    on_main_process(accelerator, lock.take_if_there)
    checkpoint = on_main_process(accelerator, lambda: _find_checkpoint(arguments, launch, accelerator.print))
    config = _build_config(arguments, checkpoint)
    base = _base_processor(arguments, checkpoint)
    data = open_batches(arguments, config, accelerator, checkpoint, setting_of(base) if base else None)
    arguments = with_available_split(arguments, accelerator)
    labels = unused_labels(arguments, accelerator)
    schedules = _build_schedules(arguments, data.num_images // arguments.batch_size)
    set_seed(arguments.seed)
    model = _build_model(arguments, config, attention, checkpoint)
    masking = build_masking(config.grid_size, **arguments.mask_fields())
    processor = _build_processor(arguments, config, base, data.sixteen_bit_max)
    probe = Probe(arguments, config, processor, accelerator, stop) if arguments.validation_split else None
    prepared_model, optimizer = _prepare_networks(arguments, accelerator, model)
    loader = data.loader(masking, schedules.total_steps, checkpoint_step(checkpoint) if checkpoint else 0)
    on_gpu = products_on_gpu(accelerator.device.type, launch.precision)
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        launch=launch,
        stop=stop,
        lock=lock,
        config=config,
        processor=processor,
        model=prepared_model,
        optimizer=optimizer,
        schedules=schedules,
        masking=masking,
        data=data,
        loader=loader,
        probe=probe,
        monitor=CollapseMonitor(),
        checkpoint=checkpoint,
        checkpoints=CheckpointWriter(
            accelerator,
            Path(arguments.output_dir) / "checkpoints",
            arguments.keep_checkpoints,
            in_background=arguments.async_checkpoints and launch.writes_whole_weights,
        ),
        notes=[*filter(None, [why, _half_life(arguments, schedules), on_gpu, labels]), *data.notes],
        unused_labels=labels,
    )


TARGET_TEXTS = {
    "layer": "layer-normalised, as released",
    "batch": "each feature normalised over the patches of {} images",
    "none": "as the target encoder gives them",
}


def summarize(run: Run) -> dict[str, str]:
    """The effective settings of a run, for the terminal and the model card."""
    arguments, config = run.arguments, run.config
    judged = f"; k-NN on split {arguments.validation_split}" if arguments.validation_split else ""
    return {
        "data": f"{arguments.data} ({counted(run.data.num_images, 'image')}, split {arguments.train_split}{judged})",
        **_summarize_schedules(run),
        "batch": _summarize_batch(run),
        "images": f"{config.image_size} pixels, patches of {config.patch_size}, grid {config.grid_size}",
        "decoding": f"JPEG by {jpeg_decoder()}{_summarize_bits(run.data.sixteen_bit_max)}",
        "masks": _summarize_masks(run),
        "targets": TARGET_TEXTS[config.target_normalization].format(arguments.images_per_pass)
        + _summarize_mean(config),
        "encoder": f"{_millions(run.networks.ijepa)}, {config.num_hidden_layers} layers of {config.hidden_size}",
        "predictor": f"{_millions(run.networks.predictor)}, {config.predictor_num_hidden_layers} layers of"
        f" {config.predictor_hidden_size}",
        "computation": f"{run.accelerator.device.type}, {run.launch.mode}, mixed precision {run.launch.precision},"
        f" {describe(run.networks)}",
    }


def _summarize_batch(run: Run) -> str:
    """How the images of a step are divided, if they are."""
    images, per_pass = counted(run.arguments.batch_size, "image"), run.arguments.images_per_pass
    if per_pass == run.arguments.batch_size:
        return images
    processes = counted(run.launch.num_processes, "process")
    passes = counted(run.accelerator.gradient_accumulation_steps, "accumulation step")
    return f"{images} = {per_pass} per pass x {processes} x {passes}"


def short_computation(run: Run) -> str:
    """Device, and launch mode and precision where they are not the simplest."""
    launch = run.launch
    return computation_of(run.accelerator.device.type, launch.num_processes, launch.precision, launch.mode)


def _summarize_schedules(run: Run) -> dict[str, str]:
    schedules, batch_size, num_images = run.schedules, run.arguments.batch_size, run.data.num_images
    return {
        "length": f"{counted(schedules.total_steps, 'step')}, {schedules.total_steps * batch_size / num_images:.1f}"
        f" epochs of {counted(num_images // batch_size, 'step')}",
        "warm-up": counted(schedules.warmup_steps, "step"),
        "momentum": f"{schedules.start_momentum:.4g} to {schedules.final_momentum:.4g}; at first the target encoder"
        f" {_forgets(half_life_of_momentum(schedules.start_momentum))}",
    }


def _forgets(half_life: float) -> str:
    return f"forgets half within {counted(round(half_life), 'step')}" if math.isfinite(half_life) else "stays as it is"


def _half_life(arguments: PretrainingArguments, schedules: Schedules) -> str:
    """What auto came to, in a sentence; empty without auto."""
    if arguments.momentum_half_life != AUTO:
        return ""
    forgets = _forgets(half_life_of_momentum(schedules.start_momentum))
    steps = counted(schedules.total_steps, "step")
    return f"At first the target encoder {forgets} (momentum_half_life), because the run has {steps}."


def with_found_values(run: Run) -> PretrainingArguments:
    """The arguments with what was found in the images and in `init_from`, for a recipe that repeats the run."""
    arguments = replace(run.arguments, sixteen_bit_max=run.data.sixteen_bit_max)
    if not arguments.init_from:
        return arguments
    return replace(arguments, image_mean=list(run.processor.image_mean), image_std=list(run.processor.image_std))


def _summarize_mean(config: IJepaConfig) -> str:
    if config.target_image_mean == 1:
        return ""
    return f", with {config.target_image_mean:.0%} of each image's mean (target_image_mean)"


def _summarize_bits(sixteen_bit_max: int | None) -> str:
    return f"; {sixteen_bit_max:,} is white in images of 16 bits (sixteen_bit_max)" if sixteen_bit_max else ""


def _summarize_masks(run: Run) -> str:
    """Their mode, and the mean sizes of the masks of eight batches."""
    masking, arguments = run.masking, run.arguments
    masks = [masking.sample(arguments.images_per_pass, arguments.seed, step) for step in range(8)]
    context, target = (sum(pair[kind].shape[-1] for pair in masks) / len(masks) for kind in (0, 1))
    who = f"each of {masking.num_contexts} contexts" if masking.num_contexts > 1 else "the context"
    about = "about " if isinstance(masking, MultiBlockMasking) else ""
    sizes = f"{who} has {about}{context:.0f} of {run.config.num_patches} patches"
    if isinstance(masking, MultiBlockMasking):
        return f"{masking.mode}: {sizes}; {masking.num_targets} targets of about {target:.0f}"
    return f"{masking.mode}: {sizes}; the other {target:.0f} are its targets"


def _millions(network: torch.nn.Module) -> str:
    # Under ZeRO-3, `ds_numel` is the size of the whole parameter.
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in network.parameters())
    return f"{count / 1e6:.2f} M parameters"


def is_evaluated(run: Run, done: int) -> bool:
    """Whether the k-NN is due after `done` steps."""
    due = run.arguments.eval_steps and done % run.arguments.eval_steps == 0
    return run.arguments.validation_split is not None and bool(due or done == run.schedules.total_steps)
