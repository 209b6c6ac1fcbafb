# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens and computes what a visualization report shows: networks, images, features and metrics."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import yaml
from transformers import PreTrainedModel

from ..arguments import flags_of, require
from ..configuration_ijepa import IJepaConfig
from ..display import SECONDS_BETWEEN_LINES, Progress
from ..encoders import (
    is_pretraining_model,
    load_config,
    load_encoder,
    load_pretraining_model,
    one_line,
    random_encoder,
)
from ..files import read_rows
from ..mask_arguments import MaskArguments, without_removed_keys
from ..masking import Masking, build_masking
from ..modeling_ijepa import IJepaForPretraining
from ..saved_weights import require_finite
from ..verdict import Verdict, read_verdict
from .arguments import VisualizationArguments
from .curves import BASELINE_KEY, PANELS
from .pool import Pool, load_pool


METRICS, RECIPE = "metrics.jsonl", "recipe.yaml"
Model = TypeVar("Model", bound=PreTrainedModel)


@dataclass
class Networks:
    """The encoder that is shown, an untrained encoder to compare with, and the model of a pretraining directory."""

    encoder: PreTrainedModel
    random_encoder: PreTrainedModel
    pretraining: IJepaForPretraining | None  # None: the directory holds one encoder
    saved_from: str  # the class that the directory was saved from

    @property
    def config(self) -> IJepaConfig:
        return cast(IJepaConfig, self.encoder.config)


def _load_networks(arguments: VisualizationArguments, device: torch.device) -> Networks:
    """Opens the model in float32 and evaluation mode, with eager attention, which returns its maps.

    Raises:
        ValueError: if it cannot be opened, is no I-JEPA, or lacks the context encoder that was asked for.
    """
    config = load_config(arguments.model)
    require(config.model_type == "ijepa", f"{arguments.model!r} is a {config.model_type!r} model, no I-JEPA.")
    saved_from = ", ".join(config.architectures or ["an unnamed class"])
    pretraining = None
    encoder: PreTrainedModel
    if is_pretraining_model(config):
        pretraining = _move(load_pretraining_model(arguments.model), device)
        pretraining.set_attn_implementation("eager")
        encoder = pretraining.ijepa if arguments.encoder == "target" else pretraining.context_encoder
    else:
        encoder = _move(load_encoder(arguments.model, arguments.encoder, torch.float32), device)
        require_finite(encoder, arguments.model)
        encoder.set_attn_implementation("eager")
    return Networks(encoder, _move(random_encoder(encoder, arguments.seed), device), pretraining, saved_from)


def _move(model: Model, device: torch.device) -> Model:
    torch.nn.Module.to(model, device)  # in place; the stub of PreTrainedModel.to does not take a device
    return model


def _read_runs(arguments: VisualizationArguments) -> dict[str, list[dict]]:
    """The metrics of the model's own run, if there are any, and of the other runs.

    Raises:
        ValueError: if one of the other runs has no metrics.
    """
    runs = {arguments.own_name: _read_metrics(Path(arguments.model))}
    for run in arguments.runs:
        name, _, directory = run.partition("=")
        runs[name] = _read_metrics(Path(directory))
        require(runs[name], f"{directory!r} holds no {METRICS} with a row in it.")
    return {name: rows for name, rows in runs.items() if rows}


def _read_metrics(directory: Path) -> list[dict]:
    path = directory / METRICS
    rows, num_damaged = read_rows(path, _can_be_drawn)
    is_growing = path.is_file() and not path.read_bytes().endswith(b"\n")  # a training writes its last line
    damaged = f"{num_damaged:,} of its lines are damaged"
    require(num_damaged <= is_growing, f"{str(path)!r} cannot be read: {damaged}. --resume of its run drops them.")
    return rows


def _can_be_drawn(row: dict) -> bool:
    """Whether all metrics that are drawn are numbers, None or absent."""
    drawn = {"step", BASELINE_KEY}.union(*(panel.lines for panel in PANELS))
    return all(isinstance(row.get(name), int | float | None) for name in drawn)


def read_masks(model: str) -> MaskArguments:
    """The settings of the masks in the run's recipe. Without a recipe, the defaults of `ijepa pretrain`.

    Raises:
        ValueError: if the recipe cannot be read, has a setting that this version no longer supports, or wrong masks.
    """
    recipe, flags = _read_recipe(model), flags_of([MaskArguments])
    try:
        values = {name: flags[name].read(recipe[name]) for name in flags.keys() & recipe.keys()}
        masks = MaskArguments(**{name: value for name, value in values.items() if value is not None})
        masks.check_masks()
    except ValueError as error:
        raise ValueError(f"{str(Path(model) / RECIPE)!r} has wrong masks: {error}") from error
    return masks


