# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of pretraining: data, model, optimization, output.

Every argument is a recipe key, a command-line flag and a keyword of `pretrain`.
"""

import dataclasses
import os
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..arguments import (
    DatasetArguments,
    argument,
    arguments_from_keywords,
    effective_values,
    parse_arguments,
    require,
    require_interval,
    require_numbers,
    require_text,
    require_workers,
    unused_settings,
)
from ..files import write_text
from ..mask_arguments import MaskArguments, without_removed_keys


AUTO = "auto"  # a value that follows from the GPU, the grid or the length of the run
PROGRAM = "ijepa pretrain"
LARGEST_SEED = 2**31 - 1  # NumPy takes 32 bits, and every process adds its rank
MAX_CHANNELS = 16  # data.decoding has it too, whose import is slow
SIZES = ("tiny", "small", "base", "large", "huge", "giant")  # the keys of IJEPA_SIZES, whose import is slow


@dataclass
class DataArguments(DatasetArguments):
    """Which images, and how they are cropped."""

    argument_group = "data"

    train_split: str = argument("train", "split to pretrain on")
    validation_data: str | None = argument(
        None, "labelled images for the k-NN, with both splits (default: those of data; needed with streaming)"
    )
    validation_split: str | None = argument(
        None,
        "split on which the k-NN is measured, such as test; auto: validation, or else test. It needs labels, and so"
        " does train_split (default: no k-NN)",
    )
    crop_scale: list[float] = argument([0.3, 1.0], "area of the random crop as a share of the image: least, most")
    crop_ratio: list[float] = argument([3 / 4, 4 / 3], "aspect ratio of the random crop: least, most")
    horizontal_flip: bool = argument(
        False, "mirror half of the images, chosen at random (the published recipe does not)"
    )
    interpolation: str = argument("bilinear", "resizing of the crop", ("bilinear", "bicubic"))
    fast_large_photos: bool = argument(
        False, "decode large JPEG photos at a half to an eighth of their size: faster, pixels differ a little"
    )
    cache_images: str = argument(
        AUTO,
        "keep decoded images in memory: auto (if they fit in a quarter of the free memory), ram (as many as fit in"
        " half of it) or none",
        (AUTO, "ram", "none"),
    )
    image_mean: list[float] | None = argument(
        None, "mean of each channel, of pixels from 0 to 1 (default: that of init_from, or ImageNet's)"
    )
    image_std: list[float] | None = argument(
        None, "standard deviation of each channel, of pixels from 0 to 1 (default: that of init_from, or ImageNet's)"
    )
    eval_resize_ratio: float = argument(
        256 / 224,
        "in evaluation and in the saved image processor: shorter side of the resized image over the side of its"
        " centre crop",
    )
    max_bad_images: float = argument(
        0.01, "stop when more images than this cannot be read: below 1 a share of the data, from 1 on a number"
    )
    streaming: bool = argument(
        False, "read Parquet, tar or Arrow shards one after the other, also from hf:// or s3://"
    )
    num_images: int | None = argument(
        None, "with streaming: images of the training split; needed for tar shards, which do not say it"
    )
    shuffle_buffer: int = argument(1000, "with streaming: images that each loading process shuffles together")
    num_workers: int = argument(4, "processes that load images, per training process; 0: it loads them itself")

    @staticmethod
    def unused_settings(values: Mapping[str, Any]) -> dict[str, str]:
        """The settings that do nothing without streaming, with the reason."""
        return {} if values.get("streaming") else dict.fromkeys(("num_images", "shuffle_buffer"), "streaming false")

    def _check_data(self):
        require(
            not (self.streaming and self.validation_split and not self.validation_data),
            "streaming cannot look images up for validation_split: name validation_data too.",
        )
        require(self.data, "data is missing: name a folder, shards, a Hub dataset, or 'digits'.")
        require_text(self, "data_config", "train_split", "validation_split", "image_column", "label_column")
        require_text(self, "validation_data")
        require_numbers(self, "max_bad_images", least=0)
        require_workers(self)
        require(
            self.max_bad_images < 1 or self.max_bad_images == int(self.max_bad_images),
            f"max_bad_images must be a share below 1 or a whole number, got {self.max_bad_images}.",
        )
        for name in ("streaming", "fast_large_photos"):
            both = self.cache_images == "ram" and getattr(self, name)
            require(not both, f"cache_images ram cannot be combined with {name}, which never keeps an image.")
        require_numbers(self, "eval_resize_ratio", "num_images", "shuffle_buffer", least=1)
        require_interval(self, "crop_scale", most=1)
        require_interval(self, "crop_ratio")
        self._check_statistics()

    def _check_statistics(self):
        require_numbers(self, "image_mean", least=0, most=1)  # of pixels in 0..1
        require_numbers(self, "image_std", above=0)
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            fits = value is None or 1 <= len(value) <= MAX_CHANNELS
            require(fits, f"{name} must be one number per channel, 1 to {MAX_CHANNELS} of them, got {value}.")
        if self.image_mean and self.image_std:
            require(
                len(self.image_mean) == len(self.image_std),
                f"image_mean and image_std must be equally many, got {self.image_mean} and {self.image_std}.",
            )

    @property
    def bad_image_limit(self) -> int | float:
        """`max_bad_images` as a count (int) or as a share of the data set (float)."""
        return int(self.max_bad_images) if self.max_bad_images >= 1 else float(self.max_bad_images)


@dataclass
class ModelArguments:
    """The networks. `size` fills what is not given; `init_from` brings a whole configuration of its own."""

    argument_group = "model"

    size: str | None = argument(None, "published size, which sets widths and numbers of layers (default: base)", SIZES)
    init_from: str | None = argument(
        None, "directory or Hub name of a model: the run starts from its weights, in its architecture and image size"
    )
    image_size: list[int] | None = argument(
        None, "pixels of a training image: one number, or height and width (default: 224)"
    )
    patch_size: list[int] | None = argument(None, "pixels of a patch: one number, or height and width (default: 16)")
    num_channels: int | None = argument(None, "3 for colour, 1 for grey, up to 16 for bands (default: 3)")
    hidden_size: int | None = argument(None, "width of the encoder (default: that of size)")
    num_hidden_layers: int | None = argument(None, "layers of the encoder (default: those of size)")
    num_attention_heads: int | None = argument(None, "attention heads of the encoder (default: those of size)")
    intermediate_size: int | None = argument(None, "feed-forward width of the encoder (default: that of size)")
    predictor_hidden_size: int | None = argument(None, "width of the predictor (default: 384)")
    predictor_num_hidden_layers: int | None = argument(None, "layers of the predictor (default: those of size)")
    predictor_num_attention_heads: int | None = argument(
        None, "attention heads of the predictor (default: as the encoder)"
    )
    predictor_intermediate_size: int | None = argument(
        None, "feed-forward width of the predictor (default: 4 x its width)"
    )
    drop_path_rate: float | None = argument(
        None,
        "stochastic depth: share of images for which the last layer of the context encoder is skipped (default: 0)",
    )
    patch_embedding_init: str | None = argument(
        None,
        "initial weights of the patch embedding: published (std 0.02) or fan_in (std 1/sqrt of the numbers in a patch)"
        " (default: published)",
        ("published", "fan_in"),
    )
    initializer_range: float | None = argument(
        None, "standard deviation of initial weights; for narrow encoders about 1/sqrt(hidden_size) (default: 0.02)"
    )
    loss_type: str | None = argument(
        None,
        "smooth_l1 (released code) or mse (paper) (default: smooth_l1, or that of init_from)",
        ("smooth_l1", "mse"),
    )
    target_normalization: str | None = argument(
        None,
        "how targets are normalised: layer (over the features of a patch, as in the released code), batch (each"
        " feature over all patches of a pass) or none (default: layer, or that of init_from)",
        ("layer", "batch", "none"),
    )
    target_image_mean: float | None = argument(
        None,
        "share of each image's mean feature that stays in the targets, 0 to 1 (default: 1, as in the released code, or"
        " that of init_from)",
    )
    attn_implementation: str | None = argument(
        None,
        "implementation of attention (default: sdpa or eager, whichever is faster)",
        ("sdpa", "eager", "flash_attention_2", "flex_attention"),
    )
    compile_layers: bool = argument(False, "torch.compile every layer: a slow first step, faster ones after it")
    gradient_checkpointing: bool = argument(False, "compute layers again in the backward pass: less memory, more time")

    def model_fields(self) -> dict:
        """The fields of `IJepaConfig` that this recipe sets."""
        from ..configuration_ijepa import IJEPA_SIZES, IJepaConfig  # slow to import

        fields = dict(IJEPA_SIZES[self.size]) if self.size else {}
        for name in (entry.name for entry in dataclasses.fields(ModelArguments)):
            value = getattr(self, name)
            if value is not None and name in {entry.name for entry in dataclasses.fields(IJepaConfig)}:
                fields[name] = value[0] if isinstance(value, list) and len(value) == 1 else value
        return fields

    def _check_model(self):
        require_text(self, "init_from")
        require_numbers(self, "initializer_range", above=0)
        require_numbers(self, "num_channels", least=1, most=MAX_CHANNELS)
        free = {"drop_path_rate", "loss_type", "target_normalization", "target_image_mean"}
        architecture = sorted(set(self.model_fields()) - free)
        require(
            not (self.init_from and architecture),
            f"init_from brings its own architecture, so {', '.join(architecture)} cannot be set beside it.",
        )
        from ..configuration_ijepa import IJepaConfig  # slow to import

        # Checks the sizes, or alone what can be set beside init_from; raises ValueError.
        IJepaConfig(**self.model_fields())


def number_or_auto(word: str) -> int | str:
    """What `per_device_batch_size` is given."""
    if word == AUTO:
        return word
    try:
        return int(word)
    except ValueError:
        raise ArgumentTypeError(f"must be a whole number or {AUTO}, got {word!r}.") from None


def share_or_auto(word: str) -> float | str:
    """What `momentum_half_life` is given."""
    if word == AUTO:
        return word
    try:
        return float(word)
    except ValueError:
        raise ArgumentTypeError(f"must be a number or {AUTO}, got {word!r}.") from None


@dataclass
class OptimizationArguments:
    """Length, batch, schedules and precision. Steps are optimizer steps."""

    argument_group = "optimization"

    optimizer: str = argument(
        "adamw",
        "adamw, or adamw_8bit, which needs a quarter of its memory (pip install bitsandbytes)",
        ("adamw", "adamw_8bit"),
    )
    batch_size: int = argument(2048, "images per optimizer step, over all processes and accumulation steps")
    per_device_batch_size: int | str = argument(
        128,
        "images per process and forward pass, or auto: as many as fit the GPU. A step accumulates as many passes as"
        " batch_size needs",
        parse=number_or_auto,
        metavar="INTEGER|auto",
    )
    epochs: float | None = argument(None, "length of the run in passes over the data; give this or max_steps")
    max_steps: int | None = argument(None, "length of the run in optimizer steps")
    warmup_epochs: float | None = argument(
        None, "linear warm-up in passes over the data; give this or warmup_steps (default: none)"
    )
    warmup_steps: int | None = argument(None, "linear warm-up in optimizer steps (default: none)")
    start_learning_rate: float = argument(2e-4, "learning rate the warm-up starts from")
    learning_rate: float = argument(1e-3, "peak learning rate")
    final_learning_rate: float = argument(1e-6, "learning rate at the end (cosine)")
    weight_decay: float = argument(0.04, "weight decay at the start")
    final_weight_decay: float = argument(0.4, "weight decay at the end (cosine)")
    momentum: float | None = argument(None, "momentum of the target encoder at the start (default: 0.996)")
    momentum_half_life: float | str | None = argument(
        None,
        "instead of momentum: share of the run within which the target encoder forgets half of its past. auto: 0.01,"
        " but at most the published 173 steps",
        parse=share_or_auto,
        metavar="NUMBER|auto",
    )
    final_momentum: float = argument(1.0, "momentum of the target encoder at the end (linear)")
    adam_beta1: float = argument(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: float = argument(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: float = argument(1e-8, "AdamW's epsilon")
    max_grad_norm: float | None = argument(None, "clip the gradient to this L2 norm (default: no clipping)")
    mixed_precision: str | None = argument(
        None,
        "precision of computation; weights stay float32 (default: that of the launcher, or no)",
        ("no", "bf16", "fp16"),
    )
    max_skipped_steps: int = argument(
        100, "stop when more steps than this had no finite gradient; each is skipped and reported"
    )
    seed: int = argument(0, "seed of initial weights, order of images, crops and masks")

    def _check_optimization(self):
        require_numbers(self, "batch_size", least=1)
        if isinstance(self.per_device_batch_size, str):
            wrong = f"per_device_batch_size must be a whole number or {AUTO}, got {self.per_device_batch_size!r}."
            require(self.per_device_batch_size == AUTO, wrong)
        else:
            require_numbers(self, "per_device_batch_size", least=1)
        require_numbers(self, "seed", least=0, most=LARGEST_SEED)
        require_numbers(self, "max_skipped_steps", least=0)
        self._check_length()
        self._check_schedules()

    def _check_length(self):
        require_numbers(self, "epochs", above=0)
        require_numbers(self, "max_steps", least=1)
        require_numbers(self, "warmup_epochs", "warmup_steps", least=0)
        require(
            (self.epochs is None) != (self.max_steps is None),
            f"Give the length of the run as epochs or as max_steps, got epochs {self.epochs} and max_steps"
            f" {self.max_steps}.",
        )
        require(
            self.warmup_epochs is None or self.warmup_steps is None,
            f"Give the warm-up as warmup_epochs or as warmup_steps, got {self.warmup_epochs} and {self.warmup_steps}.",
        )
        for unit in ("epochs", "steps"):
            warmup, whole = f"warmup_{unit}", "epochs" if unit == "epochs" else "max_steps"
            lengths = getattr(self, warmup), getattr(self, whole)
            fits = None in lengths or lengths[0] <= lengths[1]
            require(fits, f"{warmup} {lengths[0]} is longer than the run, which has {whole} {lengths[1]}.")

    def _check_schedules(self):
        require_numbers(self, "start_learning_rate", "learning_rate", "final_learning_rate", least=0)
        require_numbers(self, "weight_decay", "final_weight_decay", least=0)
        require_numbers(self, "momentum", "final_momentum", least=0, most=1)
        if isinstance(self.momentum_half_life, str):
            wrong = f"momentum_half_life must be a number or {AUTO}, got {self.momentum_half_life!r}."
            require(self.momentum_half_life == AUTO, wrong)
        else:
            require_numbers(self, "momentum_half_life", above=0, most=1)
        require(
            None in (self.momentum, self.momentum_half_life),
            f"momentum {self.momentum} and momentum_half_life {self.momentum_half_life} set the same thing: give one.",
        )
        require_numbers(self, "adam_beta1", "adam_beta2", least=0, below=1)
        require_numbers(self, "adam_epsilon", "max_grad_norm", above=0)

    @property
    def images_per_pass(self) -> int:
        """`per_device_batch_size` of a run, where it is a number."""
        if isinstance(self.per_device_batch_size, str):
            raise ValueError(f"per_device_batch_size must be a number here, got {self.per_device_batch_size!r}.")
        return self.per_device_batch_size

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.max_steps if self.max_steps is not None else int((self.epochs or 0) * steps_per_epoch)

    def total_warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the warm-up."""
        return self.warmup_steps if self.warmup_steps is not None else int((self.warmup_epochs or 0) * steps_per_epoch)


