# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa finetune`."""

import ast
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..arguments import (
    DatasetArguments,
    argument,
    arguments_from_keywords,
    build_parser,
    check_flags,
    parse_arguments,
    require,
)


if TYPE_CHECKING:
    from .training_arguments import Arguments


PROGRAM = "ijepa finetune"
DESCRIPTION = "Fine-tunes an encoder to classify images."


@dataclass
class DataArguments(DatasetArguments):
    """Which images, which of their labels, and how they are cropped."""

    argument_group = "data"

    train_split: str = argument("train", "labelled split to train on")
    validation_split: str | None = argument(
        None,
        "labelled split to evaluate on, such as test; auto: validation, or else test (default: no evaluation)",
    )
    images_per_class: int | None = argument(None, "train on so many images of every class (default: all)")
    label_fraction: float | None = argument(
        None, "train on this share of every class, at least one image of each (default: all)"
    )
    subset_seed: int = argument(0, "seed that chooses the images of images_per_class or label_fraction")
    train_list: str | None = argument(
        None, "train on the images that this text file names, one file name per line (default: all)"
    )
    crop_scale: list[float] = argument([0.08, 1.0], "area of the random crop as a share of the image: least, most")
    crop_ratio: list[float] = argument([3 / 4, 4 / 3], "aspect ratio of the random crop: least, most")
    horizontal_flip: bool = argument(True, "mirror half of the images, chosen at random")
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

    argument_group = "model"

    model: str = argument(
        "", "directory or Hub name to start from: a pretrained encoder, or any image classifier of Transformers"
    )
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory; the paper fine-tunes the target encoder"
    )
    from_scratch: bool = argument(
        False, "take only the architecture and the image processor of model, with random weights"
    )
    tune: Literal["all", "head"] = argument(
        "all", "what is trained: all, or only the head; then the encoder is frozen and in evaluation mode"
    )
    image_size: list[int] | None = argument(
        None, "pixels of an image: one number, or height and width (default: as the model)"
    )
    drop_path_rate: float | None = argument(
        None, "stochastic depth: share of images for which the last layer is skipped (default: as the model)"
    )

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
        """`image_size` as a pair. Raises ValueError if it is not given."""
        if self.image_size is None:
            raise ValueError("image_size is not given.")
        return self.image_size[0], self.image_size[-1]

    @property
    def size_in_config(self) -> int | list[int]:
        """`image_size` as a configuration has it, if it is given: one number for a square."""
        height, width = self.height_and_width
        return height if height == width else [height, width]


@dataclass
class RegularizationArguments:
    """What keeps a large encoder from learning few labels by heart. RandAugment, mixup and cutmix need torchvision."""

    argument_group = "regularization"

    randaugment_magnitude: int | None = argument(None, "strength of RandAugment, 0 to 30 (default: no RandAugment)")
    randaugment_num_ops: int = argument(2, "operations of RandAugment per image")
    mixup_alpha: float | None = argument(None, "mixup: shares are drawn from Beta(alpha, alpha) (default: no mixup)")
    cutmix_alpha: float | None = argument(
        None, "the same for cutmix; with both, every batch gets one of them at random (default: no cutmix)"
    )
    label_smoothing: float = argument(0.0, "share of each label that is spread over all classes while training")
    layer_decay: float = argument(
        1.0, "learning rate of a layer divided by that of the layer above; 1: one rate for all"
    )

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


OWN_GROUPS = (DataArguments, ModelArguments, RegularizationArguments)


def training_flags() -> list[str] | None:
    """The names of the fields of `transformers.TrainingArguments`, whose import takes seconds, from its source.

    None if the source has another form than today: then only the import tells the names.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        return None
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    fields = next((node.body for node in classes if node.name == "TrainingArguments" and not node.bases), [])
    names = [
        node.target.id for node in fields if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    return names or None


def check_names(argv: Sequence[str]) -> None:
    """Exits with an error for a mistyped flag before the slow import of TrainingArguments."""
    names = training_flags()
    if names is not None:
        parser = build_parser(OWN_GROUPS, PROGRAM, DESCRIPTION)
        negations = [f"--no_{name}" for name in names]
        check_flags(argv, [*parser.known_flags, *(f"--{name}" for name in names), *negations], parser)


def parse_fine_tuning_arguments(argv: Sequence[str] | None = None) -> "Arguments":
    """The arguments of `ijepa finetune`; see `parse_arguments`."""
    argv = sys.argv[1:] if argv is None else argv
    check_names(argv)
    from .training_arguments import GROUPS, Arguments  # slow to import

    return parse_arguments(argv, GROUPS, Arguments.build, PROGRAM, DESCRIPTION)


def fine_tuning_arguments(**keywords: Any) -> "Arguments":
    """The arguments of `finetune(...)`; see `arguments_from_keywords`."""
    from .training_arguments import GROUPS, Arguments  # slow to import

    return arguments_from_keywords(keywords, GROUPS, Arguments.build, "finetune")
