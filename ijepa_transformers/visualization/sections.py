# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The sections of a visualization report, from the most telling to the folded ones."""

import io
from dataclasses import replace

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..data.notices import counted
from ..masking import MODES, Masking, MultiBlockMasking
from ..modeling_ijepa import IJepaForPretraining
from .beliefs import belief_sheet, decode_beliefs, fidelities
from .cells import enlarge, to_picture
from .colors import PatchColors, foreground_of, pca_colors, position_mean, position_share, shifted_features, shifts_for
from .curves import plot_training_curves
from .embedding import browser_data
from .guesses import Guesses, guess
from .maps import draw_map, map_points, scatter_of
from .page import BarsBody, BrowserBody, Picture, PlotBody, Section, SheetBody, TableBody, TabsBody, bars_of
from .pool import TRAIN
from .predictions import PredictionScores, draw_scores, prediction_row, prediction_sheet
from .sheets import (
    attention_sheet,
    draw_attention,
    draw_similarity,
    mask_sheet,
    most_detailed_blocks,
    most_detailed_patches,
    pca_sheet,
)
from .study import METRICS, Study, fitting_masking


SHOWN_IMAGES = 3  # rows of a sheet
WITHOUT_BACKGROUND = ("without", "background")  # header of a column
COMPARED_IMAGES = 4  # images in the files of attention and similarity
FINE_IMAGES = 64  # images whose features are computed on a finer grid
NO_PREDICTOR = (
    "This section is left out, because the directory holds one encoder (saved from {saved_from}) without the context"
    " encoder and the predictor."
)


# The guesses
def _guesses_section(study: Study) -> Section:
    title = "What it believes about hidden parts"
    model = study.networks.pretraining
    if model is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from))
    guesses = guess(study, model)
    pictures = [_scores_picture(guesses.scores()), _predictions_picture(study, guesses)]
    if study.arguments.decoder:
        pictures = [_beliefs_picture(study, model), *(replace(each, is_folded=True) for each in pictures)]
    return Section(title, pictures)


def _beliefs_picture(study: Study, model: IJepaForPretraining) -> Picture:
    beliefs = decode_beliefs(study, model)
    rows = [[each.name, f"{each.psnr:.1f}", f"{each.distance:.2f}"] for each in fidelities(study, beliefs)]
    table = TableBody(["decoded, beside the image", "PSNR (dB)", "distance"], rows, main_row=1)
    sheet = belief_sheet(study, beliefs, SHOWN_IMAGES)
    seen_by_model = " The model itself may have been trained on them." if study.arguments.split == TRAIN else ""
    return Picture(
        "In pixels",
        "The model guesses features of the hidden blocks. A small decoder turns features into pixels. It gives one"
        " answer, so it shows the average of all that would fit: where the model is unsure, the picture is blurred.",
        [SheetBody(sheet), table],
        more="The encoder and the predictor are frozen. The decoder has two transformer layers and was trained on true"
        " features of other images. High PSNR and a low distance mean that the pixels are close to the true ones; both"
        f" are over the hidden blocks of {counted(len(beliefs.truth), 'image')} that the decoder was not trained on."
        f"{seen_by_model} The distance compares edges and textures: LPIPS with fixed filters in place of a trained"
        " network. A random encoder often keeps pixels well, so a sharp decoded truth is no sign of learning. Hatched"
        f" patches were neither seen nor guessed. {beliefs.source}",
        good="The decoded guess looks like the decoded truth. It is closer to the image than the mean of the place.",
        bad="The decoded guess looks like the mean of the place: the predictor ignores the context.",
        files={"beliefs": sheet.draw()},
    )


