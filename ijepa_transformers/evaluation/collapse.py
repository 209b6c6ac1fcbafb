# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Has an encoder collapsed? Rank, spread and neighbourhood of its features, a report per layer, an alarm for training.

An encoder collapses when its features stop depending on the image: they become a function of position alone (all
images alike), or shrink to a few directions. I-JEPA's loss is lowest of all then, so only the features can tell.
Nothing here knows a model.

Shapes: B images of a batch, N images in all (or patches, where a docstring says tokens), D feature width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


# Below this share of the features' size, variation over images is float32 rounding (unit 6e-8), not information.
ROUNDING_LEVEL = 1e-6
# Below these an encoder has collapsed; `CollapseMonitor` says what was measured on both sides of them.
STD_FLOOR, RANK_FLOOR = 0.02, 0.02
# Below these it is narrow: healthy runs on digits stayed above both, half-collapsed ones had rank shares of .05-.07.
NARROW_STD_FLOOR, NARROW_RANK_FLOOR = 0.1, 0.075
# Above this share of orphans a few images crowd out all others as neighbours. 1000 Gaussian images have at most .001
# in 2 to 1000 directions, and .73 where one direction is all there is.
ORPHANS_CEILING = 0.5
NUM_NEIGHBORS = 10  # with as many, next to no image is an orphan by chance: e^-10 of them if neighbours were drawn


# ---------------------------------------------------------------------------------------------------------- measures
def effective_rank(features: torch.Tensor) -> float:
    """How many directions the features (N, D) use, from 1 to min(N - 1, D): RankMe (Garrido et al. 2023, arXiv
    2210.02885), the exponential of the entropy of the singular values normalised to sum 1, of CENTRED features.

    The paper does not centre. Here every image shares a large offset, the average of the position embeddings: a random
    encoder that is quite healthy has rank 2.3 of 64 with the offset and 6.4 without, so an uncentred rank mostly
    measures how large the offset is against the variation. That is asked separately (`CollapseMonitor`'s
    `target_std`); this number says over how many directions the variation spreads. Alone it would take a total
    collapse for a rich one, because rounding noise spreads over all directions; so variation below 1e-6 of the
    features' size counts as none.

    Invariant to scale, rotation, a common offset and the order of images. Returns 1.0 when the images do not differ
    (or N = 1) and NaN when a feature is not finite.

    Raises:
        ValueError: features that are not (N, D) with N > 0.
    """
    if features.dim() != 2 or len(features) == 0:
        raise ValueError(f"features must be (N, D) with N > 0, got shape {tuple(features.shape)}")
    if not features.isfinite().all():
        return math.nan
    if relative_std(features) <= ROUNDING_LEVEL:
        return 1.0
    centred = features.cpu().double() - features.cpu().double().mean(dim=0)
    singular_values = torch.linalg.svdvals(centred)
    shares = singular_values / singular_values.sum()
    return torch.special.entr(shares).sum().exp().item()


