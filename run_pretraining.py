#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretrains I-JEPA on any images:

    accelerate launch run_pretraining.py --recipe recipes/quickstart.yaml
    accelerate launch run_pretraining.py --recipe recipes/custom_images_single_gpu.yaml --data my/photos

The same command runs on a CPU, a GPU or many; `python run_pretraining.py --help` lists every argument.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib  # noqa: F401 (draws the curves of each save: better missed now than then)
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import gather_object, set_seed
from huggingface_hub import create_repo, upload_folder
from safetensors.torch import load_file, save_file
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

from ijepa import IJepaConfig, IJepaForPretraining, IJepaModel
from ijepa.checkpointing import (
    CheckpointError,
    DirectoryLock,
    checkpoint_step,
    disk_errors,
    newest_checkpoint,
    replace_files,
    save_checkpoint,
    write_text,
)
from ijepa.collapse import CollapseMonitor
from ijepa.data import (
    BadImageError,
    EvaluationImages,
    build_image_processor,
    forward_seed,
    jpeg_decoder,
    load_image_dataset,
    normalize_pixel_values,
)
from ijepa.distributed import (
    SHARDED_MODES,
    accumulation,
    any_process,
    computing_precision,
    deepspeed_plugin,
    end_process_group,
    fsdp_plugin,
    gradient_norm,
    launch_mode,
    launched_mode,
    leave_models_whole,
    on_main_process,
    process_group_settings,
    update_target_encoder,
    uses_deepspeed,
    uses_fsdp,
    whole_weights,
)
from ijepa.execution import choose_attention, describe, set_matmul_precision
from ijepa.masking import MultiBlockMasking
from ijepa.memory import estimate_memory, format_memory_estimate, largest_batch_size, sampled_tokens, worst_case_tokens
from ijepa.model_card import write_model_card
from ijepa.modeling_ijepa import IJepaLayer
from ijepa.optimization import (
    Schedules,
    build_optimizer,
    half_life_of_momentum,
    momentum_of_half_life,
    parameter_groups,
)
from ijepa.preemption import StopRequest, end_workers, ignore_stop_signals
from ijepa.pretraining_data import IndexedData, StreamedData
from ijepa.probing import extract_features, few_shot_accuracy, format_table, knn_accuracy, standardize
from ijepa.recipe import (
    CPU_REMEDY,
    PretrainingArguments,
    check_launch,
    parse_pretraining_arguments,
    without_removed_keys,
)
from ijepa.visualization import plot_training_curves


# Exit codes: 0 finished, 1 failed, 2 wrong arguments or settings (nothing was written), and
PREEMPTED = 75  # stopped by a signal, saved, to be continued with --resume (sysexits.h: try again later)

# What an upload to the Hub leaves out: it is of no use there, or names the user's files.
LOCAL_FILES = ["checkpoints/*", ".tmp-*", ".lock", "run_status.json", "bad_images.jsonl", "skipped_steps.jsonl"]

# Metrics shown while training, under a short name; metrics.jsonl has all of them.
SHOWN = {
    "loss": "loss",
    "lr": "learning_rate",
    "images/s": "images_per_second",
    "rank": "effective_rank",
    "k-NN": "knn_accuracy",
    "random k-NN": "random_knn_accuracy",
}


class Preempted(Exception):
    """Asked to stop: everything is saved."""


class DivergenceError(ValueError):
    """Too many steps without a finite gradient."""


class Probe:
    """k-NN and few-shot accuracy of frozen encoders on a labelled train and validation split. Main process only."""

    def __init__(self, arguments: PretrainingArguments, config: IJepaConfig, processor, accelerator, stop):
        self.arguments, self.processor, self.accelerator, self.stop = arguments, processor, accelerator, stop
        self.loaders = [self._loader(split, config) for split in (arguments.train_split, arguments.validation_split)]

    def _loader(self, split, config):
        dataset = open_split(self.arguments, self.arguments.validation_data or self.arguments.data, split)
        if "label" not in dataset.column_names:
            raise ValueError(f"validation_split asks for a k-NN, but the {split!r} split has no labels.")
        labelled = (torch.as_tensor(dataset["label"][:]) >= 0).nonzero().flatten()  # -1 means unlabelled
        order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
        chosen = labelled[order[: self.arguments.max_probe_images]].sort().values
        if len(chosen) == 0:
            raise ValueError(f"validation_split asks for a k-NN, but no image of the {split!r} split has a label.")
        images = EvaluationImages(
            dataset, config.image_height_and_width, config.num_channels, self.arguments.eval_resize_ratio
        )
        return DataLoader(
            Subset(images, chosen.tolist()),
            batch_size=self.arguments.per_device_batch_size,
            num_workers=self.arguments.num_workers,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # or the loader draws from the generator that training uses
        )

    def features_of(self, encoder: IJepaModel | None):
        """Standardised features and labels of both splits; raw pixels when there is no encoder."""

        def embed(pixel_values):
            if self.stop:
                raise Preempted
            pixel_values = normalize_pixel_values(pixel_values, self.processor.image_mean, self.processor.image_std)
            if encoder is None:  # shrunk to 32 x 32 where they are larger, or ImageNet's pixels fill the memory
                return adaptive_avg_pool2d(pixel_values, [min(side, 32) for side in pixel_values.shape[2:]]).flatten(1)
            with self.accelerator.autocast():
                return encoder(pixel_values).pooler_output

        if encoder is not None:
            encoder.eval()
        (train, train_labels), (test, test_labels) = (
            extract_features(embed, loader, self.accelerator.device) for loader in self.loaders
        )
        train, test = standardize(train, test)
        return train, train_labels, test, test_labels

    def knn(self, encoder: IJepaModel | None) -> float:
        return self.row("", encoder, shots=())[self.knn_name]

    @property
    def knn_name(self) -> str:
        return f"{min(self.arguments.knn_neighbors, len(self.loaders[0].dataset))}-NN"

    def row(self, name: str, encoder: IJepaModel | None, shots: tuple[int, ...] = (5,)) -> dict:
        """One row of the final table; few-shot accuracy only where every class has enough images."""
        features = self.features_of(encoder)
        row = {"features": name, self.knn_name: knn_accuracy(*features, k=int(self.knn_name.removesuffix("-NN")))}
        for count in shots:
            if features[1].unique(return_counts=True)[1].min() >= count:
                result = few_shot_accuracy(*features, shots=count, num_draws=5)
                row.update({f"{count}-shot": result.mean, f"{count}-shot std": result.std})
        return row