@dataclass
class OutputArguments:
    """What is written, how often, and where."""

    argument_group = "output"

    output_dir: str = argument("", "directory of the run: the model, its card, metrics, curves and checkpoints")
    print_memory_estimate: bool = argument(
        False, "print how much memory a training process needs, part by part, and stop"
    )
    resume: bool = argument(False, "continue the run in output_dir from its newest complete checkpoint")
    logging_steps: int = argument(50, "optimizer steps between rows of metrics.jsonl")
    eval_steps: int | None = argument(None, "optimizer steps between k-NN evaluations (default: only at the end)")
    save_steps: int = argument(1000, "optimizer steps between checkpoints")
    keep_checkpoints: int = argument(2, "how many of the newest checkpoints are kept")
    export_every: int = argument(
        1, "output_dir becomes the model of every n-th checkpoint, and of the end; 0: of the end only"
    )
    async_checkpoints: bool = argument(
        True, "complete a checkpoint while the next steps are computed; one process and DDP only"
    )
    knn_neighbors: int = argument(20, "neighbours that vote in the k-NN")
    max_probe_images: int = argument(
        5000, "most labelled images of each split that are used for the k-NN and the table at the end"
    )
    trackers: list[str] = argument(
        [], "trackers of Accelerate that get the metrics too, such as tensorboard or wandb (default: none)"
    )
    push_to_hub: bool = argument(False, "upload output_dir to the Hub at the end (needs hub_model_id and a login)")
    hub_model_id: str | None = argument(None, "name of the Hub repository, USER/NAME")
    hub_private: bool = argument(True, "create the Hub repository as a private one")
    verbose: bool = argument(False, "print all settings and the classes of the data at the start")

    def _check_output(self):
        require(self.output_dir, "output_dir is missing: name the directory the run is written to.")
        require(
            Path(self.output_dir).is_dir() or not os.path.lexists(self.output_dir),
            f"output_dir {self.output_dir!r} is there already and is no directory.",
        )
        require_numbers(self, "logging_steps", "eval_steps", "save_steps", "keep_checkpoints", least=1)
        require_numbers(self, "export_every", least=0)
        require_numbers(self, "knn_neighbors", "max_probe_images", least=1)
        self._check_trackers()
        require(not self.push_to_hub or self.hub_model_id, "push_to_hub needs hub_model_id.")
        self._check_hub_model_id()

    def _check_hub_model_id(self):
        """Now, and not when the run has ended."""
        if self.hub_model_id is None:
            return
        from huggingface_hub.utils import HFValidationError, validate_repo_id  # slow to import

        try:
            validate_repo_id(self.hub_model_id)
            require_text(self, "hub_model_id")
        except HFValidationError as error:
            raise ValueError(f"hub_model_id is no name of a repository: {' '.join(str(error).split())}") from None

    def _check_trackers(self):
        """Accelerate silently ignores a tracker that is not installed."""
        if not self.trackers:
            return
        from accelerate.tracking import get_available_trackers  # slow to import
        from accelerate.utils import LoggerType

        known = [tracker.value for tracker in LoggerType]
        installed = ["all", *(str(tracker) for tracker in get_available_trackers())]
        for name in self.trackers:
            require(name in known, f"trackers must be among {', '.join(known)}, got {name!r}.")
            require(name in installed, f"trackers: {name!r} is not installed here (pip install {name}).")


