#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes an encoder to classify images, wholly or its head only, with many labels or few:

    python run_image_classification.py --model DIR --data my/photos --validation_split test --output_dir classifier
    accelerate launch run_image_classification.py --recipe recipes/finetune_in1k_1percent.yaml --data imagenet

The training loop is `transformers.Trainer`; every flag of `TrainingArguments` works, on the command line and in a
recipe. What is left in output_dir opens with `AutoModelForImageClassification`, with the class names in its config.

Shape legend: B images of a batch, C channels, H rows, W columns.
"""

import dataclasses
import importlib.util
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import torch
import yaml
from huggingface_hub import ModelCardData
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils.logging import disable_progress_bar

from ijepa import IJepaPreTrainedModel
from ijepa.checkpointing import write_text
from ijepa.data import (
    BadImageError,
    EpochSampler,
    FineTuningCollator,
    FineTuningImages,
    LabelledImages,
    ProcessedImages,
    build_image_processor,
    labels_of,
    load_image_dataset,
    normalize_pixel_values,
    select_labelled,
    select_listed,
)
from ijepa.distributed import end_process_group
from ijepa.encoders import load_encoder, load_processor, one_line
from ijepa.execution import configure, describe
from ijepa.model_card import fenced_yaml, in_markdown, in_quotes, inherited_license
from ijepa.optimization import layer_decay_groups, parameter_places
from ijepa.probing import accuracy_metric
from ijepa.recipe import argument, check_launch, parse_arguments, require


PROGRAM = "run_image_classification.py"
RECIPE = "recipe.yaml"

# Secrets, and what a repetition has no use for.
UNRECORDED = ("hub_token", "push_to_hub_token", "resume_from_checkpoint")
UNFINISHED = f"{TRAINER_STATE_NAME}, which is written last, is missing or cut off"
FREE_ON_RESUME = ("data", "validation_split")  # places and judges, which do not change what is trained


# Arguments


@dataclass
class DataArguments:
    """Which images, which of their labels, and how they are cropped."""

    _argument_group_name = "data"

    data: str = argument(
        "", "images: a folder (one subfolder per class), Parquet or tar shards, a Hub dataset, or 'digits'"
    )
    data_config: str | None = argument(None, "configuration name of a Hub dataset")
    train_split: str = argument("train", "labelled split to train on")
    validation_split: str | None = argument(None, "labelled split to evaluate on; no evaluation by default")
    image_column: str | None = argument(None, "column of the images; found if there is only one")
    label_column: str | None = argument(None, "column of the labels; found if there is only one")
    images_per_class: int | None = argument(None, "train on so many images of every class")
    label_fraction: float | None = argument(None, "train on this share of every class, at least one image of each")
    subset_seed: int = argument(0, "of the choice of images_per_class or label_fraction")
    train_list: str | None = argument(None, "train on the images this text file names, one file name per line")
    crop_scale: list[float] = argument([0.08, 1.0], "area of the random crop as a share of the image: least, most")
    crop_ratio: list[float] = argument([3 / 4, 4 / 3], "aspect ratio of the random crop: least, most")
    horizontal_flip: bool = argument(True, "mirror every second image at random")
    interpolation: Literal["bilinear", "bicubic"] = argument("bicubic", "resizing of the crop")

    def __post_init__(self):
        require(self.data, "data is missing: name a folder, shards, a Hub dataset, or 'digits'.")
        choices = ("images_per_class", "label_fraction", "train_list")
        given = [name for name in choices if getattr(self, name) is not None]
        require(len(given) < 2, f"{' and '.join(given)} all choose the training images: give one.")
        for name in ("crop_scale", "crop_ratio"):
            require(len(getattr(self, name)) == 2, f"{name} must be two numbers, got {getattr(self, name)}.")


@dataclass
class ModelArguments:
    """What the run starts from, and what of it is trained."""

    _argument_group_name = "model"

    model: str = argument(
        "", "directory or Hub name to start from: pretrained or fine-tuned, this package's or any image classifier's"
    )
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory; the paper fine-tunes the target encoder"
    )
    from_scratch: bool = argument(False, "only the architecture and the image processor of model, with fresh weights")
    tune: Literal["all", "head"] = argument("all", "all, or head: the encoder is frozen and in evaluation mode")
    image_size: list[int] | None = argument(
        None, "pixels of an image, one number or height and width; the model's own size by default"
    )
    drop_path_rate: float | None = argument(None, "stochastic depth of the last layer; as the model says by default")

    def __post_init__(self):
        require(self.model, "model is missing: name a directory or a Hub repository.")
        require(
            self.image_size is None or len(self.image_size) in (1, 2),
            f"image_size must be one number or height and width, got {self.image_size}.",
        )
        require(
            self.drop_path_rate is None or 0 <= self.drop_path_rate < 1,
            f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}.",
        )

    @property
    def height_and_width(self) -> tuple[int, int]:
        """`image_size` as a pair, if it is given."""
        return self.image_size[0], self.image_size[-1]

    @property
    def size_in_config(self) -> int | list[int]:
        """`image_size` as a configuration has it, if it is given: one number for a square."""
        height, width = self.height_and_width
        return height if height == width else [height, width]


@dataclass
class RegularizationArguments:
    """What keeps a large encoder from learning few labels by heart. RandAugment, mixup and cutmix need torchvision."""

    _argument_group_name = "regularization"

    randaugment_magnitude: int | None = argument(None, "strength of RandAugment, 0 to 30; no RandAugment by default")
    randaugment_num_ops: int = argument(2, "operations of RandAugment per image")
    mixup_alpha: float | None = argument(None, "mixup: shares drawn from Beta(alpha, alpha); no mixup by default")
    cutmix_alpha: float | None = argument(
        None, "cutmix, likewise; with mixup_alpha too, every batch gets one of both at random"
    )
    label_smoothing: float = argument(0.0, "share of each label that is spread over all classes while training")
    layer_decay: float = argument(1.0, "learning rate of a layer over that of the layer above; 1 is one rate for all")

    def __post_init__(self):
        for name in ("mixup_alpha", "cutmix_alpha"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}.")
        magnitude = self.randaugment_magnitude
        require(magnitude is None or 0 <= magnitude <= 30, f"randaugment_magnitude must be 0 to 30, got {magnitude}.")
        require(self.randaugment_num_ops >= 1, f"randaugment_num_ops must be at least 1: {self.randaugment_num_ops}.")
        require(0 <= self.label_smoothing < 1, f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        require(0 < self.layer_decay <= 1, f"layer_decay must lie in (0, 1], got {self.layer_decay}.")
        self._check_torchvision()

    def _check_torchvision(self):
        names = ("randaugment_magnitude", "mixup_alpha", "cutmix_alpha")
        needing = [name for name in names if getattr(self, name) is not None]
        require(
            not needing or importlib.util.find_spec("torchvision") is not None,
            f'{", ".join(needing)} needs torchvision: pip install "ijepa-transformers[vision]".',
        )


@dataclass
class FineTuningArguments(TrainingArguments):
    """`TrainingArguments` with the defaults of fine-tuning an encoder."""

    _argument_group_name = "training"

    num_train_epochs: float = argument(50, "passes over the training images")
    per_device_train_batch_size: int = argument(64, "images per process and forward pass")
    per_device_eval_batch_size: int = argument(64, "images per process and forward pass in evaluation")
    learning_rate: float = argument(5e-4, "peak learning rate, of the head where layer_decay is below 1")
    weight_decay: float = argument(0.05, "weight decay; none on biases and layer norms")
    lr_scheduler_type: str = argument("cosine", "schedule of the learning rate")
    warmup_steps: float = argument(0.1, "steps of linear warm-up; a share of the run below 1")
    logging_steps: float = argument(50, "optimizer steps between lines of the log; a share of the run below 1")
    save_strategy: str = argument("epoch", "when checkpoints are written: no, steps, epoch or best")
    save_total_limit: int | None = argument(2, "how many checkpoints are kept")
    metric_for_best_model: str | None = argument("accuracy", "what load_best_model_at_end goes by")
    dataloader_num_workers: int = argument(4, "image loading processes per process; 0 loads in it")
    remove_unused_columns: bool = argument(False, "must stay False: nothing that the data set yields is unused")

    def __post_init__(self):
        require(self.output_dir, "output_dir is missing: name the directory the classifier is written to.")
        require(not self.remove_unused_columns, "remove_unused_columns must stay False.")
        require(
            self.label_smoothing_factor == 0,
            f"Give label_smoothing {self.label_smoothing_factor} instead of label_smoothing_factor: that one cannot"
            " smooth the labels of mixup.",
        )
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"

    def __getstate__(self) -> dict:
        """Trainer pickles its arguments into training_args.bin, which it uploads: nobody's token belongs there."""
        return {**vars(self), **{name: None for name in vars(self) if name.endswith("hub_token")}}

    @property
    def order_seed(self) -> int:
        """Seed of the data order, of crops and of augmentation."""
        return self.seed if self.data_seed is None else self.data_seed


