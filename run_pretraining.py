#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Pretrains I-JEPA on any images:

    accelerate launch run_pretraining.py --recipe recipes/quickstart.yaml
    accelerate launch run_pretraining.py --recipe recipes/custom_images_single_gpu.yaml --data my/photos

The same command runs on a CPU, a GPU or many; `python run_pretraining.py --help` lists every argument.
"""

import dataclasses
import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
from ijepa.checkpointing import checkpoint_step, newest_checkpoint, replace_files, save_checkpoint
from ijepa.collapse import CollapseMonitor
from ijepa.data import (
    BadImageError,
    BadImageLog,
    EvaluationImages,
    PretrainingBatchSampler,
    PretrainingImages,
    bad_indices,
    build_image_processor,
    load_image_dataset,
    normalize_pixel_values,
)
from ijepa.masking import MaskingCollator, MultiBlockMasking
from ijepa.model_card import write_model_card
from ijepa.optimization import Schedules, parameter_groups
from ijepa.probing import extract_features, few_shot_accuracy, format_table, knn_accuracy, standardize
from ijepa.recipe import PretrainingArguments, parse_pretraining_arguments
from ijepa.visualization import plot_training_curves


# Metrics shown while training, under a short name; metrics.jsonl has all of them.
SHOWN = {
    "loss": "loss",
    "lr": "learning_rate",
    "images/s": "images_per_second",
    "rank": "effective_rank",
    "k-NN": "knn_accuracy",
    "random k-NN": "random_knn_accuracy",
}


class Probe:
    """k-NN and few-shot accuracy of frozen encoders on a labelled train and validation split."""

    def __init__(self, arguments: PretrainingArguments, config: IJepaConfig, processor, accelerator: Accelerator):
        self.arguments, self.processor, self.accelerator = arguments, processor, accelerator
        self.loaders = [self._loader(split, config) for split in (arguments.train_split, arguments.validation_split)]

    def _loader(self, split, config):
        dataset = open_split(self.arguments, split)
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
            generator=torch.Generator(),  # or the loader draws from the generator that training uses
        )

    def features_of(self, encoder: IJepaModel | None):
        """Standardised features and labels of both splits; raw pixels when there is no encoder."""

        def embed(pixel_values):
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
    config: IJepaConfig
    processor: object
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    schedules: Schedules
    masking: MultiBlockMasking
    loader: DataLoader
    bad_images: BadImageLog
    probe: Probe | None
    monitor: CollapseMonitor
    checkpoint: Path | None
    metrics: list[dict] = field(default_factory=list)
    baseline: dict = field(default_factory=dict)
    results: str | None = None

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


def open_split(arguments: PretrainingArguments, split: str):
    return load_image_dataset(
        arguments.data,
        split=split,
        config_name=arguments.data_config,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )


def build_accelerator(arguments: PretrainingArguments) -> Accelerator:
    """The accelerator, set to as many forward passes per optimizer step as the global batch needs."""
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.trackers or None,
        project_dir=arguments.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # position tables never change
    )
    per_pass = arguments.per_device_batch_size * accelerator.num_processes
    if arguments.batch_size % per_pass:
        raise ValueError(
            f"batch_size {arguments.batch_size} is not a multiple of per_device_batch_size"
            f" {arguments.per_device_batch_size} x {accelerator.num_processes} processes."
        )
    accelerator.gradient_accumulation_steps = arguments.batch_size // per_pass
    return accelerator


def find_checkpoint(arguments: PretrainingArguments, accelerator: Accelerator) -> Path | None:
    """The checkpoint to continue from; None for a run that starts at step 0."""
    output_dir = Path(arguments.output_dir)
    if not arguments.resume:
        if (output_dir / "metrics.jsonl").exists() or any(output_dir.glob("checkpoints/step-*")):
            raise ValueError(f"{output_dir} already holds a run: --resume continues it, or choose another output_dir.")
        return None
    checkpoint = newest_checkpoint(output_dir / "checkpoints", accelerator.print)
    if checkpoint is None:
        accelerator.print(f"{output_dir} holds no complete checkpoint to resume from: the run starts at step 0.")
        return None
    differences = arguments.differences(read_state(checkpoint)["arguments"])
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to a run with other settings ({'; '.join(differences)}). Repeat them to resume, or"
            " start a new run from its weights with --init_from."
        )
    return checkpoint


def build_model(arguments: PretrainingArguments, checkpoint: Path | None) -> IJepaForPretraining:
    """Fresh weights, or those of `init_from`; when resuming, the checkpoint's weights are loaded later."""
    attention = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    if checkpoint:
        return IJepaForPretraining._from_config(IJepaConfig.from_pretrained(checkpoint), **attention)
    if arguments.init_from:
        # float32 whatever the checkpoint's precision: in half precision the moving average would not move.
        return IJepaForPretraining.from_pretrained(
            arguments.init_from, dtype=torch.float32, **arguments.model_fields(), **attention
        )
    return IJepaForPretraining._from_config(IJepaConfig(**arguments.model_fields()), **attention)


