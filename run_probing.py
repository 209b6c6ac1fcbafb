#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Judges frozen encoders by their features:

    python run_probing.py --data digits --validation_split test --models outputs/quickstart --output_dir probes
    accelerate launch run_probing.py --recipe recipes/probe_transfer.yaml --models ours=DIR other=HUB_NAME

Any vision model of Transformers can stand in the table beside this package's, and two rows are always there: the raw
pixels, and an encoder of the same architecture with random weights. docs/evaluate.md explains every protocol.

The forward passes are shared out among the processes; features are gathered, in the order of the data set and each
image once, so the number of processes changes no result beyond rounding. Features that were computed once are read
back from `cache_dir`.

Shape legend: B images of a batch, N images of a split, D features.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import datasets
import numpy as np
import pyarrow.compute
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from huggingface_hub import EvalResult
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers.utils.logging import disable_progress_bar

import ijepa
from ijepa.checkpointing import write_text, written_aside
from ijepa.collapse import COLUMNS_IN_WORDS, LayerSpread, collapse_reading, layer_spread
from ijepa.data import (
    BadImageError,
    PretrainingImages,
    ProcessedImages,
    epoch_order,
    image_name,
    labels_of,
    load_image_dataset,
)
from ijepa.distributed import end_process_group
from ijepa.encoders import (
    EncoderSpec,
    architecture,
    encoder_features,
    feature_widths,
    load_processor,
    one_line,
    open_encoder,
    weights_digest,
)
from ijepa.execution import configure
from ijepa.linear_probing import (
    OPTIMIZERS,
    SCHEDULES,
    Batch,
    HeadSettings,
    choose_heads,
    concatenate,
    head_accuracies,
    head_grid,
    head_scores,
    rebatch,
    require_optimizers,
    split_holdout,
    train_heads,
)
from ijepa.model_card import in_markdown, update_evaluation
from ijepa.probing import (
    Accuracies,
    accuracy_metric,
    class_indices,
    few_shot_accuracy,
    format_table,
    knn_scores_by_k,
    logistic_regression_scores,
    standardize,
)
from ijepa.recipe import CPU_REMEDY, argument, check_launch, parse_arguments, require


PROGRAM = "run_probing.py"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROBES = ("knn", "few_shot", "logistic", "linear", "attentive", "collapse")
PLAIN_PROBES = {"knn", "few_shot", "logistic"}  # they need no training loop
HEAD_FEATURES, HEAD_NORMS = ("last", "last4"), ("none", "batch_norm")

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # random resized crop as usual for classification
MAX_TOKEN_BYTES = 2**31  # of patch tokens kept for the attentive probe; above it the encoder runs in every epoch
MAX_COLLAPSE_IMAGES = 5000  # of the validation split: the measures compare every image with every other

RAW_PIXELS, RANDOM_ENCODER = "raw pixels", "random encoder"
OPTIMISTIC = "{} (optimistic: chosen on the validation split)"


# Arguments


@dataclass
class DataArguments:
    """Which images."""

    _argument_group_name = "data"

    data: str = argument("", "labelled images: a folder, Parquet or tar shards, a Hub dataset, or 'digits'")
    data_config: str | None = argument(None, "configuration name of a Hub dataset")
    train_split: str = argument("train", "split that probes learn from")
    validation_split: str = argument("validation", "split that accuracies are measured on")
    image_column: str | None = argument(None, "column of the images; found if there is only one")
    label_column: str | None = argument(None, "column of the labels; found if there is only one")
    max_images: int | None = argument(None, "use a sample of this many images of each split, drawn by the seed")
    num_workers: int = argument(2, "image loading processes per process; 0 loads in it")


@dataclass
class EncoderArguments:
    """Which encoders, and how they compute."""

    _argument_group_name = "encoders"

    models: list[str] = argument(
        [],
        "NAME=SPEC or SPEC, each a row; equal names are averaged. SPEC is a directory or Hub name, perhaps with"
        " @context or @target behind it, or random:SPEC, random:SPEC#SEED, raw_pixels:SPEC",
    )
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory, where SPEC does not say; the paper evaluates the target"
    )
    no_baselines: bool = argument(False, "leave out the rows 'raw pixels' and 'random encoder'")
    dtype: Literal["fp32", "bf16"] = argument("fp32", "precision of the encoder; probes compute in float32")
    per_device_batch_size: int = argument(64, "images per forward pass of the encoder and process")


@dataclass
class ProbeArguments:
    """Which protocols."""

    _argument_group_name = "probes"

    probes: list[str] = argument(["knn", "few_shot", "logistic", "collapse"], f"any of {', '.join(PROBES)}")
    k: list[int] = argument([1, 5, 20, 100], "knn: numbers of neighbours")
    shots: list[int] = argument([1, 5, 10], "few_shot: labelled images per class")
    label_fractions: list[float] = argument([], "few_shot: labelled shares of each class, such as 0.01")
    num_draws: int = argument(5, "few_shot: draws of the labelled images")
    seed: int = argument(0, "of draws, samples, first weights, order and crops")


@dataclass
class HeadArguments:
    """The sweep of the linear and the attentive probe: every combination is a head, all are trained together."""

    _argument_group_name = "heads"

    head_features: list[str] = argument(["last", "last4"], "linear: last layer, last4 concatenated, or both")
    head_norms: list[str] = argument(["none", "batch_norm"], "linear: none, batch_norm before it, or both")
    optimizers: list[str] = argument(["adamw"], f"any of {', '.join(OPTIMIZERS)}; lars needs timm")
    learning_rates: list[float] = argument([1e-3, 1e-2, 1e-1], "peak learning rates")
    weight_decays: list[float] = argument([0.0, 0.05], "weight decays")
    schedule: str = argument("cosine", "cosine, or step: a tenth after every 15 epochs")
    warmup_epochs: float = argument(0.0, "linear warm-up in passes over the training images")
    epochs: int = argument(50, "passes over the training images")
    batch_size: int = argument(256, "images per step, over all processes")
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

    _argument_group_name = "output"

    output_dir: str = argument("", "directory of results.md and results.json")
    cache_dir: str | None = argument(None, "directory of computed features; output_dir/cache by default")
    update_model_card: bool = argument(False, "write the results into the README.md of each local model directory")