@dataclass
class Run:
    """Everything the training loop needs, built by `build_run`."""

    arguments: PretrainingArguments
    accelerator: Accelerator
    mode: str
    stop: StopRequest
    config: IJepaConfig
    processor: object
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    masking: MultiBlockMasking
    data: IndexedData | StreamedData
    loader: DataLoader
    probe: Probe | None
    monitor: CollapseMonitor
    checkpoint: Path | None
    metrics: list[dict] = field(default_factory=list)
    baseline: dict = field(default_factory=dict)
    results: str | None = None
    skipped_steps: int = 0

    @property
    def networks(self) -> IJepaForPretraining:
        """The model without the wrapper of distributed training."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def first_step(self) -> int:
        return checkpoint_step(self.checkpoint) if self.checkpoint else 0


# Building: nothing is written yet


def open_split(arguments: PretrainingArguments, source: str, split: str):
    is_data = source == arguments.data  # else the settings are those of other data
    return load_image_dataset(
        source,
        split=split,
        config_name=arguments.data_config if is_data else None,
        image_column=arguments.image_column if is_data else None,
        label_column=arguments.label_column if is_data else None,
    )


def open_data(arguments: PretrainingArguments, accelerator: Accelerator, state: dict | None):
    if arguments.streaming:
        return StreamedData(arguments, accelerator, state)
    with accelerator.main_process_first():  # one process fills the cache of datasets
        dataset = open_split(arguments, arguments.data, arguments.train_split)
    return IndexedData(dataset, arguments, accelerator, state)


def build_accelerator(arguments: PretrainingArguments) -> Accelerator:
    """The accelerator, set to as many forward passes per optimizer step as the global batch needs."""
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_pass = arguments.per_device_batch_size * num_processes
    if arguments.batch_size % per_pass:
        raise ValueError(
            f"batch_size {arguments.batch_size} is not a multiple of per_device_batch_size"
            f" {arguments.per_device_batch_size} x {num_processes} processes."
        )
    steps = arguments.batch_size // per_pass
    size, precision, limit = arguments.per_device_batch_size, arguments.mixed_precision, arguments.max_grad_norm
    accelerator = Accelerator(
        mixed_precision="no" if uses_deepspeed() else precision,
        gradient_accumulation_plugin=accumulation(steps),
        deepspeed_plugin=deepspeed_plugin(size, steps, precision, limit) if uses_deepspeed() else None,
        fsdp_plugin=fsdp_plugin() if uses_fsdp() else None,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # position tables never change
            process_group_settings(),
        ],
    )
    leave_models_whole()
    check_launch(accelerator.num_processes, CPU_REMEDY)
    set_matmul_precision(accelerator.device.type, computing_precision(precision))
    return accelerator


def describe_launch(arguments: PretrainingArguments, accelerator: Accelerator) -> dict:
    """What a checkpoint remembers of the launch that wrote it."""
    return {
        "mode": launch_mode(accelerator),
        "num_processes": accelerator.num_processes,
        "precision": computing_precision(arguments.mixed_precision),
    }


def find_checkpoint(arguments: PretrainingArguments, launch: dict, report) -> Path | None:
    """The checkpoint to continue from; None for a run that starts at step 0."""
    output_dir = Path(arguments.output_dir)
    if not arguments.resume:
        if (output_dir / "metrics.jsonl").exists() or any(output_dir.glob("checkpoints/step-*")):
            raise ValueError(f"{output_dir} already holds a run: --resume continues it, or choose another output_dir.")
        return None
    checkpoint = newest_checkpoint(output_dir / "checkpoints", report)
    if checkpoint is None:
        report(f"{output_dir} holds no complete checkpoint to resume from: the run starts at step 0.")
        return None
    state = read_state(checkpoint)
    differences = arguments.differences(without_removed_keys(state["arguments"], str(checkpoint)))
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(differences)}). Repeat them to resume, or"
            " start a new run from its weights with --init_from."
        )
    check_same_launch(checkpoint, state["launch"], launch)
    return checkpoint


def check_same_launch(checkpoint: Path, before: dict, launch: dict) -> None:
    """DDP and FSDP2 go on with any number of processes; the files of ZeRO are those of its processes."""
    remedy = "or start a new run from the weights in output_dir with --init_from (fresh optimizer and schedules)."
    modes, count = {before["mode"], launch["mode"]}, before["num_processes"]
    if len(modes) > 1 and not modes <= {"single", "ddp"}:
        raise ValueError(
            f"{checkpoint} was written under {before['mode']}, but this is {launch['mode']}: launch it as"
            f" before, {remedy}"
        )
    if launch["mode"].startswith("zero") and count != launch["num_processes"]:
        raise ValueError(
            f"{checkpoint} was written by {count} processes, and DeepSpeed cannot go on with"
            f" {launch['num_processes']}: launch {count} again, {remedy}"
        )
    if before["precision"] != launch["precision"]:
        raise ValueError(
            f"{checkpoint} was computed with mixed_precision {before['precision']}, but this is {launch['precision']}:"
            f" launch it as before, {remedy}"
        )


def build_model(
    arguments: PretrainingArguments, accelerator: Accelerator, checkpoint: Path | None
) -> IJepaForPretraining:
    """Fresh weights, or those of `init_from`; when resuming, the checkpoint's weights are loaded later."""
    precision = computing_precision(arguments.mixed_precision)
    attention = arguments.attn_implementation or choose_attention(accelerator.device.type, precision)
    if checkpoint:
        config = IJepaConfig.from_pretrained(checkpoint)
        return IJepaForPretraining._from_config(config, attn_implementation=attention)
    if arguments.init_from:
        # float32 whatever the checkpoint's precision: in half precision the moving average would not move.
        return IJepaForPretraining.from_pretrained(
            arguments.init_from, dtype=torch.float32, **arguments.model_fields(), attn_implementation=attention
        )
    return IJepaForPretraining._from_config(IJepaConfig(**arguments.model_fields()), attn_implementation=attention)


