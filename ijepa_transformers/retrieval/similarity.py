# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Exact search by cosine similarity: nearest photos, near duplicates and outliers. It knows no model and no files.

Shape legend: N photos, Q queries, D features, k neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation.probes import ROUNDING_LEVEL, nearest, standardization
from .random_pairs import RandomPairs, random_pairs


NEIGHBOURS = 5  # whose mean similarity tells how much of an outlier a photo is
LEAST_PHOTOS = 3  # of which similarities mean anything
ALL_EQUAL = "All of these equal the query, and more may: a larger k lists them and what comes after them."
TOO_FEW = f"With fewer than {LEAST_PHOTOS} photos similarities say nothing, except that 1 means equal photos."
USUAL_SHARE = 0.03  # of the usual distance of nearest photos: near duplicates are closer. docs/search.md measures it.
_MOST_COPIES = 20  # of one photo, where copies are not told from other photos at first sight
_FEWEST_DIFFERENT = 8  # photos; in fewer crowds than this the photos of a crowd may be different
_GAP = USUAL_SHARE**-0.5  # between distances of different photos and of copies; the squares go with the cosines
ROUNDING = 1e-5  # of the cosine of equal photos
_SHARE_OF_STD = 1e-3  # by which each feature of equal photos differs at most
_SAMPLE = 2000  # photos whose nearest photos tell the usual distance
_CHUNK_VALUES = 2**25  # similarities that are computed at a time: 128 MiB


