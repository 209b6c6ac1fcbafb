# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The sections of a visualization report."""

import dataclasses
import io
import math
from dataclasses import dataclass

import torch
from PIL import Image

from ..masking import MODES, Masking, MultiBlockMasking
from ..modeling_ijepa import IJepaForPretraining
from .curves import plot_training_curves
from .maps import draw_map, map_points
from .page import Picture, Section
from .predictions import PredictionScores, draw_predictions, draw_scores, nearest_patches, score_predictions
from .sheets import (
    cut_patches,
    draw_attention,
    draw_masks,
    draw_pca,
    draw_similarity,
    most_detailed_blocks,
    most_detailed_patches,
    pca_colors,
    position_mean,
    position_share,
)
from .study import METRICS, Study, fitting_masking


MASKED_IMAGES, COMPARED_IMAGES = 3, 4  # images in the pictures of masks; in those of attention and similarity
COLUMN_WIDTH, CURVES_WIDTH = 85, 540  # least CSS pixels of a column of a sheet; of the curves


def _curves_section(study: Study) -> Section:
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
        " often the most similar images belong to the same class. Effective rank says in how many directions the"
        " features of different images differ.",
        "k-NN accuracy climbs well above the dashed line (an untrained network), and effective rank and spread grow or"
        " stay level.",
        "Effective rank falls towards 1 or spread towards 0: the network gives every image the same answer"
        " (collapse). The loss alone says little; it may rise while features improve, and fall while they collapse.",
        CURVES_WIDTH,
    )
    return Section(title, [picture])


NO_PREDICTOR = (
    "This section is left out, because the directory holds one encoder (saved from {saved_from}) without the context"
    " encoder and the predictor."
)


def _masks_section(study: Study) -> Section:
    title = "What the model is asked: guess the hidden parts"
    if study.networks.pretraining is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from))
    own_mode, notes, pictures = study.masks.mask_mode, [], []
    for mode in sorted(MODES, key=lambda mode: mode != own_mode):
        try:
            masking = fitting_masking(study.grid_size, study.masks, mode)
        except ValueError as error:
            notes.append(f"Masks of mode {mode!r} cannot be drawn here: {error}.")
            continue
        pictures.append(_masks_picture(study, masking, mode == own_mode))
    return Section(title, pictures, " ".join(notes))


MASK_RULES = {
    "unbiased": "Blocks may lie anywhere, so over time every patch is sometimes seen and sometimes guessed.",
    "meta": "The rules of the published code: blocks never touch the last row and column, and surplus context patches"
    " are cut from the bottom.",
    "random": "The context is a random share of the patches. Everything else is the target.",
    "inverse_block": "The context is one block at a random place. Everything around it is the target.",
}


def _masks_picture(study: Study, masking: Masking, is_own: bool) -> Picture:
    images = study.images[:MASKED_IMAGES]
    contexts, targets = masking.sample(len(images), study.arguments.seed)
    sheet = draw_masks(images, contexts, targets, study.patch_size)
    rules = MASK_RULES[masking.mode]
    if isinstance(masking, MultiBlockMasking) and masking.min_patches != study.masks.min_patches:
        rules += f" (Their least number of patches is lowered to {masking.min_patches}, so that they fit this grid.)"
    name, title = f"masks_{masking.mode}", f"Masks of mode {masking.mode!r}"
    least_width = (1 + contexts.shape[1] + math.prod(targets.shape[1:-1])) * COLUMN_WIDTH
    if not is_own:
        title, seen = f"{title}, which this run did not use", f"The same images. {rules}"
        return Picture(name, sheet, title, seen, least_width=least_width)
    return Picture(
        name,
        sheet,
        f"{title}, as in this run",
        "One row per image. The context is all that the first network sees. Grey is hidden from it (what shows through"
        " is for your orientation). From the context the second network, the predictor, has to guess the features, not"
        f" the pixels, of each target. {rules}",
        "The context leaves enough of the object for a person to guess the rest.",
        "So little context is left that nobody could guess, or the targets hold nothing but background.",
        least_width,
    )