GROUPS = (DataArguments, EncoderArguments, ProbeArguments, HeadArguments, OutputArguments)


@dataclass
class ProbingArguments(OutputArguments, HeadArguments, ProbeArguments, EncoderArguments, DataArguments):
    """Every argument of `run_probing.py`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    def __post_init__(self):
        for name in ("data", "models", "output_dir", "probes"):
            require(getattr(self, name), f"--{name} is missing.")
        for name, allowed in (
            ("probes", PROBES),
            ("head_features", HEAD_FEATURES),
            ("head_norms", HEAD_NORMS),
            ("optimizers", OPTIMIZERS),
        ):
            self._check_words(name, allowed)
        require(self.schedule in SCHEDULES, f"schedule must be cosine or step, got {self.schedule!r}.")
        self._check_numbers()

    def _check_words(self, name, allowed):
        unknown = [word for word in getattr(self, name) if word not in allowed]
        require(not unknown, f"{name} must be any of {', '.join(allowed)}, got {' '.join(unknown)}.")
        require(getattr(self, name), f"{name} must not be empty.")

    def _check_numbers(self):
        for name, least in (
            *(("num_draws", 1), ("epochs", 1), ("batch_size", 1), ("per_device_batch_size", 1), ("max_images", 2)),
            *(("num_workers", 0), ("warmup_epochs", 0), ("k", 1), ("shots", 1), ("weight_decays", 0), ("seed", 0)),
        ):
            for value in self._values(name):
                require(value >= least, f"{name} must be at least {least}, got {value}.")
        for value in self.learning_rates:
            require(value > 0, f"learning_rates must be positive, got {value}.")
        for value in self.label_fractions:
            require(0 < value <= 1, f"label_fractions must lie in (0, 1], got {value}.")
        require(0 <= self.holdout < 1, f"holdout must lie in [0, 1), got {self.holdout}.")

    def _values(self, name) -> list:
        value = getattr(self, name)
        return value if isinstance(value, list) else [] if value is None else [value]

    @property
    def has_heads(self) -> bool:
        return bool({"linear", "attentive"} & set(self.probes))


def parse_probing_arguments(words: Sequence[str]) -> ProbingArguments:
    """Arguments from command-line words; see `ijepa.recipe.parse_arguments`."""
    return parse_arguments(words, GROUPS, ProbingArguments, PROGRAM, "Judges frozen encoders by their features.")


# Building: nothing is written yet


@dataclass(frozen=True)
class Entry:
    """An encoder and the name of its row."""

    name: str
    spec: EncoderSpec


@dataclass
class Split:
    """The labelled images of a split that are used: their indices (N,) in the data set, and their labels (N,)."""

    name: str
    dataset: datasets.Dataset
    indices: torch.Tensor
    labels: torch.Tensor
    fingerprint: str


@dataclass
class Run:
    """Everything the evaluation needs, built and checked by `build_run` before anything is written."""

    arguments: ProbingArguments
    accelerator: Accelerator
    entries: list[Entry]
    train: Split
    validation: Split
    trials: dict[EncoderSpec, "Trial"]
    notes: list[str] = field(default_factory=list)

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)

    @property
    def cache_dir(self) -> Path:
        return Path(self.arguments.cache_dir) if self.arguments.cache_dir else self.output_dir / "cache"

    def note(self, sentence: str) -> None:
        """A remark for below the table, once."""
        if sentence not in self.notes:
            self.notes.append(sentence)


def build_run(arguments: ProbingArguments) -> Run:
    """Opens the data and every encoder.

    Raises:
        ValueError: if something cannot be opened or cannot work.
    """
    if arguments.has_heads:
        require_optimizers(arguments.optimizers)
    # The main process fits probes alone, for hours on a large data set, while the others wait.
    waits = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(kwargs_handlers=[waits])
    check_launch(accelerator.num_processes, CPU_REMEDY)
    entries = all_entries(arguments)
    specs = dict.fromkeys(entry.spec for entry in entries)
    trials = {spec: try_out(arguments, open_spec(arguments, spec, accelerator.device)) for spec in specs}
    with accelerator.main_process_first():  # one process fills the cache of datasets
        splits = [open_split(arguments, name) for name in (arguments.train_split, arguments.validation_split)]
    check_classes(*splits)
    run = Run(arguments, accelerator, entries, *splits, trials)
    note_left_out(run)
    note_unknown_classes(run)
    return run


def all_entries(arguments: ProbingArguments) -> list[Entry]:
    """The entries of the command, after the rows every table has unless they are given."""
    entries = [parse_entry(text, arguments.encoder) for text in arguments.models]
    first = next((entry.spec for entry in entries if entry.spec.kind == "model"), entries[0].spec)
    kinds = {entry.spec.kind for entry in entries}
    baselines = []
    if "raw_pixels" not in kinds:
        baselines.append(Entry(RAW_PIXELS, EncoderSpec("raw_pixels", first.source)))
    if "random" not in kinds:
        baselines.append(Entry(RANDOM_ENCODER, dataclasses.replace(first, kind="random")))
    return entries if arguments.no_baselines else baselines + entries


def parse_entry(text: str, default_encoder: str) -> Entry:
    """`NAME=SPEC` or `SPEC`. A name has no slash, so a directory such as runs/lr=0.1 is a SPEC."""
    name, equals, spec = text.partition("=")
    if not equals or "/" in name or Path(text).is_dir():
        return Entry(text, EncoderSpec.parse(text, default_encoder))
    require(name, f"{text!r} has no name before '='.")
    return Entry(name, EncoderSpec.parse(spec, default_encoder))


def open_split(arguments: ProbingArguments, name: str) -> Split:
    """The labelled images of a split, or a sample of them.

    Raises:
        ValueError: if there are none.
    """
    dataset = load_image_dataset(
        arguments.data,
        split=name,
        config_name=arguments.data_config,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    if "label" not in dataset.column_names:
        raise ValueError(f"The {name!r} split of {arguments.data!r} has no labels: a probe needs them in both splits.")
    labels = torch.from_numpy(labels_of(dataset))
    indices = (labels >= 0).nonzero().flatten()  # -1 means unlabelled
    if len(indices) < 2:
        raise ValueError(f"The {name!r} split of {arguments.data!r} has {len(indices)} labelled images; two at least.")
    indices = sample(indices, arguments.max_images or len(indices), arguments.seed)
    return Split(name, dataset, indices, labels[indices], fingerprint(dataset))


def check_classes(train: Split, validation: Split) -> None:
    """Raises ValueError if the training split has one class, or the splits number their classes differently."""
    require(
        len(train.labels.unique()) > 1, f"The {train.name!r} split has a single class; a probe needs two at least."
    )
    names, others = (split.dataset.features["label"].names for split in (train, validation))
    require(
        names == others,
        f"The splits {train.name!r} and {validation.name!r} number their classes differently; use one data set.",
    )


def sample(indices: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` of the indices, or all if there are fewer, in their order."""
    order = torch.from_numpy(epoch_order(len(indices), seed, epoch=0))
    return indices[order[:count].sort().values]