GROUPS = (DataArguments, ModelArguments, RegularizationArguments, FineTuningArguments)


@dataclass
class Arguments:
    """Every argument of `run_image_classification.py`.

    Raises:
        ValueError: with the offending value, if two contradict each other.
    """

    data: DataArguments
    model: ModelArguments
    regularization: RegularizationArguments
    training: FineTuningArguments
    recipe: dict  # what was given, if it differs from the defaults

    def __post_init__(self):
        require(
            self.data.validation_split or self.training.eval_strategy == "no",
            f"eval_strategy {self.training.eval_strategy.value} needs a validation_split.",
        )

    @classmethod
    def build(cls, **values) -> "Arguments":
        """Arguments from the values of all flags by name."""
        names = {group: [entry.name for entry in dataclasses.fields(group) if entry.init] for group in GROUPS}
        defaults = _defaults()
        given = {name: value for name, value in values.items() if value != defaults[name] and name not in UNRECORDED}
        try:
            groups = [group(**{name: values[name] for name in names[group]}) for group in GROUPS]
        except ImportError as error:  # of DeepSpeed, trackers and so on, where a flag asks for them
            raise ValueError(one_line(error)) from None
        return cls(*groups, recipe=given)


def _defaults() -> dict:
    """The value of every flag that is not given."""
    return vars(HfArgumentParser(GROUPS).parse_args([]))


