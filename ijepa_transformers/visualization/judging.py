# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The top of the page: the verdict in one sentence, and the figures behind it on cards."""

from collections.abc import Mapping, Sequence

import torch

from ..data.notices import counted
from ..display import in_words
from ..encoders import RawPixels
from ..evaluation.collapse import spread_of
from ..evaluation.probes import knn_accuracy, standardize
from ..verdict import (
    ABOVE,
    BELOW,
    COLLAPSED,
    PIXELS,
    RANDOM,
    WITH_RANDOM_WEIGHTS,
    Comparison,
    Score,
    Verdict,
    are_equal,
    judge,
    judge_without_labels,
    state_of,
    with_spread,
)
from .page import BAD, GOOD, UNSURE, Card, Headline, bars_of
from .pool import TRAIN
from .study import Study


NEIGHBORS = 20


def shown_verdict(study: Study, on_these_images: Verdict) -> Verdict:
    """The verdict that the page begins with, and that its cards belong to.

    It is that of the run. It is that on the images of the page if the run left none, if the run had no labels and the
    page has, or if the page shows the context encoder, on which a run passes no verdict.
    """
    of_run = study.verdict_of_run
    if of_run is None or study.arguments.encoder != "target":
        return on_these_images
    return on_these_images if on_these_images.standings and not of_run.standings else of_run


def headline(verdict: Verdict, on_these_images: Verdict) -> Headline:
    """The verdict of the page in one sentence, and the sentences behind it."""
    first, *rest = verdict.sentences
    if verdict is on_these_images:
        return Headline(first, tone_of(verdict), rest)
    others = f"The images of this page are others and may give other numbers: {on_these_images}"
    return Headline(first, tone_of(verdict), ["Measured by the run:", *rest, *verdict.advice, others])


def measured_on(verdict: Verdict, on_these_images: Verdict) -> str:
    """The sentence for a terminal that says on which images the verdict of the page was measured."""
    if verdict is on_these_images:
        return "Measured on the images of this page."
    if verdict.sentences[0] == on_these_images.sentences[0]:
        return "Measured by the run on its own images. Those of this page say the same."
    return f"Measured by the run on its own images. Those of this page say: {on_these_images.sentences[0]}"


def tone_of(verdict: Verdict) -> str:
    """Good only if labels show that the encoder is better than a random one and not worse than raw pixels."""
    return BAD if verdict.state == COLLAPSED else _tone_of_standings(verdict.standings)


def _tone_of_standings(standings: Mapping[str, str]) -> str:
    if standings.get(RANDOM) == BELOW:
        return BAD
    return GOOD if standings.get(RANDOM) == ABOVE and standings.get(PIXELS) != BELOW else UNSURE


def judge_pool(study: Study) -> Verdict:
    """Judges the encoder by the images of the page: by k-NN beside a random encoder and raw pixels if the images have
    labels of several classes, otherwise by rank and spread."""
    name = f"The {study.arguments.encoder} encoder" if study.networks.pretraining else "The encoder"
    features, random = study.features.pooled, study.random_features.pooled
    labelled = _labelled(study)
    if labelled is None or not features.isfinite().all():
        return judge_without_labels(name, spread_of(features), spread_of(random), WITH_RANDOM_WEIGHTS)
    rows, labels = labelled
    pixels = _raw_pixels(study)
    found = {key: _knn(values[rows], labels) for key, values in (("", features), (RANDOM, random), (PIXELS, pixels))}
    baselines = {RANDOM: with_spread(found[RANDOM]), PIXELS: found[PIXELS]}
    equal = are_equal(spread_of(random)) and are_equal(spread_of(features))
    state = None if are_equal(spread_of(random)) else state_of(spread_of(features))
    return judge(name, found[""], baselines, len(labels) - len(labels) // 2, state, _images_of(study), equal)


def _images_of(study: Study) -> str:
    """What the images of the page are called. The model may have been trained on them, so they are no test images."""
    return f"images of the split {study.arguments.split!r}"


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


def cards(study: Study, verdict: Verdict, on_these_images: Verdict) -> list[Card]:
    """The accuracies of the verdict beside their baselines, rank, data and time."""
    images = _images_of(study) if verdict is on_these_images else "test images"
    return [*accuracy_cards(verdict, images), _rank_card(study), _data_card(study), _time_card(study)]


def accuracy_cards(verdict: Verdict, images: str = "test images") -> list[Card]:
    """A card for each measure. None looks better than the verdict over all of them.

    Args:
        images: what the images are called on which the accuracies were measured.
    """
    if not verdict.comparisons:
        return [Card("Accuracy", "no labels", "Labels would tell whether the features are useful.")]
    measures = dict.fromkeys(each.measure for each in verdict.comparisons)
    return [
        _accuracy_card([each for each in verdict.comparisons if each.measure == measure], verdict, images)
        for measure in measures
    ]


def _accuracy_card(comparisons: Sequence[Comparison], verdict: Verdict, images: str) -> Card:
    first = comparisons[0]
    bars = [("this encoder", first.accuracy), *((each.baseline, each.baseline_accuracy) for each in comparisons)]
    standing = " and ".join(each.in_words for each in comparisons)
    own = _tone_of_standings({each.baseline: each.standing for each in comparisons})
    return Card(
        f"{first.measure} accuracy on {verdict.num_test_images or 0:,} {images}",
        f"{first.accuracy:.1%}",
        standing[0].upper() + standing[1:],
        bars_of(bars),
        min(own, tone_of(verdict), key=(BAD, UNSURE, GOOD).index),
    )


def _rank_card(study: Study) -> Card:
    own, random = spread_of(study.features.pooled), spread_of(study.random_features.pooled)
    value = f"{own.effective_rank:.1f} of {own.highest_rank}"
    note = f"A random encoder has {random.effective_rank:.1f}. Near 1 it has collapsed. A high rank proves nothing."
    return Card("Effective rank", value, note)


def _data_card(study: Study) -> Card:
    bad = f", {study.pool.num_bad:,} could not be read" if study.pool.num_bad else ""
    trained_on = "; the model may have been trained on them" if study.arguments.split == TRAIN else ""
    note = f"{study.arguments.data}, split {study.arguments.split}{bad}{trained_on}"
    return Card("Data of this page", counted(len(study.pool.images), "image"), note)


def _time_card(study: Study) -> Card:
    rows = study.runs.get(study.arguments.own_name, [])
    steps = int(rows[-1].get("step", 0)) if rows else 0
    if not steps:
        return Card("Training", "not recorded", "The model's directory holds no log of a run.")
    seconds = training_seconds(rows, study.batch_size)
    if seconds is None:
        return Card("Training", counted(steps, "step"))
    return Card(
        "Training",
        in_words(seconds),
        f"about, for {counted(steps, 'step')} of {counted(study.batch_size or 1, 'image')}",
    )


def training_seconds(rows: Sequence[dict], batch_size: int | None) -> float | None:
    """The time of the steps of a run, from the speeds in its log. None if a speed or the batch size is missing."""
    seconds, before = 0.0, 0
    for row in rows:
        speed, step = row.get("images_per_second"), row.get("step", 0)
        if not speed or not batch_size or speed <= 0:
            return None
        seconds += (step - before) * batch_size / speed
        before = step
    return seconds