GROUPS = (DataArguments, ModelArguments, MaskArguments, OptimizationArguments, OutputArguments)
# What may differ between the two halves of an interrupted run without changing what it computes.
FREE_ON_RESUME = {
    *("output_dir", "resume", "num_workers", "logging_steps", "eval_steps", "save_steps", "keep_checkpoints"),
    *("trackers", "push_to_hub", "hub_model_id", "hub_private", "max_bad_images", "gradient_checkpointing"),
    "mixed_precision",  # a checkpoint remembers what it came to, by recipe or by launcher
    *("cache_images", "compile_layers", "max_skipped_steps", "print_memory_estimate", "validation_data"),
    *("attn_implementation", "data", "knn_neighbors", "max_probe_images", "per_device_batch_size", "validation_split"),
    *("verbose", "async_checkpoints", "export_every"),
}


@dataclass
class UncheckedArguments(OutputArguments, OptimizationArguments, MaskArguments, ModelArguments, DataArguments):
    """Every argument of `ijepa pretrain`, as it was given. It needs no import that is slow."""

    def differences(self, other: dict) -> list[str]:
        """What `other`, the arguments of the first half of a run, has otherwise, of all that must not change.

        A field that there was not yet when the run began has its default there. Fields that are gone are left to
        `without_removed_keys`. Those that do nothing beside the others may differ.
        """
        new = (entry for entry in dataclasses.fields(self) if entry.name not in other)
        defaults = {
            entry.name: entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
            for entry in new
        }
        before = {**defaults, **other}
        # Targets that are normalised over the images of a forward pass depend on how many these are.
        free = FREE_ON_RESUME - ({"per_device_batch_size"} if self.target_normalization == "batch" else set())
        free |= unused_settings(GROUPS, vars(self)).keys()
        return [
            f"{name} was {before[name]!r}, is {value!r}"
            for name, value in dataclasses.asdict(self).items()
            if name not in free and before[name] != value
        ]

    def save(self, path) -> None:
        """Writes the effective arguments as a recipe that repeats the run."""
        write_text(Path(path), yaml.safe_dump(self.effective(), sort_keys=False))

    def effective(self) -> dict:
        """The arguments that have a value, as a recipe."""
        return effective_values(dataclasses.asdict(self), unused_settings(GROUPS, vars(self)))


