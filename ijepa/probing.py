# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Judging a frozen encoder by its features: k-NN, few-shot and linear probes, rank and collapse measures.

The loss of I-JEPA does not say whether the encoder is good: it may rise while the features improve, and it is lowest
of all when the target encoder has collapsed. The measures here do say it. They know no model: they receive features,
or a callable that makes them.

Shapes: B images of a batch, N images in all (or patches, where a docstring says tokens), D feature width.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F


# Below this share of the features' size, variation over images is float32 rounding (unit 6e-8), not information.
ROUNDING_LEVEL = 1e-6


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
    _check_labelled(train_features, train_labels, "train")
    _check_labelled(test_features, test_labels, "test")
    if not 1 <= k <= len(train_features):
        raise ValueError(f"k={k} neighbours, but there are {len(train_features)} training images")
    classes, train_classes = train_labels.to(train_features.device).unique(return_inverse=True)
    train = F.normalize(train_features.float(), dim=1)
    correct = 0
    for chunk, labels in zip(test_features.split(chunk_size), test_labels.split(chunk_size), strict=True):
        similarities = F.normalize(chunk.float(), dim=1) @ train.T  # (chunk, N)
        votes = _votes(*_nearest(similarities, k), train_classes, len(classes), temperature)
        correct += (classes[votes.argmax(dim=1)] == labels.to(classes.device)).sum().item()
    return correct / len(test_features)