def build_optimizer(arguments: PretrainingArguments, model: IJepaForPretraining, device) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(model),
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        fused=device.type == "cuda",
    )


def build_schedules(arguments: PretrainingArguments, steps_per_epoch: int) -> Schedules:
    return Schedules(
        total_steps=arguments.total_steps(steps_per_epoch),
        warmup_steps=arguments.total_warmup_steps(steps_per_epoch),
        start_learning_rate=arguments.start_learning_rate,
        peak_learning_rate=arguments.learning_rate,
        final_learning_rate=arguments.final_learning_rate,
        start_weight_decay=arguments.weight_decay,
        final_weight_decay=arguments.final_weight_decay,
        start_momentum=arguments.momentum,
        final_momentum=arguments.final_momentum,
    )


def build_loader(arguments, accelerator, dataset, config, masking, total_steps: int, first_step: int) -> DataLoader:
    """Batches from `first_step` on. What a batch holds depends on the step and the process alone."""
    images = PretrainingImages(
        dataset,
        config.image_height_and_width,
        num_channels=config.num_channels,
        crop_scale=tuple(arguments.crop_scale),
        crop_ratio=tuple(arguments.crop_ratio),
        horizontal_flip=arguments.horizontal_flip,
        interpolation=arguments.interpolation,
        seed=arguments.seed,
    )
    sampler = PretrainingBatchSampler(
        len(dataset),
        arguments.per_device_batch_size,
        total_steps=total_steps,
        seed=arguments.seed,
        start_step=first_step,
        accumulation_steps=accelerator.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    return DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=MaskingCollator(masking, arguments.seed),
        num_workers=arguments.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # or starting the workers draws from the generator that training uses
    )


def check_size(dataset, arguments: PretrainingArguments, checkpoint: Path | None) -> None:
    if len(dataset) < arguments.batch_size:
        raise ValueError(f"{len(dataset)} images do not fill one batch; lower batch_size {arguments.batch_size}.")
    before = read_state(checkpoint)["num_images"] if checkpoint else len(dataset)
    if before != len(dataset):
        raise ValueError(
            f"The run to resume had {before} images, but {arguments.data!r} has {len(dataset)}: the order of images"
            " would not continue."
        )


