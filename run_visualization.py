#!/usr/bin/env python
# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Shows what an I-JEPA has learned, as one HTML page of pictures that needs nothing beside itself:

    python run_visualization.py --model DIR --data my/photos --output report.html
    python run_visualization.py --model runs/a --runs other=runs/b --data digits --split test --output report.html

A pretraining directory gets every section. A directory with one encoder gets those that need no predictor, and the
page says what is missing. Everything is computed before anything is written.

Shapes: K images of the pool, B of them shown, N patches, D features, M target blocks, T patches of one block.
"""

import dataclasses
import io
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Literal

import datasets
import matplotlib  # noqa: F401 (draws curves and maps: better missed now than after the computation)
import numpy as np
import torch
import transformers
import yaml
from PIL import Image
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ijepa import IJepaForPretraining, IJepaModel, __version__
from ijepa.checkpointing import write_text
from ijepa.data import ProcessedImages, labels_of, load_image_dataset, normalize_pixel_values
from ijepa.encoders import load_encoder, load_processor, one_line, random_encoder
from ijepa.masking import MODES, MultiBlockMasking
from ijepa.recipe import MaskArguments, argument, parse_arguments, require, without_removed_keys
from ijepa.report import Picture, Section, build_page, write_pictures
from ijepa.visualization import (
    PredictionScores,
    cut_patches,
    draw_attention,
    draw_map,
    draw_masks,
    draw_pca,
    draw_predictions,
    draw_scores,
    draw_similarity,
    map_points,
    most_detailed_blocks,
    most_detailed_patches,
    nearest_patches,
    pca_colors,
    plot_training_curves,
    position_mean,
    position_share,
    score_predictions,
)


PROGRAM = "run_visualization.py"
METRICS = "metrics.jsonl"
MASKED_IMAGES, COMPARED_IMAGES = 3, 4  # of the shown images: in the pictures of masks; of attention and similarity
COLUMN_WIDTH, CURVES_WIDTH = 85, 540  # CSS pixels that a column of a sheet, and the curves, need to be read


@dataclass
class VisualizationArguments:
    """Every argument of `run_visualization.py`.

    Raises:
        ValueError: with the offending value, if one is missing or out of range.
    """

    model: str = argument("", "model directory or Hub name: a pretraining directory, or one I-JEPA encoder")
    data: str = argument("", "images: a folder, Parquet or tar shards, a Hub dataset, or 'digits'")
    output: str = argument("", "the HTML file to write")
    data_config: str | None = argument(None, "configuration name of a Hub dataset")
    split: str = argument("train", "split to show; one that the model was not trained on is the more honest choice")
    image_column: str | None = argument(None, "column of the images; found if there is only one")
    label_column: str | None = argument(None, "column of the labels; found if there is only one")
    encoder: Literal["target", "context"] = argument(
        "target", "which encoder of a pretraining directory is shown; the paper evaluates the target"
    )
    num_images: int = argument(8, "images that are shown")
    bank_size: int = argument(512, "images whose patches are searched for the nearest to a prediction")
    map_images: int = argument(1000, "images on the map")
    batch_size: int = argument(32, "images per forward pass")
    seed: int = argument(0, "of the choice of images, of the masks and of the random encoder")
    runs: list[str] = argument([], "further runs as NAME=DIR, whose metrics.jsonl are drawn with the model's own")
    pictures_dir: str | None = argument(None, "directory that also gets every picture as a PNG file")

    def __post_init__(self):
        for name in ("model", "data", "output"):
            require(getattr(self, name), f"--{name} is missing.")
        require(not Path(self.output).is_dir(), f"output must be a file, but {self.output!r} is a directory.")
        for name, least in (("num_images", 2), ("bank_size", 2), ("map_images", 3), ("batch_size", 1), ("seed", 0)):
            require(getattr(self, name) >= least, f"{name} must be at least {least}, got {getattr(self, name)}.")
        for run in self.runs:
            name, _, directory = run.partition("=")
            require(name and directory, f"runs must be NAME=DIR, got {run!r}.")
        names = [self.own_name, *(run.partition("=")[0] for run in self.runs)]
        require(len(set(names)) == len(names), f"every run needs a name of its own, got {', '.join(names)}.")

    @property
    def own_name(self) -> str:
        """What the page calls the model: the last part of its name."""
        return Path(self.model).name or self.model

    @property
    def pool_size(self) -> int:
        """Images that are read."""
        return max(self.num_images, self.bank_size, self.map_images)


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
    try:
        config = AutoConfig.from_pretrained(arguments.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {arguments.model!r} cannot be opened: {one_line(error)}") from error
    require(config.model_type == "ijepa", f"{arguments.model!r} is a {config.model_type!r} model, no I-JEPA.")
    saved_from = ", ".join(config.architectures or ["an unnamed class"])
    pretraining = None
    if saved_from == "IJepaForPretraining":
        pretraining = IJepaForPretraining.from_pretrained(arguments.model, dtype=torch.float32).eval().to(device)
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
    dataset = load_image_dataset(
        arguments.data,
        split=arguments.split,
        config_name=arguments.data_config,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
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


# Sections


def curves_section(study: Study) -> Section:
    title = "How the training went"
    if not study.runs:
        return Section(title, note=f"There are no curves, because the model's directory holds no {METRICS}.")
    file = io.BytesIO()
    plot_training_curves(study.runs, file, title=None if len(study.runs) > 1 else next(iter(study.runs)))
    picture = Picture(
        "curves",
        Image.open(file),
        f"Training curves of {', '.join(study.runs)}",
        "Each box is one measurement over the course of the training (from left to right). k-NN accuracy says how"
        " often the most similar images belong to the same class; effective rank, in how many directions the features"
        " of different images differ.",
        "k-NN accuracy climbs well above the dashed line (an untrained network), and effective rank and spread grow or"
        " stay level.",
        "Effective rank falls towards 1 or spread towards 0: the network gives every image the same answer"
        " (collapse). The loss alone says little; it may rise in a good run and fall in a collapsing one.",
        CURVES_WIDTH,
    )
    return Section(title, [picture])


NO_PREDICTOR = (
    "This section is left out, because the directory holds one encoder (saved from {saved_from}) without the context"
    " encoder and the predictor."
)


def masks_section(study: Study) -> Section:
    title = "What the model is asked: guess the hidden parts"
    if study.networks.pretraining is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from))
    own_mode, notes, pictures = study.mask_fields["mode"], [], []
    for mode in sorted(MODES, key=lambda mode: mode != own_mode):
        try:
            masking = build_masking(study.grid_size, study.mask_fields, mode)
        except ValueError as error:
            notes.append(f"Masks of mode {mode!r} cannot be drawn here: {error}.")
            continue
        pictures.append(masks_picture(study, masking, mode == own_mode))
    return Section(title, pictures, " ".join(notes))


MASK_RULES = {
    "unbiased": "Blocks may lie anywhere, so over time every patch is sometimes seen and sometimes guessed.",
    "meta": "The rules of the published code: blocks never touch the last row and column, and surplus context patches"
    " are cut from the bottom.",
}


def masks_picture(study: Study, masking: MultiBlockMasking, is_own: bool) -> Picture:
    images = study.images[:MASKED_IMAGES]
    contexts, targets = masking.sample(len(images), study.arguments.seed)
    sheet = draw_masks(images, contexts, targets, study.patch_size)
    rules = MASK_RULES[masking.mode]
    if masking.min_patches != study.mask_fields["min_patches"]:
        rules += f" (Their least number of patches is lowered to {masking.min_patches}, or none would fit this grid.)"
    name, title = f"masks_{masking.mode}", f"Masks of mode {masking.mode!r}"
    least_width = (1 + contexts.shape[1] + targets.shape[1]) * COLUMN_WIDTH
    if not is_own:
        title, seen = f"{title}, which this run did not use", f"The same images. {rules}"
        return Picture(name, sheet, title, seen, least_width=least_width)
    return Picture(
        name,
        sheet,
        f"{title}, as in this run",
        "One row per image. The context is all that the first network sees; grey is hidden from it (what shows through"
        " is for your orientation). From the context the second network, the predictor, has to guess the features, not"
        f" the pixels, of each target block. {rules}",
        "The context leaves enough of the object for a person to guess the rest.",
        "So little context is left that nobody could guess, or the targets hold nothing but background.",
        least_width,
    )


def pca_section(study: Study) -> Section:
    shown, learned, untrained = len(study.images), study.features.patches, study.random_features.patches
    results = {
        ("this encoder", ""): pca_colors(learned[:shown]),
        ("the same,", "without place"): pca_colors(learned[:shown] - position_mean(learned)),
        ("untrained", "encoder"): pca_colors(untrained[:shown]),
    }
    own, placeless, _ = (f"{result.share:.0%}" for result in results.values())
    picture = Picture(
        "pca",
        draw_pca(study.images, results, study.patch_size),
        "Features of the patches as colours",
        "Patches with alike features have alike colours, across all images of a column (the three main directions of"
        f" the features, by principal component analysis, as red, green and blue; they hold {own} of the variation)."
        f" Knowing where a patch lies explains {position_share(learned):.0%} of the features' variation"
        f" ({position_share(untrained):.0%} in an untrained encoder), so the first colours show the place too. In the"
        " second column of colours the average of each place, taken over many images, is removed; what is left is"
        f" content ({placeless} of it in the three colours). An untrained encoder mostly repeats brightness.",
        "The same part of different objects has the same colour, background another, and borders between colours"
        " follow the objects.",
        "Every image has the same colours at the same places whatever it shows (only the place was learned), or the"
        " colours look no different from the untrained encoder's.",
        4 * COLUMN_WIDTH,
    )
    return Section("What the patches mean to it", [picture])


@torch.no_grad()
def attention_section(study: Study) -> Section:
    images = study.images[:COMPARED_IMAGES]
    pixel_values = study.pool.pixel_values(slice(len(images))).to(study.networks.encoder.device)
    attentions = study.networks.encoder(pixel_values, output_attentions=True).attentions[-1].cpu()  # (B, H, N, N)
    chosen = most_detailed_patches(images, study.patch_size)
    picture = Picture(
        "attention",
        draw_attention(images, attentions, chosen, study.patch_size),
        "Attention in the last layer",
        "When a layer recomputes a patch it looks at the others, at some more than at others: bright patches count"
        " most. The first row of maps is for the outlined patch (the one with most detail in each image), the second"
        " shows how much each patch gets from all; both are means over the heads, which look in different ways at the"
        " same time and follow one by one. I-JEPA has no summary token (class token), so no single map is 'the'"
        " attention.",
        "The marked patch looks at other parts of its own object, and the heads differ.",
        "All maps are alike in every image, or evenly dim: attention does not depend on what is there.",
        len(images) * COLUMN_WIDTH,
    )
    return Section("Where it looks", [picture])


def similarity_section(study: Study) -> Section:
    images = study.images[:COMPARED_IMAGES]
    features = study.features.patches
    chosen = most_detailed_patches(images, study.patch_size)
    picture = Picture(
        "similarity",
        draw_similarity(images, features[: len(images)], chosen, study.patch_size),
        "Similarity of one patch to all others",
        "Each row asks which patches are similar to the outlined one on the left: yellow is the same, dark blue the"
        " opposite (cosine similarity of the features). Each column is one image, shown at the top.",
        "The same kind of thing lights up in every image, wherever it lies.",
        "Only the same place lights up in all images, or everything has the same colour (every patch is like every"
        " other).",
        (1 + len(images)) * COLUMN_WIDTH,
    )
    return Section("What it takes to be alike", [picture])


@dataclass
class Guesses:
    """Predictions for blocks of the shown images, and the real patches that they are compared with."""

    images: torch.Tensor  # (B,), the numbers of the images in the bank
    contexts: torch.Tensor  # (B, N_ctx)
    blocks: torch.Tensor  # (B, M, T)
    predictions: torch.Tensor  # (B, M, T, D)
    truths: torch.Tensor  # (B, M, T, D)
    bank: torch.Tensor  # (K', N, D), as the predictor's targets
    bank_patches: torch.Tensor  # (K' * N, channels, patch height, patch width)

    def block(self, image: int, block: int) -> "Guesses":
        """One block of one image."""
        one, chosen = slice(image, image + 1), slice(block, block + 1)
        parts = {name: getattr(self, name)[one, chosen] for name in ("blocks", "predictions", "truths")}
        return dataclasses.replace(self, images=self.images[one], contexts=self.contexts[one], **parts)

    @property
    def query_images(self) -> torch.Tensor:
        """The number of the image of each predicted patch, (B * M * T,)."""
        return self.images.repeat_interleave(self.blocks[0].numel())

    def nearest(self, features: torch.Tensor) -> torch.Tensor:
        """The nearest real patches of other images to features (B, M, T, D), (B * M * T, channels, height, width)."""
        found = nearest_patches(features.flatten(0, 2), self.query_images, self.bank, torch.arange(len(self.bank)))
        return self.bank_patches[found]

    def scores(self) -> PredictionScores:
        predictions, truths = self.predictions.flatten(0, 2), self.truths.flatten(0, 2)
        bank_images = torch.arange(len(self.bank))
        return score_predictions(predictions, truths, self.query_images, self.blocks.flatten(), self.bank, bank_images)


@torch.no_grad()
def guess(study: Study) -> Guesses:
    """Masks, predictions from the first context, and the bank."""
    model, images = study.networks.pretraining, study.images
    masking = build_masking(study.grid_size, study.mask_fields, study.mask_fields["mode"])
    contexts, blocks = masking.sample(len(images), study.arguments.seed)
    pixel_values = study.pool.pixel_values(slice(len(images)))
    output = model(*(each.to(model.device) for each in (pixel_values, contexts, blocks)))
    targets = model.normalize_targets(study.target_features.patches)  # of more images than the forward pass saw
    bank = targets[: study.arguments.bank_size]
    return Guesses(
        images=torch.arange(len(images)),
        contexts=contexts[:, 0],
        blocks=blocks,
        predictions=output.predictions[:, 0].cpu(),
        truths=targets[torch.arange(len(images))[:, None, None], blocks],
        bank=bank,
        bank_patches=cut_patches(study.whole_patches(len(bank)), study.patch_size).flatten(0, 1),
    )


def predictions_section(study: Study) -> Section:
    title = "What the predictor guesses"
    if study.networks.pretraining is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from))
    guesses = guess(study)
    return Section(title, [predictions_picture(study, guesses), scores_picture(guesses.scores())])


def predictions_picture(study: Study, guesses: Guesses) -> Picture:
    chosen = most_detailed_blocks(study.images, guesses.blocks, study.patch_size).tolist()
    blocks = [guesses.block(image, block) for image, block in enumerate(chosen)]
    scores = [each.scores() for each in blocks]
    sheet = draw_predictions(
        study.images,
        guesses.contexts,
        torch.stack([each.blocks[0, 0] for each in blocks]),
        torch.stack([each.nearest(each.truths) for each in blocks]),
        torch.stack([each.nearest(each.predictions) for each in blocks]),
        study.patch_size,
        [f"similarity to the truth: guess {each.prediction:.2f}, place alone {each.place:.2f}" for each in scores],
    )
    return Picture(
        "predictions",
        sheet,
        "The predictor's guesses, put together from real patches",
        "The predictor guesses features, which have no picture. So for each guessed patch the most similar one among"
        f" {len(guesses.bank_patches):,} real patches of other images is looked up and pasted into the outlined block"
        " (last column; of each image's blocks the one with most detail is shown). The column before does the same"
        " with the true features: better the last column cannot become. The numbers are cosine similarities (1 is the"
        " same); 'place alone' is what the average of that place in other images would reach, without a look at this"
        " one.",
        "The last two columns look alike and continue the strokes and surfaces of the context.",
        "The last column has patches that are plausible at that place but ignore the context. If the column before is"
        " wrong too, the bank is too small, or the features hold little of what patches look like.",
        5 * COLUMN_WIDTH,
    )


def scores_picture(scores: PredictionScores) -> Picture:
    return Picture(
        "prediction_scores",
        draw_scores(scores),
        "Is the predictor any good?",
        f"How similar the guesses are to the true features: {scores.prediction:.2f}. Answering with the average of the"
        f" place, without a look at the image, would give {scores.place:.2f}, any patch {scores.random:.2f}. The truth"
        f" is more like the guess than {scores.rank:.1%} of the real patches of other images are (50% would be"
        " chance).",
        "The first bar is clearly longer than the second.",
        "The first two bars are alike: the predictor knows what is usual at a place and ignores the context. All three"
        " are near 1: every patch has the same features (collapse).",
    )


def map_section(study: Study) -> Section:
    number = study.arguments.map_images
    labels = None if study.pool.labels is None else study.pool.labels[:number]
    pictures = []
    for name, title, texts, features in (
        ("map", "Map of the images by this encoder", MAP_TEXTS[labels is not None], study.features),
        ("map_untrained", "Map of the same images by an untrained encoder", [UNTRAINED], study.random_features),
    ):
        points = map_points(features.pooled[:number])
        image = draw_map(points, study.pool.images[:number], labels, study.pool.class_names)
        pictures.append(Picture(name, image, title, *texts))
    return Section("Which images it takes to be alike", pictures)


UNTRAINED = (
    "The same images, as an encoder with random weights sees them. What the map above has over this was learned."
)
MAP_TEXTS = {
    True: (
        "Each point is an image; images with alike features lie near each other (t-SNE; only nearness means something,"
        " not directions or distances between groups). Colours and marks are the classes, which the model was never"
        " told.",
        "Points of one class lie together, apart from the others.",
        "The classes are mixed, or no better sorted than by the untrained encoder below.",
    ),
    False: (
        "Each point is an image; images with alike features lie near each other (t-SNE; only nearness means something,"
        " not directions or distances between groups). The data have no labels, so there are no colours.",
        "Neighbours show the same kind of thing.",
        "Neighbours have nothing in common but brightness or colour, as on the map of the untrained encoder below.",
    ),
}


SECTIONS = (
    curves_section,
    masks_section,
    predictions_section,
    pca_section,
    similarity_section,
    attention_section,
    map_section,
)


# The page


def describe(study: Study, words: Sequence[str]) -> dict[str, str]:
    """What stands at the head of the page."""
    arguments, networks, config = study.arguments, study.networks, study.networks.config
    shown = f"the {arguments.encoder} encoder" if networks.pretraining is not None else "the only one it has"
    bad = f", {study.pool.num_bad:,} could not be read" if study.pool.num_bad else ""
    image_height, image_width = config.image_height_and_width
    predictor = "none in this directory"
    if networks.pretraining is not None:
        depth, width = config.predictor_num_hidden_layers, config.predictor_hidden_size
        predictor = f"{depth} layers of width {width}, {count_parameters(networks.pretraining.predictor)}"
    return {
        "Model": f"{arguments.model} (saved from {networks.saved_from})",
        "Encoder shown": f"{shown}: {config.num_hidden_layers} layers of width {config.hidden_size} with"
        f" {config.num_attention_heads} heads, {count_parameters(networks.encoder)}",
        "Predictor": predictor,
        "Images": f"{image_height} x {image_width} pixels, {config.num_channels} channels, {config.grid_size[0]} x"
        f" {config.grid_size[1]} patches of {study.patch_size[0]} x {study.patch_size[1]} pixels",
        "Data": f"{arguments.data}, split {arguments.split}: {len(study.pool.images):,} images{bad}",
        "Made on": f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC by ijepa-transformers {__version__}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}",
        "Command": shlex.join(["python", PROGRAM, *words]),
    }


def count_parameters(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def main(words: list[str] | None = None) -> None:
    words = sys.argv[1:] if words is None else words
    disable_progress_bar()  # of Transformers' loading
    datasets.disable_progress_bars()
    arguments = parse_arguments(
        words, [VisualizationArguments], VisualizationArguments, PROGRAM, "Shows what an I-JEPA has learned."
    )
    try:
        study = build_study(arguments)
        sections = [section(study) for section in SECTIONS]
    except (ValueError, OSError) as error:
        print(f"{PROGRAM}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)  # the status argparse gives to wrong arguments
    page = build_page(f"What {arguments.own_name} has learned", describe(study, words), sections)
    if arguments.pictures_dir:
        write_pictures(arguments.pictures_dir, sections)
    write_text(Path(arguments.output), page)
    print(f"{arguments.output}: {len(page) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
