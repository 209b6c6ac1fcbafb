# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures how good a frozen encoder's features are: k-NN, few-shot and logistic probes, metrics and tables.

The loss of I-JEPA does not tell whether the encoder is good. It may rise while the features improve, and it is lowest
when the target encoder has collapsed. The functions here take features, or a function that computes them; they know no
model.

Shapes: B images of a batch, N images in all, D feature width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F


if TYPE_CHECKING:
    import evaluate
    from sklearn.linear_model import LogisticRegression


# Variation over images that is below this share of the features' size is float32 rounding (unit 6e-8).
ROUNDING_LEVEL = 1e-6
_SMALL_PROBLEM = 2_000_000  # numbers in the training features, below which one thread fits a regression
_NO_CLASS = -2  # the prediction for scores that are not finite; -1 is the label of a class without training images


# Features
@torch.no_grad()
def extract_features(
    embed: Callable[[torch.Tensor], torch.Tensor],
    loader: Iterable[Mapping[str, torch.Tensor]],
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pooled features of all images of `loader`, in the loader's order.

    Args:
        embed: maps the batch's `pixel_values`, moved to `device`, to pooled features (B, D). It takes care of
            evaluation mode, autocast and normalisation.
        loader: batches with `pixel_values` and, if known, `labels` (B,).
        device: where `embed` computes.

    Returns:
        Features (N, D), float32 on the CPU, and labels (N,), int64, or None if no batch has labels.

    Raises:
        ValueError: if there is no batch, if features are not (B, D), or if only some batches have labels.
    """
    features, labels = [], []
    for batch in loader:
        pooled = embed(batch["pixel_values"].to(device, non_blocking=True))  # (B, D)
        if pooled.dim() != 2:
            raise ValueError(f"embed must return pooled features (B, D), got shape {tuple(pooled.shape)}")
        features.append(pooled.to("cpu", torch.float32))
        if batch.get("labels") is not None:
            labels.append(torch.as_tensor(batch["labels"]).to("cpu", torch.int64))
    if not features:
        raise ValueError("the loader gave no batch, so there are no features")
    if labels and len(labels) != len(features):
        raise ValueError(f"{len(labels)} of {len(features)} batches have labels: all must have them, or none")
    return torch.cat(features), torch.cat(labels) if labels else None


def standardize(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets (N, D), shifted and scaled so that each feature of `train` has mean 0 and standard deviation 1.

    A feature that is constant over `train`, up to rounding, becomes 0 in both sets. Division by its standard deviation
    would scale rounding noise up to size 1.
    """
    mean, scale = standardization(train)
    return (train.float() - mean) * scale, (test.float() - mean) * scale


def standardization(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (D,) of features (N, D), and the factor (D,) that gives each a standard deviation of 1.

    The factor of a feature that is constant up to rounding is 0.
    """
    mean, std = features.float().mean(dim=0), features.float().std(dim=0, correction=0)
    return mean, torch.where(std > ROUNDING_LEVEL * mean.abs(), 1 / std, 0)


# Probes
def knn_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk_size: int = 256,
) -> float:
    """Accuracy of k-nearest-neighbour classification by cosine similarity.

    Each of the k most similar training images votes for its class with weight exp(similarity / temperature), or with
    weight 1 if `temperature` is None. Of equally similar images the lower index comes first; of classes with equal
    votes the lower label wins. k = 20 and temperature 0.07 are usual for self-supervised encoders (Wu et al. 2018,
    arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294). Cosine similarity does not depend on the scale of the
    features, but it does depend on an offset that all images share: call `standardize` first.

    Args:
        train_features, test_features: (N, D), finite, on the device that computes.
        train_labels, test_labels: (N,), any integers.
        chunk_size: test images at a time. The memory needed is `chunk_size` times the number of training images.

    Raises:
        ValueError: if sizes do not fit, if features are not finite, or if k is not in 1..number of training images.
    """
    _check_labelled(test_features, test_labels, "test")
    scores = knn_scores_by_k(train_features, train_labels, test_features, [k], temperature, chunk_size)[k]
    return (scores.argmax(dim=1) == class_indices(train_labels, test_labels)).double().mean().item()


def knn_scores_by_k(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    ks: Sequence[int],
    temperature: float | None = 0.07,
    chunk_size: int = 256,
) -> dict[int, torch.Tensor]:
    """Votes (test images, classes) of `knn_accuracy`, on the CPU, for each k. Classes are the sorted training labels.

    The search for neighbours takes nearly all the time, and is done once for all k.

    Raises:
        ValueError: as `knn_accuracy`.
    """
    _check_labelled(train_features, train_labels, "train")
    for k in ks:
        if not 1 <= k <= len(train_features):
            raise ValueError(f"k={k} neighbours, but there are {len(train_features)} training images")
    classes, train_classes = train_labels.to(train_features.device).unique(return_inverse=True)
    train = F.normalize(train_features.float(), dim=1)
    votes: dict[int, list[torch.Tensor]] = {k: [] for k in ks}
    for chunk in test_features.split(chunk_size):
        similarities = F.normalize(chunk.float(), dim=1) @ train.T  # (chunk, N)
        values, indices = nearest(similarities, max(ks))
        for k in votes:
            scores = _votes(values[:, :k], indices[:, :k], train_classes, len(classes), temperature)
            votes[k].append(scores.cpu())
    return {k: torch.cat(parts) for k, parts in votes.items()}


def class_indices(train_labels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Position (N,) of each label among the sorted classes of `train_labels`, on the CPU. It is -1 for a class without
    training images, which no probe can predict."""
    classes, labels = train_labels.cpu().unique(), labels.cpu()
    places = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[places] == labels, places, -1)


def nearest(similarities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (chunk, k) of the k most similar images, the most similar first.

    Of equally similar images the lower index comes first, which `topk` does not guarantee. So the first columns are
    the result for a smaller k. Only rows with a tie among the first k + 1 values need the slower stable sort.
    """
    values, indices = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1)
    indices[tied, :k] = similarities[tied].sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values[:, :k], indices[:, :k]


def _votes(
    similarities: torch.Tensor,
    indices: torch.Tensor,
    classes: torch.Tensor,
    num_classes: int,
    temperature: float | None,
) -> torch.Tensor:
    """Votes (chunk, num_classes) of the neighbours (chunk, k). Sums one-hot votes, because `scatter_add` on a GPU adds
    in no fixed order."""
    weights = torch.ones_like(similarities)
    if temperature is not None:
        weights = ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp()  # the largest is 1
    one_hot = F.one_hot(classes[indices], num_classes).to(weights.dtype)  # (chunk, k, num_classes)
    return (one_hot * weights[..., None]).sum(dim=1)


@dataclass(frozen=True)
class Accuracies:
    """Accuracies of several draws of the labelled images, or of several pretraining seeds.

    `std` is the standard deviation of these values; it does not estimate that of other values.
    """

    mean: float
    std: float
    accuracies: tuple[float, ...]

    @classmethod
    def of(cls, accuracies: Iterable[float]) -> "Accuracies":
        values = tuple(accuracies)
        return cls(float(np.mean(values)), float(np.std(values)), values)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}"


def few_shot_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    shots: int | float = 5,
    num_draws: int = 5,
    seed: int = 0,
) -> Accuracies:
    """Accuracy of logistic regression (scikit-learn, L2 with C = 1) on few labelled images.

    Features are standardised with the statistics of ALL training features. This needs no labels, and a user with few
    labels also has the images without labels. The statistics of a few images would be noise. Draw number i depends on
    (seed, i) only, so the first draws stay the same if there are more.

    Args:
        shots: images of each class (int), or a share of each class (float, at least one image), as in the published
            1 % protocol.

    Raises:
        ValueError: if a class has fewer than `shots` training images, if shots is below 1 or a share outside (0, 1],
            if num_draws is below 1, or if sizes do not fit.
    """
    _check_labelled(train_features, train_labels, "train")
    _check_labelled(test_features, test_labels, "test")
    if num_draws < 1 or (shots < 1 if isinstance(shots, int) else not 0 < shots <= 1):
        raise ValueError(f"shots and num_draws must be at least 1, got {shots} and {num_draws}")
    train, test = _as_arrays(*standardize(train_features, test_features))
    labels, expected = _as_arrays(train_labels, test_labels)
    accuracies = []
    for draw in range(num_draws):
        chosen = _draw_shots(labels, shots, np.random.default_rng([seed, draw]))
        accuracies.append(float(_fit(train[chosen], labels[chosen]).score(test, expected)))
    return Accuracies.of(accuracies)


def _draw_shots(labels: np.ndarray, shots: int | float, generator: np.random.Generator) -> np.ndarray:
    """Indices of `shots` images of each class, or of that share, drawn without replacement, class by class."""
    chosen = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        wanted = shots if isinstance(shots, int) else max(1, round(shots * count))
        if count < wanted:
            raise ValueError(f"class {label} has {count} training images, fewer than shots={shots}")
        chosen.append(generator.choice(np.flatnonzero(labels == label), wanted, replace=False))
    return np.concatenate(chosen)


def logistic_regression_accuracy(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Accuracy of logistic regression (scikit-learn, L2 with C = 1) on all training images.

    Features are standardised. This is the linear probe for data sets that fit in memory. It has no learning rate and
    no randomness.
    """
    _check_labelled(test_features, test_labels, "test")
    scores = logistic_regression_scores(train_features, train_labels, test_features)
    return (scores.argmax(dim=1) == class_indices(train_labels, test_labels)).double().mean().item()


def logistic_regression_scores(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor
) -> torch.Tensor:
    """Scores (test images, classes) of `logistic_regression_accuracy`. Classes are the sorted training labels.

    Raises:
        ValueError: if sizes do not fit, if features are not finite, or if there is a single class.
    """
    _check_labelled(train_features, train_labels, "train")
    train, test = _as_arrays(*standardize(train_features, test_features))
    scores = torch.from_numpy(_fit(train, *_as_arrays(train_labels)).decision_function(test))
    return scores if scores.dim() == 2 else torch.stack([-scores, scores], dim=1)  # for two classes it has one score


def _fit(train: np.ndarray, train_labels: np.ndarray) -> "LogisticRegression":
    from sklearn.linear_model import LogisticRegression  # takes a second
    from threadpoolctl import threadpool_limits

    # Products of a small problem take microseconds. Several threads spend most of the time waiting for each other.
    with threadpool_limits(1 if train.size < _SMALL_PROBLEM else None):
        return LogisticRegression(max_iter=1000).fit(train, train_labels)


def _as_arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def _check_labelled(features: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name} features and labels must be (N, D) and (N,) with N > 0, got {shapes}")
    if not features.isfinite().all():
        raise ValueError(f"{name} features hold NaN or infinity: the encoder has diverged")


# Metrics and tables
def _top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of images whose label is among the k highest scores; scores (N, classes), labels (N,).

    Of equal scores the lower class comes first. An image whose scores are not finite counts as wrong. (scikit-learn's
    `top_k_accuracy_score` puts the higher class first, and refuses labels for which there is no score.)

    Raises:
        ValueError: if k is not in 1..classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k}, but there are {scores.shape[1]} classes")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N, k)
    return float(((best == labels[:, None]).any(axis=1) & np.isfinite(scores).all(axis=1)).mean())


def _predictions(scores: np.ndarray) -> np.ndarray:
    """Class (N,) with the highest of the scores (N, classes); _NO_CLASS if the scores of an image are not finite."""
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), _NO_CLASS)


