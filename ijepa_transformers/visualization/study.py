# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a visualization report is made from: networks, images, features and metrics."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel

from ..arguments import MaskArguments, require, without_removed_keys
from ..data.datasets import ProcessedImages
from ..data.sources import labels_of, open_split
from ..data.transforms import normalize_pixel_values
from ..encoders import (
    is_pretraining_model,
    load_config,
    load_encoder,
    load_pretraining_model,
    load_processor,
    one_line,
    random_encoder,
)
from ..masking import MultiBlockMasking
from ..modeling_ijepa import IJepaForPretraining, IJepaModel
from .arguments import VisualizationArguments


METRICS = "metrics.jsonl"


# Opening: nothing is written yet
@dataclass
class Networks:
    """The encoder that is shown, an untrained one beside it, and the three networks of a pretraining directory."""

    encoder: IJepaModel
    random_encoder: IJepaModel
    pretraining: IJepaForPretraining | None  # None: the directory holds one encoder
    saved_from: str  # the class that the directory was saved from

    @property
    def config(self):
        return self.encoder.config


def load_networks(arguments: VisualizationArguments, device: torch.device) -> Networks:
    """Opens the model in float32 and evaluation mode, with attention that can be looked at.

    Raises:
        ValueError: if it cannot be opened, is no I-JEPA, or has no context encoder and that is asked for.
    """
    config = load_config(arguments.model)
    require(config.model_type == "ijepa", f"{arguments.model!r} is a {config.model_type!r} model, no I-JEPA.")
    saved_from = ", ".join(config.architectures or ["an unnamed class"])
    pretraining = None
    if is_pretraining_model(config):
        pretraining = load_pretraining_model(arguments.model).to(device)
        pretraining.set_attn_implementation("eager")
        encoder = pretraining.ijepa if arguments.encoder == "target" else pretraining.context_encoder
    else:
        encoder = load_encoder(arguments.model, arguments.encoder, torch.float32).to(device)
        encoder.set_attn_implementation("eager")
    return Networks(encoder, random_encoder(encoder, arguments.seed).to(device), pretraining, saved_from)


@dataclass
class Pool:
    """The images that were read, as the networks see them."""

    images: torch.Tensor  # (K, channels, height, width), uint8
    labels: np.ndarray | None  # (K,), -1 where an image has none
    class_names: list[str] | None
    num_bad: int
    image_mean: Sequence[float]
    image_std: Sequence[float]

    def pixel_values(self, rows: slice) -> torch.Tensor:
        return normalize_pixel_values(self.images[rows], self.image_mean, self.image_std)


def load_pool(arguments: VisualizationArguments, networks: Networks) -> Pool:
    """Reads images in a random order; those that cannot be read are passed over and counted.

    Raises:
        ValueError: fewer than two images can be read, or the image processor does not fit the model.
    """
    config = networks.config
    dataset = open_split(arguments, arguments.split)
    processor = load_processor(arguments.model)
    has_statistics = getattr(processor, "do_normalize", True)
    mean = processor.image_mean if has_statistics else [0.0] * config.num_channels
    std = processor.image_std if has_statistics else [1.0] * config.num_channels
    rows, images, num_bad = read_images(ProcessedImages(dataset, processor, config.num_channels), arguments)
    images = torch.stack([to_uint8(image, mean, std) for image in images])
    size = tuple(images.shape[-2:])
    require(
        size == config.image_height_and_width,
        f"The image processor gives {size} pixels, but the model takes {config.image_height_and_width}.",
    )
    labels, class_names = None, None
    if "label" in dataset.column_names:
        labels, class_names = labels_of(dataset.select(rows)), dataset.features["label"].names
        labels = labels if (labels >= 0).any() else None  # the page must not speak of colours that no image has
    return Pool(images, labels, class_names, num_bad, mean, std)


