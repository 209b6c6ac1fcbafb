# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The verdicts at the top of the page: that of the run, and one on the images that the page shows."""

import torch

from ..encoders import RawPixels
from ..evaluation.collapse import spread_of
from ..evaluation.probes import knn_accuracy, standardize
from ..verdict import PIXELS, RANDOM, Score, Verdict, judge, judge_without_labels, state_of
from .study import Study


NEIGHBORS = 20


def verdicts(study: Study) -> dict[str, str]:
    """Name -> text. The first is there only if the model's directory holds the verdict of its run."""
    of_run = {"Verdict of the run": study.verdict_of_run} if study.verdict_of_run else {}
    return {**of_run, "Verdict on these images": str(judge_pool(study))}


def judge_pool(study: Study) -> Verdict:
    """Judges the encoder by the images of the page: by k-NN beside a random encoder and raw pixels if the images have
    labels of several classes, otherwise by rank and spread."""
    name = f"The {study.arguments.encoder} encoder" if study.networks.pretraining else "The encoder"
    features, random = study.features.pooled, study.random_features.pooled
    labelled = _labelled(study)
    if labelled is None or not features.isfinite().all():
        return judge_without_labels(name, spread_of(features), spread_of(random), "With random weights")
    rows, labels = labelled
    pixels = _raw_pixels(study)
    found = {key: _knn(values[rows], labels) for key, values in (("", features), (RANDOM, random), (PIXELS, pixels))}
    baselines = {key: found[key] for key in (RANDOM, PIXELS)}
    return judge(name, found[""], baselines, len(labels) - len(labels) // 2, state_of(spread_of(features)))


def _raw_pixels(study: Study) -> torch.Tensor:
    """The pixels of all images, (K, D). Whole float images would fill the memory."""
    size = study.arguments.batch_size
    starts = range(0, len(study.pool.images), size)
    return torch.cat([RawPixels()(study.pool.pixel_values(slice(start, start + size))) for start in starts])


def _labelled(study: Study) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rows and labels of the images with a label; None unless the first half of them has several classes."""
    if study.pool.labels is None:
        return None
    labels = torch.as_tensor(study.pool.labels)
    rows = (labels >= 0).nonzero().flatten()
    chosen = labels[rows]
    return (rows, chosen) if len(chosen[: len(chosen) // 2].unique()) > 1 else None


def _knn(features: torch.Tensor, labels: torch.Tensor) -> dict[str, Score]:
    """k-NN accuracy on the second half of the images, with neighbours from the first. Their order is random."""
    half = len(labels) // 2
    train, test = standardize(features[:half], features[half:])
    k = min(NEIGHBORS, half)
    return {f"{k}-NN": Score(knn_accuracy(train, labels[:half], test, labels[half:], k=k))}