def fingerprint(dataset: datasets.Dataset) -> str:
    """Changes when the images or labels change: what `datasets` says of them, and size and time of every file."""
    digest = hashlib.sha256(dataset._fingerprint.encode())
    table = dataset.select_columns(["image"]).with_format("arrow")
    for start in range(0, len(table), 1000):
        column = table[start : start + 1000]["image"]
        outside = pyarrow.compute.is_null(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
        paths = pyarrow.compute.struct_field(column, "path").to_pylist()
        for path in (path for path, is_file in zip(paths, outside, strict=True) if is_file and path):
            status = os.stat(path) if os.path.exists(path) else None
            digest.update(f"{path} {status and (status.st_size, status.st_mtime_ns)}".encode())
    return digest.hexdigest()


def note_left_out(run: Run) -> None:
    """Says which settings the training split is too small for."""
    count, arguments = len(run.train.labels), run.arguments
    smallest = run.train.labels.unique(return_counts=True)[1].min().item()
    for k in (k for k in arguments.k if "knn" in arguments.probes and k > count):
        run.note(f"{k}-NN is left out: there are {count:,} training images.")
    for shots in (shots for shots in arguments.shots if "few_shot" in arguments.probes and shots > smallest):
        run.note(f"{shots}-shot is left out: the smallest class has {smallest:,} training images.")


def note_unknown_classes(run: Run) -> None:
    """Says how much of the validation split no probe can get right, as happens in a sample of many classes."""
    labels = run.validation.labels
    unknown = labels[class_indices(run.train.labels, labels) < 0]
    if len(unknown):
        run.note(
            f"{len(unknown):,} of the {len(labels):,} validation images belong to {len(unknown.unique()):,} classes"
            " without a training image: they count as wrong in every row."
        )


# Features


class DivergedError(ValueError):
    """Features that are not finite, of which no accuracy can be measured."""


@dataclass
class OpenedEncoder:
    """An encoder on its device, with all that its features depend on."""

    spec: EncoderSpec
    model: torch.nn.Module
    processor: object
    num_channels: int

    @property
    def is_raw(self) -> bool:
        return self.spec.kind == "raw_pixels"

    @cached_property
    def digest(self) -> str:
        """Of the weights."""
        return weights_digest(self.model)

    @cached_property
    def all_but_weights(self) -> str:
        """JSON of everything beside weights, images and precision that features depend on."""
        processor = [type(self.processor).__name__, json.loads(self.processor.to_json_string())]
        parts = {"encoder": architecture(self.model), "processor": processor, "num_channels": self.num_channels}
        return json.dumps(parts, sort_keys=True)

    def images(self, dataset: datasets.Dataset) -> ProcessedImages:
        return ProcessedImages(dataset, self.processor, self.num_channels)


def open_entry(run: Run, entry: Entry) -> OpenedEncoder:
    return open_spec(run.arguments, entry.spec, run.accelerator.device)


def open_spec(arguments: ProbingArguments, spec: EncoderSpec, device: torch.device) -> OpenedEncoder:
    processor = load_processor(spec.source)  # first: it is the quicker to fail
    model = open_encoder(spec, DTYPES[arguments.dtype])
    configure(model, device.type, arguments.dtype)
    config = getattr(model, "config", None) or transformers.AutoConfig.from_pretrained(spec.source)
    return OpenedEncoder(spec, model.to(device), processor, getattr(config, "num_channels", 3))


@dataclass(frozen=True)
class Trial:
    """What one image through an encoder tells: the widths of its features, and the number and width of its tokens."""

    widths: dict[str, int]
    token_shape: tuple[int, int]


def try_out(arguments: ProbingArguments, opened: OpenedEncoder) -> Trial:
    """One blank image through image processor and encoder, for all features that the run needs.

    Raises:
        ValueError: if one of them does not take it: better now than after the encoders before it.
    """
    images, source = opened.images(None), opened.spec.source
    try:
        pixel_values = images.prepare(blank_image(images))
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The image processor of {source!r}, a {type(opened.processor).__name__}, cannot be used, since it does"
            f" not work like those of Transformers' own: {one_line(error)}"
        ) from error
    device = next((parameter.device for parameter in opened.model.parameters()), pixel_values.device)
    layers = ["layers"] if "collapse" in arguments.probes else []
    kinds = {"last", *head_features(arguments, opened.is_raw), *layers}
    try:
        return Trial(*feature_widths(opened.model, pixel_values[None].to(device), kinds))
    except ValueError as error:
        raise ValueError(f"The model {source!r} cannot be used: {error}") from error