def start_momentum(arguments: PretrainingArguments, total_steps: int) -> float:
    """As given, or that of the half-life, or the published one."""
    if arguments.momentum_half_life is not None:
        return momentum_of_half_life(arguments.momentum_half_life * total_steps)
    return Schedules.start_momentum if arguments.momentum is None else arguments.momentum


def build_schedules(arguments: PretrainingArguments, steps_per_epoch: int) -> Schedules:
    total_steps = arguments.total_steps(steps_per_epoch)
    return Schedules(
        total_steps=total_steps,
        warmup_steps=arguments.total_warmup_steps(steps_per_epoch),
        start_learning_rate=arguments.start_learning_rate,
        peak_learning_rate=arguments.learning_rate,
        final_learning_rate=arguments.final_learning_rate,
        start_weight_decay=arguments.weight_decay,
        final_weight_decay=arguments.final_weight_decay,
        start_momentum=start_momentum(arguments, total_steps),
        final_momentum=arguments.final_momentum,
    )


def prepare_networks(arguments: PretrainingArguments, accelerator: Accelerator, model: IJepaForPretraining):
    """The model and its optimizer, wrapped for the launch mode."""
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if arguments.compile_layers:  # in place, so that the names of the weights stay
        layers = [module for module in model.modules() if isinstance(module, IJepaLayer)]
        # Beyond the limit PyTorch would go on uncompiled: the rate of stochastic depth differs from layer to layer.
        limit = torch._dynamo.config.recompile_limit
        torch._dynamo.config.recompile_limit = max(limit, 4 * len(layers))
        for layer in layers:
            layer.compile(dynamic=True)
    optimizer = build_optimizer(
        parameter_groups(model),
        name=arguments.optimizer,
        learning_rate=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        epsilon=arguments.adam_epsilon,
        device_type=accelerator.device.type,
    )
    return accelerator.prepare(model, optimizer)