def accuracy_metric(top_k: int = 5) -> "evaluate.Metric":
    """An `evaluate.Metric` that needs no internet. `evaluate.load("accuracy")` would download a script.

    `compute(predictions=scores (N, classes), references=labels (N,))` returns `accuracy`, `macro_accuracy` (the mean
    of the accuracies per class) and `top_{k}_accuracy`. The last is left out if there are at most `top_k` classes,
    because it would always be 1.
    """
    import datasets  # these imports take seconds
    import evaluate
    from sklearn.metrics import accuracy_score, recall_score

    class Accuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="Top-1, top-k and mean per-class accuracy.",
                citation="",
                inputs_description="predictions: scores (N, classes); references: labels (N,).",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
            scores, labels = np.asarray(predictions), np.asarray(references)
            chosen, known = _predictions(scores), np.unique(labels)
            # `balanced_accuracy_score` returns the same number, but warns if a class has no image.
            macro = recall_score(labels, chosen, labels=known, average="macro", zero_division=0)
            result = {"accuracy": float(accuracy_score(labels, chosen)), "macro_accuracy": float(macro)}
            if top_k < scores.shape[1]:
                result[f"top_{top_k}_accuracy"] = _top_k_accuracy(scores, labels, top_k)
            return result

    return Accuracy()


