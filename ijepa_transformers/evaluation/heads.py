# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Linear and attentive heads on frozen features, all heads of a sweep trained together on the same batches.

A sweep over learning rates, weight decays, inputs and optimizers costs little more than one head, because the features
of a batch are computed once (the paper's appendix A chooses the best of such a sweep). Heads share no parameter and no
random number: a head trained in a sweep is the head trained alone. Nothing here knows a model: features come by name
in batches, from wherever the caller takes them.

Shapes: B images of a batch, N tokens, D feature width.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


OPTIMIZERS = ("adamw", "sgd", "lars")
SCHEDULES = ("cosine", "step")
STEP_EPOCHS = 15  # the step schedule divides by 10 so often (published)
ATTENTION_HEAD_WIDTH = 64
# Features by name, each (B, D), or (B, N, D) for tokens, and labels (B,), class indices.
Batch = tuple[Mapping[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadSettings:
    """One head of a sweep.

    `features` is the name of the features it reads; those called "tokens" are pooled by attention first.
    """

    features: str
    batch_norm: bool
    optimizer: str
    learning_rate: float
    weight_decay: float

    @property
    def probe(self) -> str:
        return "attentive" if self.features == "tokens" else "linear"

    def __str__(self) -> str:
        norm = "BatchNorm + " if self.batch_norm else ""
        return (
            f"{norm}{self.probe} on {self.features}, {self.optimizer}, learning rate {self.learning_rate:g}, weight"
            f" decay {self.weight_decay:g}"
        )


def head_grid(
    features: Sequence[str],
    batch_norms: Sequence[bool],
    optimizers: Sequence[str],
    learning_rates: Sequence[float],
    weight_decays: Sequence[float],
) -> list[HeadSettings]:
    """Every combination. A head on tokens has a layer norm of its own and is there once, without BatchNorm."""
    grid = itertools.product(features, batch_norms, optimizers, learning_rates, weight_decays)
    heads = (HeadSettings(name, norm and name != "tokens", *rest) for name, norm, *rest in grid)
    return list(dict.fromkeys(heads))


def require_optimizers(names: Iterable[str]) -> None:
    """Raises ValueError if one of the optimizers is not installed: before hours of work, not after."""
    if "lars" in names:
        try:
            import timm.optim  # noqa: F401
        except ImportError:
            raise ValueError(
                'The optimizer lars needs timm, which is not installed: pip install "ijepa-transformers[vision]".'
            ) from None


# -------------------------------------------------------------------------------------------------------------- heads
class LinearHead(nn.Module):
    """Scores (B, classes) of pooled features (B, D), after BatchNorm without affine parameters if asked for."""

    def __init__(self, width: int, num_classes: int, batch_norm: bool):
        super().__init__()
        # The features are frozen, so every batch tells as much of their statistics as the next: a plain average.
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=None) if batch_norm else nn.Identity()
        self.classifier = _classifier(width, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(features))


class AttentiveHead(nn.Module):
    """Scores (B, classes) of tokens (B, N, D): cross-attention with one learned query, then a linear classifier.

    Unlike the mean over tokens it can look at a part of the image. It is no linear probe: it has D^2 parameters more.

    Since the query is the same for every image, the key projection is part of it, and values are projected after they
    were averaged: the same function at 1/D of the cost, H attention heads (H, D) x (B, N, D) instead of two D x D
    projections of every token.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        num_heads = width // ATTENTION_HEAD_WIDTH if width % ATTENTION_HEAD_WIDTH == 0 else 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.empty(num_heads, width))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.value = nn.Linear(width, width)
        self.classifier = _classifier(width, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(tokens)  # (B, N, D)
        attention = (tokens @ self.query.T).softmax(dim=1)  # (B, N, H)
        pooled = attention.transpose(1, 2) @ tokens  # (B, H, D)
        value = self.value.weight.unflatten(0, (len(self.query), -1))  # (H, D / H, D)
        values = torch.einsum("bhd,hwd->bhw", pooled, value).flatten(1) + self.value.bias  # (B, D)
        return self.classifier(values)


def _classifier(width: int, num_classes: int) -> nn.Linear:
    classifier = nn.Linear(width, num_classes)
    nn.init.trunc_normal_(classifier.weight, std=0.01)
    nn.init.zeros_(classifier.bias)
    return classifier


def build_heads(
    settings: Sequence[HeadSettings], widths: Mapping[str, int], num_classes: int, seed: int
) -> nn.ModuleList:
    """A fresh head for each of the settings, whose weights depend on its shape and the seed alone."""
    heads = nn.ModuleList()
    for entry in settings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if entry.probe == "attentive":
                heads.append(AttentiveHead(widths[entry.features], num_classes))
            else:
                heads.append(LinearHead(widths[entry.features], num_classes, entry.batch_norm))
    return heads


# ----------------------------------------------------------------------------------------------------------- training
def learning_rate_factor(schedule: str, epoch: float, epochs: float, warmup_epochs: float = 0.0) -> float:
    """The share of its own learning rate that each head takes, `epoch` (a fraction counts) into `epochs`.

    "cosine" falls to 0; "step" divides by 10 every 15 epochs. The warm-up rises linearly from 0 and is part of
    `epochs`.
    """
    warmup = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0
    if schedule == "step":
        return warmup * 0.1 ** (math.floor(epoch) // STEP_EPOCHS)
    progress = max(0.0, epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_optimizers(settings: Sequence[HeadSettings], heads: nn.ModuleList) -> list[torch.optim.Optimizer]:
    """One optimizer per kind, with each head in groups of its own. Biases and norms take no weight decay."""
    groups = {}
    for entry, head in zip(settings, heads, strict=True):
        for is_matrix in (True, False):
            groups.setdefault(entry.optimizer, []).append(
                {
                    "params": [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix],
                    "lr": entry.learning_rate,
                    "peak_learning_rate": entry.learning_rate,
                    "weight_decay": entry.weight_decay if is_matrix else 0.0,
                    # timm's LARS adapts only what it decays, unless told otherwise.
                    **({"always_adapt": is_matrix} if entry.optimizer == "lars" else {}),
                }
            )
    return [_build_optimizer(name, entries) for name, entries in groups.items()]


def _build_optimizer(name: str, groups: list[dict]) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(groups)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    from timm.optim import Lars

    return Lars(groups, momentum=0.9)


def train_heads(
    settings: Sequence[HeadSettings],
    batches_per_epoch: Callable[[int], Iterable[Batch]],
    widths: Mapping[str, int],
    num_classes: int,
    *,
    epochs: int,
    steps_per_epoch: int,
    schedule: str = "cosine",
    warmup_epochs: float = 0.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> nn.ModuleList:
    """Trains all heads on the same batches, each as if it were alone.

    Args:
        settings: the heads.
        batches_per_epoch: the training batches of an epoch (from 0), `steps_per_epoch` of them.
        widths: D of each of the features by name.
        seed: of the first weights.

    Returns:
        The heads, in the order of `settings`, in evaluation mode.
    """
    heads = build_heads(settings, widths, num_classes, seed).to(device).train()
    optimizers = build_optimizers(settings, heads)
    for epoch in range(epochs):
        for step, (features, labels) in enumerate(batches_per_epoch(epoch)):
            factor = learning_rate_factor(schedule, epoch + step / steps_per_epoch, epochs, warmup_epochs)
            _update(settings, heads, optimizers, features, labels, factor)
    return heads.eval()


def _update(settings, heads, optimizers, features, labels, factor: float) -> None:
    """One step of every head. No gradient flows from one head to another, so the sum of the losses does for all."""
    losses = [
        F.cross_entropy(head(features[entry.features]), labels) for entry, head in zip(settings, heads, strict=True)
    ]
    torch.stack(losses).sum().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------------------------------------------------ batches
def rebatch(parts: Iterable[dict[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of all parts, in order, as parts of `size` rows; the last one may be shorter."""
    waiting, count = [], 0
    for part in parts:
        waiting.append(part)
        count += len(next(iter(part.values())))
        if count >= size:
            whole = concatenate(waiting)
            for start in range(0, count - size + 1, size):
                yield {name: value[start : start + size] for name, value in whole.items()}
            waiting = [{name: value[count // size * size :] for name, value in whole.items()}]
            count %= size
    if count:
        yield concatenate(waiting)


def concatenate(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def split_holdout(count: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places 0..count-1 of a training split, sorted: those to train on, and the `share` to choose the best head on."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(count - 1, max(1, round(share * count))) if share else 0
    return order[held:].sort().values, order[:held].sort().values


# --------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def head_accuracies(
    settings: Sequence[HeadSettings], heads: Sequence[nn.Module], batches: Iterable[Batch]
) -> list[float]:
    """Top-1 accuracy of each head, in one pass. A head that diverged is right nowhere.

    Raises:
        ValueError: no image.
    """
    hits, num_images = 0, 0
    for features, labels in batches:
        scores = [head(features[entry.features]) for entry, head in zip(settings, heads, strict=True)]
        hits = hits + torch.stack([_hits(values, labels).sum() for values in scores])  # (heads,)
        num_images += len(labels)
    if not num_images:
        raise ValueError("there is no image to measure the heads on")
    return (hits.cpu().double() / num_images).tolist()  # MPS has no double precision


def _hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) whether the highest score is the label's; never where scores are not finite."""
    return (scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)


@torch.no_grad()
def head_scores(settings: HeadSettings, head: nn.Module, batches: Iterable[Batch]) -> torch.Tensor:
    """Scores (N, classes) of one head, on the CPU."""
    return torch.cat([head(features[settings.features]).float().cpu() for features, _ in batches])


def choose_heads(settings: Sequence[HeadSettings], accuracies: Sequence[float]) -> dict[str, int]:
    """For each probe ("linear", "attentive") the index of its most accurate head; the first of equals."""
    best = {}
    for index, entry in enumerate(settings):
        if entry.probe not in best or accuracies[index] > accuracies[best[entry.probe]]:
            best[entry.probe] = index
    return best