def _nearest(similarities: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices (chunk, k) of the k most similar; among equals the lower index, as `topk` does not promise.

    Only a tie across the k-th place changes who is chosen, so only rows with one pay for a stable sort.
    """
    values, indices = similarities.topk(min(k + 1, similarities.shape[1]), dim=1)
    if values.shape[1] > k:
        tied = values[:, k - 1] == values[:, k]
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
class FewShotResult:
    """Accuracy over several draws of the labelled images: mean, standard deviation, and one accuracy per draw."""

    mean: float
    std: float
    accuracies: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.std:.3f}"


def few_shot_accuracy(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    shots: int = 5,
    num_draws: int = 5,
    seed: int = 0,
) -> FewShotResult:
    """Accuracy of logistic regression (scikit-learn, L2 with C = 1) on `shots` labelled images per class.

    Features are standardised with the statistics of ALL training features: without their labels these are the images
    an encoder was pretrained on, which a low-shot user has, and statistics of a few shots would be noise. Draw number
    i depends on (seed, i) alone, so more draws keep the first ones.

    Raises:
        ValueError: a class with fewer than `shots` training images, shots or num_draws below 1, or wrong sizes.
    """
    _check_labelled(train_features, train_labels, "train")
    _check_labelled(test_features, test_labels, "test")
    if shots < 1 or num_draws < 1:
        raise ValueError(f"shots and num_draws must be at least 1, got {shots} and {num_draws}")
    train, test = _as_arrays(*standardize(train_features, test_features))
    train_labels, test_labels = _as_arrays(train_labels, test_labels)
    accuracies = []
    for draw in range(num_draws):
        chosen = _draw_shots(train_labels, shots, np.random.default_rng([seed, draw]))
        accuracies.append(_fit_and_score(train[chosen], train_labels[chosen], test, test_labels))
    return FewShotResult(float(np.mean(accuracies)), float(np.std(accuracies)), tuple(accuracies))


def _draw_shots(labels: np.ndarray, shots: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of `shots` images of each class, drawn without replacement, class by class."""
    chosen = []
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count < shots:
            raise ValueError(f"class {label} has {count} training images, fewer than shots={shots}")
        chosen.append(generator.choice(np.flatnonzero(labels == label), shots, replace=False))
    return np.concatenate(chosen)


def logistic_regression_accuracy(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> float:
    """Accuracy of logistic regression (scikit-learn, L2 with C = 1) on the whole training set, features standardised.

    The linear probe for data sets that fit in memory; it has no learning rate to tune and no randomness.
    """
    _check_labelled(train_features, train_labels, "train")
    _check_labelled(test_features, test_labels, "test")
    train, test = _as_arrays(*standardize(train_features, test_features))
    return _fit_and_score(train, *_as_arrays(train_labels), test, *_as_arrays(test_labels))


def _fit_and_score(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    from sklearn.linear_model import LogisticRegression

    return float(LogisticRegression(max_iter=1000).fit(train, train_labels).score(test, test_labels))


def _as_arrays(*tensors: torch.Tensor) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def _check_labelled(features: torch.Tensor, labels: torch.Tensor, name: str) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or len(features) == 0:
        shapes = f"{tuple(features.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"{name} features and labels must be (N, D) and (N,) with N > 0, got {shapes}")
    if not features.isfinite().all():
        raise ValueError(f"{name} features hold NaN or infinity: the encoder has diverged")


# --------------------------------------------------------------------------------------------------- rank and collapse


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
    if _relative_std(features) <= ROUNDING_LEVEL:
        return 1.0
    centred = features.cpu().double() - features.cpu().double().mean(dim=0)
    singular_values = torch.linalg.svdvals(centred)
    shares = singular_values / singular_values.sum()
    return torch.special.entr(shares).sum().exp().item()


def feature_std(features: torch.Tensor) -> float:
    """Standard deviation over images, averaged over features: (B, D) pooled or (B, N, D) token features.

    For tokens it is taken at each position, so it is 0 exactly when the tokens are a function of position alone. On
    targets normalised to unit variance it lies between 0 and about 1: .44 to .58 over a healthy run on digits, from
    .02 down to .002 over one that collapsed.

    Raises:
        ValueError: other shapes, or no image.
    """
    if features.dim() not in (2, 3) or len(features) == 0:
        raise ValueError(f"features must be (B, D) or (B, N, D) with B > 0, got shape {tuple(features.shape)}")
    return features.float().std(dim=0, correction=0).mean().item()


def _relative_std(features: torch.Tensor) -> float:
    """Root mean square deviation of the features (N, D) from their mean, as a share of their root mean square: 0 (all
    images alike) to 1 (no common offset). Invariant to scale and rotation."""
    features = features.cpu().double()
    size = features.square().sum(dim=1).mean().sqrt()
    deviation = (features - features.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return 0.0 if size == 0 else (deviation / size).item()


class CollapseMonitor:
    """Watches the target encoder's pooled features and says when they stop depending on the image.

    It keeps the features of the last `size` images and judges two things, neither of which depends on the features'
    scale:

    - `target_std`: how far images lie from the common offset, as a share of the features' root mean square (0 to 1).
      It falls to 0 when features become a function of position alone, the collapse I-JEPA is prone to.
    - `effective_rank`: over how many directions they differ. It falls when the features shrink to a few directions.
      The floor is a share of the range, from 1 to min(images - 1, D), because a rank of 5 is fine at D = 64 and poor
      at D = 1280.

    The floors lie between what was measured. Digits, a run that learned: target_std .13 to .44, rank .09 to .22 of the
    range from the first step to the last; a run that collapsed: .004 to .0003, and .02 to .007. Randomly initialised
    ViT-Ti/S/B on photographs: target_std .48 to .58, rank .08 to .10. A half-collapsed run on digits (learning rate
    too high) is above both floors, at .48 to .73 and .05 to .07: only k-NN against the random encoder shows that one.

    What it reports is a pure function of the floors and of the features it was fed, so a run that resumes from
    `state_dict` reports what an uninterrupted run would. `update` stays on the features' device and waits for nothing;
    `report` copies to the CPU and takes about a second for 1024 images of width 1280 on two cores. In a distributed
    run every process judges its own images.

    Args:
        size: how many images to keep; memory is size × D floats.
        std_floor: collapsing below this `target_std`.
        rank_floor: collapsing below 1 + rank_floor × (min(images - 1, D) - 1).
        warmup_updates: never call a run collapsing before this many updates.
    """

    def __init__(
        self, size: int = 1024, std_floor: float = 0.02, rank_floor: float = 0.02, warmup_updates: int = 100
    ) -> None:
        if size < 2:
            raise ValueError(f"size={size}: at least 2 images are needed to tell whether images differ")
        self.size, self.std_floor, self.rank_floor, self.warmup_updates = size, std_floor, rank_floor, warmup_updates
        self.features: torch.Tensor | None = None  # (up to size, D), oldest first
        self.num_updates = 0

    @torch.no_grad()
    def update(self, pooled: torch.Tensor) -> None:
        """Adds the pooled target features (B, D) of one batch, from any device and in any precision."""
        if pooled.dim() != 2:
            raise ValueError(f"pooled features must be (B, D), got shape {tuple(pooled.shape)}")
        newest = pooled[-self.size :].float()
        kept = newest[:0] if self.features is None else self.features.to(newest.device)
        self.features = torch.cat([kept, newest])[-self.size :].clone()
        self.num_updates += 1

    def report(self) -> dict[str, float | bool | str]:
        """`target_std`, `effective_rank`, `collapsing`, and `reason`: a sentence for the log, empty when healthy.

        Raises:
            ValueError: before the first update.
        """
        if self.features is None or len(self.features) == 0:
            raise ValueError("the collapse monitor has seen no features yet: call update() first")
        std, rank = _relative_std(self.features), effective_rank(self.features)
        too_early = self.num_updates < self.warmup_updates or len(self.features) < 2
        reason = "" if too_early else self._reason(std, rank)
        return {"target_std": std, "effective_rank": rank, "collapsing": bool(reason), "reason": reason}

    def _reason(self, std: float, rank: float) -> str:
        highest_rank = min(len(self.features) - 1, self.features.shape[1])
        lowest_rank = 1 + self.rank_floor * (highest_rank - 1)
        if not math.isfinite(std):
            return "the target encoder is collapsing: its features hold NaN or infinity, so training has diverged"
        cure = "try a lower learning rate, a momentum nearer 1, or patch embeddings with a larger initial std"
        if std < self.std_floor:
            seen = f"images differ by {std:.2%} of the features' size (floor {self.std_floor:.2%})"
            return f"the target encoder is collapsing: {seen}, so features hardly depend on the image; {cure}"
        if rank < lowest_rank:
            seen = f"features vary over {rank:.1f} of {highest_rank} directions (floor {lowest_rank:.1f})"
            return f"the target encoder is collapsing: {seen}; {cure}"
        return ""

    def state_dict(self) -> dict[str, torch.Tensor | int | None]:
        """All that was learned from the features; the sizes and floors are the constructor's."""
        features = None if self.features is None else self.features.to("cpu", copy=True)
        return {"features": features, "num_updates": self.num_updates}

    def load_state_dict(self, state: Mapping[str, torch.Tensor | int | None]) -> None:
        features = state["features"]
        self.features = None if features is None else features[-self.size :].to("cpu", torch.float32, copy=True)
        self.num_updates = state["num_updates"]


# ------------------------------------------------------------------------------------------------- metrics and tables


def top_k_accuracy(scores: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Share of images whose label is among the k highest scores; scores (N, classes), labels (N,).

    Among equal scores the lower class comes first.

    Raises:
        ValueError: k not in 1..classes.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k}, but there are {scores.shape[1]} classes")
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]  # (N, k)
    return float((best == labels[:, None]).any(axis=1).mean())


def macro_accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy within each class, averaged over the classes that occur in `labels`: rare classes count like common
    ones (mean per-class accuracy). Both (N,)."""
    hits = np.asarray(predictions) == np.asarray(labels)
    return float(np.mean([hits[np.asarray(labels) == label].mean() for label in np.unique(labels)]))


def accuracy_metric(top_k: int = 5):
    """An `evaluate.Metric` that needs no internet, unlike `evaluate.load("accuracy")`, which downloads a script.

    `compute(predictions=scores (N, classes), references=labels (N,))` gives `accuracy`, `macro_accuracy` and
    `top_{k}_accuracy`; the last is left out where there are no more than `top_k` classes, since it would always be 1.
    """
    import datasets  # both imports take seconds
    import evaluate

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
            result = {"accuracy": top_k_accuracy(scores, labels)}
            result["macro_accuracy"] = macro_accuracy(scores.argmax(axis=1), labels)
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
    return isinstance(value, (int, float, FewShotResult, np.number)) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (float, np.floating)):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value).replace("|", "\\|")