def _scores_picture(scores: PredictionScores) -> Picture:
    values = [
        ("the guess of the predictor", scores.prediction),
        ("mean of that place in other images", scores.place),
        ("any patch of other images", scores.random),
    ]
    return Picture(
        "How close the guesses are",
        "Cosine similarity to the true features (1 is the same). Only the difference between the first two bars comes"
        " from looking at the rest of the image.",
        [BarsBody(bars_of(values))],
        more=f"The truth is more similar to the guess than {scores.rank:.1%} of the real patches of other images (50%"
        " would be chance).",
        good="The first bar is clearly longer than the second.",
        bad="The first two bars are equally long: the predictor knows what is usual at a place and ignores the"
        " context. All three are near 1: every patch has the same features (collapse).",
        files={"prediction_scores": draw_scores(scores)},
    )


def _predictions_picture(study: Study, guesses: Guesses) -> Picture:
    number = min(SHOWN_IMAGES, len(study.images))
    images = study.images[:number]
    chosen = most_detailed_blocks(images, guesses.blocks[:number], study.patch_size).tolist()
    blocks = [guesses.block(image, block) for image, block in enumerate(chosen)]
    scores = [each.scores() for each in blocks]
    rows = [
        prediction_row(
            image,
            context,
            each.blocks[0, 0],
            each.nearest(each.truths),
            each.nearest(each.predictions),
            study.patch_size,
        )
        for image, context, each in zip(images, guesses.contexts[:number], blocks, strict=True)
    ]
    sheet = prediction_sheet(
        rows,
        [f"similarity to the truth: guess {each.prediction:.2f}, place alone {each.place:.2f}" for each in scores],
    )
    return Picture(
        "Put together from real patches",
        "For each guessed patch, the most similar real patch of other images is pasted into the outlined block. The"
        " last column is the guess. The one before it does the same with the true features: nothing can be better.",
        [SheetBody(sheet)],
        more=f"The patches are chosen among {len(guesses.bank_patches):,} of other images by the cosine similarity of"
        " features. The block with most detail in each image is shown. 'Place alone' is the similarity of the average"
        " of that place in other images, without a look at this image.",
        good="The last two columns look alike and continue the strokes and surfaces of the context.",
        bad="The last column has patches that are plausible at that place but ignore the context. If the column before"
        " is wrong too, the bank is too small, or the features hold little of what patches look like.",
        files={"predictions": sheet.draw()},
    )


# The map
def _map_section(study: Study) -> Section:
    number = study.arguments.map_images
    labels = None if study.pool.labels is None else study.pool.labels[:number]
    pictures, names = study.pool.pictures[:number], study.pool.class_names
    parts, files = {}, {}
    for file, name, features in (
        ("map", "this encoder", study.features),
        ("map_untrained", "random encoder", study.random_features),
    ):
        points = map_points(features.pooled[:number])
        parts[name] = scatter_of(points, pictures, labels, names, f"Map of the images by {name}")
        files[file] = draw_map(points, pictures, labels, names)
    seen = "Each point is an image. Images with similar features lie near each other. "
    seen += COLORED if labels is not None else "The data have no labels, so there are no colours."
    picture = Picture(
        "",
        seen,
        [TabsBody(parts)],
        more="The map is t-SNE (PCA for few images): only nearness has a meaning, not directions or distances between"
        " groups. The random encoder is the same network before any training: the difference between the two maps was"
        " learned.",
        good="Images of one class, or of one kind of thing, lie together, apart from the others.",
        bad="The map is sorted no better than by the random encoder.",
        files=files,
    )
    return Section("Which images it finds similar", [picture])


COLORED = "Colours are the classes, which the model was never told."