def build_run(arguments: PretrainingArguments) -> Run:
    """Opens the data, finds the checkpoint to resume, and builds all that is trained."""
    accelerator = build_accelerator(arguments)
    checkpoint = find_checkpoint(arguments, accelerator)
    with accelerator.main_process_first():  # one process fills the cache of datasets
        dataset = open_split(arguments, arguments.train_split)
    check_size(dataset, arguments, checkpoint)
    schedules = build_schedules(arguments, len(dataset) // arguments.batch_size)
    set_seed(arguments.seed)
    model = build_model(arguments, checkpoint)
    config = model.config
    masking = MultiBlockMasking(config.grid_size, **arguments.mask_fields())
    processor = build_image_processor(
        config.image_height_and_width,
        config.num_channels,
        arguments.image_mean,
        arguments.image_std,
        arguments.eval_resize_ratio,
    )
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # From here on every process draws its own random numbers (stochastic depth), reproducibly.
    set_seed(arguments.seed, device_specific=True)
    model, optimizer = accelerator.prepare(model, build_optimizer(arguments, model, accelerator.device))
    first_step = checkpoint_step(checkpoint) if checkpoint else 0
    return Run(
        arguments=arguments,
        accelerator=accelerator,
        config=config,
        processor=processor,
        model=model,
        optimizer=optimizer,
        schedules=schedules,
        masking=masking,
        loader=build_loader(arguments, accelerator, dataset, config, masking, schedules.total_steps, first_step),
        bad_images=BadImageLog(
            Path(arguments.output_dir) / "bad_images.jsonl",
            arguments.bad_image_limit,
            dataset,
            config.num_channels,
            writes=accelerator.is_main_process,
        ),
        probe=Probe(arguments, config, processor, accelerator) if arguments.validation_split else None,
        monitor=CollapseMonitor(),
        checkpoint=checkpoint,
    )


def effective_values(run: Run) -> dict[str, object]:
    """What the settings come to, for the terminal and the model card."""
    arguments, schedules, config = run.arguments, run.schedules, run.config
    num_images, count = len(run.loader.dataset), run.accelerator.num_processes
    masks = [run.masking.sample(arguments.per_device_batch_size, arguments.seed, step) for step in range(8)]
    context, target = (sum(pair[kind].shape[2] for pair in masks) / len(masks) for kind in (0, 1))
    parameters = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("encoder", run.networks.ijepa), ("predictor", run.networks.predictor))
    }
    return {
        "data": f"{arguments.data} ({num_images:,} images, split {arguments.train_split})",
        "length": f"{schedules.total_steps:,} steps, {schedules.total_steps * arguments.batch_size / num_images:.1f}"
        f" epochs of {num_images // arguments.batch_size:,} steps",
        "warm-up": f"{schedules.warmup_steps:,} steps",
        "batch": f"{arguments.batch_size} images = {arguments.per_device_batch_size} per pass x {count} processes x"
        f" {run.accelerator.gradient_accumulation_steps} accumulation steps",
        "images": f"{config.image_size} pixels, patches of {config.patch_size}, grid {config.grid_size}",
        "masks": f"about {context:.0f} of {config.num_patches} patches of context,"
        f" {arguments.num_targets} targets of about {target:.0f}",
        "encoder": f"{parameters['encoder']:.2f} M parameters, {config.num_hidden_layers} layers of"
        f" {config.hidden_size}",
        "predictor": f"{parameters['predictor']:.2f} M parameters, {config.predictor_num_hidden_layers} layers of"
        f" {config.predictor_hidden_size}",
        "computation": f"{run.accelerator.device.type}, mixed precision {run.accelerator.mixed_precision}",
    }


# Training


