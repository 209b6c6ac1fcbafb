# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the predictor guesses for hidden patches, and how good the guesses are."""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image
from torch.nn.functional import normalize

from ..data.notices import counted
from .cells import Sheet, enlarge, height_and_width_pair, paste, to_picture, visible_patches
from .colors import position_mean
from .curves import COLORS
from .sheets import check_masks


if TYPE_CHECKING:
    from matplotlib.figure import Figure


def nearest_patches(
    queries: torch.Tensor, query_images: torch.Tensor, bank: torch.Tensor, bank_images: torch.Tensor
) -> torch.Tensor:
    """For each query, the patch of ANOTHER image whose features have the largest cosine similarity to it.

    Args:
        queries: (Q, D).
        query_images: (Q,), the number of the image of each query.
        bank: (K, N, D), features of all patches of K images.
        bank_images: (K,), their numbers.

    Returns:
        (Q,), indices into `bank.flatten(0, 1)`.

    Raises:
        ValueError: the bank holds no image other than that of a query.
    """
    found = []
    for similarities, _ in _similarities(queries, query_images, bank, bank_images):
        found.append(similarities.argmax(dim=1))
    return torch.cat(found)


QUERIES_AT_ONCE = 128  # the memory holds the similarities of this many queries to the whole bank


def _similarities(
    queries: torch.Tensor, query_images: torch.Tensor, bank: torch.Tensor, bank_images: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields the cosines (q, K * N) of some queries, and the numbers (q,) of these queries.

    The cosine is -inf for patches of the query's own image.
    """
    others = bank_images != query_images.unsqueeze(1)  # (Q, K)
    if not others.any(dim=1).all():
        raise ValueError(f"the bank of {counted(len(bank), 'image')} holds no other image than that of a query")
    num_patches = bank.shape[1]
    bank = normalize(bank.float(), dim=-1).flatten(0, 1)
    for chosen in torch.arange(len(queries)).split(QUERIES_AT_ONCE):
        similarities = normalize(queries[chosen].float(), dim=-1) @ bank.T
        own_image = ~others[chosen].repeat_interleave(num_patches, dim=1)
        yield similarities.masked_fill_(own_image, -torch.inf), chosen


class PredictionScores(NamedTuple):
    """Mean cosine similarities to the true features, and the rank of the truth."""

    prediction: float  # of the predictions
    place: float  # of the mean features of the same place in the other images, which need no look at the image
    random: float  # of the patches of the other images
    rank: float  # the share of those patches that are less similar to the prediction than the truth; 0.5 is chance


def score_predictions(
    predictions: torch.Tensor,
    truths: torch.Tensor,
    query_images: torch.Tensor,
    query_patches: torch.Tensor,
    bank: torch.Tensor,
    bank_images: torch.Tensor,
) -> PredictionScores:
    """Compares predictions with the true features, both (Q, D), and with the features of the other images of the bank.

    `query_patches` (Q,) are the places of the patches. The other arguments are those of `nearest_patches`.
    """
    similarity_to_truth = torch.cosine_similarity(predictions.float(), truths.float(), dim=-1)  # (Q,)
    places, randoms, ranks = [], [], []
    for similarities, chosen in _similarities(predictions, query_images, bank, bank_images):
        allowed = similarities > -torch.inf
        ranks.append(((similarities < similarity_to_truth[chosen, None]) & allowed).sum(dim=1) / allowed.sum(dim=1))
    for image in query_images.unique():
        asked, others = query_images == image, bank[bank_images != image].float()  # (Q,), (K', N, D)
        places.append(torch.cosine_similarity(position_mean(others)[query_patches[asked]], truths[asked], dim=-1))
        randoms.append(normalize(truths[asked].float(), dim=-1) @ normalize(others, dim=-1).mean(dim=(0, 1)))
    means = [torch.cat(values).mean().item() for values in (places, randoms, ranks)]
    return PredictionScores(similarity_to_truth.mean().item(), *means)


def draw_predictions(
    images: torch.Tensor,
    context_indices: torch.Tensor,
    target_indices: torch.Tensor,
    nearest_to_truth: torch.Tensor,
    nearest_to_prediction: torch.Tensor,
    patch_size: int | tuple[int, int],
    titles: Sequence[str] = (),
) -> Image.Image:
    """A row per image: the image, the context, the context with the true block, and with real patches in its place.

    Args:
        context_indices: (B, N_ctx), the patches the context encoder saw.
        target_indices: (B, T), the patches of one block that was predicted.
        nearest_to_truth, nearest_to_prediction: (B, T, channels, patch height, patch width), uint8: the real patches
            with the features nearest to the block's true features, and to the predicted ones.
        titles: a line above each row.

    Raises:
        ValueError: as `draw_masks`.
    """
    parts = zip(images, context_indices, target_indices, nearest_to_truth, nearest_to_prediction, strict=True)
    patch = height_and_width_pair(patch_size)
    return prediction_sheet([prediction_row(*each, patch) for each in parts], titles).draw()


def prediction_row(
    image: torch.Tensor,
    context: torch.Tensor,
    block: torch.Tensor,
    nearest_to_truth: torch.Tensor,
    nearest_to_prediction: torch.Tensor,
    patch: tuple[int, int],
) -> list[Image.Image]:
    """The pictures of one image (1 or 3, H, W), its context (N_ctx,) and a block (T,); see `draw_predictions`."""
    grid = check_masks(image[None], context[None, None], block[None, None], patch)
    seen, filled = visible_patches(context, *grid), visible_patches(block, *grid)
    pasted = [paste(image, block, pieces, grid) for pieces in (nearest_to_truth, nearest_to_prediction)]
    plain = [enlarge(to_picture(image), patch), enlarge(to_picture(image), patch, seen)]
    return plain + [enlarge(to_picture(each), patch, seen | filled, filled) for each in (image, *pasted)]


def prediction_sheet(rows: list[list[Image.Image]], titles: Sequence[str]) -> Sheet:
    """The rows of `prediction_row` below their headers."""
    headers = [("image", ""), ("context: all that", "the model saw"), ("true block", "in the context")]
    headers += [("nearest patches", "to the truth"), ("nearest patches", "to the guess")]
    return Sheet(rows, headers, titles)


def draw_scores(scores: PredictionScores) -> Image.Image:
    """The similarities as bars."""
    from matplotlib.figure import Figure

    bars = {
        "the predictor's guess": scores.prediction,
        "average of that place\nin other images": scores.place,
        "any patch of\nother images": scores.random,
    }
    figure = Figure(figsize=(5, 2.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.barh(list(bars), list(bars.values()), color=[COLORS[0], COLORS[1], "#777777"])
    axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=12)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    lowest = min(bars.values())
    axes.set_xlim(lowest - 0.25 if lowest < 0 else 0, 1.1)  # with room for the number left of a negative bar
    axes.set_title("Similarity to the true features", fontsize=12.5)
    axes.set_xlabel("cosine (1 = the same direction)", fontsize=11.5)
    axes.tick_params(labelsize=11.5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return to_image(figure)


def to_image(figure: "Figure") -> Image.Image:
    """A figure of matplotlib as an RGB image."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    return Image.open(file).convert("RGB")