def _pca_section(study: Study) -> Section:
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
        "Patches with similar features have similar colours, across all images of a column. Red, green and blue are"
        f" the three main directions of the features (principal component analysis). They hold {own} of the variation."
        f" The place of a patch explains {position_share(learned):.0%} of the features' variation"
        f" ({position_share(untrained):.0%} in an untrained encoder), so the first colours show the place too. In the"
        " second column of colours, the average of each place over many images is removed. What is left is"
        f" content ({placeless} of it in the three colours). An untrained encoder mostly repeats brightness.",
        "The same part of different objects has the same colour, the background has another one, and borders between"
        " colours follow the objects.",
        "All images have the same colours at the same places (only the place was learned), or the colours look like"
        " the untrained encoder's.",
        4 * COLUMN_WIDTH,
    )
    return Section("What the patches mean to it", [picture])


@torch.no_grad()
def _attention_section(study: Study) -> Section:
    images = study.images[:COMPARED_IMAGES]
    pixel_values = study.pool.pixel_values(slice(len(images))).to(study.networks.encoder.device)
    attentions = study.networks.encoder(pixel_values, output_attentions=True).attentions[-1].cpu()  # (B, H, N, N)
    chosen = most_detailed_patches(images, study.patch_size)
    picture = Picture(
        "attention",
        draw_attention(images, attentions, chosen, study.patch_size),
        "Attention in the last layer",
        "When a layer recomputes a patch, it looks at the other patches. Bright patches count most. The first row of"
        " maps is for the outlined patch (the one with most detail in each image). The second row shows how much each"
        " patch gets from all patches. Both are means over the heads, which look in different ways at the same time."
        " The rows below show the heads one by one. I-JEPA has no summary token (class token), so no single map is"
        " 'the' attention.",
        "The marked patch looks at other parts of its own object, and the heads differ.",
        "All maps are the same in every image, or evenly dim: attention does not depend on the content.",
        len(images) * COLUMN_WIDTH,
    )
    return Section("Where it looks", [picture])


def _similarity_section(study: Study) -> Section:
    images = study.images[:COMPARED_IMAGES]
    features = study.features.patches
    chosen = most_detailed_patches(images, study.patch_size)
    picture = Picture(
        "similarity",
        draw_similarity(images, features[: len(images)], chosen, study.patch_size),
        "Similarity of one patch to all others",
        "Each row shows which patches are similar to the outlined one on the left: yellow is the same, dark blue the"
        " opposite (cosine similarity of the features). Each column is one image, shown at the top.",
        "The same kind of thing lights up in every image, at any place.",
        "Only the same place lights up in all images, or everything has the same colour (all patches have the same"
        " features).",
        (1 + len(images)) * COLUMN_WIDTH,
    )
    return Section("Which patches it finds similar", [picture])


@dataclass
class Guesses:
    """Predictions for blocks of the shown images, and the real patches that they are compared with."""

    images: torch.Tensor  # (B,), the numbers of the images in the bank
    contexts: torch.Tensor  # (B, N_ctx)
    blocks: torch.Tensor  # (B, M, T)
    predictions: torch.Tensor  # (B, M, T, D)
    truths: torch.Tensor  # (B, M, T, D)
    bank: torch.Tensor  # (K', N, D), normalised like the predictor's targets
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
def _guess(study: Study, model: IJepaForPretraining) -> Guesses:
    """Predicts the target blocks of the shown images from the first context."""
    images = study.images
    masking = fitting_masking(study.grid_size, study.masks, study.masks.mask_mode)
    contexts, targets = masking.sample(len(images), study.arguments.seed)
    blocks = targets if targets.dim() == 3 else targets[:, 0]  # those of the first context
    pixel_values = study.pool.pixel_values(slice(len(images)))
    output = model(*(each.to(model.device) for each in (pixel_values, contexts, targets)))
    features = model.normalize_targets(study.target_features.patches)  # also of images that are not shown
    bank = features[: study.arguments.bank_size]
    return Guesses(
        images=torch.arange(len(images)),
        contexts=contexts[:, 0],
        blocks=blocks,
        predictions=output.predictions[:, 0].cpu(),
        truths=features[torch.arange(len(images))[:, None, None], blocks],
        bank=bank,
        bank_patches=cut_patches(study.whole_patches(len(bank)), study.patch_size).flatten(0, 1),
    )