class Window:
    """What happened since the last row of metrics; nothing here waits for the device until the row is asked for."""

    def __init__(self, run: Run):
        self.run = run
        self.clear()

    def clear(self):
        self.losses, self.bad_indices, self.tokens, self.grad_norm = [], set(), None, None
        self.images, self.started = 0, time.perf_counter()

    @contextmanager
    def paused(self):
        """Evaluating and saving are not training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, batch: dict, output) -> None:
        self.losses.append(output.loss.detach())
        self.bad_indices.update(bad_indices(batch, len(self.run.loader.dataset)))
        self.tokens = batch["context_indices"].shape[2], batch["target_indices"].shape[2]
        self.images += len(batch["pixel_values"]) * self.run.accelerator.num_processes
        self.run.monitor.update(output.target_hidden_states.mean(dim=1))

    def row(self, step: int) -> dict:
        """The metrics after optimizer step `step` (from 0), over the steps since the last row."""
        run = self.run
        run.bad_images.add(gather_object(sorted(self.bad_indices)))  # of all processes, so that they stop together
        loss = run.accelerator.reduce(torch.stack(self.losses).mean(), reduction="mean").item()
        row = {
            "step": step + 1,
            "epoch": (step + 1) * run.arguments.batch_size / len(run.loader.dataset),
            "loss": loss,
            "learning_rate": run.schedules.learning_rate(step),
            "weight_decay": run.schedules.weight_decay(step),
            "momentum": run.schedules.momentum(step),
            "grad_norm": float(self.grad_norm),
            "context_tokens": self.tokens[0],
            "target_tokens": self.tokens[1],
            "images_per_second": self.images / (time.perf_counter() - self.started),
            "bad_images": len(run.bad_images.indices),
            **run.monitor.report(),
        }
        self.clear()
        return row


def optimizer_step(run: Run, batches: Iterator[dict], window: Window, measure_gradient: bool) -> None:
    """One update from as many forward passes as the global batch needs."""
    accelerator, arguments = run.accelerator, run.arguments
    for _ in range(accelerator.gradient_accumulation_steps):
        batch = next(batches)
        with accelerator.accumulate(run.model):
            pixel_values = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            output = run.model(
                normalize_pixel_values(pixel_values, run.processor.image_mean, run.processor.image_std),
                batch["context_indices"].to(accelerator.device, non_blocking=True),
                batch["target_indices"].to(accelerator.device, non_blocking=True),
            )
            accelerator.backward(output.loss)
            if accelerator.sync_gradients and (measure_gradient or arguments.max_grad_norm):
                limit = arguments.max_grad_norm or float("inf")
                window.grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), limit)
            run.optimizer.step()
            run.optimizer.zero_grad()
        window.add(batch, output)


def train(run: Run) -> None:
    arguments, total_steps = run.arguments, run.schedules.total_steps
    run.model.train()  # from_pretrained leaves a model in evaluation mode
    batches, window = iter(run.loader), Window(run)
    progress = tqdm(
        total=total_steps,
        initial=run.first_step,
        unit="step",
        disable=not (run.accelerator.is_main_process and sys.stderr.isatty()),
    )
    for step in range(run.first_step, total_steps):
        done, last = step + 1, step + 1 == total_steps
        saves = last or done % arguments.save_steps == 0
        evaluates = run.probe is not None and (last or (arguments.eval_steps and done % arguments.eval_steps == 0))
        # A row at every checkpoint: nothing that a resumed run would need is left in the window.
        logs = saves or evaluates or done % arguments.logging_steps == 0
        run.schedules.apply(run.optimizer, step)
        optimizer_step(run, batches, window, measure_gradient=logs)
        run.networks.update_target_encoder(run.schedules.momentum(step))
        progress.update()
        if logs:
            row = window.row(step)
            if evaluates:
                with window.paused():
                    row.update(run.baseline, knn_accuracy=run.probe.knn(run.networks.ijepa))
            record(run, row, progress)
        if saves:
            with window.paused():
                save(run, done)
    progress.close()


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
    if row["collapsing"]:
        tqdm.write(f"WARNING at step {row['step']:,}: {row['reason']}")


# Saving and resuming


def read_state(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "run_state.json").read_text())


def save(run: Run, step: int) -> None:
    """A checkpoint to resume from, and the output directory as a model."""

    def write_extra(directory: Path):
        monitor = {key: torch.as_tensor(value) for key, value in run.monitor.state_dict().items()}
        save_file(monitor, directory / f"monitor_{run.accelerator.process_index}.safetensors")
        if run.accelerator.is_main_process:
            state = {"arguments": dataclasses.asdict(run.arguments), "baseline": run.baseline}
            state["num_images"] = len(run.loader.dataset)
            (directory / "run_state.json").write_text(json.dumps(state))
            run.networks.config.save_pretrained(directory)
            run.processor.save_pretrained(directory)

    save_checkpoint(run.accelerator, run.output_dir / "checkpoints", step, write_extra, run.arguments.keep_checkpoints)
    export(run)


def export(run: Run) -> None:
    """Makes the output directory a model: weights, configuration, image processor, recipe, curves and card."""
    weights = run.accelerator.get_state_dict(run.model)
    if not run.accelerator.is_main_process:
        return
    unfinished = run.output_dir / ".tmp-export"
    run.networks.save_pretrained(unfinished, state_dict=dict(weights))
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
    monitor = load_file(run.checkpoint / f"monitor_{run.accelerator.process_index}.safetensors")
    run.monitor.load_state_dict({"features": monitor["features"], "num_updates": int(monitor["num_updates"])})
    run.baseline = read_state(run.checkpoint)["baseline"]
    metrics = run.output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    rows = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [(line, row) for line, row in rows if row["step"] <= run.first_step]
    run.metrics = [row for _, row in kept]
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        unfinished = metrics.with_name(".tmp-metrics.jsonl")
        unfinished.write_text("".join(line for line, _ in kept))
        unfinished.replace(metrics)


# The run from beginning to end


def random_encoder(run: Run) -> IJepaModel:
    """An untrained encoder of the same architecture: what every probe is compared with."""
    with torch.random.fork_rng():
        torch.manual_seed(run.arguments.seed)
        return IJepaModel._from_config(run.config).to(run.accelerator.device).eval()


def start(run: Run) -> None:
    """Prints the effective values, then loads the checkpoint or measures the random encoder."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    for name, value in effective_values(run).items():
        run.accelerator.print(f"{name:12} {value}")
    run.accelerator.init_trackers(run.output_dir.name)
    if run.checkpoint:
        resume(run)
        run.accelerator.print(f"resuming {run.checkpoint} at step {run.first_step:,}")
    elif run.probe:
        run.baseline = {"random_knn_accuracy": run.probe.knn(random_encoder(run))}