def _read_recipe(model: str) -> dict[str, Any]:
    path = Path(model) / RECIPE
    try:
        recipe = (yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(path)!r} is not a YAML file: {one_line(error)}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{str(path)!r} must hold `key: value` lines.")
    return without_removed_keys(recipe, repr(str(path)))


def fitting_masking(grid_size: tuple[int, int], masks: MaskArguments, mode: str) -> Masking:
    """The masks of a run, in its own mode or another one. `min_patches` is lowered as far as needed.

    Raises:
        ValueError: if no such masks fit the grid.
    """
    if mode != masks.mask_mode:  # fixed numbers of one mode may be impossible in another
        masks = dataclasses.replace(masks, mask_mode=mode, num_context_tokens=None, num_target_tokens=None)
    fields = masks.mask_fields()
    if "min_patches" not in fields:
        return build_masking(grid_size, **fields)
    for least in range(fields["min_patches"], 0, -1):
        try:
            return build_masking(grid_size, **{**fields, "min_patches": least})
        except ValueError as error:
            problem = error
    raise problem


@dataclass
class Features:
    """The features of the pool by one encoder."""

    patches: torch.Tensor  # (K', N, D), of the first images, which are shown or in the bank
    pooled: torch.Tensor  # (K, D), of all images


@torch.no_grad()
def encode(encoder: PreTrainedModel, pool: Pool, num_patch_images: int, batch_size: int) -> Features:
    """The features of all images, with a bar while they are computed."""
    patches, pooled = [], []
    with Progress(len(pool.images), "image", seconds_between_lines=SECONDS_BETWEEN_LINES, leave=False) as progress:
        for start in range(0, len(pool.images), batch_size):
            pixel_values = pool.pixel_values(slice(start, start + batch_size)).to(encoder.device)
            hidden_states = encoder(pixel_values).last_hidden_state
            patches.append(hidden_states[: max(0, num_patch_images - start)].cpu())
            pooled.append(hidden_states.mean(dim=1).cpu())
            progress.update(len(hidden_states))
    return Features(torch.cat(patches), torch.cat(pooled))


@dataclass
class Study:
    """Everything that the sections of the page show. Features are computed when they are first used."""

    arguments: VisualizationArguments
    networks: Networks
    pool: Pool
    runs: dict[str, list[dict]]
    masks: MaskArguments
    verdict_of_run: Verdict | None = None  # None: the model's directory holds none

    @property
    def batch_size(self) -> int | None:
        """Images per step of the model's run; None if its recipe does not say."""
        value = _read_recipe(self.arguments.model).get("batch_size")
        return value if isinstance(value, int) else None

    @property
    def images(self) -> torch.Tensor:
        """The shown images, (B, 1 or 3, height, width)."""
        return self.whole_patches(self.arguments.num_images)

    def whole_patches(self, number: int | None, pool: Pool | None = None) -> torch.Tensor:
        """The first images, without the pixels beyond the last whole patch. The model does not see those."""
        (rows, columns), (height, width) = self.grid_size, self.patch_size
        return (pool or self.pool).pictures[:number, :, : rows * height, : columns * width]

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
        """Features of the target encoder, which the predictor predicts, also if the other encoder is shown."""
        assert self.networks.pretraining is not None, "one encoder alone has no targets"
        target = self.networks.pretraining.ijepa
        return self.features if target is self.networks.encoder else self._encode(target)

    def _encode(self, encoder: PreTrainedModel) -> Features:
        return encode(encoder, self.pool, self.num_patch_images, self.arguments.batch_size)

    @property
    def num_patch_images(self) -> int:
        """Of how many images the features of the patches are kept, if there are so many."""
        return max(self.arguments.num_images, self.arguments.bank_size)


def build_study(arguments: VisualizationArguments) -> Study:
    """Opens everything.

    Raises:
        ValueError, OSError: if the arguments cannot work.
    """
    runs, verdict = _read_runs(arguments), read_verdict(Path(arguments.model))
    networks = _load_networks(arguments, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    require(
        networks.pretraining is not None or not arguments.decoder,
        f"--decoder shows the guesses of a predictor, but {arguments.model!r} holds one encoder.",
    )
    pool = load_pool(arguments, networks.config)
    return Study(arguments, networks, pool, runs, read_masks(arguments.model), verdict)