@dataclass
class PretrainingArguments(UncheckedArguments):
    """Every argument of `ijepa pretrain`.

    Raises:
        ValueError: with the offending value, if one is out of range or two contradict each other.
    """

    def __post_init__(self):
        self._check_data()
        self.check_masks()
        self._check_optimization()
        self._check_output()
        self._check_model()  # last, because it imports Transformers, which takes seconds
        self._check_channels()

    def _check_channels(self):
        """Statistics for other channels than the model's, as far as the recipe says them."""
        from ..configuration_ijepa import IJepaConfig  # slow to import

        channels = self.num_channels or (None if self.init_from else IJepaConfig.num_channels)
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            fits = None in (value, channels) or len(value) == channels
            require(fits, f"{name} has {len(value or [])} numbers, {value}, but num_channels is {channels}.")
            require(
                value or channels in (None, 1, 3),
                f"num_channels {channels} needs {name}, because there is no usual one: measure it with ijepa stats.",
            )


_DESCRIPTION = "Pretrains I-JEPA."


def parse_pretraining_arguments(argv: Sequence[str] | None = None) -> PretrainingArguments:
    """The arguments of `ijepa pretrain`; see `parse_arguments`."""
    return parse_arguments(argv, GROUPS, PretrainingArguments, PROGRAM, _DESCRIPTION, without_removed_keys)


def parse_unchecked_arguments(argv: Sequence[str]) -> UncheckedArguments:
    """The same, before they are checked."""
    return parse_arguments(argv, GROUPS, UncheckedArguments, PROGRAM, _DESCRIPTION, without_removed_keys)


def pretraining_arguments(**keywords: Any) -> PretrainingArguments:
    """The arguments of `pretrain(...)`; see `arguments_from_keywords`."""
    return arguments_from_keywords(keywords, GROUPS, PretrainingArguments, "pretrain", without_removed_keys)
