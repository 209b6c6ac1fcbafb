# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa finetune`: fine-tunes an encoder as an image classifier. docs/finetune.md explains the choices."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from accelerate import PartialState
from transformers import BaseImageProcessor, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from ..api import Result, process_as_before
from ..arguments import require
from ..data.bit_depth import look_at_dataset, setting_of, settle
from ..data.datasets import FineTuningCollator, FineTuningImages, LabelledImages
from ..data.labels import (
    class_counts,
    class_names,
    has_several,
    label_array,
    labels_of,
    num_unlabelled,
)
from ..data.notices import counted
from ..data.selection import select_labelled, select_listed
from ..data.sources import open_split, opened_once, split_to_judge_on
from ..distributed import check_launch, end_process_group, on_main_process
from ..encoders import load_processor
from ..execution import configure
from ..failures import FAILED, REFUSED, end_workers, failures_told
from ..files import check_output_directory, refuse_other_files, write_text
from ..locks import OutputLock
from ..modeling_ijepa import IJepaPreTrainedModel
from ..preemption import PREEMPTED, Preempted
from ..trackers import quiet_writers
from .arguments import (
    PROGRAM,
    DataArguments,
    RegularizationArguments,
    fine_tuning_arguments,
    parse_fine_tuning_arguments,
)
from .checkpointing import check_same_run, find_checkpoint, plain_values, state_of, step_of
from .messages import show_head, show_results
from .model import build_model, processed_size, processor_statistics, resize_processor
from .trainer import ClassificationTrainer, total_steps
from .training_arguments import Arguments, FineTuningArguments


_RECIPE = "recipe.yaml"
_WORKERS = "dataloader_num_workers"


# Data
def _open_labelled(arguments: DataArguments, split: str) -> datasets.Dataset:
    """A labelled split.

    Raises:
        ValueError: if it cannot be opened, is empty, or has an image without a label.
    """
    dataset = open_split(arguments, split, labels="required")
    unlabelled = num_unlabelled(dataset)
    require(
        not unlabelled,
        f"{unlabelled:,} of {counted(len(dataset), 'image')} of the {split!r} split"
        f" {'has' if unlabelled == 1 else 'have'} no label.",
    )
    return dataset


def _require_two_classes(dataset: datasets.Dataset, arguments: DataArguments) -> None:
    """Raises ValueError if all training images have the same label."""
    present = _present_classes(dataset)
    require(
        len(present) > 1,
        f"The {arguments.train_split!r} split of {arguments.data!r} has only one class, {present[:1]}; a classifier"
        " needs two.",
    )


def _present_classes(dataset: datasets.Dataset) -> list[str]:
    """The names of the classes that have an image."""
    return [name for name, count in zip(class_names(dataset), class_counts(dataset), strict=True) if count]


def _open_training_split(arguments: DataArguments) -> datasets.Dataset:
    """The training split, or the part of it that the arguments for few labels choose."""
    dataset = _open_labelled(arguments, arguments.train_split)
    if arguments.train_list is not None:
        return dataset.select(select_listed(dataset, arguments.train_list))
    if arguments.images_per_class is None and arguments.label_fraction is None:
        return dataset
    require(
        not has_several(dataset),
        "images_per_class and label_fraction choose images by their class, and here an image has a list of classes:"
        " name the images with train_list.",
    )
    selection = select_labelled(
        labels_of(dataset),
        images_per_class=arguments.images_per_class,
        label_fraction=arguments.label_fraction,
        seed=arguments.subset_seed,
    )
    return dataset.select(selection)


def _check_classes(training: datasets.Dataset, validation: datasets.Dataset) -> None:
    """Raises ValueError if a validation class has no training image, or if the splits number classes differently."""
    known, needed = _present_classes(training), _present_classes(validation)
    unknown = [name for name in needed if name not in known]
    require(not unknown, f"No training image has the validation classes {', '.join(map(repr, unknown[:5]))}.")
    require(
        class_names(validation) == class_names(training),
        "The two splits number their classes differently; use one data set.",
    )