def several_labels_scores(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures for images with several classes each.

    Args:
        scores: (N, classes), above 0 where a class is predicted.
        labels: (N, classes), 0 or 1.

    Returns:
        `mean_average_precision`: the mean over all classes that occur; `micro_f1`: F1 over all images and classes.
        Scores that are not finite count as the lowest.
    """
    from sklearn.metrics import average_precision_score, f1_score  # takes a second

    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels) > 0.5
    scores = np.where(np.isfinite(scores), scores, -np.finfo(np.float64).max)
    there = labels.any(axis=0)
    if not there.any():
        return {"mean_average_precision": float("nan"), "micro_f1": float("nan")}
    precision = average_precision_score(labels[:, there], scores[:, there], average="macro")
    return {
        "mean_average_precision": float(precision),
        "micro_f1": float(f1_score(labels, scores > 0, average="micro", zero_division=0)),
    }


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a markdown table whose columns are also aligned in a terminal.

    Each key has a column, in order of first appearance. Numbers are aligned to the right, with three decimals, or one
    decimal from 10 on. A missing value is a dash.

    Raises:
        ValueError: if there is no row.
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    right = [any(_is_number(row.get(column)) for row in rows) for column in columns]
    rule = [
        "-" * (width - 1) + ":" if is_right else "-" * width for width, is_right in zip(widths, right, strict=True)
    ]
    lines = [
        [
            cell.rjust(width) if is_right else cell.ljust(width)
            for cell, width, is_right in zip(line, widths, right, strict=True)
        ]
        for line in (cells[0], rule, *cells[1:])
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Accuracies, np.number)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).replace("|", "\\|")
