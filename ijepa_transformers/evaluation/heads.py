# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Linear and attentive heads on frozen features. All heads of a sweep are trained together on the same batches.

The paper's appendix A chooses the best head of a sweep over learning rates, weight decays, inputs and optimizers. Such
a sweep costs little more than one head, because the features of a batch are computed once. Heads share no parameter
and no random number, so a head of a sweep equals the same head trained alone. The functions here know no model: the
caller passes batches of features by name.

Shapes: B images of a batch, N tokens, D feature width.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn


_STEP_EPOCHS = 15  # the step schedule divides by 10 after this many epochs (published)
_ATTENTION_HEAD_WIDTH = 64
# Features by name, each (B, D), or (B, N, D) for tokens; and labels (B,), which are class indices.
Batch: TypeAlias = tuple[Mapping[str, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class HeadSettings:
    """One head of a sweep.

    `features` is the name of the features that the head reads. "tokens" are pooled by attention first.
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
    """All combinations. A head on tokens has its own layer norm, so it is listed once, without BatchNorm."""
    grid = itertools.product(features, batch_norms, optimizers, learning_rates, weight_decays)
    heads = (
        HeadSettings(name, norm and name != "tokens", optimizer, *rates) for name, norm, optimizer, *rates in grid
    )
    return list(dict.fromkeys(heads))


def require_optimizers(names: Iterable[str]) -> None:
    """Raises ValueError if the package of an optimizer is not installed. Call it before hours of work."""
    if "lars" in names:
        try:
            import timm.optim  # noqa: F401
        except ImportError:
            raise ValueError(
                'The optimizer lars needs timm, which is not installed: pip install "ijepa-transformers[vision]".'
            ) from None


# Heads
class LinearHead(nn.Module):
    """Scores (B, classes) of pooled features (B, D). `batch_norm` puts BatchNorm without affine parameters first."""

    def __init__(self, width: int, num_classes: int, batch_norm: bool):
        super().__init__()
        # The features do not change during training, so momentum=None averages the statistics of all batches.
        self.norm = nn.BatchNorm1d(width, affine=False, momentum=None) if batch_norm else nn.Identity()
        self.classifier = _classifier(width, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(features))


class AttentiveHead(nn.Module):
    """Scores (B, classes) of tokens (B, N, D): cross-attention with one learned query, then a linear classifier.

    It can read a part of the image, which the mean over tokens cannot. It is no linear probe: it has about D^2 more
    parameters.

    The query is the same for all images, so it includes the key projection. Values are projected after averaging. This
    is the same function at 1/D of the cost: it multiplies H attention heads (H, D) with (B, N, D), and needs no two
    D x D projections of each token.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        num_heads = width // _ATTENTION_HEAD_WIDTH if width % _ATTENTION_HEAD_WIDTH == 0 else 1
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


def _build_heads(
    settings: Sequence[HeadSettings], widths: Mapping[str, int], num_classes: int, seed: int
) -> nn.ModuleList:
    """A new head for each of the settings. Its weights depend only on its shape and on the seed."""
    heads = nn.ModuleList()
    for entry in settings:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if entry.probe == "attentive":
                heads.append(AttentiveHead(widths[entry.features], num_classes))
            else:
                heads.append(LinearHead(widths[entry.features], num_classes, entry.batch_norm))
    return heads


# Training
def learning_rate_factor(schedule: str, epoch: float, epochs: float, warmup_epochs: float = 0.0) -> float:
    """The factor of each head's learning rate after `epoch` of `epochs`; `epoch` may be a fraction.

    "cosine" falls to 0; "step" divides by 10 every 15 epochs. The warm-up rises linearly from 0 and is part of
    `epochs`.
    """
    warmup = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0
    if schedule == "step":
        return warmup * 0.1 ** (math.floor(epoch) // _STEP_EPOCHS)
    progress = max(0.0, epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _build_optimizers(settings: Sequence[HeadSettings], heads: nn.ModuleList) -> list[torch.optim.Optimizer]:
    """One optimizer of each kind. Each head has its own groups. Biases and norms have no weight decay."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry, head in zip(settings, heads, strict=True):
        for is_matrix in (True, False):
            groups.setdefault(entry.optimizer, []).append(
                {
                    "params": [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix],
                    "lr": entry.learning_rate,
                    "peak_learning_rate": entry.learning_rate,
                    "weight_decay": entry.weight_decay if is_matrix else 0.0,
                    # By default timm's LARS adapts only parameters with weight decay.
                    **({"always_adapt": is_matrix} if entry.optimizer == "lars" else {}),
                }
            )
    return [_build_optimizer(name, entries) for name, entries in groups.items()]


def _build_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
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
    """Trains all heads on the same batches. Each head becomes the same as if it were trained alone.

    Args:
        settings: the heads.
        batches_per_epoch: takes an epoch (from 0) and returns its `steps_per_epoch` training batches.
        widths: D of the features, by their name.
        schedule: "cosine" or "step", see `learning_rate_factor`.
        seed: of the initial weights.
        device: of the heads and of the batches.

    Returns:
        The heads, in the order of `settings`, in evaluation mode.
    """
    heads = _build_heads(settings, widths, num_classes, seed).to(device).train()
    optimizers = _build_optimizers(settings, heads)
    for epoch in range(epochs):
        for step, (features, labels) in enumerate(batches_per_epoch(epoch)):
            factor = learning_rate_factor(schedule, epoch + step / steps_per_epoch, epochs, warmup_epochs)
            _update(settings, heads, optimizers, features, labels, factor)
    return heads.eval()


def _update(
    settings: Sequence[HeadSettings],
    heads: nn.ModuleList,
    optimizers: Sequence[torch.optim.Optimizer],
    features: Mapping[str, torch.Tensor],
    labels: torch.Tensor,
    factor: float,
) -> None:
    """One step of all heads. They share no parameter, so the gradient of the summed loss is right for each of them."""
    losses = [
        F.cross_entropy(head(features[entry.features]), labels) for entry, head in zip(settings, heads, strict=True)
    ]
    torch.stack(losses).sum().backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak_learning_rate"]
        optimizer.step()
        optimizer.zero_grad()


# Batches
def rebatch(parts: Iterable[dict[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Cuts the rows of all parts, in order, into parts of `size` rows. The last part may be shorter."""
    waiting: list[dict[str, torch.Tensor]] = []
    count = 0
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
    """The rows of all parts in one dictionary. All parts have the same names."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def split_holdout(count: int, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides the positions 0..count-1 of a training split at random.

    Returns:
        Sorted positions (int64) to train on, and a `share` of them on which the best head is chosen.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    held = min(count - 1, max(1, round(share * count))) if share else 0
    return order[held:].sort().values, order[:held].sort().values


# Evaluation
@torch.no_grad()
def head_accuracies(
    settings: Sequence[HeadSettings], heads: Iterable[nn.Module], batches: Iterable[Batch]
) -> list[float]:
    """Top-1 accuracy of each head, in one pass. An image whose scores are not finite counts as wrong.

    Raises:
        ValueError: if there is no image.
    """
    heads = list(heads)
    hits: torch.Tensor | int = 0  # (heads,) after the first batch
    num_images = 0
    for features, labels in batches:
        scores = [head(features[entry.features]) for entry, head in zip(settings, heads, strict=True)]
        hits = hits + torch.stack([_hits(values, labels).sum() for values in scores])
        num_images += len(labels)
    if isinstance(hits, int):
        raise ValueError("there is no image to measure the heads on")
    return (hits.cpu().double() / num_images).tolist()  # MPS has no double precision


def _hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B,) whether the label has the highest score; False if the scores of an image are not finite."""
    return (scores.argmax(dim=1) == labels) & scores.isfinite().all(dim=1)


@torch.no_grad()
def head_scores(settings: HeadSettings, head: nn.Module, batches: Iterable[Batch]) -> torch.Tensor:
    """Scores (N, classes) of one head, on the CPU."""
    return torch.cat([head(features[settings.features]).float().cpu() for features, _ in batches])


def choose_heads(settings: Sequence[HeadSettings], accuracies: Sequence[float]) -> dict[str, int]:
    """The index of the most accurate head of each probe ("linear", "attentive"); the first of equal ones."""
    best: dict[str, int] = {}
    for index, entry in enumerate(settings):
        if entry.probe not in best or accuracies[index] > accuracies[best[entry.probe]]:
            best[entry.probe] = index
    return best