def relative_std(features: torch.Tensor) -> float:
    """Root mean square deviation of the features (N, D) from their mean, as a share of their root mean square: 0 (all
    images alike) to 1 (no common offset). Invariant to scale and rotation."""
    features = features.cpu().double()
    size = features.square().sum(dim=1).mean().sqrt()
    deviation = (features - features.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return 0.0 if size == 0 else (deviation / size).item()


def uniformity(features: torch.Tensor) -> float:
    """How evenly the features (N, D) spread over the sphere: log mean exp(-2 |x - y|^2) over all pairs of images
    (Wang and Isola 2020, arXiv 2005.10242), of features that are centred and then normalised to length 1.

    0 when all images are alike; about -4 when they point in all of many directions. The paper does not centre; here
    images share a large offset (see `effective_rank`), beside which all of them would look alike.

    Raises:
        ValueError: fewer than 2 images.
    """
    directions = _directions(features)
    return torch.pdist(directions).square().mul(-2).exp().mean().log().item()


def orphan_share(features: torch.Tensor, num_neighbors: int = NUM_NEIGHBORS) -> float:
    """Share of images that are among the nearest `num_neighbors` of no other image, by cosine of centred features.

    A measure of hubs (anti-hubs in Radovanovic et al. 2010): where a few images are the neighbours of nearly all, k-NN
    and retrieval find the same few again and again. Near 0 when every image has its place.

    Raises:
        ValueError: fewer than 2 images.
    """
    similarities = _similarities(features)
    nearest = similarities.topk(min(num_neighbors, len(similarities) - 1), dim=1).indices  # (N, num_neighbors)
    is_found = torch.zeros(len(similarities), dtype=torch.bool).index_fill_(0, nearest.flatten(), True)
    return 1 - is_found.float().mean().item()


def nearest_cosine(features: torch.Tensor) -> float:
    """Median over images of the cosine to the most similar other image, of centred features: 1 when every image has
    an indistinguishable twin. Between random images it is near 0.

    Raises:
        ValueError: fewer than 2 images.
    """
    return _similarities(features).amax(dim=1).median().item()


def _directions(features: torch.Tensor) -> torch.Tensor:
    """Centred features (N, D) of length 1, float32 on the CPU; zeros where all images are alike up to rounding."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be (N, D) with N > 1, got shape {tuple(features.shape)}")
    features = features.cpu().double()
    centred = features - features.mean(dim=0)
    return F.normalize(centred * (relative_std(features) > ROUNDING_LEVEL), dim=1).float()


def _similarities(features: torch.Tensor) -> torch.Tensor:
    """Cosines (N, N) of centred features, with -infinity for an image and itself."""
    directions = _directions(features)
    return (directions @ directions.T).fill_diagonal_(-math.inf)


# ------------------------------------------------------------------------------------------------------------ report
@dataclass(frozen=True)
class LayerSpread:
    """The measures of one layer's features, and its health: "healthy", "narrow" or "collapsed"."""

    relative_std: float
    effective_rank: float
    highest_rank: int
    uniformity: float
    orphan_share: float
    nearest_cosine: float
    health: str

    def in_words(self) -> str:
        return (
            f"images differ by {self.relative_std:.1%} of the features' size, over {self.effective_rank:.1f} of"
            f" {self.highest_rank} directions"
        )

    def cells(self) -> dict[str, object]:
        """The measures as a row of a table."""
        return {
            "spread": self.relative_std,
            "rank": f"{self.effective_rank:.1f} of {self.highest_rank}",
            "uniformity": self.uniformity,
            "orphans": self.orphan_share,
            "twin": self.nearest_cosine,
            "health": self.health,
        }

    def in_figures(self) -> str:
        return f"{self.relative_std:.1%}, {self.effective_rank:.1f} directions"


# What the columns of `LayerSpread.cells` mean.
COLUMNS_IN_WORDS = "\n".join(
    (
        "- spread: how far images lie from their common average, as a share of the features' size. Near 0, features no"
        " longer depend on the image.",
        "- rank: over how many directions images differ (RankMe of centred features), of as many as there could be.",
        "- uniformity: 0 when all images are alike, towards -4 the more evenly they spread (centred features).",
        "- orphans: share of images that are among the 10 nearest neighbours of no other image. Near 1, a few images"
        " are everybody's neighbours.",
        "- twin: cosine of an image to its nearest neighbour (median, centred features). At 1, images have"
        " indistinguishable twins.",
    )
)


def layer_spread(features: torch.Tensor) -> LayerSpread:
    """Measures the features (N, D) of one layer. Memory is N x N floats, so a few thousand images are plenty.

    Raises:
        ValueError: fewer than 2 images.
    """
    if not features.isfinite().all():
        return LayerSpread(*(math.nan,) * 2, 0, *(math.nan,) * 3, "collapsed")
    std, rank, orphans = relative_std(features), effective_rank(features), orphan_share(features)
    highest_rank = min(len(features) - 1, features.shape[1])
    return LayerSpread(
        relative_std=std,
        effective_rank=rank,
        highest_rank=highest_rank,
        uniformity=uniformity(features),
        orphan_share=orphans,
        nearest_cosine=nearest_cosine(features),
        health=_health(std, (rank - 1) / max(highest_rank - 1, 1), orphans),
    )


def _health(std: float, rank_share: float, orphans: float) -> str:
    if std < STD_FLOOR or rank_share < RANK_FLOOR:
        return "collapsed"
    if std < NARROW_STD_FLOOR or rank_share < NARROW_RANK_FLOOR or orphans > ORPHANS_CEILING:
        return "narrow"
    return "healthy"


def collapse_reading(layers: Sequence[LayerSpread], random_layers: Sequence[LayerSpread] | None = None) -> str:
    """What the measures of an encoder's layers (the embedding first) come to, in one or two sentences.

    The last layer decides, because it is the one that is used. The values of a random encoder of the same architecture
    stand beside it: a rank that is low there too is the images' or the architecture's.

    Raises:
        ValueError: no layer.
    """
    if not layers:
        raise ValueError("a reading needs at least one layer")
    last = layers[-1]
    beside = f" (random encoder: {random_layers[-1].in_figures()})" if random_layers else ""
    return f"{last.health}: {_verdict(last)}{beside}.{_where(layers)}"


def _verdict(layer: LayerSpread) -> str:
    """Why a layer has its health."""
    if not math.isfinite(layer.relative_std):
        return "the features hold NaN or infinity, so training has diverged"
    rank_share = (layer.effective_rank - 1) / max(layer.highest_rank - 1, 1)
    if layer.relative_std < NARROW_STD_FLOOR:
        return f"{layer.in_words()}, so the features hardly depend on the image"
    if rank_share < NARROW_RANK_FLOOR:
        return f"{layer.in_words()}, so few kinds of difference between images are left"
    if layer.orphan_share > ORPHANS_CEILING:
        return f"{layer.in_words()}, but {layer.orphan_share:.0%} of the images are nobody's neighbours"
    return layer.in_words()


def _where(layers: Sequence[LayerSpread]) -> str:
    """From which layer on the last layer's trouble lasts, or which layers before a healthy one have trouble.

    Not the embedding's: its mean over patches is a linear function of the pixels' means, narrow by nature.
    """
    last = layers[-1].health
    if last == "healthy":
        inner = list(enumerate(layers))[1:]
        troubled = [f"{index} ({layer.health})" for index, layer in inner if layer.health != "healthy"]
        return f" Layers before the last that are not healthy: {', '.join(troubled)}." if troubled else ""
    first = len(layers)
    while first > 0 and layers[first - 1].health == last:
        first -= 1
    if first == 0:
        return " It is so from the embedding of the patches on."
    return f" It is so from layer {first} of {len(layers) - 1} on; the layer before is {layers[first - 1].health}."
