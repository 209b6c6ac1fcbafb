# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa finetune`."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Literal

from transformers import HfArgumentParser, TrainingArguments

from ..arguments import DatasetArguments, argument, require
from ..encoders import one_line


PROGRAM = "run_image_classification.py"
# Secrets, and what a repetition has no use for.
UNRECORDED = ("hub_token", "push_to_hub_token", "resume_from_checkpoint")


# Arguments
@dataclass
class DataArguments(DatasetArguments):
    """Which images, which of their labels, and how they are cropped."""

    _argument_group_name = "data"

    train_split: str = argument("train", "labelled split to train on")
    validation_split: str | None = argument(None, "labelled split to evaluate on; no evaluation by default")
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
        defaults = default_values()
        given = {name: value for name, value in values.items() if value != defaults[name] and name not in UNRECORDED}
        try:
            groups = [group(**{name: values[name] for name in names[group]}) for group in GROUPS]
        except ImportError as error:  # of DeepSpeed, trackers and so on, where a flag asks for them
            raise ValueError(one_line(error)) from None
        return cls(*groups, recipe=given)


def default_values() -> dict:
    """The value of every flag that is not given."""
    return vars(HfArgumentParser(GROUPS).parse_args([]))