@dataclass(frozen=True)
class Neighbours:
    """`rows` (Q, k), int64, the most similar first, and their cosine `similarities` (Q, k)."""

    rows: torch.Tensor
    similarities: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Photos that are near duplicates of one another: sorted rows, and the similarity of the most similar two."""

    rows: list[int]
    similarity: float


@dataclass(frozen=True)
class Comparison:
    """All photos with all others.

    Attributes:
        groups: near duplicates, the most similar first. Two photos are in one group if a chain of pairs joins them.
        closeness: (N,), the mean cosine similarity with the `NEIGHBOURS` nearest photos.
    """

    groups: list[Group]
    closeness: torch.Tensor

    def outliers(self, count: int) -> list[int]:
        """The rows of the photos with the lowest closeness, the lowest first."""
        return self.closeness.sort(stable=True).indices[:count].tolist()


class SimilaritySearch:
    """Cosine similarity of standardised features, as in the k-NN of `ijepa probe`.

    Each feature is shifted and scaled, so that it has mean 0 and standard deviation 1 over the photos. Without this,
    an offset that all photos share would make all cosines nearly 1. Equal photos count once: many of them would be the
    mean, and what is near the mean has no direction. So do near copies in a folder that consists mostly of them.

    A photo that equals the mean of all has no direction, such as each of a folder of equal photos. It has similarity
    1 with its equals and 0 with all others.

    Args:
        features: (N, D), float32, finite.

    Raises:
        ValueError: if there is no photo, or if features are not finite.
    """

    def __init__(self, features: torch.Tensor):
        if features.dim() != 2 or len(features) == 0:
            raise ValueError(f"features must be (N, D) with N > 0, got {tuple(features.shape)}.")
        if not features.isfinite().all():
            raise ValueError("the features hold NaN or infinity: the encoder has diverged.")
        distinct = features[_are_distinct(features)]
        different = _without_near_copies(distinct)
        self._mean, self._scale = standardization(distinct if different is None else different)
        self._has_means = bool(self._are_means(features).any())
        self._vectors = self._directions(features)
        self._different = None if different is None else self._directions(different)

    def __len__(self) -> int:
        return len(self._vectors)

    def _directions(self, features: torch.Tensor) -> torch.Tensor:
        directions = F.normalize((features.float() - self._mean) * self._scale, dim=1)
        if not self._has_means:
            return directions
        are_means = self._are_means(features)[:, None]
        return torch.cat([directions * ~are_means, are_means], dim=1)  # (N, D + 1)

    def _are_means(self, features: torch.Tensor) -> torch.Tensor:
        """(N,), bool: which photos equal the mean of all, up to rounding."""
        return ((features.float() - self._mean).abs() <= ROUNDING_LEVEL * self._mean.abs()).all(dim=1)

    def query(self, features: torch.Tensor, k: int, without: int | None = None) -> Neighbours:
        """The `k` photos that are most similar to each query.

        Args:
            features: (Q, D) of the queries.
            k: at most N, or N - 1 with `without`.
            without: a row that is left out, such as that of the query itself.
        """
        similarities = self._directions(features) @ self._vectors.T
        if without is not None:
            similarities[:, without] = -torch.inf
        values, rows = nearest(similarities, k)
        return Neighbours(rows, values.clamp(-1, 1))

    def random_pairs(self) -> RandomPairs | None:
        """How similar two photos are that were taken at random; None if there are no two different ones."""
        return random_pairs(self._vectors)

    def usual_threshold(self) -> float:
        """The least cosine similarity of near duplicates, if the user names none.

        How similar two different photos are depends on the encoder and on the photos, so no number suits all. Near
        duplicates are `USUAL_SHARE` times as far from one another as a photo usually is from the nearest other one.
        The distance is 1 minus the cosine, its usual value the median over up to 2,000 photos.

        Copies do not count as the nearest other photo. In a folder that consists mostly of them, each crowd of
        them counts as one photo. Elsewhere they are those within `USUAL_SHARE` times the usual distance to the 20th
        nearest photo (in a small folder: to half of the photos), since few photos have so many copies.
        Equal photos count once, so there may be any number of them.
        """
        if self._different is not None:
            similarities = (self._different @ self._different.T).fill_diagonal_(-torch.inf)
            return 1 - max(USUAL_SHARE * (1 - similarities.amax(1)).quantile(0.5).item(), ROUNDING)
        count = len(self)
        rows = torch.from_numpy(np.unique(np.linspace(0, count - 1, _SAMPLE).round().astype(np.int64)))
        rows = self._without_equals(rows)
        distances = torch.cat([self._to_others(part) for part in rows.split(max(1, _CHUNK_VALUES // count))])
        distances = distances[distances[:, 0].isfinite()]
        if not len(distances):
            return 1 - ROUNDING
        farthest = distances.masked_fill(distances.isinf(), 0).amax(1)
        to_copies = max(USUAL_SHARE * farthest.quantile(0.5).item(), ROUNDING)
        others = distances.masked_fill(distances <= to_copies, torch.inf).amin(1)
        others = others[others.isfinite()]
        return 1 - max(USUAL_SHARE * others.quantile(0.5).item() if len(others) else 0, ROUNDING)

    def _without_equals(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows without those of photos that equal an earlier one of them."""
        similarities = self._vectors[rows] @ self._vectors[rows].T
        return rows[~(similarities >= 1 - ROUNDING).tril(-1).any(1)]

    def _to_others(self, rows: torch.Tensor) -> torch.Tensor:
        """Distances (rows, photos) to the nearest photos that are not equal, the smallest first; infinity for none."""
        similarities = self._vectors[rows] @ self._vectors.T
        similarities[similarities >= 1 - ROUNDING] = -torch.inf
        most_copies = max(1, min(_MOST_COPIES, len(self) // 2))
        return 1 - similarities.topk(most_copies, dim=1).values

    def compare_all(self, threshold: float) -> Comparison:
        """Compares all photos with all others, some at a time. It takes N x N x D operations.

        Args:
            threshold: the least cosine similarity of near duplicates. Also at 1 equal photos are found, whose cosine
                is 1 up to rounding.
        """
        count, neighbours, threshold = len(self), min(NEIGHBOURS, len(self) - 1), min(threshold, 1 - ROUNDING)
        size = max(1, _CHUNK_VALUES // count)
        closeness, groups = [torch.zeros(0)], _Groups(count)
        for start in range(0, count, size):
            similarities = self._vectors[start : start + size] @ self._vectors.T
            own = torch.arange(len(similarities))
            similarities[own, start + own] = -torch.inf
            best = similarities.topk(neighbours, dim=1).values if neighbours else torch.zeros(len(own), 1)
            closeness.append(best.mean(1).clamp(-1, 1))
            groups.join(start, similarities.clamp_(-1, 1), threshold)
        return Comparison(groups.found(), torch.cat(closeness))


def _are_distinct(features: torch.Tensor) -> torch.Tensor:
    """(N,), bool: the photos without those that equal another one up to rounding; all if they are all equal.

    Equal photos are next to one another if all are sorted by any number that is computed from their features.
    """
    mean, scale = standardization(features)
    scaled = (features.float() - mean) * scale
    mix = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(0))
    order = (scaled @ mix).argsort(stable=True)
    differences = (scaled[order[1:]] - scaled[order[:-1]]).abs()
    are_equal = (differences <= _SHARE_OF_STD + ROUNDING_LEVEL * mean.abs() * scale).all(1)
    distinct = torch.ones(len(features), dtype=torch.bool)
    distinct[order[1:][are_equal]] = False
    return distinct if distinct.sum() > 1 else torch.ones_like(distinct)


def _without_near_copies(photos: torch.Tensor) -> torch.Tensor | None:
    """One photo of each crowd of near copies, of up to 2,000 photos that are spread over all. None if at least half of
    them are no near copies, or if this is not clear.

    Photos are taken one after the other, each time the one that is farthest from those before. So the distances fall,
    and where only copies are left they fall at once.

    Args:
        photos: (N, D), no two of them equal.
    """
    rows = np.unique(np.linspace(0, len(photos) - 1, _SAMPLE).round().astype(np.int64))
    photos = photos[torch.from_numpy(rows)]
    mean, scale = standardization(photos)
    scaled = (photos.float() - mean) * scale
    distances = torch.cdist(scaled, scaled)
    taken, to_taken, steps = [0], distances[0].clone(), []
    for _ in range(len(photos) - 1):
        steps.append(to_taken.max().item())
        taken.append(int(to_taken.argmax()))
        to_taken = torch.minimum(to_taken, distances[taken[-1]])
    falls = np.array(steps[:-1]) / np.maximum(steps[1:], 1e-9)
    falls[: _FEWEST_DIFFERENT - 2] = 0  # steps[n] is the distance of the photo n + 1 from those before
    falls[len(photos) // 2 :] = 0
    if not len(falls) or falls.max() < _GAP:
        return None
    return photos[torch.tensor(taken[: int(falls.argmax()) + 2])]


class _Groups:
    """The groups that pairs of `count` photos form. No pair is kept, because n equal photos have n (n - 1) / 2."""

    def __init__(self, count: int):
        self._group = np.arange(count)  # of each photo
        self._best = np.full(count, -np.inf)  # similarity of each photo with later ones

    def join(self, start: int, similarities: torch.Tensor, threshold: float) -> None:
        """Joins photos from `start` on with all later ones that are similar enough.

        Args:
            similarities: (photos, N), those of these photos with all.
        """
        are_pairs = (similarities >= threshold).triu(start + 1)
        for place in are_pairs.any(1).nonzero()[:, 0].tolist():
            others, row = are_pairs[place].numpy(), start + place
            self._best[row] = similarities[place].numpy()[others].max()
            groups = self._group[others]
            groups = groups[groups != self._group[row]]
            if len(groups):
                self._group[np.isin(self._group, groups)] = self._group[row]

    def found(self) -> list[Group]:
        """The groups of at least two photos, the most similar first."""
        order = self._group.argsort(kind="stable")
        members = np.split(order, np.flatnonzero(np.diff(self._group[order])) + 1)
        found = [Group(rows.tolist(), float(self._best[rows].max())) for rows in members if len(rows) > 1]
        return sorted(found, key=lambda group: (-group.similarity, group.rows))