# Features of patches
@torch.no_grad()
def _pca_section(study: Study) -> Section:
    number = min(SHOWN_IMAGES, len(study.images))
    results = {
        ("all", "patches"): _placeless(study.features.patches, number),
        WITHOUT_BACKGROUND: object_colors(study, study.networks.encoder, number),
        ("random", "encoder"): object_colors(study, study.networks.random_encoder, number),
    }
    sheet = pca_sheet(study.images[:number], results, study.patch_size)
    share = results[WITHOUT_BACKGROUND].share
    place, untrained = (f"{position_share(each.patches):.0%}" for each in (study.features, study.random_features))
    picture = Picture(
        "",
        "Patches with similar features have similar colours, in all images of a column. In the third column the"
        " background is grey. The features themselves tell which patches are background; nobody has marked it."
        " An image that is all grey has no foreground by this measure.",
        [SheetBody(sheet)],
        more="Red, green and blue are the three main directions of the features (principal component analysis)."
        f" Without the background they hold {share:.0%} of the variation. The first direction divides the patches into"
        " two groups. The group that is more common at the border of the images is called background; it may fill a"
        " whole image. The mean of each place over many images is subtracted: the place of a patch explains"
        f" {place} of the features' variation ({untrained} in a random encoder). On a coarse grid, the columns without"
        " background are drawn from copies of the image that are moved by parts of a patch.",
        good="The same part of different objects has the same colour, and borders between colours follow the objects.",
        bad="The colours look like those of the random encoder, which mostly repeats brightness.",
        files={"pca": sheet.draw()},
    )
    return Section("What the parts of an image mean to it", [picture])


def _placeless(features: torch.Tensor, number: int) -> PatchColors:
    result = pca_colors(features - position_mean(features))
    return result._replace(colors=result.colors[:number])


def object_colors(study: Study, encoder: PreTrainedModel, number: int) -> PatchColors:
    """Colours of the foreground on a fine grid, in one basis for many images."""
    shifts = shifts_for(study.grid_size, study.patch_size)
    size, many = study.arguments.batch_size, min(FINE_IMAGES, len(study.pool.rows))
    starts = range(0, many, size)
    parts = [study.pool.pixel_values(slice(start, min(start + size, many))) for start in starts]
    features = torch.cat([shifted_features(encoder, part, shifts) for part in parts])
    features = features - position_mean(features)
    grid = shifts * study.grid_size[0], shifts * study.grid_size[1]
    result = pca_colors(features, foreground_of(features, grid))
    assert result.foreground is not None
    return result._replace(colors=result.colors[:number], foreground=result.foreground[:number])


def _browser_section(study: Study) -> Section:
    images, features = study.images, study.features.patches
    chosen = most_detailed_patches(images[:1], study.patch_size).tolist()[0]
    data = browser_data(features, len(images), study.grid_size, (0, chosen))
    compared = min(COMPARED_IMAGES, len(images))
    patches = most_detailed_patches(images[:compared], study.patch_size)
    file = draw_similarity(images[:compared], features[:compared], patches, study.patch_size)
    picture = Picture(
        "",
        "Click a patch (pink frame). The more similar another patch is, the brighter it stays. The most similar one of"
        " each image has a yellow frame.",
        [BrowserBody([enlarge(to_picture(image), study.patch_size) for image in images], data)],
        more="Similarity is the cosine of the features, 1 for equal ones. The most similar other patch is fully"
        " bright, whatever its similarity is. A patch that is not more similar than the usual one (the median) is"
        " darkest. The features are stored in this file with one byte for each of their main directions, so"
        " similarities are off by a few hundredths.",
        good="The same kind of thing lights up in every image, at any place, and its similarity is far above the usual"
        " one.",
        bad="Only the same place lights up in all images, or the highest similarity is hardly above the usual one.",
        files={"similarity": file},
    )
    return Section("Click a patch: what is similar?", [picture])


@torch.no_grad()
def _attention_section(study: Study) -> Section:
    images = study.images[:COMPARED_IMAGES]
    pixel_values = study.pool.pixel_values(slice(len(images))).to(study.networks.encoder.device)
    attentions = study.networks.encoder(pixel_values, output_attentions=True).attentions[-1].cpu()  # (B, H, N, N)
    chosen = most_detailed_patches(images, study.patch_size)
    shown = slice(min(SHOWN_IMAGES, len(images)))
    sheet = attention_sheet(images[shown], attentions[shown], chosen[shown], study.patch_size)
    picture = Picture(
        "",
        "When the last layer recomputes a patch, it looks at the other patches. Bright parts count most.",
        [SheetBody(sheet)],
        more="The maps are means over the heads, which look in different ways at the same time. I-JEPA has no summary"
        " token (class token), so no single map is 'the' attention: the second column is for the outlined patch (the"
        " one with most detail), the third for all patches together.",
        good="The marked patch looks at other parts of its own object.",
        bad="All maps are the same in every image, or evenly dim: attention does not depend on the content.",
        files={"attention": draw_attention(images, attentions, chosen, study.patch_size)},
    )
    return Section("Where it looks", [picture])