def blank_image(images: ProcessedImages) -> np.ndarray:
    return np.zeros((256, 256, images.num_channels), dtype=np.uint8)


class CroppedImages(torch.utils.data.Dataset):
    """Random resized crops, half of them mirrored, as the encoder takes them. The key is (epoch, index), and the crop
    is a pure function of (seed, epoch, index); or the reason why the image cannot be read."""

    def __init__(self, images: ProcessedImages, seed: int):
        self.images = images
        self.crops = PretrainingImages(
            images.dataset,
            tuple(images.prepare(blank_image(images)).shape[1:]),
            num_channels=images.num_channels,
            crop_scale=CROP_SCALE,
            crop_ratio=CROP_RATIO,
            horizontal_flip=True,
            interpolation="bicubic",
            seed=seed,
        )

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        epoch, index = key
        crop = self.crops[0, 0, epoch, index]
        if crop["num_bad"]:  # it holds another image: the reason is found by reading this one
            return self.images[index]
        return self.images.processor(
            crop["pixel_values"].permute(1, 2, 0).numpy(),
            do_resize=False,
            do_center_crop=False,
            input_data_format="channels_last",
            return_tensors="pt",
        )["pixel_values"][0]


class FlippedImages(torch.utils.data.Dataset):
    """The views of evaluation, half of them mirrored, for images that a crop would change (Clevr: counts, distances).
    Keys and values are those of `CroppedImages`."""

    def __init__(self, images: ProcessedImages, seed: int):
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor | str:
        view = self.images[key[1]]
        is_mirrored = np.random.default_rng([self.seed, *key]).random() < 0.5
        return view.flip(-1) if is_mirrored and not isinstance(view, str) else view


AUGMENTED = {"crop_flip": CroppedImages, "flip": FlippedImages}