def _build_augmentation(
    arguments: RegularizationArguments, num_channels: int
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """RandAugment for uint8 crops (C, H, W), or None. Raises ValueError if the channels are no colours."""
    if arguments.randaugment_magnitude is None:
        return None
    require(num_channels in (1, 3), f"randaugment_magnitude is for grey and colours, not for {num_channels} channels.")
    from torchvision.transforms import v2  # an extra of the package, which may not be installed

    return v2.RandAugment(num_ops=arguments.randaugment_num_ops, magnitude=arguments.randaugment_magnitude)


def _build_mixers(arguments: RegularizationArguments, num_classes: int) -> list[Callable]:
    """Mixup, cutmix, both or none, for normalised images (B, C, H, W) and labels (B,)."""
    if arguments.mixup_alpha is None and arguments.cutmix_alpha is None:
        return []
    from torchvision.transforms import v2  # an extra of the package, which may not be installed

    alphas = {v2.MixUp: arguments.mixup_alpha, v2.CutMix: arguments.cutmix_alpha}
    return [mixer(num_classes=num_classes, alpha=alpha) for mixer, alpha in alphas.items() if alpha is not None]


@opened_once()
def build_trainer(arguments: Arguments, lock: OutputLock | None = None) -> ClassificationTrainer:
    """Opens and checks everything. The output directory is made and locked after all checks.

    Raises:
        ValueError: if something cannot be opened, or if the arguments cannot work.
    """
    check_launch(arguments.training.world_size, "pass --use_cpu")
    _check_gpus(arguments.training.n_gpu)
    output_dir = Path(str(arguments.training.output_dir))
    check_output_directory(output_dir)
    lock = lock or OutputLock(output_dir)
    on_main_process(PartialState(), lock.take_if_there)
    checkpoint = find_checkpoint(arguments)
    on_main_process(PartialState(), lambda: refuse_other_files(output_dir, [_RECIPE, "checkpoint-*"]))
    training_data = _open_training_split(arguments.data)
    names = class_names(training_data)
    state = state_of(arguments, training_data, names, label_array(training_data))
    if checkpoint is not None:
        state = check_same_run(checkpoint, state)
    _check_length(arguments.training, len(training_data), checkpoint)
    validation_data = None
    if arguments.data.validation_split is not None:
        arguments.data.validation_split = split_to_judge_on(arguments.data, arguments.data.validation_split)
    if arguments.data.validation_split is not None:
        validation_data = _open_labelled(arguments.data, arguments.data.validation_split)
        _check_classes(training_data, validation_data)
    _require_two_classes(training_data, arguments.data)
    set_seed(arguments.training.seed)  # for the weights that are new: those of the head, or all
    model, head = build_model(arguments.model, names, has_several(training_data))
    processor = load_processor(arguments.model.model)
    if isinstance(model, IJepaPreTrainedModel) and arguments.training.ddp_find_unused_parameters is None:
        arguments.training.ddp_find_unused_parameters = False  # all trained weights are used; a search takes time
    if arguments.model.image_size is not None:
        processor = resize_processor(processor, arguments.model.height_and_width)
    configure(model, arguments.training.device.type, arguments.training.precision, training=True)
    channels = getattr(model.config, "num_channels", 3)
    sample = look_at_dataset(training_data, channels, arguments.data.data)
    settle(processor, sample, arguments.data.sixteen_bit_max)
    options = _build_data(arguments, model, processor, training_data, validation_data)
    trainer = ClassificationTrainer(arguments, checkpoint, state, model=model, processing_class=processor, **options)
    trainer.head = head
    on_main_process(PartialState(), lock.claim)
    return trainer


def _check_gpus(num_gpus: int) -> None:
    """Raises ValueError if one process has several GPUs. `Trainer` would multiply the loss by their number."""
    require(
        num_gpus <= 1,
        f"One process cannot train on {num_gpus} GPUs: start it with ijepa launch --num_processes {num_gpus} finetune"
        " ..., or use one GPU (CUDA_VISIBLE_DEVICES=0).",
    )


def _build_data(
    arguments: Arguments,
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    training_data: datasets.Dataset,
    validation_data: datasets.Dataset | None,
) -> dict[str, Any]:
    """Data sets and collator, as options of `Trainer`.

    Raises:
        ValueError: if the image processor's size is not the model's, or if it does more than resize and normalise.
    """
    num_channels = getattr(model.config, "num_channels", 3)
    image_size = processed_size(processor, num_channels)
    mean, std = processor_statistics(processor, num_channels)
    expected = getattr(model.config, "image_height_and_width", image_size)
    require(image_size == expected, f"The image processor gives {image_size} pixels, the model takes {expected}.")
    data, seed = arguments.data, arguments.training.order_seed
    training_images = FineTuningImages(
        training_data,
        image_size,
        augment=_build_augmentation(arguments.regularization, num_channels),
        num_channels=num_channels,
        sixteen_bit_max=setting_of(processor),
        crop_scale=(data.crop_scale[0], data.crop_scale[1]),
        crop_ratio=(data.crop_ratio[0], data.crop_ratio[1]),
        horizontal_flip=data.horizontal_flip,
        interpolation=data.interpolation,
        seed=seed,
    )
    num_classes = len(class_names(training_data))
    mixers = _build_mixers(arguments.regularization, num_classes)
    return {
        "train_dataset": training_images,
        "eval_dataset": None if validation_data is None else LabelledImages(validation_data, processor, num_channels),
        "data_collator": FineTuningCollator(
            mean, std, mixers, seed, num_classes if has_several(training_data) else None
        ),
    }


def _check_length(arguments: FineTuningArguments, num_images: int, checkpoint: Path | None) -> None:
    """Raises ValueError if the run has no step, or fewer than were done already."""
    batch_size, processes = arguments.train_batch_size, arguments.world_size
    batches = num_images / (batch_size * processes)
    require(
        batches >= 1 or not arguments.dataloader_drop_last,
        f"dataloader_drop_last leaves no batch: the {num_images:,} training images are fewer than"
        f" per_device_train_batch_size {batch_size} x {processes} {'process' if processes == 1 else 'processes'}.",
    )
    total = total_steps(arguments, num_images)
    require(total > 0, f"The run has no step: num_train_epochs is {arguments.num_train_epochs}.")
    done = step_of(checkpoint) if checkpoint else 0
    require(done <= total, f"{checkpoint} is beyond the end of the run: {done:,} steps are done, of {total:,}.")


def start(trainer: ClassificationTrainer) -> None:
    """Prints the head, and writes the recipe that repeats the run."""
    if not trainer.is_world_process_zero():
        return
    arguments = trainer.arguments
    show_head(trainer, total_steps(trainer.args, len(trainer.train_dataset)))
    recipe = yaml.safe_dump(plain_values(arguments.recipe), sort_keys=False)
    write_text(Path(arguments.training.output_dir) / _RECIPE, recipe)


@quiet_writers()
def run(trainer: ClassificationTrainer) -> dict[str, float]:
    """Trains, saves and evaluates the classifier, and writes its model card. Returns the metrics of training."""
    metrics = trainer.train_to_the_end()
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_fsdp_enabled:  # by default `Trainer` saves weights in shards, and no whole model
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    with trainer.exporting():
        if trainer.eval_dataset is not None:
            trainer.results = trainer.evaluate()
            trainer.save_metrics("eval", trainer.results)
    trainer.create_model_card()
    if trainer.is_world_process_zero():
        show_results(trainer)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return metrics


def execute(arguments: Arguments, argv: Sequence[str] = ()) -> None:
    """Carries out the command of the parsed arguments. Exits as a command."""
    disable_progress_bar()  # of Transformers' loading and saving
    status = 0
    with OutputLock(Path(str(arguments.training.output_dir))) as lock:
        with failures_told(PROGRAM, REFUSED, _WORKERS):
            trainer = build_trainer(arguments, lock)
        with failures_told(PROGRAM, FAILED, _WORKERS):
            start(trainer)
            try:
                run(trainer)
            except Preempted:
                end_workers()
                status = PREEMPTED
    accelerator = trainer.accelerator
    del trainer
    end_process_group(accelerator)
    if status:
        sys.exit(status)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(parse_fine_tuning_arguments(argv))


def finetune(**keywords: Any) -> Result:
    """Fine-tunes an encoder as an image classifier: `ijepa finetune` as a function.

    Args:
        keywords: the flags of `ijepa finetune --help` by name, `recipe` among them.

    Returns:
        output_dir and the metrics of training and of the last evaluation.

    Raises:
        TypeError: for an unknown keyword.
        ValueError, OSError: with one sentence, where the command would end with an error.
        Preempted: after a signal in the main thread. A checkpoint is saved; `resume_from_checkpoint="last"` continues.
    """
    others = multiprocessing.active_children()
    with process_as_before():
        disable_progress_bar()
        arguments = fine_tuning_arguments(**keywords)
        with OutputLock(Path(str(arguments.training.output_dir))) as lock:
            trainer = build_trainer(arguments, lock)
            try:
                start(trainer)
                metrics = {**run(trainer), **trainer.results}
            except Preempted:
                end_workers(others)
                end_process_group(trainer.accelerator)
                raise
        accelerator = trainer.accelerator
        del trainer
        end_process_group(accelerator)
    return Result(Path(arguments.training.output_dir), metrics)