# Data


def open_split(arguments: DataArguments, split: str) -> datasets.Dataset:
    """A labelled split.

    Raises:
        ValueError: if it cannot be opened, is empty, or has an image without a label.
    """
    dataset = load_image_dataset(
        arguments.data,
        split=split,
        config_name=arguments.data_config,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    require(len(dataset), f"The {split!r} split of {arguments.data!r} is empty.")
    require("label" in dataset.column_names, f"The {split!r} split of {arguments.data!r} has no labels.")
    unlabelled = int((labels_of(dataset) < 0).sum())
    require(not unlabelled, f"{unlabelled} of {len(dataset)} images of the {split!r} split have no label.")
    return dataset


def open_training_split(arguments: DataArguments) -> datasets.Dataset:
    """The training split, or the part of it that few-label arguments choose."""
    dataset = open_split(arguments, arguments.train_split)
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


# Image processor


def resize_processor(processor, image_size: tuple[int, int]):
    """The same image processor for images of another size; its shorter side over its crop stays what it was."""
    settings = processor.to_dict()
    height, width = image_size
    if not settings.get("do_center_crop"):
        return type(processor).from_dict({**settings, "size": {"height": height, "width": width}})
    size, crop = settings["size"], settings["crop_size"]
    ratio = size.get("shortest_edge", size.get("height")) / crop["height"]
    sizes = build_image_processor(image_size, resize_ratio=ratio).to_dict()
    return type(processor).from_dict({**settings, "size": sizes["size"], "crop_size": sizes["crop_size"]})


def processor_statistics(processor, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that the processor normalises by.

    Raises:
        ValueError: if it does something else to pixels, which training images would then be without.
    """
    mean, std = [0.0] * num_channels, [1.0] * num_channels
    if processor.do_normalize:
        mean, std = list(processor.image_mean), list(processor.image_std)
    grey = np.full((256, 256, num_channels), 100, dtype=np.uint8)
    processed = ProcessedImages(None, processor, num_channels).prepare(grey)  # (C, H, W)
    expected = normalize_pixel_values(torch.from_numpy(grey).permute(2, 0, 1), mean, std)[:, :1, :1]
    require(
        torch.allclose(processed, expected.expand_as(processed), atol=1e-4),
        f"{type(processor).__name__} does more than resize, crop and normalise by {mean} and {std}.",
    )
    return mean, std


def processed_size(processor, num_channels: int) -> tuple[int, int]:
    """Height and width of what the processor gives."""
    blank = np.zeros((256, 256, num_channels), dtype=np.uint8)
    return tuple(ProcessedImages(None, processor, num_channels).prepare(blank).shape[-2:])


# Model


def build_config(arguments: ModelArguments, class_names: Sequence[str]) -> PreTrainedConfig:
    """The configuration of the classifier, but for another image size of pretrained weights.

    Raises:
        ValueError: if there is none, or it knows no stochastic depth and that is asked for.
    """
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {arguments.model!r} cannot be opened: {one_line(error)}") from error
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    config.problem_type = "single_label_classification"
    if arguments.drop_path_rate is not None:
        require(hasattr(config, "drop_path_rate"), f"{config.model_type} models have no drop_path_rate.")
        config.drop_path_rate = arguments.drop_path_rate
    if arguments.from_scratch and arguments.image_size is not None:
        config.image_size = arguments.size_in_config
    return config


def build_model(arguments: ModelArguments, class_names: Sequence[str]) -> PreTrainedModel:
    """The classifier to train, with float32 weights.

    Raises:
        ValueError: if it cannot be opened, or cannot take the image size.
    """
    config = build_config(arguments, class_names)
    with quiet_loading():
        model = load_model(arguments, config)
    if arguments.image_size is not None and not arguments.from_scratch:
        require(hasattr(model, "resize_image"), f"image_size is for I-JEPA, not for {type(model).__name__}.")
        model.resize_image(arguments.size_in_config)
    if arguments.tune == "head":
        freeze_encoder(model)
    # Some stock classes save their weights under early names, by which Trainer could not read a checkpoint back.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    return model


def load_model(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """Fresh weights, those of the context encoder under a fresh head, or all that the directory has.

    Raises:
        ValueError: if it cannot be opened, or lacks weights of the encoder.
    """
    start_from_context = arguments.encoder == "context" and not arguments.from_scratch
    encoder = load_encoder(arguments.model, "context", torch.float32) if start_from_context else None
    try:
        if encoder is None and not arguments.from_scratch:
            return load_classifier(arguments.model, config)
        model = AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {arguments.model!r} cannot be opened: {one_line(error)}") from error
    if encoder is not None:
        model.base_model.load_state_dict(encoder.state_dict())
    return model


def load_classifier(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of a directory, with its head if that is for as many classes, else with a fresh one."""
    model, loading = AutoModelForImageClassification.from_pretrained(
        source, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
    )
    fresh = set(loading["missing_keys"]) | {key for key, *_ in loading["mismatched_keys"]}
    lost = sorted(key for key in fresh if key.startswith(f"{model.base_model_prefix}."))
    require(not lost, f"it lacks {len(lost)} weights of the encoder, for example {lost[:1]}.")
    return model


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No warnings that a fresh head means nothing until it is fine-tuned: that is what happens next."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ijepa")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def freeze_encoder(model: PreTrainedModel) -> None:
    """Takes the encoder out of training: no gradient, no dropout, no stochastic depth.

    Raises:
        ValueError: if encoder and head cannot be told apart.
    """
    encoder = model.base_model
    require(encoder is not model, f"{type(model).__name__} has no encoder beside its head, so tune cannot be head.")
    encoder.requires_grad_(False)
    # Before each forward pass, because Trainer puts the whole model into training mode before each step.
    encoder.register_forward_pre_hook(lambda module, inputs: module.eval() and None)


# Training


def classification_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, label_smoothing: float = 0.0):
    """Cross-entropy in float32, the mean over all images of an optimizer step.

    Args:
        outputs: with `logits` (B, classes).
        labels: (B,) class ids, or (B, classes) shares of mixed images.
        num_items_in_batch: numbers in the labels of the whole step, as Trainer counts them: over accumulation and
            processes, so that a short last batch weighs no more than it should; those of `labels` by default.
        label_smoothing: share of each label that is spread over all classes; only where gradients are, so that an
            evaluation measures the plain cross-entropy.
    """
    smoothing = label_smoothing if torch.is_grad_enabled() else 0.0
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing
    )
    num_items = labels.numel() if num_items_in_batch is None else num_items_in_batch
    # Mixed labels hold `classes` numbers per image.
    return total * (labels.shape[1] if labels.ndim == 2 else 1) / num_items


