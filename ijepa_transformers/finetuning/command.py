# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa finetune`: fine-tunes an encoder as an image classifier. docs/finetune.md explains the choices."""

import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import yaml
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import disable_progress_bar

from ..arguments import require
from ..data.datasets import FineTuningCollator, FineTuningImages, LabelledImages
from ..data.decoding import BadImageError
from ..data.sources import labels_of, open_split, select_labelled, select_listed
from ..distributed import check_launch, end_process_group
from ..encoders import load_processor
from ..execution import configure, describe
from ..files import write_text
from ..modeling_ijepa import IJepaPreTrainedModel
from .arguments import OWN_GROUPS, PROGRAM, DataArguments, RegularizationArguments, parse_fine_tuning_arguments
from .model import build_model, processed_size, processor_statistics, resize_processor
from .trainer import ClassificationTrainer, plain_value
from .training_arguments import Arguments, default_values


RECIPE = "recipe.yaml"
UNFINISHED = f"{TRAINER_STATE_NAME}, which is written last, is missing or cut off"
FREE_ON_RESUME = ("data", "validation_split")  # places and judges, which do not change what is trained


# Data
def open_labelled(arguments: DataArguments, split: str) -> datasets.Dataset:
    """A labelled split.

    Raises:
        ValueError: if it cannot be opened, is empty, or has an image without a label.
    """
    dataset = open_split(arguments, split, labels="required")
    unlabelled = int((labels_of(dataset) < 0).sum())
    require(not unlabelled, f"{unlabelled} of {len(dataset)} images of the {split!r} split have no label.")
    return dataset


def open_training_split(arguments: DataArguments) -> datasets.Dataset:
    """The training split, or the part of it that few-label arguments choose."""
    dataset = open_labelled(arguments, arguments.train_split)
    if arguments.train_list is not None:
        return dataset.select(select_listed(dataset, arguments.train_list))
    if arguments.images_per_class is None and arguments.label_fraction is None:
        return dataset
    selection = select_labelled(
        labels_of(dataset),
        images_per_class=arguments.images_per_class,
        label_fraction=arguments.label_fraction,
        seed=arguments.subset_seed,
    )
    return dataset.select(selection)


def check_classes(training: datasets.Dataset, validation: datasets.Dataset) -> None:
    """Raises ValueError if images are to be judged by a class that nothing teaches."""
    names = validation.features["label"].names
    known = {training.features["label"].names[label] for label in np.unique(labels_of(training))}
    unknown = sorted({names[label] for label in np.unique(labels_of(validation))} - known)
    require(not unknown, f"No training image has the validation classes {', '.join(map(repr, unknown[:5]))}.")
    require(
        names == training.features["label"].names, "The two splits number their classes differently; use one data set."
    )


def build_augmentation(arguments: RegularizationArguments) -> Callable | None:
    """RandAugment on uint8 crops (C, H, W), or None."""
    if arguments.randaugment_magnitude is None:
        return None
    from torchvision.transforms import v2  # an extra

    return v2.RandAugment(num_ops=arguments.randaugment_num_ops, magnitude=arguments.randaugment_magnitude)


def build_mixers(arguments: RegularizationArguments, num_classes: int) -> list[Callable]:
    """Mixup, cutmix, both or none, on normalised images (B, C, H, W) and labels (B,)."""
    if arguments.mixup_alpha is None and arguments.cutmix_alpha is None:
        return []
    from torchvision.transforms import v2  # an extra

    alphas = {v2.MixUp: arguments.mixup_alpha, v2.CutMix: arguments.cutmix_alpha}
    return [mixer(num_classes=num_classes, alpha=alpha) for mixer, alpha in alphas.items() if alpha is not None]


def build_trainer(arguments: Arguments) -> ClassificationTrainer:
    """Opens and checks everything; only then is something written, the output directory.

    Raises:
        ValueError: if something cannot work.
    """
    check_launch(arguments.training.world_size, "pass --use_cpu")
    check_gpus(arguments.training.n_gpu)
    checkpoint = find_checkpoint(arguments)
    training_data = open_training_split(arguments.data)
    validation_data = None
    if arguments.data.validation_split is not None:
        validation_data = open_labelled(arguments.data, arguments.data.validation_split)
        check_classes(training_data, validation_data)
    set_seed(arguments.training.seed)  # of the fresh head, or of all fresh weights
    model = build_model(arguments.model, training_data.features["label"].names)
    processor = load_processor(arguments.model.model)
    if isinstance(model, IJepaPreTrainedModel) and arguments.training.ddp_find_unused_parameters is None:
        arguments.training.ddp_find_unused_parameters = False  # every trained weight is used; a search takes time
    if arguments.model.image_size is not None:
        processor = resize_processor(processor, arguments.model.height_and_width)
    precision = "bf16" if arguments.training.bf16 else "fp16" if arguments.training.fp16 else "fp32"
    configure(model, arguments.training.device.type, precision, training=True)
    options = build_data(arguments, model, processor, training_data, validation_data)
    return ClassificationTrainer(arguments, checkpoint, model=model, processing_class=processor, **options)


