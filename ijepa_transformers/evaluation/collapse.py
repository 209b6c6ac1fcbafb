# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures whether an encoder has collapsed: rank, spread and neighbours of its features, and a report per layer.

An encoder collapses when its features no longer depend on the image. Then the features of all images are equal, or
they differ in a few directions only. I-JEPA's loss is lowest for a collapsed encoder, so the loss cannot show it. The
functions here take features; they know no model.

Shapes: B images of a batch, N images in all, D feature width.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..verdict import (
    COLLAPSED,
    NARROW_RANK_FLOOR,
    NARROW_STD_FLOOR,
    NOT_COLLAPSED,
    ORPHANS_CEILING,
    Spread,
    rank_share_of,
    state_of,
)
from .probes import ROUNDING_LEVEL


_NUM_NEIGHBORS = 10  # with 10 random neighbours per image, a share of only e^-10 of the images would be orphans


# Measures
def effective_rank(features: torch.Tensor) -> float:
    """How many directions the features (N, D) use, from 1 to min(N - 1, D).

    This is RankMe (Garrido et al. 2023, arXiv 2210.02885) of centred features: the exponential of the entropy of the
    singular values, which are scaled to sum 1. The paper does not centre. Here all images share a large offset, the
    average of the position embeddings. A random encoder has rank 2.3 of 64 with the offset and 6.4 without it,
    so a rank that is not centred mostly measures the size of the offset. `relative_std` measures that size.

    Variation below 1e-6 of the features' size counts as none. It is rounding noise, which spreads over all directions,
    so a totally collapsed encoder would have a high rank.

    Scale, rotation, a common offset and the order of images do not change the rank.

    Returns:
        The rank: 1.0 if the images do not differ or N = 1, NaN if a feature is not finite.

    Raises:
        ValueError: if the features are not (N, D) with N > 0.
    """
    if features.dim() != 2 or len(features) == 0:
        raise ValueError(f"features must be (N, D) with N > 0, got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        return math.nan
    if relative_std(features) <= ROUNDING_LEVEL:
        return 1.0
    centred = features.cpu().double() - features.cpu().double().mean(dim=0)
    if len(centred) < centred.shape[1]:
        centred = centred.T
    # The eigenvalues of D x D (or N x N) products are the squares of the singular values, and found much sooner.
    singular_values = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    shares = singular_values / singular_values.sum()
    return torch.special.entr(shares).sum().exp().item()


def relative_std(features: torch.Tensor) -> float:
    """Root mean square deviation of the features (N, D) from their mean, as a share of their root mean square.

    It is 0 if all images are alike and 1 if they share no offset. Scale and rotation do not change it.
    """
    features = features.cpu().double()
    size = features.square().sum(dim=1).mean().sqrt()
    deviation = (features - features.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return 0.0 if size == 0 else (deviation / size).item()


def uniformity(features: torch.Tensor) -> float:
    """How evenly the features (N, D) spread over the sphere: log mean exp(-2 |x - y|^2) over all pairs of images.

    The features are centred and then scaled to length 1. The measure is that of Wang and Isola (2020, arXiv
    2005.10242), who do not centre. Here images share a large offset (see `effective_rank`), so without centring all
    images would look alike. It is 0 if all images are alike, and about -4 if they point in many different directions.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    directions = _directions(features)
    return torch.pdist(directions).square().mul(-2).exp().mean().log().item()


def orphan_share(features: torch.Tensor, num_neighbors: int = _NUM_NEIGHBORS) -> float:
    """Share of images (N, D) that are not among the `num_neighbors` nearest neighbours of any other image.

    Neighbours have the highest cosine of centred features. Orphans are the anti-hubs of Radovanovic et al. (2010). If
    their share is high, k-NN and retrieval find the same few images again and again.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    similarities = _similarities(features)
    nearest = similarities.topk(min(num_neighbors, len(similarities) - 1), dim=1).indices  # (N, num_neighbors)
    is_found = torch.zeros(len(similarities), dtype=torch.bool).index_fill_(0, nearest.flatten(), True)
    return 1 - is_found.float().mean().item()


def nearest_cosine(features: torch.Tensor) -> float:
    """Cosine of an image to the most similar other image, of centred features (N, D): the median over the images.

    It is 1 if each image has a twin with equal features, and near 0 for random images.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    return _similarities(features).amax(dim=1).median().item()


def _directions(features: torch.Tensor) -> torch.Tensor:
    """Centred features (N, D) of length 1, float32 on the CPU. Zeros if all images are alike up to rounding."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N > 1, got shape {tuple(features.shape)}")
    features = features.cpu().double()
    centred = features - features.mean(dim=0)
    return F.normalize(centred * (relative_std(features) > ROUNDING_LEVEL), dim=1).float()


def _similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines (N, N) of centred features; -infinity between an image and itself."""
    directions = _directions(features)
    return (directions @ directions.T).fill_diagonal_(-math.inf)


# Report
@dataclass(frozen=True)
class LayerSpread(Spread):
    """The measures of one layer's features; `state` is that of `state_of`."""

    uniformity: float
    orphan_share: float
    nearest_cosine: float
    state: str

    def cells(self) -> dict[str, object]:
        """The measures as a row of a table."""
        return {
            "spread": self.relative_std,
            "rank": f"{self.effective_rank:.1f} of {self.highest_rank}",
            "uniformity": self.uniformity,
            "orphans": self.orphan_share,
            "twin": self.nearest_cosine,
            "state": self.state,
        }

    def short_form(self) -> str:
        """Spread and rank, for a comparison in brackets."""
        return f"{self.relative_std:.1%}, {self.effective_rank:.1f} directions"


# The columns of `LayerSpread.cells`.
COLUMN_LEGEND = "\n".join(
    (
        "- spread: how far images lie from their common average, as a share of the features' size. If it is near 0,"
        " features no longer depend on the image.",
        "- rank: in how many directions images differ (RankMe of centred features), and the largest possible number.",
        "- uniformity: 0 if all images are alike, about -4 if they spread evenly (centred features).",
        "- orphans: share of images that are not among the 10 nearest neighbours of any other image. If it is near 1,"
        " a few images are the neighbours of all others.",
        "- twin: cosine of an image to its nearest neighbour (median, centred features). If it is 1, each image has a"
        " twin with equal features.",
        "- state: collapsed, narrow or not collapsed. The last is no praise: random encoders have not collapsed.",
    )
)


def layer_spread(features: torch.Tensor) -> LayerSpread:
    """Measures the features (N, D) of one layer. It needs memory for N x N floats, so use a few thousand images.

    Raises:
        ValueError: if there are fewer than 2 images.
    """
    if not features.isfinite().all():
        nan = math.nan
        return LayerSpread(nan, nan, 0, uniformity=nan, orphan_share=nan, nearest_cosine=nan, state=COLLAPSED)
    spread, orphans = spread_of(features), orphan_share(features)
    return LayerSpread(
        **dataclasses.asdict(spread),
        uniformity=uniformity(features),
        orphan_share=orphans,
        nearest_cosine=nearest_cosine(features),
        state=state_of(spread, orphans),
    )


def spread_of(features: torch.Tensor) -> Spread:
    """Spread and rank of features (N, D)."""
    highest_rank = max(1, min(len(features) - 1, features.shape[1]))
    return Spread(relative_std(features), effective_rank(features), highest_rank)


def collapse_summary(layers: Sequence[LayerSpread], random_layers: Sequence[LayerSpread] | None = None) -> str:
    """One or two sentences on the measures of an encoder's layers; the first layer is the embedding.

    The last layer decides, because its features are used. Pass the layers of a random encoder of the same architecture
    to show its values beside it: a rank that is low in both comes from the images or from the architecture.

    Raises:
        ValueError: if there is no layer.
    """
    if not layers:
        raise ValueError("a collapse summary needs at least one layer")
    last = layers[-1]
    comparison = f" (random encoder: {random_layers[-1].short_form()})" if random_layers else ""
    return f"{last.state}: {_reason(last)}{comparison}.{_other_layers(layers)}"


def _reason(layer: LayerSpread) -> str:
    """The reason for a layer's state."""
    if not math.isfinite(layer.relative_std):
        return "the features hold NaN or infinity, so training has diverged"
    if layer.relative_std < NARROW_STD_FLOOR:
        return f"{layer}, so the features hardly depend on the image"
    if rank_share_of(layer) < NARROW_RANK_FLOOR:
        return f"{layer}, so images differ in few ways"
    if layer.orphan_share > ORPHANS_CEILING:
        return f"{layer}, but {layer.orphan_share:.0%} of the images are nobody's neighbours"
    return str(layer)


def _other_layers(layers: Sequence[LayerSpread]) -> str:
    """The layer at which the last layer's state begins. If the last layer has not collapsed: the layers that have, or
    that are narrow.

    The embedding is not listed. Its mean over patches is a linear function of the pixels' means, so it is always
    narrow.
    """
    last = layers[-1].state
    if last == NOT_COLLAPSED:
        inner = list(enumerate(layers))[1:]
        troubled = [f"{index} ({layer.state})" for index, layer in inner if layer.state != NOT_COLLAPSED]
        return f" Layers before the last with less variation: {', '.join(troubled)}." if troubled else ""
    first = len(layers)
    while first > 0 and layers[first - 1].state == last:
        first -= 1
    if first == 0:
        return " This begins at the embedding of the patches."
    return f" This begins at layer {first} of {len(layers) - 1}; the layer before is {layers[first - 1].state}."