def classification_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracies of logits (images, classes), and how many images they are over."""
    logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    accuracies = accuracy_metric().compute(predictions=logits, references=prediction.label_ids)
    return {**accuracies, "images": len(prediction.label_ids)}


class SetEpoch(TrainerCallback):
    """Tells the sampler which epoch begins, also in the middle of a resumed one."""

    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.epoch = int(state.epoch or 0)


class ClassificationTrainer(Trainer):
    """`Trainer` with keyed images, layer-wise learning rates and this package's model card."""

    def __init__(self, arguments: Arguments, checkpoint: str | None, **options):
        self.arguments, self.checkpoint = arguments, checkpoint
        # Of the model as it is, since FSDP version 1 wraps it before the optimizer is made. Raises for unknown layers.
        self.places = parameter_places(options["model"], arguments.regularization.layer_decay)
        self.train_sampler = EpochSampler(len(options["train_dataset"]), arguments.training.order_seed)
        self.results = {}  # of the last evaluation
        smoothing = arguments.regularization.label_smoothing
        super().__init__(
            args=arguments.training,
            callbacks=[SetEpoch(self.train_sampler)],
            compute_loss_func=partial(classification_loss, label_smoothing=smoothing),
            compute_metrics=classification_metrics,
            **options,
        )
        self.model_accepts_loss_kwargs = False  # the loss takes the number of items; the encoder has no use for it

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        return self.train_sampler

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        check_sharding(getattr(self.accelerator.state, "fsdp_plugin", None))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = self.parameter_groups(model)
            self.optimizer_cls_and_kwargs = optimizer_class, {**settings, "params": groups}
        return super().create_optimizer(model)

    def parameter_groups(self, model: PreTrainedModel) -> list[dict]:
        layer_decay = self.arguments.regularization.layer_decay
        return layer_decay_groups(model, self.args.learning_rate, self.args.weight_decay, layer_decay, self.places)

    def _issue_warnings_after_load(self, load_result) -> None:
        """Weights that a checkpoint has under other names would stay as they are, under a mere warning."""
        require(
            not load_result.missing_keys and not load_result.unexpected_keys,
            f"The checkpoint lacks {load_result.missing_keys[:1]} and has {load_result.unexpected_keys[:1]} instead.",
        )

    def create_model_card(self, *args, **kwargs) -> None:
        if self.is_world_process_zero():
            write_card(self)


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
        validation_data = open_split(arguments.data, arguments.data.validation_split)
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