def _predictions_section(study: Study) -> Section:
    title = "What the predictor guesses"
    if study.networks.pretraining is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from))
    guesses = _guess(study, study.networks.pretraining)
    return Section(title, [_predictions_picture(study, guesses), _scores_picture(guesses.scores())])


def _predictions_picture(study: Study, guesses: Guesses) -> Picture:
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
        f" {len(guesses.bank_patches):,} real patches of other images is pasted into the outlined block (last column)."
        " The block with most detail in each image is shown. The column before it does the same with the true"
        " features. The last column cannot become better than that. The numbers are cosine similarities (1 is the"
        " same). 'Place alone' is the similarity of the average of that place in other images, without a look at this"
        " image.",
        "The last two columns look alike and continue the strokes and surfaces of the context.",
        "The last column has patches that are plausible at that place but ignore the context. If the column before is"
        " wrong too, the bank is too small, or the features hold little of what patches look like.",
        5 * COLUMN_WIDTH,
    )


def _scores_picture(scores: PredictionScores) -> Picture:
    return Picture(
        "prediction_scores",
        draw_scores(scores),
        "How close the predictor's guesses are",
        f"How similar the guesses are to the true features: {scores.prediction:.2f}. The average of the place, without"
        f" a look at the image, would give {scores.place:.2f}, and any patch {scores.random:.2f}. The truth is more"
        f" similar to the guess than {scores.rank:.1%} of the real patches of other images (50% would be chance).",
        "The first bar is clearly longer than the second.",
        "The first two bars are equally long: the predictor knows what is usual at a place and ignores the context."
        " All three are near 1: every patch has the same features (collapse).",
    )


def _map_section(study: Study) -> Section:
    number = study.arguments.map_images
    labels = None if study.pool.labels is None else study.pool.labels[:number]
    pictures = []
    for name, title, texts, features in (
        ("map", "Map of the images by this encoder", MAP_TEXTS[labels is not None], study.features),
        ("map_untrained", "Map of the same images by an untrained encoder", [UNTRAINED], study.random_features),
    ):
        points = map_points(features.pooled[:number])
        image = draw_map(points, study.pool.pictures[:number], labels, study.pool.class_names)
        pictures.append(Picture(name, image, title, *texts))
    return Section("Which images it finds similar", pictures)


UNTRAINED = (
    "The same images, as an encoder with random weights sees them. The difference to the map above was learned."
)
MAP_TEXTS = {
    True: (
        "Each point is an image. Images with similar features lie near each other (t-SNE: only nearness has a meaning,"
        " not directions or distances between groups). Colours and marks are the classes, which the model was never"
        " told.",
        "Points of one class lie together, apart from the others.",
        "The classes are mixed, or sorted no better than by the untrained encoder below.",
    ),
    False: (
        "Each point is an image. Images with similar features lie near each other (t-SNE: only nearness has a meaning,"
        " not directions or distances between groups). The data have no labels, so there are no colours.",
        "Neighbours show the same kind of thing.",
        "Neighbours have nothing in common but brightness or colour, as on the map of the untrained encoder below.",
    ),
}
SECTIONS = (
    _curves_section,
    _masks_section,
    _predictions_section,
    _pca_section,
    _similarity_section,
    _attention_section,
    _map_section,
)