def finish(run: Run) -> None:
    """The table of accuracies, the last export, and the upload."""
    if run.probe:
        encoders = {
            "raw pixels": None,
            "random encoder": random_encoder(run),
            "I-JEPA target encoder": run.networks.ijepa,
            "I-JEPA context encoder": run.networks.context_encoder,
        }
        run.results = format_table([run.probe.row(name, encoder) for name, encoder in encoders.items()])
        export(run)
        run.accelerator.print(f"\nAccuracy on the {run.arguments.validation_split!r} split, frozen features:\n")
        run.accelerator.print(run.results)
    run.accelerator.print(f"\nmodel  {run.output_dir}\ncurves {run.output_dir / 'curves.png'}")
    if run.arguments.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(run)


def close(run: Run) -> None:
    """Frees the networks before the process group, or gloo workers abort at exit now and then."""
    accelerator = run.accelerator
    run.model = run.optimizer = None
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()


def push_to_hub(run: Run) -> None:
    """Uploads the output directory without its checkpoints."""
    repository = create_repo(run.arguments.hub_model_id, private=run.arguments.hub_private, exist_ok=True)
    upload_folder(repo_id=repository.repo_id, folder_path=run.output_dir, ignore_patterns=["checkpoints/*", ".tmp-*"])
    run.accelerator.print(f"pushed {repository.repo_id}")


def main(words: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading and saving, which takes no time beside training
    arguments = parse_pretraining_arguments(sys.argv[1:] if words is None else words)
    try:
        run = build_run(arguments)
    except (ValueError, OSError) as error:
        print(f"run_pretraining.py: error: {error}", file=sys.stderr)
        sys.exit(2)  # the status argparse gives to wrong arguments
    try:
        start(run)
        train(run)
        finish(run)
    except BadImageError as error:
        print(f"run_pretraining.py: error: {error}", file=sys.stderr)
        sys.exit(1)
    close(run)


if __name__ == "__main__":
    main()
