# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How similar two photos are that were taken at random. Beside this a similarity gets a meaning."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


# A model hardly tells photos apart if 1 of 20 pairs at random is at least so similar. Measured on 400 photographs: .65
# after 700 steps of small_images, .66 with random weights, .89 after 40 steps of the quickstart. On 500 digits: .73
# for an encoder that learned them, .82 after 40 steps.
TOO_HIGH = 0.8
_MOST_PHOTOS = 2000  # all pairs of these are looked at
_EQUAL = 1 - 1e-5  # cosine of equal photos, which tell nothing about different ones


@dataclass(frozen=True)
class RandomPairs:
    """Cosine similarities of pairs of different photos: the median, and the value that 95 of 100 are below."""

    median: float
    percentile_95: float

    @classmethod
    def of(cls, values: Mapping[str, float] | None) -> "RandomPairs | None":
        """From the values in the results of a search."""
        return cls(**values) if values else None

    @property
    def sentence(self) -> str:
        """What to compare a similarity with."""
        return (
            f"For comparison, two photos at random: usually {round(self.median, 2) + 0:.2f}, in 95 of 100 cases below"
            f" {self.percentile_95:.2f}."
        )

    @property
    def warning(self) -> str | None:
        """None if the model tells the photos apart."""
        if self.percentile_95 < TOO_HIGH:
            return None
        return (
            "This model hardly tells these photos apart: 1 of 20 pairs at random has a similarity of"
            f" {self.percentile_95:.2f} or more. So a high similarity means little here. See whether the model has"
            " learned (ijepa visualize), or take another one."
        )


def random_pairs(vectors: torch.Tensor) -> RandomPairs | None:
    """The similarities of random pairs of photos.

    Args:
        vectors: (N, D), of length 1.

    Returns:
        None if there are no two different photos.
    """
    count = len(vectors)
    rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:_MOST_PHOTOS]
    similarities = vectors[rows] @ vectors[rows].T
    values = similarities[torch.ones_like(similarities, dtype=torch.bool).triu(1)]
    values = values[values < _EQUAL].sort().values
    if not len(values):
        return None
    return RandomPairs(*(values[int(share * (len(values) - 1))].item() for share in (0.5, 0.95)))