# Folded: the task and the training
def _masks_section(study: Study) -> Section:
    title = "What it is asked: guess the hidden parts"
    if study.networks.pretraining is None:
        return Section(title, note=NO_PREDICTOR.format(saved_from=study.networks.saved_from), is_folded=True)
    own_mode, notes, pictures = study.masks.mask_mode, [], []
    for mode in sorted(MODES, key=lambda mode: mode != own_mode):
        try:
            masking = fitting_masking(study.grid_size, study.masks, mode)
        except ValueError as error:
            notes.append(f"Masks of mode {mode!r} cannot be drawn here: {error}.")
            continue
        pictures.append(_masks_picture(study, masking, mode == own_mode))
    return Section(title, pictures, " ".join(notes), is_folded=True)


MASK_RULES = {
    "unbiased": "Blocks may lie anywhere, so over time every patch is sometimes seen and sometimes guessed.",
    "meta": "The rules of the published code: blocks never touch the last row and column, and surplus context patches"
    " are cut from the bottom.",
    "random": "The context is a random share of the patches. Everything else is the target.",
    "inverse_block": "The context is one block at a random place. Everything around it is the target.",
}


def _masks_picture(study: Study, masking: Masking, is_own: bool) -> Picture:
    images = study.images[:SHOWN_IMAGES]
    contexts, targets = masking.sample(len(images), study.arguments.seed)
    sheet = mask_sheet(images, contexts, targets, study.patch_size)
    rules = MASK_RULES[masking.mode]
    if isinstance(masking, MultiBlockMasking) and masking.min_patches != study.masks.min_patches:
        rules += f" (Their least number of patches is lowered to {masking.min_patches}, so that they fit this grid.)"
    name, title = f"masks_{masking.mode}", f"Masks of mode {masking.mode!r}"
    files = {name: sheet.draw()}
    if not is_own:
        return Picture(f"{title}, which this run did not use", rules, [SheetBody(sheet)], files=files)
    return Picture(
        f"{title}, as in this run",
        "One row per image. The context is all that the first network sees. From it the second network, the predictor,"
        f" has to guess the features, not the pixels, of each target. Hatched patches are hidden. {rules}",
        [SheetBody(sheet)],
        good="The context leaves enough of the object for a person to guess the rest.",
        bad="So little context is left that nobody could guess, or the targets hold nothing but background.",
        files=files,
    )


def _curves_section(study: Study) -> Section:
    title = "How the training went"
    if not study.runs:
        note = f"There are no curves, because the model's directory holds no {METRICS}."
        return Section(title, note=note, is_folded=True)
    file = io.BytesIO()
    plot_training_curves(study.runs, file, title=None if len(study.runs) > 1 else next(iter(study.runs)))
    image = Image.open(file).convert("RGB")
    picture = Picture(
        f"Training curves of {', '.join(study.runs)}",
        "Each box is one measurement over the course of the training (from left to right). k-NN accuracy says how"
        " often the most similar images belong to the same class. Effective rank says in how many directions the"
        " features of different images differ.",
        [PlotBody(image)],
        good="k-NN accuracy climbs well above the dashed line (an untrained network), and effective rank and spread"
        " grow or stay level.",
        bad="Effective rank falls towards 1 or spread towards 0: the network gives every image the same answer"
        " (collapse). The loss alone says little; it may rise while features improve, and fall while they collapse.",
        files={"curves": image},
    )
    return Section(title, [picture], is_folded=True)


SECTIONS = (
    _guesses_section,
    _map_section,
    _pca_section,
    _browser_section,
    _attention_section,
    _masks_section,
    _curves_section,
)