def memory_estimate(arguments: PretrainingArguments) -> str:
    """What one process of this launch will need, for the largest batch that the masks can make."""
    fields = arguments.model_fields()
    config = (
        IJepaConfig.from_pretrained(arguments.init_from, **fields) if arguments.init_from else IJepaConfig(**fields)
    )
    mode, num_processes = launched_mode()
    masking = MultiBlockMasking(config.grid_size, **arguments.mask_fields())
    tokens = worst_case_tokens(masking)
    settings = {
        "precision": computing_precision(arguments.mixed_precision),
        "optimizer": arguments.optimizer,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "attention": arguments.attn_implementation or "sdpa",
        "mode": mode,
        "num_processes": num_processes,
    }
    estimate = estimate_memory(config, tokens, arguments.per_device_batch_size, **settings)
    on_gpu = torch.cuda.is_available()
    device_bytes = torch.cuda.get_device_properties(0).total_memory if on_gpu else None
    fits = largest_batch_size(device_bytes, config, tokens, **settings) if on_gpu else None
    likely = sampled_tokens(masking, arguments.per_device_batch_size)
    met = estimate_memory(config, likely, arguments.per_device_batch_size, **settings)
    return (
        f"{mode}, {num_processes} processes, per_device_batch_size {arguments.per_device_batch_size}, at most"
        f" {tokens.context} context patches and {tokens.num_targets} x {tokens.target} target patches per image\n\n"
        f"{format_memory_estimate(estimate, device_bytes, fits)}\n\n200 sampled batches had at most {likely.context}"
        f" and {tokens.num_targets} x {likely.target} patches: {met.total / 2**30:.2f} GiB. Others may have more."
    )


def build_run(arguments: PretrainingArguments, lock: DirectoryLock, stop: StopRequest) -> Run:
    """Opens the data, finds the checkpoint to resume, and builds all that is trained."""
    accelerator = build_accelerator(arguments)
    mode = launch_mode(accelerator)
    if mode == "fsdp2" and arguments.optimizer == "adamw_8bit":
        raise ValueError("optimizer adamw_8bit does not work under FSDP2: bitsandbytes cannot read sharded weights.")
    on_main_process(accelerator, lock.take_if_there)
    launch = describe_launch(arguments, accelerator)
    checkpoint = on_main_process(accelerator, lambda: find_checkpoint(arguments, launch, accelerator.print))
    data = open_data(arguments, accelerator, read_state(checkpoint) if checkpoint else None)
    schedules = build_schedules(arguments, data.num_images // arguments.batch_size)
    set_seed(arguments.seed)
    model = build_model(arguments, accelerator, checkpoint)
    config = model.config
    masking = MultiBlockMasking(config.grid_size, **arguments.mask_fields())
    processor = build_image_processor(
        config.image_height_and_width,
        config.num_channels,
        arguments.image_mean,
        arguments.image_std,
        arguments.eval_resize_ratio,
    )
    data.open_log(config.num_channels)
    probe = Probe(arguments, config, processor, accelerator, stop) if arguments.validation_split else None
    model, optimizer = prepare_networks(arguments, accelerator, model)
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        mode=mode,
        stop=stop,
        config=config,
        processor=processor,
        model=model,
        optimizer=optimizer,
        schedules=schedules,
        masking=masking,
        data=data,
        loader=data.loader(config, masking, schedules.total_steps, first_step),
        probe=probe,
        monitor=CollapseMonitor(),
        checkpoint=checkpoint,
    )


def effective_values(run: Run) -> dict[str, object]:
    """What the settings come to, for the terminal and the model card."""
    arguments, schedules, config = run.arguments, run.schedules, run.config
    num_images, count = run.data.num_images, run.accelerator.num_processes
    precision = computing_precision(arguments.mixed_precision)
    masks = [run.masking.sample(arguments.per_device_batch_size, arguments.seed, step) for step in range(8)]
    context, target = (sum(pair[kind].shape[-1] for pair in masks) / len(masks) for kind in (0, 1))
    parameters = {
        name: sum(getattr(p, "ds_numel", p.numel()) for p in part.parameters()) / 1e6  # ds_: whole under ZeRO-3
        for name, part in (("encoder", run.networks.ijepa), ("predictor", run.networks.predictor))
    }
    return {
        "data": f"{arguments.data} ({num_images:,} images, split {arguments.train_split})",
        "length": f"{schedules.total_steps:,} steps, {schedules.total_steps * arguments.batch_size / num_images:.1f}"
        f" epochs of {num_images // arguments.batch_size:,} steps",
        "warm-up": f"{schedules.warmup_steps:,} steps",
        "momentum": f"{schedules.start_momentum:.4g} to {schedules.final_momentum:.4g}; at first the target encoder"
        f" forgets half within {half_life_of_momentum(schedules.start_momentum):,.0f} steps",
        "batch": f"{arguments.batch_size} images = {arguments.per_device_batch_size} per pass x {count} processes x"
        f" {run.accelerator.gradient_accumulation_steps} accumulation steps",
        "images": f"{config.image_size} pixels, patches of {config.patch_size}, grid {config.grid_size}",
        "decoding": f"JPEG by {jpeg_decoder()}",
        "masks": f"about {context:.0f} of {config.num_patches} patches of context,"
        f" {arguments.num_targets} targets of about {target:.0f}",
        "targets": {
            "layer": "layer-normalised, as released",
            "batch": f"each feature normalised over the patches of {arguments.per_device_batch_size} images",
            "none": "as the target encoder gives them",
        }[config.target_normalization],
        "encoder": f"{parameters['encoder']:.2f} M parameters, {config.num_hidden_layers} layers of"
        f" {config.hidden_size}",
        "predictor": f"{parameters['predictor']:.2f} M parameters, {config.predictor_num_hidden_layers} layers of"
        f" {config.predictor_hidden_size}",
        "computation": f"{run.accelerator.device.type}, {run.mode}, mixed precision {precision},"
        f" {describe(run.networks)}",
    }