def check_gpus(num_gpus: int) -> None:
    """Raises ValueError if one process has several GPUs: Trainer would make the loss that many times too large."""
    require(
        num_gpus <= 1,
        f"One process cannot train on {num_gpus} GPUs: start it with accelerate launch --num_processes {num_gpus}, or"
        " show it one GPU (CUDA_VISIBLE_DEVICES=0).",
    )


def build_data(arguments: Arguments, model, processor, training_data, validation_data) -> dict:
    """Data sets and collator for Trainer.

    Raises:
        ValueError: if model and image processor do not fit each other.
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
        augment=build_augmentation(arguments.regularization),
        num_channels=num_channels,
        crop_scale=tuple(data.crop_scale),
        crop_ratio=tuple(data.crop_ratio),
        horizontal_flip=data.horizontal_flip,
        interpolation=data.interpolation,
        seed=seed,
    )
    mixers = build_mixers(arguments.regularization, model.config.num_labels)
    return {
        "train_dataset": training_images,
        "eval_dataset": None if validation_data is None else LabelledImages(validation_data, processor, num_channels),
        "data_collator": FineTuningCollator(mean, std, mixers, seed),
    }


def find_checkpoint(arguments: Arguments) -> str | None:
    """The checkpoint to go on from, or None.

    Raises:
        ValueError: if there is none, if output_dir holds another run, or if that run had other data or another model.
    """
    output_dir, wanted = arguments.training.output_dir, arguments.training.resume_from_checkpoint
    checkpoints = checkpoints_in(Path(output_dir))
    if wanted is None:
        occupied = checkpoints or os.path.exists(os.path.join(output_dir, "config.json"))
        require(
            not occupied,
            f"{output_dir!r} holds a run: --resume_from_checkpoint last continues it, or choose another output_dir.",
        )
        return None
    if wanted != "last":
        checkpoints = [Path(wanted)] if os.path.isdir(wanted) else []
    require(checkpoints, f"There is no checkpoint {wanted!r} to go on from in {output_dir!r}.")
    whole = [path for path in checkpoints if is_whole(path)]
    require(whole, f"The checkpoint {str(checkpoints[0])!r} is not whole: {UNFINISHED}.")
    check_recipe(Path(output_dir) / RECIPE, arguments.recipe)
    passed_over = checkpoints[: checkpoints.index(whole[0])]
    if passed_over and arguments.training.process_index == 0:
        names = ", ".join(path.name for path in passed_over)
        print(f"{PROGRAM}: {names} passed over: {UNFINISHED}; {whole[0].name} is whole.", file=sys.stderr)
    return str(whole[0])


def checkpoints_in(output_dir: Path) -> list[Path]:
    """The checkpoints of Trainer, whole or not, the newest first."""
    paths = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether Trainer came to the end of writing it: its state is the last file."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text()))
    except (OSError, ValueError):
        return False


def check_recipe(path: Path, recipe: dict) -> None:
    """Raises ValueError if the first half of a run had other data, another model or other regularization."""
    if not path.exists():  # a checkpoint from elsewhere
        return
    before = yaml.safe_load(path.read_text())
    names = [entry.name for group in OWN_GROUPS for entry in dataclasses.fields(group)]
    defaults, now = default_values(), plain_value(recipe)
    changed = [
        f"{name} was {before.get(name, defaults[name])!r}, is {now.get(name, defaults[name])!r}"
        for name in names
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME
    ]
    require(not changed, f"{str(path.parent)!r} holds a run of other arguments: {'; '.join(changed)}.")


def start(trainer: ClassificationTrainer) -> None:
    """Says what is about to happen, and writes the recipe that repeats it."""
    if not trainer.is_world_process_zero():
        return
    arguments, model = trainer.arguments, trainer.model
    origin = "fresh weights" if arguments.model.from_scratch else f"{arguments.model.encoder} encoder"
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    classes = f"{model.config.num_labels:,} classes"
    print(f"{type(model).__name__} of {arguments.model.model}, {origin}: {trained:,} trained weights, {classes}")
    print(f"{arguments.training.device.type}, {describe(model)}")
    evaluation = "no validation_split, so nothing is evaluated"
    if trainer.eval_dataset is not None:
        evaluation = f"{len(trainer.eval_dataset):,} images to evaluate on"
    print(f"{len(trainer.train_dataset):,} images to train on; {evaluation}", flush=True)
    recipe = yaml.safe_dump(plain_value(arguments.recipe), sort_keys=False)
    write_text(Path(arguments.training.output_dir) / RECIPE, recipe)


def run(trainer: ClassificationTrainer) -> None:
    """Trains, saves, evaluates, and describes the result."""
    metrics = trainer.train(resume_from_checkpoint=trainer.checkpoint).metrics
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    if trainer.is_fsdp_enabled:  # Trainer leaves no model behind where checkpoints are in shards, as by default
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.eval_dataset is not None:
        trainer.results = trainer.evaluate()
        trainer.log_metrics("eval", trainer.results)
        trainer.save_metrics("eval", trainer.results)
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def main(argv: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading and saving
    arguments = parse_fine_tuning_arguments(argv)
    try:
        trainer = build_trainer(arguments)
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(2)  # the status argparse gives to wrong arguments
    try:
        start(trainer)
        run(trainer)
    except BadImageError as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(1)
    accelerator = trainer.accelerator
    del trainer
    end_process_group(accelerator)