def shares(count: int, round_size: int, rank: int, world_size: int) -> Iterator[tuple[int, list[int]]]:
    """Rounds of up to `round_size` places of 0..count-1: the number of places, and those of process `rank`.

    The shares of a round, one process after the other, are its places in order; all have the same length, so the last
    place may be there more than once at the end.
    """
    for start in range(0, count, round_size):
        size = min(round_size, count - start)
        share = -(-size // world_size)
        yield size, [start + min(rank * share + offset, size - 1) for offset in range(share)]


def stream(
    run: Run, opened: OpenedEncoder, images: torch.utils.data.Dataset, keys: Sequence, kinds: Collection[str]
) -> Iterator[dict[str, torch.Tensor]]:
    """Features (up to B x processes, ...) of images[key], in the order of the keys, the same on every process.

    Raises:
        BadImageError: at the first image that cannot be read; leaving it out would change the published number.
    """
    accelerator = run.accelerator
    round_size = run.arguments.per_device_batch_size * accelerator.num_processes
    parts = list(shares(len(keys), round_size, accelerator.process_index, accelerator.num_processes))
    batches = [[keys[place] for place in places] for _, places in parts]
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=list,
        num_workers=run.arguments.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    for (size, _), batch, samples in zip(parts, batches, loader, strict=True):
        pixel_values = stack(images, batch, samples).to(accelerator.device)
        features = encoder_features(opened.model, pixel_values, kinds)
        features.pop("token_shape", None)  # of all images alike: `Trial` has it
        yield {name: accelerator.gather(value.contiguous())[:size] for name, value in features.items()}


def stack(images: torch.utils.data.Dataset, keys: Sequence, samples: Sequence[torch.Tensor | str]) -> torch.Tensor:
    """Pixels (B, channels, height, width)."""
    for key, value in zip(keys, samples, strict=True):
        if isinstance(value, str):
            plain, index = (images.images, key[1]) if isinstance(key, tuple) else (images, key)
            raise BadImageError(image_name(plain.dataset, index), value)
    if len({value.shape for value in samples}) > 1:
        raise ValueError("The image processor gives images of different sizes; take --per_device_batch_size 1.")
    return torch.stack(list(samples))


@dataclass
class SplitFeatures:
    """The features of a split that are kept in memory, float32 on the CPU.

    Args:
        places: of each kind, the places of the split (N,), in order, whose features there are.
        values: of each kind, the features (N, ...) by name; a kind has its own name, but "layers" one name per layer.
    """

    split: Split
    places: dict[str, torch.Tensor]
    values: dict[str, dict[str, torch.Tensor]]

    def at(self, kind: str, places: torch.Tensor) -> torch.Tensor:
        """Features (n, ...) of some places (n,) of the split."""
        return self.values[kind][kind][torch.searchsorted(self.places[kind], places)]

    def require_finite(self) -> None:
        """Raises DivergedError if there are features, other than the report's, that are not finite."""
        for kind in (kind for kind in self.values if kind != "layers"):
            values = self.values[kind][kind]
            bad = int((~values.flatten(1).isfinite().all(dim=1)).sum())
            if bad:
                raise DivergedError(f"NaN or infinity in {bad:,} of {len(values):,} {self.split.name!r} images")


def wanted_features(run: Run, opened: OpenedEncoder, split: Split) -> dict[str, torch.Tensor]:
    """The kinds of features that the probes read from memory, and of which places of the split (N,), in order."""
    arguments, everything, wanted = run.arguments, torch.arange(len(split.indices)), {}
    is_training = split is run.train
    if not streams_evaluation(run, opened):
        # Random views are seen once and not kept, so what is left is the part that the best head is chosen on.
        is_augmented = is_training and arguments.augment != "none"
        places = split_holdout(len(everything), arguments.holdout, arguments.seed)[1] if is_augmented else everything
        if len(places):
            wanted = dict.fromkeys(head_features(arguments, opened.is_raw), places)
    if PLAIN_PROBES & set(arguments.probes):
        wanted["last"] = everything
    if "collapse" in arguments.probes and not (is_training or opened.is_raw):
        wanted["layers"] = sample(everything, MAX_COLLAPSE_IMAGES, arguments.seed)
    return wanted


def frozen_features(run: Run, opened: OpenedEncoder, split: Split) -> SplitFeatures:
    """All that this run keeps of a split, from the cache; what is not there is computed in one pass and put there.

    Each kind has a file of its own, so that other probes, or a probe more, compute no kind again.
    """
    wanted = wanted_features(run, opened, split)
    if not wanted:
        return SplitFeatures(split, {}, {})
    keys = {kind: cache_key(run, opened, split, split.indices[places], kind) for kind, places in wanted.items()}
    paths = {kind: cache_path(run, key) for kind, key in keys.items()}
    values = {kind: read_cache(run, paths[kind], key) for kind, key in keys.items()}
    found = torch.tensor([[values[kind] is not None for kind in wanted]], device=run.accelerator.device)
    is_found = dict(zip(wanted, run.accelerator.gather(found).all(dim=0).tolist(), strict=True))
    missing = {kind: places for kind, places in wanted.items() if not is_found[kind]}
    computed = compute_features(run, opened, split, missing) if missing else {}
    if run.accelerator.is_main_process:
        for kind, features in computed.items():
            write_cache(paths[kind], keys[kind], features)
    return SplitFeatures(split, wanted, {**values, **computed})


def compute_features(
    run: Run, opened: OpenedEncoder, split: Split, wanted: dict[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Features by kind and name, by one pass over all places that any kind wants."""
    is_wanted = {kind: torch.zeros(len(split.indices), dtype=torch.bool) for kind in wanted}
    for kind, places in wanted.items():
        is_wanted[kind][places] = True
    places = torch.stack([*is_wanted.values()]).any(dim=0).nonzero().flatten()
    parts = stream(run, opened, opened.images(split.dataset), split.indices[places].tolist(), list(wanted))
    is_shown = run.accelerator.is_main_process and sys.stderr.isatty()
    kept, start = {kind: [] for kind in wanted}, 0
    for part in tqdm(parts, f"{split.name} batches", disable=not is_shown):
        chunk = places[start : start + len(next(iter(part.values())))]
        start += len(chunk)
        for kind in wanted:
            kept[kind].append(
                {name: value.cpu()[is_wanted[kind][chunk]] for name, value in part.items() if kind_of(name) == kind}
            )
    return {kind: concatenate(parts) for kind, parts in kept.items()}


def kind_of(name: str) -> str:
    """The kind that asks for features of this name; see `encoder_features`."""
    return "layers" if name.startswith("layer_") else name


def cache_key(run: Run, opened: OpenedEncoder, split: Split, indices: torch.Tensor, kind: str) -> str:
    """All that features depend on, as JSON."""
    key = {
        "weights": opened.digest,
        "all_but_weights": opened.all_but_weights,
        "data": split.fingerprint,
        "split": split.name,
        "indices": hashlib.sha256(indices.numpy().tobytes()).hexdigest(),
        "kind": kind,
        "dtype": run.arguments.dtype,
        "versions": [ijepa.__version__, transformers.__version__],
    }
    return json.dumps(key, sort_keys=True)


def cache_path(run: Run, key: str) -> Path:
    return run.cache_dir / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def read_cache(run: Run, path: Path, key: str) -> dict[str, torch.Tensor] | None:
    """The features of a cache file, or None if there is none that can be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("key") == key:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError):
        pass
    run.note(f"The cache file {path} was damaged, so its features were computed again.")
    return None


def write_cache(path: Path, key: str, features: dict[str, torch.Tensor]) -> None:
    with written_aside(path) as unfinished:
        save_file(features, unfinished, metadata={"key": key})


# Probes


def evaluate_entry(run: Run, entry: Entry) -> dict:
    """Everything that is measured of one encoder; on the main process. Others only help to compute features."""
    opened = open_entry(run, entry)
    result = {
        "spec": str(entry.spec),
        "encoder": type(opened.model).__name__,
        "weights_sha256": opened.digest,
        "all_but_weights_sha256": hashlib.sha256(opened.all_but_weights.encode()).hexdigest(),
    }
    train, validation = (frozen_features(run, opened, split) for split in (run.train, run.validation))
    try:
        result["probes"] = accuracies_of(run, opened, train, validation)
    except DivergedError as error:
        run.note(f"{entry.name} ({entry.spec}) has no accuracies: {error}. The encoder has diverged.")
        result["probes"] = {}
    if "layers" in validation.values and run.accelerator.is_main_process:
        layers = validation.values["layers"]
        names = sorted(layers, key=lambda name: int(name.removeprefix("layer_")))
        result["collapse"] = [dataclasses.asdict(layer_spread(layers[name])) for name in names]
    return result


def accuracies_of(run: Run, opened: OpenedEncoder, train: SplitFeatures, validation: SplitFeatures) -> dict[str, dict]:
    """What all probes but the collapse report measure, by the name of their column; on the main process.

    Raises:
        DivergedError: on every process, if features are not finite.
    """
    for features in (train, validation):
        features.require_finite()
    accuracies = {}
    if PLAIN_PROBES & set(run.arguments.probes) and run.accelerator.is_main_process:
        accuracies = plain_probes(run, train.values["last"]["last"], validation.values["last"]["last"])
    if run.arguments.has_heads:
        accuracies |= sweep(run, opened, train, validation)
    return accuracies


def plain_probes(run: Run, train: torch.Tensor, validation: torch.Tensor) -> dict[str, dict]:
    """The probes that need no training loop, by the name of their column, of features (N, D)."""
    arguments, results = run.arguments, {}
    train_labels, validation_labels = run.train.labels, run.validation.labels
    ks = [k for k in arguments.k if "knn" in arguments.probes and k <= len(train)]
    for k, scores in (knn_votes(run, train, validation, ks) if ks else {}).items():
        results[f"{k}-NN"] = measure(run, scores)
    if "few_shot" in arguments.probes:
        for name, shots in few_shot_columns(run):
            result = few_shot_accuracy(
                *(train, train_labels, validation, validation_labels, shots, arguments.num_draws, arguments.seed)
            )
            results[name] = {"accuracy": result.mean, "std": result.std, "draws": list(result.accuracies)}
    if "logistic" in arguments.probes:
        results["logistic"] = measure(run, logistic_regression_scores(train, train_labels, validation))
    return results


def knn_votes(run: Run, train: torch.Tensor, validation: torch.Tensor, ks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Votes (N, classes) by k, computed on the accelerator where the training features fit in its memory."""
    scaled = standardize(train, validation)
    try:
        device = run.accelerator.device
        return knn_scores_by_k(scaled[0].to(device), run.train.labels, scaled[1].to(device), ks)
    except torch.OutOfMemoryError:
        return knn_scores_by_k(scaled[0], run.train.labels, scaled[1], ks)


def few_shot_columns(run: Run) -> list[tuple[str, int | float]]:
    smallest = run.train.labels.unique(return_counts=True)[1].min().item()
    shots = [(f"{shots}-shot", shots) for shots in run.arguments.shots if shots <= smallest]
    return shots + [(f"{100 * share:g} % labels", share) for share in run.arguments.label_fractions]


def measure(run: Run, scores: torch.Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy of scores (N, classes) on the validation split."""
    references = class_indices(run.train.labels, run.validation.labels)
    return accuracy_metric().compute(predictions=scores.float().numpy(), references=references.numpy())


# Heads


def head_features(arguments: ProbingArguments, is_raw: bool) -> list[str]:
    """What the heads of a sweep read. Raw pixels have neither layers nor tokens: of theirs only "last" is left."""
    names = [*arguments.head_features] if "linear" in arguments.probes else []
    if is_raw:
        return ["last"] if names else []
    return names + (["tokens"] if "attentive" in arguments.probes else [])


def heads_of(run: Run, opened: OpenedEncoder) -> list[HeadSettings]:
    """The sweep."""
    arguments = run.arguments
    names, norms = head_features(arguments, opened.is_raw), [norm == "batch_norm" for norm in arguments.head_norms]
    return head_grid(names, norms, arguments.optimizers, arguments.learning_rates, arguments.weight_decays)


def streams_evaluation(run: Run, opened: OpenedEncoder) -> bool:
    """Whether heads read patch tokens that are too many to stay in memory, so that the encoder runs beside them."""
    num_images = len(run.train.indices) + len(run.validation.indices)
    num_tokens, width = run.trials[opened.spec].token_shape
    has_tokens = "tokens" in head_features(run.arguments, opened.is_raw)
    return has_tokens and 4 * num_images * num_tokens * width > MAX_TOKEN_BYTES


@dataclass
class HeadData:
    """Where the batches of the heads come from: features kept in memory, or the encoder running along.

    Args:
        train, validation: the kept features.
        kinds: the features that the heads read.
    """

    run: Run
    opened: OpenedEncoder
    train: SplitFeatures
    validation: SplitFeatures
    kinds: list[str]

    @property
    def streams_training(self) -> bool:
        return streams_evaluation(self.run, self.opened) or self.run.arguments.augment != "none"

    def labels(self, split: Split, places: torch.Tensor) -> torch.Tensor:
        """Class indices (N,), on the device."""
        return class_indices(self.run.train.labels, split.labels[places]).to(self.run.accelerator.device)

    def evaluation(self, features: SplitFeatures, places: torch.Tensor) -> Callable[[], Iterable[Batch]]:
        """What gives the batches of these images, seen as in evaluation, as often as it is called."""
        split, size = features.split, self.run.arguments.batch_size
        if not streams_evaluation(self.run, self.opened):
            return lambda: self.kept(features, places, size)
        images, keys = self.opened.images(split.dataset), split.indices[places].tolist()
        return lambda: self.streamed(images, keys, self.labels(split, places), size)

    def training(self, places: torch.Tensor, size: int) -> Callable[[int], Iterable[Batch]]:
        """What gives the batches of an epoch, of `size` images each; the last images of the order may be left over."""
        split, arguments = self.run.train, self.run.arguments

        def chosen(epoch: int) -> torch.Tensor:
            order = torch.from_numpy(epoch_order(len(places), arguments.seed, epoch))
            return places[order[: len(places) // size * size]]

        if not self.streams_training:
            return lambda epoch: self.kept(self.train, chosen(epoch), size)
        images = self.opened.images(split.dataset)
        augmented = AUGMENTED[arguments.augment](images, arguments.seed) if arguments.augment != "none" else None

        def batches(epoch: int) -> Iterator[Batch]:
            indices = split.indices[chosen(epoch)].tolist()
            keys = [(epoch, index) for index in indices] if augmented else indices
            return self.streamed(augmented or images, keys, self.labels(split, chosen(epoch)), size)

        return batches

    def kept(self, features: SplitFeatures, places: torch.Tensor, size: int) -> Iterator[Batch]:
        device = self.run.accelerator.device
        labels = self.labels(features.split, places)
        for part, part_labels in zip(places.split(size), labels.split(size), strict=True):
            yield {kind: features.at(kind, part).to(device) for kind in self.kinds}, part_labels

    def streamed(self, images, keys: Sequence, labels: torch.Tensor, size: int) -> Iterator[Batch]:
        parts = map(finite, stream(self.run, self.opened, images, keys, self.kinds))
        return zip(rebatch(parts, size), labels.split(size), strict=True)


def finite(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same features. Raises DivergedError if they are not finite, at the first ones instead of after the sweep."""
    if not all(value.isfinite().all() for value in features.values()):
        raise DivergedError("NaN or infinity in its features")
    return features


def sweep(run: Run, opened: OpenedEncoder, train: SplitFeatures, validation: SplitFeatures) -> dict[str, dict]:
    """The linear and the attentive probe, by the name of their column: all heads, and what the best one reaches."""
    arguments, settings = run.arguments, heads_of(run, opened)
    if not settings:
        return {}
    data = HeadData(run, opened, train, validation, sorted({entry.features for entry in settings}))
    fit, held = split_holdout(len(run.train.indices), arguments.holdout, arguments.seed)
    size = min(arguments.batch_size, len(fit))
    training = data.training(fit, size)
    judging = data.evaluation(validation, torch.arange(len(run.validation.indices)))
    choosing = data.evaluation(train, held) if len(held) else judging
    if not (run.accelerator.is_main_process or data.streams_training):
        return {}  # where the encoder does not run along, the main process trains alone
    heads = train_heads(
        settings,
        training,
        run.trials[opened.spec].widths,
        len(run.train.labels.unique()),
        epochs=arguments.epochs,
        steps_per_epoch=len(fit) // size,
        schedule=arguments.schedule,
        warmup_epochs=arguments.warmup_epochs,
        seed=arguments.seed,
        device=run.accelerator.device,
    )
    return judge_heads(run, settings, heads, choosing, judging)


def judge_heads(
    run: Run,
    settings: list[HeadSettings],
    heads: torch.nn.ModuleList,
    choosing: Callable[[], Iterable[Batch]],
    validation: Callable[[], Iterable[Batch]],
) -> dict[str, dict]:
    """Chooses the best head of each probe, then measures it on the validation split.

    The validation accuracies of the other heads are for the record: they are not looked at here, unless the choice is
    made on the validation split as published.
    """
    is_optimistic = run.arguments.holdout == 0
    accuracies = head_accuracies(settings, heads, validation())
    chosen_by = accuracies if is_optimistic else head_accuracies(settings, heads, choosing())
    results = {}
    for probe, index in choose_heads(settings, chosen_by).items():
        results[OPTIMISTIC.format(probe) if is_optimistic else probe] = {
            **measure(run, head_scores(settings[index], heads[index], validation())),
            "chosen": str(settings[index]),
            "border": border_of(settings, settings[index]),
            "chosen_on": run.validation.name if is_optimistic else f"{run.arguments.holdout:g} of {run.train.name}",
            "heads": [
                {**dataclasses.asdict(entry), "accuracy": accuracy, "accuracy_of_choice": chosen}
                for entry, accuracy, chosen in zip(settings, accuracies, chosen_by, strict=True)
                if entry.probe == probe
            ],
        }
    return results


def border_of(settings: list[HeadSettings], best: HeadSettings) -> str | None:
    """Whether the best head has an extreme learning rate of its sweep, so that the optimum may lie outside."""
    rates = sorted({entry.learning_rate for entry in settings})
    if len(rates) == 1 or rates[0] < best.learning_rate < rates[-1]:
        return None
    return "smallest" if best.learning_rate == rates[0] else "largest"


def border_notes(rows: dict[str, list[dict]]) -> list[str]:
    """One remark for each probe whose sweep should be wider."""
    found = {}
    for name, results in rows.items():
        for probe, value in (pair for result in results for pair in result["probes"].items()):
            if value.get("border"):
                found.setdefault((probe, value["border"]), []).append(name)
    return [
        f"The best {probe} head has the {border} learning rate of the sweep for {', '.join(dict.fromkeys(names))}:"
        " widen the sweep."
        for (probe, border), names in found.items()
    ]


# Report


def summarize(results: list[dict]) -> dict[str, float | Accuracies]:
    """The cells of a row by column: an accuracy, or several of draws or of entries with the same name."""
    cells = {}
    for column in dict.fromkeys(name for result in results for name in result["probes"]):
        values = [result["probes"][column] for result in results if column in result["probes"]]
        if len(results) > 1:
            cells[column] = Accuracies.of(value["accuracy"] for value in values)
        elif "draws" in values[0]:
            cells[column] = Accuracies.of(values[0]["draws"])
        else:
            cells[column] = values[0]["accuracy"]
    return cells


def accuracy_table(rows: dict[str, list[dict]]) -> str:
    return format_table([{"encoder": name, **summarize(results)} for name, results in rows.items()])


def random_layers(rows: dict[str, list[dict]], all_but_weights: str) -> list[LayerSpread] | None:
    """The layers of the first random encoder that differs from another encoder in the weights alone."""
    for result in (result for results in rows.values() for result in results):
        if is_random(result) and result["all_but_weights_sha256"] == all_but_weights and "collapse" in result:
            return [LayerSpread(**layer) for layer in result["collapse"]]
    return None


def is_random(result: dict) -> bool:
    return EncoderSpec.parse(result["spec"]).kind == "random"


def collapse_readings(rows: dict[str, list[dict]]) -> list[str]:
    """A line of plain words for each encoder."""
    lines = []
    for name, results in rows.items():
        for result in (result for result in results if "collapse" in result):
            title = name if len(results) == 1 else f"{name}, {result['spec']}"
            layers = [LayerSpread(**layer) for layer in result["collapse"]]
            beside = None if is_random(result) else random_layers(rows, result["all_but_weights_sha256"])
            lines.append(f"**{title}** is {collapse_reading(layers, beside)}")
    return lines


def collapse_table(rows: dict[str, list[dict]]) -> str:
    """A row for each layer of each encoder."""
    lines = []
    for name, results in rows.items():
        for result in results:
            title = {"encoder": name if len(results) == 1 else f"{name}, {result['spec']}"}
            for index, layer in enumerate(result.get("collapse", [])):
                place = {"layer": "embedding" if index == 0 else str(index)}
                lines.append({**title, **place, **LayerSpread(**layer).cells()})
    return format_table(lines)


ACCURACY_LEGEND = (
    "Top-1 accuracy of frozen features; ± is the standard deviation of what was averaged: the draws of a few-shot"
    " probe, or the encoders of a row that has several. Compare with the random encoder: what is not above it was not"
    " learned."
)


def report(run: Run, rows: dict[str, list[dict]]) -> str:
    """The tables and readings as markdown."""
    split = run.validation
    parts = [
        f"Measured on {len(split.indices):,} images of the {split.name!r} split of {run.arguments.data!r}; probes"
        f" learn from {len(run.train.indices):,} images of {run.train.name!r}, {len(run.train.labels.unique())}"
        " classes.",
    ]
    if any(result["probes"] for results in rows.values() for result in results):
        parts += [accuracy_table(rows), ACCURACY_LEGEND]
    chosen = [
        f"- {name}: {value['chosen']}"
        for name, results in rows.items()
        for result in results
        for value in result["probes"].values()
        if "chosen" in value
    ]
    parts += ["Best heads:\n\n" + "\n".join(chosen)] if chosen else []
    notes = [*run.notes, *border_notes(rows)]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    readings = collapse_readings(rows)
    if readings:
        parts += ["### Has it collapsed?", "\n".join(f"- {reading}" for reading in readings)]
        parts += [collapse_table(rows), COLUMNS_IN_WORDS]
    return "\n\n".join(parts)


def provenance(words: Sequence[str]) -> dict:
    packages = ("torch", "transformers", "accelerate", "datasets", "scikit-learn", "numpy")
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": f"{PROGRAM} {shlex.join(words)}",
        "versions": {
            "ijepa-transformers": ijepa.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
        },
    }


def write_results(run: Run, rows: dict[str, list[dict]], words: Sequence[str], unmeasured: Sequence[str] = ()) -> None:
    """results.json and results.md; `unmeasured` are the entries whose turn has not come yet."""
    origin = provenance(words)
    results = {
        **origin,
        "arguments": dataclasses.asdict(run.arguments),
        "data": {split.name: len(split.indices) for split in (run.train, run.validation)},
        "num_processes": run.accelerator.num_processes,
        "notes": [*run.notes, *border_notes(rows)],
        "unmeasured": list(unmeasured),
        "rows": [
            {"name": name, "summary": {k: as_json(v) for k, v in summarize(entries).items()}, "entries": entries}
            for name, entries in rows.items()
        ],
    }
    write_text(run.output_dir / "results.json", json.dumps(results, indent=2) + "\n")
    text = f"# Frozen encoders on {in_markdown(run.arguments.data)}\n\n{origin['date']}: `{origin['command']}`\n\n"
    text += f"**Unfinished**, still to be measured: {', '.join(unmeasured)}.\n\n" if unmeasured else ""
    write_text(run.output_dir / "results.md", f"{text}{report(run, rows)}\n")


def as_json(value: float | Accuracies) -> float | dict:
    return dataclasses.asdict(value) if isinstance(value, Accuracies) else value


# Model cards


def update_model_cards(run: Run, rows: dict[str, list[dict]], words: Sequence[str]) -> None:
    """The results of every local directory in its README.md, beside those of raw pixels and of the random encoders
    that differ from it in the weights alone."""
    origin = provenance(words)
    specs = [EncoderSpec.parse(result["spec"]) for results in rows.values() for result in results]
    for directory in sorted({spec.source for spec in specs if spec.kind == "model" and os.path.isdir(spec.source)}):
        baselines, own = {}, {}
        kin = {
            result["all_but_weights_sha256"]
            for results in rows.values()
            for result in results
            if EncoderSpec.parse(result["spec"]).source == directory
        }
        for name, results in rows.items():
            for result in results:
                spec = EncoderSpec.parse(result["spec"])
                if spec.kind == "raw_pixels" or (is_random(result) and result["all_but_weights_sha256"] in kin):
                    baselines.setdefault(name, []).append(result)
                elif spec.kind == "model" and spec.source == directory:
                    own[f"{spec.encoder} encoder"] = [result]
        text = f"{report(run, {**baselines, **own})}\n\n{origin['date']}: `{origin['command']}`"
        update_evaluation(Path(directory), text, card_results(run, own))


def card_results(run: Run, rows: dict[str, list[dict]]) -> list[EvalResult]:
    arguments = run.arguments
    name = Path(arguments.data).name if Path(arguments.data).exists() else arguments.data
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=name,
            dataset_name=name,
            dataset_config=arguments.data_config,
            dataset_split=run.validation.name,
            metric_type="accuracy",
            metric_name=f"{column}, {row}",
            metric_value=round(value["accuracy"], 4),
        )
        for row, results in rows.items()
        for column, value in results[0]["probes"].items()
    ]


# The run from beginning to end


def evaluate(run: Run, words: Sequence[str]) -> None:
    """Measures every entry, prints the tables and writes them; what is measured stays if a later entry fails."""
    rows = {}
    for number, entry in enumerate(run.entries, start=1):
        run.accelerator.print(f"{number} of {len(run.entries)}: {entry.name} ({entry.spec})", flush=True)
        rows.setdefault(entry.name, []).append(evaluate_entry(run, entry))
        if run.accelerator.is_main_process:
            write_results(run, rows, words, [entry.name for entry in run.entries[number:]])
    if not run.accelerator.is_main_process:
        return
    if run.arguments.update_model_card:
        update_model_cards(run, rows, words)
    print(f"\n{report(run, rows)}\n\nresults {run.output_dir / 'results.md'} and results.json")


def main(words: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading
    words = sys.argv[1:] if words is None else words
    arguments = parse_probing_arguments(words)
    status = 2  # the status argparse gives to wrong arguments
    try:
        run = build_run(arguments)
        status = 1
        evaluate(run, words)
    except ValueError as error:  # a BadImageError, among others
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(status)
    run.accelerator.wait_for_everyone()
    end_process_group(run.accelerator)


if __name__ == "__main__":
    main()