# Training


class Window:
    """What happened since the last row of metrics; but for the norm of the gradient, nothing here waits for the device
    until the row is asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.clear()

    def clear(self):
        self.losses, self.bad_images, self.masks, self.grad_norm = [], [], None, float("nan")
        self.images, self.started = 0, time.perf_counter()

    @contextmanager
    def paused(self):
        """Evaluating and saving are not training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, step: "Step") -> None:
        """Counts an optimizer step; one that was skipped counts for nothing but time and bad images."""
        for batch in step.batches:
            self.run.data.used(batch)
            self.bad_images += self.run.data.bad_images(batch)
            self.masks = batch["context_indices"], batch["target_indices"]
        self.images += self.run.arguments.batch_size
        if step.moved:
            self.grad_norm = step.grad_norm
            self.losses += step.losses
            for pooled in step.pooled_targets:
                self.run.monitor.update(pooled)

    def row(self, step: int) -> dict:
        """The metrics after optimizer step `step` (from 0), over the steps since the last row."""
        run = self.run
        run.data.log.add(gather_object(self.bad_images))  # of all processes, so that they stop together
        losses = self.losses or [torch.tensor(float("nan"), device=run.accelerator.device)]
        row = {
            "step": step + 1,
            "epoch": (step + 1) * run.arguments.batch_size / run.data.num_images,
            "loss": run.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item(),
            "learning_rate": run.schedules.learning_rate(step),
            "weight_decay": run.schedules.weight_decay(step),
            "momentum": run.schedules.momentum(step),
            "grad_norm": self.grad_norm,
            "context_tokens": float(self.masks[0].shape[-1]),
            "target_tokens": float(self.masks[1].shape[-1]),
            "images_per_second": self.images / (time.perf_counter() - self.started),
            "bad_images": len(run.data.log.indices),
            "skipped_steps": run.skipped_steps,
            **(run.monitor.report() if run.monitor.num_updates else {}),
        }
        self.clear()
        return row


@dataclass
class Step:
    """One optimizer step of this process: what it saw and what came of it."""

    batches: list[dict] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    pooled_targets: list[torch.Tensor] = field(default_factory=list)
    grad_norm: float = float("nan")
    moved: bool = False

    def add(self, batch: dict, output) -> None:
        self.batches.append({key: value for key, value in batch.items() if key != "pixel_values"})  # too large to keep
        self.losses.append(output.loss.detach())
        self.pooled_targets.append(output.target_hidden_states.mean(dim=1))


def optimizer_step(run: Run, batches: Iterator[dict], number: int) -> Step:
    """One update from as many forward passes as the global batch needs."""
    accelerator, step = run.accelerator, Step()
    for micro_step in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        if run.config.drop_path_rate:  # a function of step and place, as everything else that is random
            place = micro_step * accelerator.num_processes + accelerator.process_index
            torch.manual_seed(forward_seed(run.arguments.seed, number, place))
        with accelerator.accumulate(run.model):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            with accelerator.autocast():  # which Accelerate leaves to FSDP2 itself, and that casts more than it should
                output = run.model(
                    normalize_pixel_values(pixel_values, run.processor.image_mean, run.processor.image_std),
                    batch["context_indices"].to(accelerator.device, non_blocking=True),
                    batch["target_indices"].to(accelerator.device, non_blocking=True),
                )
            accelerator.backward(output.loss)
            step.add(batch, output)
            del output  # or it would outlive the next forward pass
    step.grad_norm, step.moved = update_weights(run)
    return step


def update_weights(run: Run) -> tuple[float, bool]:
    """The norm of the gradient, and whether the weights moved: a gradient that is not finite would ruin them."""
    accelerator, limit = run.accelerator, run.arguments.max_grad_norm
    if run.mode.startswith("zero"):  # DeepSpeed has clipped and stepped, or not, at the end of the backward pass
        return float(accelerator.clip_grad_norm_([], 0.0)), not run.optimizer.step_was_skipped
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    norm = float(gradient_norm(parameters))
    moved = math.isfinite(norm)
    if moved and limit is not None and norm > limit:
        torch._foreach_mul_([parameter.grad for parameter in parameters], limit / (norm + 1e-6))
    if moved or accelerator.scaler is not None:  # fp16: the scaler skips by itself, and lowers its scale
        run.optimizer.step()
    run.optimizer.zero_grad()
    return norm, moved