def check_sharding(plugin) -> None:
    """Raises ValueError if FSDP (None: there is none) leaves no weights of their own to give learning rates to."""
    require(
        plugin is None or plugin.fsdp_version != 1 or plugin.use_orig_params,
        "FSDP version 1 needs use_orig_params (--fsdp_use_orig_params true): weights that it flattens into one have no"
        " learning rate and no weight decay of their own.",
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
    names = [entry.name for group in GROUPS[:-1] for entry in dataclasses.fields(group)]
    defaults, now = _defaults(), _plain(recipe)
    changed = [
        f"{name} was {before.get(name, defaults[name])!r}, is {now.get(name, defaults[name])!r}"
        for name in names
        if before.get(name) != now.get(name) and name not in FREE_ON_RESUME
    ]
    require(not changed, f"{str(path.parent)!r} holds a run of other arguments: {'; '.join(changed)}.")


def _plain(recipe: dict) -> dict:
    """A recipe in values that YAML keeps."""
    return {name: getattr(value, "value", value) for name, value in recipe.items()}


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
    recipe = yaml.safe_dump(_plain(arguments.recipe), sort_keys=False)
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


# Model card


USAGE = """\
from transformers import pipeline

classifier = pipeline("image-classification", "{name}")
classifier("image.png")"""

# The pipeline makes every image RGB, which an image processor for one channel refuses.
USAGE_OF_GREY = """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModelForImageClassification.from_pretrained("{name}")
logits = model(**processor(Image.open("image.png").convert("L"), return_tensors="pt")).logits
model.config.id2label[logits.argmax().item()]"""

CARD = """\
# {name}

An image classifier for {num_classes} classes ({classes}), {origin} by ijepa-transformers.

```python
{usage}
```

## Training

- data: {data}, {num_images:,} images of the split {split!r}
- base model: {model}

Arguments that differ from the defaults (`recipe.yaml`):

{recipe}
{results}"""


def write_card(trainer: ClassificationTrainer) -> None:
    """README.md of the output directory: base model, data, arguments and result."""
    arguments = trainer.arguments
    names, source = list(trainer.model.config.id2label.values()), arguments.model.model
    origin = {"all": "fine-tuned", "head": "with a trained head on a frozen encoder,"}[arguments.model.tune]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["ijepa"] if trainer.model.config.model_type == "ijepa" else [],
        # The Hub refuses a card whose base_model is a path; the licence of a local directory still carries over.
        base_model=None if Path(source).exists() or arguments.model.from_scratch else source,
        license=None if arguments.model.from_scratch else inherited_license(source),
    )
    lines = [f"- {key.removeprefix('eval_')}: {value:.4g}" for key, value in trainer.results.items()]
    name = trainer.args.hub_model_id or Path(trainer.args.output_dir).name
    is_grey = getattr(trainer.model.config, "num_channels", 3) == 1
    body = CARD.format(
        name=in_markdown(name),
        usage=(USAGE_OF_GREY if is_grey else USAGE).format(name=in_quotes(name)),
        num_classes=len(names),
        classes=", ".join(map(in_markdown, names[:10])) + (", ..." if len(names) > 10 else ""),
        origin="trained from scratch" if arguments.model.from_scratch else origin,
        data=in_markdown(arguments.data.data),
        num_images=len(trainer.train_dataset),
        split=arguments.data.train_split,
        model=in_markdown(source),
        recipe=fenced_yaml(_plain(arguments.recipe)),
        results=f"\n## Results on {arguments.data.validation_split!r}\n\n" + "\n".join(lines) + "\n" if lines else "",
    )
    # Written directly: ModelCard.save and ModelCard.validate may ask the Hub.
    write_text(Path(trainer.args.output_dir) / "README.md", f"---\n{data.to_yaml()}\n---\n\n{body}")


def main(words: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading and saving
    words = sys.argv[1:] if words is None else words
    arguments = parse_arguments(words, GROUPS, Arguments.build, PROGRAM, "Fine-tunes an encoder to classify images.")
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


if __name__ == "__main__":
    main()
