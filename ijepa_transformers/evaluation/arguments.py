# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The arguments of `ijepa probe`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..arguments import (
    DatasetArguments,
    argument,
    arguments_from_keywords,
    parse_arguments,
    require,
    require_numbers,
    require_workers,
)


PROGRAM = "ijepa probe"
PROBES = ("knn", "few_shot", "logistic", "linear", "attentive", "collapse")
PLAIN_PROBES = {"knn", "few_shot", "logistic"}  # they need no training loop
HEAD_FEATURES, HEAD_NORMS = ("last", "last4"), ("none", "batch_norm")
OPTIMIZERS, SCHEDULES = ("adamw", "sgd", "lars"), ("cosine", "step")


# Arguments
@dataclass
class DataArguments(DatasetArguments):
    """Which images."""

    argument_group = "data"

    train_split: str = argument("train", "labelled split that probes learn from")
    validation_split: str = argument(
        "validation", "labelled split that accuracies are measured on, such as test; auto: validation, or else test"
    )
    max_images: int | None = argument(
        None, "use a sample of this many images of each split, drawn by the seed (default: all)"
    )
    num_workers: int = argument(2, "processes that load images, per process of the command; 0: it loads them itself")


@dataclass
class EncoderArguments:
    """Which encoders, and how they compute."""

    argument_group = "encoders"

    models: list[str] = argument(
        [],
        "encoders, each a row of the table: DIR (a directory or Hub name), DIR@context, DIR@target, random:DIR"
        " (random weights), random:DIR#SEED or raw_pixels:DIR. NAME= before it names the row; rows of one name are"
        " averaged",
    )
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory, where models does not say; the paper evaluates the target"
    )
    no_baselines: bool = argument(False, "leave out the rows 'raw pixels' and 'random encoder'")
    dtype: Literal["fp32", "bf16"] = argument("fp32", "precision of the encoder; probes compute in float32")
    per_device_batch_size: int = argument(64, "images per process and forward pass of the encoder")


@dataclass
class ProbeArguments:
    """Which protocols."""

    argument_group = "probes"

    probes: list[str] = argument(["knn", "few_shot", "logistic", "collapse"], "what is measured", PROBES)
    k: list[int] = argument([1, 5, 20, 100], "knn: numbers of neighbours")
    shots: list[int] = argument([1, 5, 10], "few_shot: labelled images per class")
    label_fractions: list[float] = argument(
        [], "few_shot: labelled shares of each class, such as 0.01 (default: none)"
    )
    num_draws: int = argument(5, "few_shot: how often labelled images are drawn; the mean over the draws is shown")
    seed: int = argument(0, "seed of draws, samples, first weights, order and crops")


@dataclass
class HeadArguments:
    """The sweep of the linear and the attentive probe: every combination is a head, all are trained together."""

    argument_group = "heads"

    head_features: list[str] = argument(
        ["last", "last4"],
        "linear: what a head sees: the last layer, the last four (averages, concatenated), or both",
        HEAD_FEATURES,
    )
    head_norms: list[str] = argument(
        ["none", "batch_norm"], "linear: what comes before a head: none, batch_norm, or both", HEAD_NORMS
    )
    optimizers: list[str] = argument(["adamw"], "optimizers of the heads; lars needs timm", OPTIMIZERS)
    learning_rates: list[float] = argument([1e-3, 1e-2, 1e-1], "peak learning rates of the heads")
    weight_decays: list[float] = argument([0.0, 0.05], "weight decays of the heads")
    schedule: str = argument(
        "cosine", "learning rate over time: cosine, or step: a tenth after every 15 epochs", SCHEDULES
    )
    warmup_epochs: float = argument(0.0, "linear warm-up of the heads in passes over the training images")
    epochs: int = argument(50, "training of the heads in passes over the training images")
    batch_size: int = argument(256, "images per step of the heads, over all processes")
    augment: Literal["none", "crop_flip", "flip"] = argument(
        "none",
        "none: features are computed once; crop_flip: the encoder sees new random crops in every epoch, half of them"
        " mirrored; flip: the views of evaluation, half of them mirrored",
    )
    holdout: float = argument(
        0.1, "share of the training split on which the best head is chosen; 0 chooses on the validation split"
    )


@dataclass
class OutputArguments:
    """What is written, and where."""

    argument_group = "output"

    output_dir: str = argument("", "directory that results.md and results.json are written to")
    cache_dir: str | None = argument(
        None, "directory in which computed features are kept (default: cache in output_dir)"
    )
    update_model_card: bool = argument(False, "write the results into the README.md of each local model directory")


GROUPS = (DataArguments, EncoderArguments, ProbeArguments, HeadArguments, OutputArguments)


@dataclass
class ProbingArguments(OutputArguments, HeadArguments, ProbeArguments, EncoderArguments, DataArguments):
    """Every argument of `ijepa probe`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    def __post_init__(self):
        for name in ("data", "models", "output_dir", "probes", "head_features", "head_norms", "optimizers"):
            require(getattr(self, name), f"{name} is missing.")
        self._check_numbers()

    def _check_numbers(self):
        for name, least in (
            *(("num_draws", 1), ("epochs", 1), ("batch_size", 1), ("per_device_batch_size", 1), ("max_images", 2)),
            *(("warmup_epochs", 0), ("k", 1), ("shots", 1), ("weight_decays", 0), ("seed", 0)),
        ):
            require_numbers(self, name, least=least)
        require_workers(self)
        require_numbers(self, "learning_rates", above=0)
        require_numbers(self, "label_fractions", above=0, most=1)
        require_numbers(self, "holdout", least=0, below=1)

    @property
    def has_heads(self) -> bool:
        return bool({"linear", "attentive"} & set(self.probes))


def parse_probing_arguments(argv: Sequence[str] | None = None) -> ProbingArguments:
    """The arguments of `ijepa probe`; see `parse_arguments`."""
    return parse_arguments(argv, GROUPS, ProbingArguments, PROGRAM, "Judges frozen encoders by their features.")


def probing_arguments(**keywords: Any) -> ProbingArguments:
    """The arguments of `probe(...)`; see `arguments_from_keywords`."""
    return arguments_from_keywords(keywords, GROUPS, ProbingArguments, "probe")


# Heads
def head_features(arguments: ProbingArguments, is_raw: bool) -> list[str]:
    """What the heads of a sweep read. Raw pixels have neither layers nor tokens: of theirs only "last" is left."""
    names = [*arguments.head_features] if "linear" in arguments.probes else []
    if is_raw:
        return ["last"] if names else []
    return names + (["tokens"] if "attentive" in arguments.probes else [])