def train(run: Run) -> None:
    """The loop. Raises Preempted when it was asked to stop and everything is saved."""
    arguments, total_steps = run.arguments, run.schedules.total_steps
    run.model.train()  # from_pretrained leaves a model in evaluation mode
    batches, window = iter(run.loader), Window(run)
    progress = tqdm(
        total=total_steps,
        initial=run.first_step,
        unit="step",
        disable=not (run.accelerator.is_main_process and sys.stderr.isatty()),
    )
    for number in range(run.first_step, total_steps):
        done, last = number + 1, number + 1 == total_steps
        run.schedules.apply(run.optimizer, number)
        step = optimizer_step(run, batches, number)
        if step.moved:
            update_target_encoder(run.accelerator, run.networks, run.schedules.momentum(number))
        else:
            report_skipped_step(run, step, done)
        window.add(step)
        progress.update()
        diverged = run.skipped_steps > arguments.max_skipped_steps
        stops = any_process(run.accelerator, run.stop) or diverged
        saves = last or stops or done % arguments.save_steps == 0
        evaluates = is_evaluated(run, done) and not stops
        # A row at every checkpoint: nothing that a resumed run would need is left in the window.
        if saves or evaluates or done % arguments.logging_steps == 0:
            row = window.row(number)
            with window.paused():
                record(run, {**row, **(evaluate(run) if evaluates else {})}, progress)
        stops = stops or (evaluates and any_process(run.accelerator, run.stop))
        if saves or stops:
            with window.paused():
                save(run, done, exports=not stops and not last)  # `finish` exports
            stops = stops or any_process(run.accelerator, run.stop)
        if stops:
            progress.close()
            raise divergence(run) if diverged else Preempted
    progress.close()


def is_evaluated(run: Run, done: int) -> bool:
    """Whether the k-NN is due after `done` steps."""
    due = run.arguments.eval_steps and done % run.arguments.eval_steps == 0
    return run.arguments.validation_split is not None and bool(due or done == run.schedules.total_steps)


def record(run: Run, row: dict, progress: tqdm) -> None:
    """A row of metrics to metrics.jsonl, the trackers and the terminal; a collapse is said aloud."""
    run.metrics.append(row)
    run.accelerator.log({key: value for key, value in row.items() if key != "reason"}, step=row["step"])
    if not run.accelerator.is_main_process:
        return
    with open(run.output_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    shown = {name: f"{row[key]:.3g}" for name, key in SHOWN.items() if key in row}
    progress.set_postfix(shown)
    if progress.disable:  # a log file: a line for each row instead of a bar
        line = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {row['step']:,} of {run.schedules.total_steps:,}: {line}", flush=True)
    if row.get("collapsing"):
        tqdm.write(f"WARNING at step {row['step']:,}: {row['reason']}")


# Steps without a finite gradient


def report_skipped_step(run: Run, step: Step, done: int) -> None:
    """Counts the step and writes down what was in it, from all processes. The scaler of fp16 looks for its scale by
    failing, which is no fault of the images."""
    if run.accelerator.scaler is not None and run.accelerator.scaler.get_scale() >= 1:
        return
    run.skipped_steps += 1
    names = gather_object([name for batch in step.batches for name in run.data.names(batch)])
    losses = gather_object([loss.item() for loss in step.losses])
    if run.accelerator.is_main_process:
        report = {"step": done, "grad_norm": str(step.grad_norm), "losses": list(map(str, losses)), "images": names}
        with open(run.output_dir / "skipped_steps.jsonl", "a") as file:
            file.write(json.dumps(report) + "\n")
        tqdm.write(f"WARNING at step {done:,}: the gradient is not finite; the step is skipped.")


def divergence(run: Run) -> DivergenceError:
    return DivergenceError(
        f"{run.skipped_steps} steps had no finite gradient, more than max_skipped_steps"
        f" {run.arguments.max_skipped_steps}. {run.output_dir / 'skipped_steps.jsonl'} lists their losses and images;"
        f" the state is saved in {run.output_dir / 'checkpoints'}. A lower learning rate, max_grad_norm, or"
        " mixed_precision bf16 in place of fp16 may help, in a new run."
    )


# Evaluating: on the main process, while the others wait


def evaluate(run: Run) -> dict:
    """The k-NN of the target encoder beside that of a random one; nothing if a signal interrupts it."""
    encoders = whole_encoders(run, "ijepa")
    if not run.accelerator.is_main_process:
        return {}
    try:
        return {**run.baseline, "knn_accuracy": run.probe.knn(encoders["ijepa"])}
    except Preempted:
        return {}  # the run stops, and --resume makes up for it


def whole_encoders(run: Run, *names: str) -> dict[str, IJepaModel]:
    """Encoders that compute on their own. Call it on all processes; only the main one gets them."""
    if run.mode not in SHARDED_MODES:
        return {name: getattr(run.networks, name) for name in names}
    weights = whole_weights(run.accelerator, run.model)
    return {name: plain_encoder(run, weights, f"{name}.") for name in names if run.accelerator.is_main_process}


def plain_encoder(run: Run, weights: dict[str, torch.Tensor], prefix: str) -> IJepaModel:
    encoder = IJepaModel._from_config(run.config)
    encoder.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return encoder.to(run.accelerator.device)


# Saving and resuming


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "run_state.json").read_text())


