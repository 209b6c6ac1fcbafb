# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Judging a frozen encoder by its features: k-NN, few-shot and logistic probes, metrics and tables.

The loss of I-JEPA does not say whether the encoder is good: it may rise while the features improve, and it is lowest
of all when the target encoder has collapsed. The measures here do say it. They know no model: they receive features,
or a callable that makes them.

Shapes: B images of a batch, N images in all (or patches, where a docstring says tokens), D feature width.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


# Below this share of the features' size, variation over images is float32 rounding (unit 6e-8), not information (as
# in `evaluation/collapse.py`).
ROUNDING_LEVEL = 1e-6
NO_CLASS = -2  # predicted where there is no prediction; -1 is the label of a class without training images


# ----------------------------------------------------------------------------------------------------------- features
@torch.no_grad()
def extract_features(
    embed: Callable[[torch.Tensor], torch.Tensor], loader: Iterable[Mapping], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Pooled features of every image of `loader`, in the loader's order.

    Args:
        embed: maps the batch's `pixel_values`, moved to `device`, to pooled features (B, D). Evaluation mode, autocast
            and normalisation are its own business.
        loader: batches with `pixel_values` and, where known, `labels` (B,).
        device: where `embed` computes.

    Returns:
        features (N, D), float32 on the CPU, and labels (N,), int64, or None when no batch has labels.

    Raises:
        ValueError: no batch at all, features that are not (B, D), or labels in some batches only.
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
        raise ValueError(f"{len(labels)} of {len(features)} batches have labels: either all must, or none")
    return torch.cat(features), torch.cat(labels) if labels else None


def standardize(train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sets (N, D) with the mean and standard deviation of `train` taken out, feature by feature.

    A feature that is constant over `train` (up to rounding) tells its images apart in no way: it becomes 0 in both
    sets, where dividing by its standard deviation would blow rounding noise up to size 1.
    """
    mean, std = train.float().mean(dim=0), train.float().std(dim=0, correction=0)
    scale = torch.where(std > ROUNDING_LEVEL * mean.abs(), 1 / std, 0)
    return (train.float() - mean) * scale, (test.float() - mean) * scale


# ------------------------------------------------------------------------------------------------------------- probes
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
    weight 1 when `temperature` is None. Ties are decided alike every time: equally similar images rank by their index,
    equal votes go to the lower label. k = 20 and temperature 0.07 are the values usual for self-supervised encoders
    (Wu et al. 2018, arXiv 1805.01978; Caron et al. 2021, arXiv 2104.14294). Cosine similarity sees no scale, but it
    does see an offset shared by all images: `standardize` the features first.

    Args:
        train_features, test_features: (N, D), finite, on one device, where the work is done.
        train_labels, test_labels: (N,), any integers.
        chunk_size: test images at a time; the memory needed is `chunk_size` times the number of training images.

    Raises:
        ValueError: sizes that do not fit, features that are not finite, or k not in 1..number of training images.
    """
    _check_labelled(test_features, test_labels, "test")
    scores = knn_scores(train_features, train_labels, test_features, k, temperature, chunk_size)
    return (scores.argmax(dim=1) == class_indices(train_labels, test_labels)).double().mean().item()


def knn_scores(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk_size: int = 256,
) -> torch.Tensor:
    """Votes (test images, classes), on the CPU, of `knn_accuracy`; the classes are the training labels in order."""
    return knn_scores_by_k(train_features, train_labels, test_features, [k], temperature, chunk_size)[k]


def knn_scores_by_k(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    ks: Sequence[int],
    temperature: float | None = 0.07,
    chunk_size: int = 256,
) -> dict[int, torch.Tensor]:
    """`knn_scores` by k, of several k: the neighbours, which take nearly all the time, are looked up once."""
    _check_labelled(train_features, train_labels, "train")
    for k in ks:
        if not 1 <= k <= len(train_features):
            raise ValueError(f"k={k} neighbours, but there are {len(train_features)} training images")
    classes, train_classes = train_labels.to(train_features.device).unique(return_inverse=True)
    train = F.normalize(train_features.float(), dim=1)
    votes = {k: [] for k in ks}
    for chunk in test_features.split(chunk_size):
        similarities = F.normalize(chunk.float(), dim=1) @ train.T  # (chunk, N)
        nearest, indices = _nearest(similarities, max(ks))
        for k in votes:
            scores = _votes(nearest[:, :k], indices[:, :k], train_classes, len(classes), temperature)
            votes[k].append(scores.cpu())
    return {k: torch.cat(parts) for k, parts in votes.items()}


def class_indices(train_labels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Place (N,) of each label among the classes of `train_labels`, in order; -1 for a class that has no training
    image, which no probe can name. On the CPU."""
    classes, labels = train_labels.cpu().unique(), labels.cpu()
    places = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
    return torch.where(classes[places] == labels, places, -1)


def _nearest(similarities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (chunk, k) of the k most similar, in order; among equals the lower index comes first, which
    `topk` does not promise. So the first of them are those of a smaller k.

    Only rows with a tie, across the k-th place or before it, pay for a stable sort.
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
    """Votes (chunk, num_classes) of the neighbours (chunk, k). A sum over one-hot votes, since the atomic additions of
    `scatter_add` on a GPU come in no fixed order."""
    weights = torch.ones_like(similarities)
    if temperature is not None:
        weights = ((similarities - similarities.amax(dim=1, keepdim=True)) / temperature).exp()  # the largest is 1
    one_hot = F.one_hot(classes[indices], num_classes).to(weights.dtype)  # (chunk, k, num_classes)
    return (one_hot * weights[..., None]).sum(dim=1)


@dataclass(frozen=True)
class Accuracies:
    """Accuracy over several draws of the labelled images, or several pretraining seeds: mean, standard deviation (of
    these values, not an estimate for others), and every value."""

    mean: float
    std: float
    accuracies: tuple[float, ...]

    @classmethod
    def of(cls, accuracies: Iterable[float]) -> "Accuracies":
        accuracies = tuple(accuracies)
        return cls(float(np.mean(accuracies)), float(np.std(accuracies)), accuracies)

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

    `shots` is how many of each class (int), or a share of each class (float, at least one image), as in the published
    1 % protocol.

    Features are standardised with the statistics of ALL training features: without their labels these are the images
    an encoder was pretrained on, which a low-shot user has, and statistics of a few shots would be noise. Draw number
    i depends on (seed, i) alone, so more draws keep the first ones.

    Raises:
        ValueError: a class with fewer than `shots` training images, shots below 1 or a share not in (0, 1], num_draws
            below 1, or wrong sizes.
    """
    _check_labelled(train_features, train_labels, "train")
    _check_labelled(test_features, test_labels, "test")
    if num_draws < 1 or (shots < 1 if isinstance(shots, int) else not 0 < shots <= 1):
        raise ValueError(f"shots and num_draws must be at least 1, got {shots} and {num_draws}")
    train, test = _as_arrays(*standardize(train_features, test_features))
    train_labels, test_labels = _as_arrays(train_labels, test_labels)
    accuracies = []
    for draw in range(num_draws):
        chosen = _draw_shots(train_labels, shots, np.random.default_rng([seed, draw]))
        accuracies.append(float(_fit(train[chosen], train_labels[chosen]).score(test, test_labels)))
    return Accuracies.of(accuracies)


def _draw_shots(labels: np.ndarray, shots: int | float, generator: np.random.Generator) -> np.ndarray:
    """Indices of `shots` images (or that share) of each class, drawn without replacement, class by class."""
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
    """Accuracy of logistic regression (scikit-learn, L2 with C = 1) on the whole training set, features standardised.

    The linear probe for data sets that fit in memory; it has no learning rate to tune and no randomness.
    """
    _check_labelled(test_features, test_labels, "test")
    scores = logistic_regression_scores(train_features, train_labels, test_features)
    return (scores.argmax(dim=1) == class_indices(train_labels, test_labels)).double().mean().item()


def logistic_regression_scores(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor
) -> torch.Tensor:
    """Scores (test images, classes) of `logistic_regression_accuracy`; the classes are the training labels in order.

    Raises:
        ValueError: sizes that do not fit, features that are not finite, or a single class.
    """
    _check_labelled(train_features, train_labels, "train")
    train, test = _as_arrays(*standardize(train_features, test_features))
    scores = torch.from_numpy(_fit(train, *_as_arrays(train_labels)).decision_function(test))
    return scores if scores.dim() == 2 else torch.stack([-scores, scores], dim=1)  # of two classes it gives one score


def _fit(train: np.ndarray, train_labels: np.ndarray):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(train, train_labels)


def _as_arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def _check_labelled(features: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name} features and labels must be (N, D) and (N,) with N > 0, got {shapes}")
    if not features.isfinite().all():
        raise ValueError(f"{name} features hold NaN or infinity: the encoder has diverged")


# ------------------------------------------------------------------------------------------------- metrics and tables
def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of images whose label is among the k highest scores; scores (N, classes), labels (N,).

    Among equal scores the lower class comes first. Scores that are not finite are right nowhere. (scikit-learn's
    `top_k_accuracy_score` puts the higher class first and refuses labels of classes that the scores do not have.)

    Raises:
        ValueError: k not in 1..classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k}, but there are {scores.shape[1]} classes")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N, k)
    return float(((best == labels[:, None]).any(axis=1) & np.isfinite(scores).all(axis=1)).mean())


def _predictions(scores: np.ndarray) -> np.ndarray:
    """Class (N,) of the highest of scores (N, classes); NO_CLASS where scores are not finite."""
    return np.where(np.isfinite(scores).all(axis=1), scores.argmax(axis=1), NO_CLASS)


def accuracy_metric(top_k: int = 5):
    """An `evaluate.Metric` that needs no internet, unlike `evaluate.load("accuracy")`, which downloads a script.

    `compute(predictions=scores (N, classes), references=labels (N,))` gives `accuracy`, `macro_accuracy` and
    `top_{k}_accuracy`; the last is left out where there are no more than `top_k` classes, since it would always be 1.
    """
    import datasets  # these imports take seconds
    import evaluate
    from sklearn.metrics import accuracy_score, recall_score

    class Accuracy(evaluate.Metric):
        def _info(self):
            features = {"predictions": datasets.List(datasets.Value("float32")), "references": datasets.Value("int64")}
            return evaluate.MetricInfo(
                description="Top-1, top-k and mean per-class accuracy.",
                citation="",
                inputs_description="predictions: scores (N, classes); references: labels (N,).",
                features=datasets.Features(features),
            )

        def _compute(self, predictions, references):
            scores, labels = np.asarray(predictions), np.asarray(references)
            chosen, known = _predictions(scores), np.unique(labels)
            # The balanced accuracy: `balanced_accuracy_score` is the same number, but warns of classes without images.
            macro = recall_score(labels, chosen, labels=known, average="macro", zero_division=0)
            result = {"accuracy": float(accuracy_score(labels, chosen)), "macro_accuracy": float(macro)}
            if top_k < scores.shape[1]:
                result[f"top_{top_k}_accuracy"] = top_k_accuracy(scores, labels, top_k)
            return result

    return Accuracy()


def format_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Rows as a markdown table that also lines up in a terminal: one column per key, in order of first appearance.

    Numbers stand to the right, with three decimals (one from 10 on); a missing value is a dash.

    Raises:
        ValueError: no row.
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