def read_images(images: ProcessedImages, arguments: VisualizationArguments) -> tuple[list[int], list, int]:
    """The rows and the pixels of as many readable images as are asked for, and how many were passed over."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed)).tolist()
    rows, pixels, num_bad = [], [], 0
    for row in order:
        image = images[row]
        if isinstance(image, str):
            num_bad += 1
            continue
        rows.append(row)
        pixels.append(image)
        if len(rows) == arguments.pool_size:
            break
    require(len(rows) >= 2, f"{arguments.data!r} has {len(rows)} readable images, but pictures need at least 2.")
    return rows, pixels, num_bad


def to_uint8(pixel_values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Undoes the normalisation, (channels, height, width)."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (255 * (pixel_values * std + mean)).round().clamp(0, 255).to(torch.uint8)


def read_runs(arguments: VisualizationArguments) -> dict[str, list[dict]]:
    """The metrics of the model's own run, if there are any, and of the further ones.

    Raises:
        ValueError: a further run has no metrics.
    """
    runs = {arguments.own_name: read_metrics(Path(arguments.model))}
    for run in arguments.runs:
        name, _, directory = run.partition("=")
        runs[name] = read_metrics(Path(directory))
        require(runs[name], f"{directory!r} holds no {METRICS} with a row in it.")
    return {name: rows for name, rows in runs.items() if rows}


def read_metrics(directory: Path) -> list[dict]:
    path = directory / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    try:  # a run at work may have written half a line
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error


def read_mask_fields(model: str) -> dict:
    """The settings of the masks in the run's recipe; the defaults of `run_pretraining.py` where there is none.

    Raises:
        ValueError: the recipe cannot be read, or has a setting that this version no longer supports.
    """
    path = Path(model) / "recipe.yaml"
    try:
        recipe = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{str(path)!r} is not a YAML file: {one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{str(path)!r} must hold `key: value` lines.")
    recipe = without_removed_keys(recipe, repr(str(path)))
    known = {entry.name for entry in dataclasses.fields(MaskArguments)}
    return MaskArguments(**{name: value for name, value in recipe.items() if name in known}).mask_fields()


def build_masking(grid_size: tuple[int, int], fields: dict, mode: str) -> MultiBlockMasking:
    """The masks of a run, or what they would be in the other mode, with `min_patches` lowered as far as needed."""
    if mode != fields["mode"]:  # numbers fixed for one mode need not be possible in the other
        fields = {**fields, "mode": mode, "num_context_tokens": None, "num_target_tokens": None}
    for least in range(fields["min_patches"], 0, -1):
        try:
            return MultiBlockMasking(grid_size, **{**fields, "min_patches": least})
        except ValueError as error:
            problem = error
    raise problem


# Computing
@dataclass
class Features:
    """What an encoder makes of the pool."""

    patches: torch.Tensor  # (K', N, D), of the first images: those that are shown and those in the bank
    pooled: torch.Tensor  # (K, D)


@torch.no_grad()
def encode(encoder: PreTrainedModel, pool: Pool, num_patch_images: int, batch_size: int) -> Features:
    patches, pooled = [], []
    for start in range(0, len(pool.images), batch_size):
        pixel_values = pool.pixel_values(slice(start, start + batch_size)).to(encoder.device)
        hidden_states = encoder(pixel_values).last_hidden_state
        patches.append(hidden_states[: max(0, num_patch_images - start)].cpu())
        pooled.append(hidden_states.mean(dim=1).cpu())
    return Features(torch.cat(patches), torch.cat(pooled))


@dataclass
class Study:
    """All that the sections draw from."""

    arguments: VisualizationArguments
    networks: Networks
    pool: Pool
    runs: dict[str, list[dict]]
    mask_fields: dict

    @property
    def images(self) -> torch.Tensor:
        """The shown images, (B, channels, height, width)."""
        return self.whole_patches(self.arguments.num_images)

    def whole_patches(self, number: int) -> torch.Tensor:
        """The first images without the pixels beyond the last whole patch, which the model does not see."""
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        return self.pool.images[:number, :, : rows * height, : columns * width]

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.networks.config.patch_height_and_width

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.networks.config.grid_size

    @cached_property
    def features(self) -> Features:
        return self._encode(self.networks.encoder)

    @cached_property
    def random_features(self) -> Features:
        return self._encode(self.networks.random_encoder)

    @cached_property
    def target_features(self) -> Features:
        """Of the target encoder, which is what the predictor predicts, whichever encoder is shown."""
        target = self.networks.pretraining.ijepa
        return self.features if target is self.networks.encoder else self._encode(target)

    def _encode(self, encoder: IJepaModel) -> Features:
        print(f"encoding {len(self.pool.images):,} images", flush=True)
        num_patch_images = max(self.arguments.num_images, self.arguments.bank_size)
        return encode(encoder, self.pool, num_patch_images, self.arguments.batch_size)


def build_study(arguments: VisualizationArguments) -> Study:
    """Opens everything. Raises ValueError if the arguments cannot work."""
    runs = read_runs(arguments)
    networks = load_networks(arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return Study(arguments, networks, load_pool(arguments, networks), runs, read_mask_fields(arguments.model))