def save(run: Run, step: int, exports: bool) -> None:
    """A checkpoint to resume from, and, unless time is short, the output directory as a model."""
    data_state = run.data.state()

    def write_extra(directory: Path):
        monitor = {key: torch.as_tensor(value) for key, value in run.monitor.state_dict().items() if value is not None}
        save_file(monitor, directory / f"monitor_{run.accelerator.process_index}.safetensors")
        if run.accelerator.is_main_process:
            state = {
                "arguments": dataclasses.asdict(run.arguments),
                "baseline": run.baseline,
                **data_state,
                "skipped_steps": run.skipped_steps,
                "launch": describe_launch(run.arguments, run.accelerator),
            }
            (directory / "run_state.json").write_text(json.dumps(state))
            run.networks.config.save_pretrained(directory)
            run.processor.save_pretrained(directory)

    save_checkpoint(run.accelerator, run.output_dir / "checkpoints", step, write_extra, run.arguments.keep_checkpoints)
    if exports:
        export(run)


def export(run: Run) -> None:
    """Makes the output directory a model: weights, configuration, image processor, recipe, curves and card."""
    weights = whole_weights(run.accelerator, run.model)
    on_main_process(run.accelerator, lambda: write_model(run, weights))


@disk_errors()
def write_model(run: Run, weights: dict[str, torch.Tensor]) -> None:
    unfinished = run.output_dir / ".tmp-export"
    shutil.rmtree(unfinished, ignore_errors=True)
    run.networks.save_pretrained(unfinished, state_dict=weights)
    run.processor.save_pretrained(unfinished)
    run.arguments.save(unfinished / "recipe.yaml")
    if run.metrics:
        plot_training_curves(run.metrics, unfinished / "curves.png", title=run.output_dir.name)
    write_model_card(
        unfinished,
        name=run.arguments.hub_model_id or run.output_dir.name,
        summary=effective_values(run),
        metrics=run.metrics[-1] if run.metrics else {},
        recipe=run.arguments.effective(),
        results=run.results,
        base_model=run.arguments.init_from,
    )
    replace_files(unfinished, run.output_dir)


def resume(run: Run) -> None:
    """Loads the checkpoint, and drops the metrics that were written after it."""
    run.accelerator.load_state(str(run.checkpoint))
    # Accelerate goes on counting forward passes where it was, but a step may now have another number of them.
    run.accelerator.step = 0
    load_monitor(run)
    state = read_state(run.checkpoint)
    run.baseline, run.skipped_steps = state["baseline"], state["skipped_steps"]
    metrics = run.output_dir / "metrics.jsonl"
    run.metrics = rows_until(metrics, run.first_step)
    last = run.metrics[-1] if run.metrics else {"step": None}
    if last["step"] == run.first_step and is_evaluated(run, run.first_step) and "knn_accuracy" not in last:
        last.update(evaluate(run))  # a signal came in between
    on_main_process(run.accelerator, lambda: write_rows(metrics, run.metrics))
    skipped = run.output_dir / "skipped_steps.jsonl"
    if skipped.exists():
        kept = rows_until(skipped, run.first_step)
        on_main_process(run.accelerator, lambda: write_rows(skipped, kept))


def rows_until(path: Path, step: int) -> list[dict]:
    """The whole lines of a JSON-lines file up to a step; what a killed run did after its checkpoint, it does again."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["step"] <= step]


def write_rows(path: Path, rows: list[dict]) -> None:
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def load_monitor(run: Run) -> None:
    """What this process had seen; a process that was not there goes on from what the main one had."""
    own = run.checkpoint / f"monitor_{run.accelerator.process_index}.safetensors"
    state = load_file(own if own.exists() else run.checkpoint / "monitor_0.safetensors")
    run.monitor.load_state_dict({"features": state.get("features"), "num_updates": int(state["num_updates"])})


# The run from beginning to end


def random_encoder(run: Run) -> IJepaModel:
    """An untrained encoder of the same architecture: what every probe is compared with."""
    with torch.random.fork_rng():
        torch.manual_seed(run.arguments.seed)
        return IJepaModel._from_config(run.config).to(run.accelerator.device).eval()


def claim(run: Run, lock: DirectoryLock) -> None:
    """Takes the directory, if it was not there before, and makes sure that no other run has come in between."""
    if not lock.is_taken:
        lock.take()
        if (run.output_dir / "metrics.jsonl").exists():
            raise ValueError(f"Another run has just begun in {run.output_dir}: choose another output_dir.")


def start(run: Run, lock: DirectoryLock) -> None:
    """Prints the effective values, then loads the checkpoint or measures the random encoder."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    on_main_process(run.accelerator, lambda: claim(run, lock))
    say_status(run, "running", lock)
    for name, value in effective_values(run).items():
        run.accelerator.print(f"{name:12} {value}")
    run.accelerator.init_trackers(run.output_dir.name)
    if run.checkpoint:
        resume(run)
        run.accelerator.print(f"resuming {run.checkpoint} at step {run.first_step:,}")
    elif run.probe and run.accelerator.is_main_process:
        with suppress(Preempted):  # all processes ask below
            run.baseline = {"random_knn_accuracy": run.probe.knn(random_encoder(run))}
    if run.skipped_steps > run.arguments.max_skipped_steps:
        raise divergence(run)
    if any_process(run.accelerator, run.stop):
        raise Preempted


