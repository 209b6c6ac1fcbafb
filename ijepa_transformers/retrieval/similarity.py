# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Exact search by cosine similarity: nearest photos, near duplicates and outliers. It knows no model and no files.

Shape legend: N photos, Q queries, D features, k neighbours.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..evaluation.probes import ROUNDING_LEVEL, nearest, standardization


NEIGHBOURS = 5  # whose mean similarity tells how much of an outlier a photo is
LEAST_PHOTOS = 3  # of which similarities mean anything
TOO_FEW = f"With fewer than {LEAST_PHOTOS} photos similarities say nothing, except that 1 means equal photos."
MAX_PAIRS = 1_000_000  # of near duplicates
USUAL_SHARE = 0.03  # of the usual distance of nearest photos: near duplicates are closer. docs/search.md measures it.
_MOST_COPIES = 20  # of one photo: more may hide what the usual distance of different photos is
_ROUNDING = 1e-5  # of the cosine of equal photos
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
    an offset that all photos share would make all cosines nearly 1.

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
        self._mean, self._scale = standardization(features)
        self._has_means = bool(self._are_means(features).any())
        self._vectors = self._directions(features)

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

    def usual_threshold(self) -> float:
        """The least cosine similarity of near duplicates, if the user names none.

        How similar two different photos are depends on the encoder and on the photos, so no number suits all. Near
        duplicates are `USUAL_SHARE` times as far from one another as a photo usually is from the nearest other one.
        The distance is 1 minus the cosine, its usual value the median over up to 2,000 photos.

        Copies do not count as the nearest other photo. They are those within `USUAL_SHARE` times the usual distance
        to the 20th nearest photo (in a small folder: to half of the photos), since few photos have so many copies.
        """
        count = len(self)
        if count < 2:
            return 1 - _ROUNDING
        rows = torch.from_numpy(np.unique(np.linspace(0, count - 1, _SAMPLE).round().astype(np.int64)))
        most_copies, parts = min(_MOST_COPIES, count // 2), []
        for part in rows.split(max(1, _CHUNK_VALUES // count)):
            similarities = self._vectors[part] @ self._vectors.T
            similarities[torch.arange(len(part)), part] = -torch.inf
            parts.append(similarities.topk(most_copies, dim=1).values)
        distances = 1 - torch.cat(parts).clamp(-1, 1)  # (sample, most_copies), the smallest first
        to_copies = max(USUAL_SHARE * distances[:, -1].quantile(0.5).item(), _ROUNDING)
        others = distances.masked_fill(distances <= to_copies, torch.inf).amin(1)
        others = others[others.isfinite()]
        return 1 - max(USUAL_SHARE * others.quantile(0.5).item() if len(others) else 0, _ROUNDING)

    def compare_all(self, threshold: float) -> Comparison:
        """Compares all photos with all others, some at a time. It takes N x N x D operations.

        Args:
            threshold: the least cosine similarity of near duplicates. Also at 1 equal photos are found, whose cosine
                is 1 up to rounding.

        Raises:
            ValueError: if there are more than MAX_PAIRS pairs of near duplicates.
        """
        count, neighbours, threshold = len(self), min(NEIGHBOURS, len(self) - 1), min(threshold, 1 - _ROUNDING)
        size = max(1, _CHUNK_VALUES // count)
        closeness, pairs, values = [torch.zeros(0)], [torch.zeros(0, 2, dtype=torch.int64)], [torch.zeros(0)]
        for start in range(0, count, size):
            similarities = self._vectors[start : start + size] @ self._vectors.T
            own = torch.arange(len(similarities))
            similarities[own, start + own] = -torch.inf
            best = similarities.topk(neighbours, dim=1).values if neighbours else torch.zeros(len(own), 1)
            closeness.append(best.mean(1).clamp(-1, 1))
            found = (similarities >= threshold).nonzero()
            found = found[found[:, 1] > found[:, 0] + start]
            values.append(similarities[found[:, 0], found[:, 1]].clamp(-1, 1))
            pairs.append(found + torch.tensor([start, 0]))
            if sum(map(len, pairs)) > MAX_PAIRS:
                raise ValueError(
                    f"more than {MAX_PAIRS:,} pairs have a similarity of at least {threshold:g}: raise threshold."
                )
        return Comparison(_groups(torch.cat(pairs), torch.cat(values), count), torch.cat(closeness))


def _groups(pairs: torch.Tensor, similarities: torch.Tensor, count: int) -> list[Group]:
    """The groups that pairs (P, 2) with similarities (P,) form among `count` photos."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    left, right = pairs.numpy().T
    links = coo_array((np.ones(len(pairs), dtype=np.int8), (left, right)), shape=(count, count))
    _, component = connected_components(links, directed=False)
    rows: dict[int, set[int]] = {}
    best: dict[int, float] = {}
    for one, other, value in zip(left.tolist(), right.tolist(), similarities.tolist(), strict=True):
        group = int(component[one])
        rows.setdefault(group, set()).update((one, other))
        best[group] = max(value, best.get(group, -1.0))
    found = [Group(sorted(members), best[group]) for group, members in rows.items()]
    return sorted(found, key=lambda group: (-group.similarity, group.rows))