def finish(run: Run) -> None:
    """The table of accuracies, the last export, and the upload."""
    if run.probe:
        trained = whole_encoders(run, "ijepa", "context_encoder")
        run.results = tabulate(run, trained) if run.accelerator.is_main_process else None
        if any_process(run.accelerator, run.stop):
            raise Preempted
    export(run)
    if run.probe:
        run.accelerator.print(f"\nAccuracy on the {run.arguments.validation_split!r} split, frozen features:\n")
        run.accelerator.print(run.results)
    run.accelerator.print(f"\nmodel  {run.output_dir}\ncurves {run.output_dir / 'curves.png'}")
    if run.arguments.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(run)


def tabulate(run: Run, trained: dict[str, IJepaModel]) -> str | None:
    encoders = {
        "raw pixels": None,
        "random encoder": random_encoder(run),
        "I-JEPA target encoder": trained["ijepa"],
        "I-JEPA context encoder": trained["context_encoder"],
    }
    try:
        return format_table([run.probe.row(name, encoder) for name, encoder in encoders.items()])
    except Preempted:
        return None  # the caller asks all processes


def close(run: Run) -> None:
    end_workers()
    run.model = run.optimizer = None
    end_process_group(run.accelerator)


def push_to_hub(run: Run) -> None:
    """Uploads the output directory without its checkpoints."""
    repository = create_repo(run.arguments.hub_model_id, private=run.arguments.hub_private, exist_ok=True)
    upload_folder(repo_id=repository.repo_id, folder_path=run.output_dir, ignore_patterns=LOCAL_FILES)
    run.accelerator.print(f"pushed {repository.repo_id}")


def sentence_for(error: Exception) -> str | None:
    """What to tell a user about an error that is none of this program; None for one that may be."""
    text = str(error)
    if text.startswith("Caught "):  # by a data loading process, which adds its traceback in front
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, (BadImageError, DivergenceError, CheckpointError)):
        return text
    if isinstance(error, OSError):
        return f"{text}. What was saved before is whole; when the cause is gone, --resume continues from it."
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0] if text else 'no details'}). Lower per_device_batch_size"
            " (accumulation makes up for it) or set gradient_checkpointing; --print_memory_estimate shows the need."
        )
    if "DataLoader worker" in text:
        return f"{text} Often the machine is out of memory: lower num_workers, then --resume."
    if isinstance(error, torch.distributed.DistError) or "gloo" in text:
        return (
            f"another process of this run has ended ({text.splitlines()[0]}); --resume continues from what was saved."
        )
    return None


def fail(error: Exception, code: int) -> None:
    """Ends the process with one sentence, or with the traceback of an error that nobody expected."""
    sentence = sentence_for(error) if code == 1 else str(error)
    if sentence is None:
        traceback.print_exception(error)
    else:
        print(f"run_pretraining.py: error: {sentence}", file=sys.stderr)
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)  # the other processes may be waiting, and would be waited for
    sys.exit(code)


def say_status(run: Run, status: str, lock: DirectoryLock) -> None:
    """run_status.json, for job scripts: launchers have exit codes of their own."""
    if run.accelerator.is_main_process and lock.is_taken:
        with suppress(OSError):  # on a full disk the reason for stopping is what the user has to read
            write_text(run.output_dir / "run_status.json", json.dumps({"status": status}) + "\n")


def main(words: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading and saving, which takes no time beside training
    arguments = parse_pretraining_arguments(sys.argv[1:] if words is None else words)
    if arguments.print_memory_estimate:
        try:
            if os.environ.get("RANK", "0") == "0":
                print(memory_estimate(arguments))
        except (ValueError, OSError) as error:
            fail(error, 2)
        return
    lock = DirectoryLock(Path(arguments.output_dir))
    with StopRequest(PREEMPTED) as stop, lock:
        try:
            run = build_run(arguments, lock, stop)
        except (ValueError, OSError) as error:
            fail(error, 2)  # the status argparse gives to wrong arguments
        except Exception as error:
            fail(error, 1)
        stop.exits = False  # from here on the loop stops, where everything can be saved
        try:
            start(run, lock)
            train(run)
            finish(run)
        except Preempted:
            say_status(run, "preempted", lock)
            run.accelerator.print(f"stopped ({stop.reason or 'another process was asked to'}); --resume continues.")
            close(run)
            sys.exit(PREEMPTED)
        except Exception as error:
            say_status(run, "failed", lock)
            fail(error, 1)
        say_status(run, "finished", lock)
        close(run)


if __name__ == "__main__":
    main()
