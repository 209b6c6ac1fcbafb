# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The linear and the attentive probe: trains heads on frozen features and chooses the best of them.

Shapes: N images, n some of these images.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..arguments import require
from ..data.notices import counted
from ..data.order import epoch_order
from ..failures import DivergedError
from .arguments import head_features
from .features import (
    AUGMENTED,
    Images,
    Keys,
    OpenedEncoder,
    Run,
    Split,
    SplitFeatures,
    stream,
    streams_tokens,
)
from .heads import (
    Batch,
    HeadSettings,
    choose_heads,
    head_accuracies,
    head_grid,
    head_scores,
    rebatch,
    split_holdout,
    train_heads,
)
from .probes import accuracy_metric, class_indices


_OPTIMISTIC = "{} (optimistic: chosen on the validation split)"


def measure(run: Run, scores: torch.Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy of the scores (N, classes) of the validation split."""
    references = class_indices(run.train.labels, run.validation.labels)
    return accuracy_metric().compute(predictions=scores.float().numpy(), references=references.numpy())


def _head_settings(run: Run, opened: OpenedEncoder) -> list[HeadSettings]:
    """All heads of the sweep."""
    arguments = run.arguments
    names, norms = head_features(arguments, opened.is_raw), [norm == "batch_norm" for norm in arguments.head_norms]
    return head_grid(names, norms, arguments.optimizers, arguments.learning_rates, arguments.weight_decays)


@dataclass
class _HeadData:
    """Batches for the heads, from features in memory or from an encoder that runs again in every epoch.

    Args:
        train, validation: the features in memory.
        kinds: the features that the heads read.
    """

    run: Run
    opened: OpenedEncoder
    train: SplitFeatures
    validation: SplitFeatures
    kinds: list[str]

    @property
    def streams_training(self) -> bool:
        """Whether the encoder runs again in every epoch."""
        return streams_tokens(self.run, self.opened) or self.run.arguments.augment != "none"

    def labels(self, split: Split, positions: torch.Tensor) -> torch.Tensor:
        """Class indices (n,) at some positions (n,) of a split, on the device."""
        return class_indices(self.run.train.labels, split.labels[positions]).to(self.run.accelerator.device)

    def evaluation_batches(self, features: SplitFeatures, positions: torch.Tensor) -> Callable[[], Iterable[Batch]]:
        """A function that returns the batches of the images at some positions (n,), as in evaluation."""
        split, size = features.split, self.run.arguments.batch_size
        if not streams_tokens(self.run, self.opened):
            return lambda: self._stored(features, positions, size)
        images, keys = self.opened.images(split.dataset), split.indices[positions].tolist()
        return lambda: self._streamed(images, keys, self.labels(split, positions), size)

    def training_batches(self, positions: torch.Tensor, size: int) -> Callable[[int], Iterable[Batch]]:
        """A function that returns the batches of an epoch, each with `size` images. A smaller rest is left out.

        It is called for one epoch after the other, and each time all batches are taken.
        """
        split, arguments = self.run.train, self.run.arguments

        def chosen(epoch: int) -> torch.Tensor:
            order = torch.from_numpy(epoch_order(len(positions), arguments.seed, epoch))
            return positions[order[: len(positions) // size * size]]

        if not self.streams_training:
            return lambda epoch: self._stored(self.train, chosen(epoch), size)
        images = self.opened.images(split.dataset)
        augmented = AUGMENTED[arguments.augment](images, arguments.seed) if arguments.augment != "none" else None

        def keys(epoch: int) -> Keys:
            indices = split.indices[chosen(epoch)].tolist()
            return [(epoch, index) for index in indices] if augmented else indices

        # Nothing is read before the first batch is asked for.
        parts = self._features(augmented or images, map(keys, range(arguments.epochs)), size)

        def batches(epoch: int) -> Iterator[Batch]:
            labels = self.labels(split, chosen(epoch)).split(size)
            return zip(itertools.islice(parts, len(labels)), labels, strict=True)

        return batches

    def _stored(self, features: SplitFeatures, positions: torch.Tensor, size: int) -> Iterator[Batch]:
        device = self.run.accelerator.device
        labels = self.labels(features.split, positions)
        for part, part_labels in zip(positions.split(size), labels.split(size), strict=True):
            yield {kind: features.at(kind, part).to(device) for kind in self.kinds}, part_labels

    def _streamed(self, images: Images, keys: Keys, labels: torch.Tensor, size: int) -> Iterator[Batch]:
        return zip(self._features(images, [keys], size), labels.split(size), strict=True)

    def _features(self, images: Images, passes: Iterable[Keys], size: int) -> Iterator[dict[str, torch.Tensor]]:
        """In parts of `size`; each pass has a multiple of it, or there is only one."""
        return rebatch(map(_require_finite, stream(self.run, self.opened, images, passes, self.kinds)), size)


def _require_finite(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the features. Raises DivergedError if they are not finite."""
    if not all(value.isfinite().all() for value in features.values()):
        raise DivergedError("NaN or infinity in its features")
    return features


def sweep(
    run: Run, opened: OpenedEncoder, train: SplitFeatures, validation: SplitFeatures
) -> dict[str, dict[str, Any]]:
    """The linear and the attentive probe: accuracies of the best head and of all heads, by column of the table.

    Processes that compute nothing return an empty dictionary.

    Raises:
        DivergedError: if features are not finite.
    """
    arguments, settings = run.arguments, _head_settings(run, opened)
    if not settings:
        return {}
    data = _HeadData(run, opened, train, validation, sorted({entry.features for entry in settings}))
    fit, held = split_holdout(len(run.train.indices), arguments.holdout, arguments.seed)
    size = min(arguments.batch_size, len(fit))
    require(
        size > 1 or not any(entry.batch_norm for entry in settings),
        "a linear probe with BatchNorm needs at least 2 training images in a batch, got 1: take more images, or a"
        " larger batch_size.",
    )
    validation_batches = data.evaluation_batches(validation, torch.arange(len(run.validation.indices)))
    choice_batches = data.evaluation_batches(train, held) if len(held) else validation_batches
    if not (run.accelerator.is_main_process or data.streams_training):
        return {}  # with features in memory the main process trains alone
    heads = train_heads(
        settings,
        data.training_batches(fit, size),
        run.trials[opened.spec].widths,
        len(run.train.labels.unique()),
        epochs=arguments.epochs,
        steps_per_epoch=len(fit) // size,
        schedule=arguments.schedule,
        warmup_epochs=arguments.warmup_epochs,
        seed=arguments.seed,
        device=run.accelerator.device,
    )
    return _evaluate_heads(run, str(opened.spec), settings, heads, choice_batches, validation_batches)


def _evaluate_heads(
    run: Run,
    spec: str,
    settings: list[HeadSettings],
    heads: torch.nn.ModuleList,
    choice_batches: Callable[[], Iterable[Batch]],
    validation_batches: Callable[[], Iterable[Batch]],
) -> dict[str, dict[str, Any]]:
    """Chooses the best head of each probe, then measures it on the validation split.

    The validation accuracies of the other heads are only recorded. They take part in the choice only if it is made on
    the validation split, as published.
    """
    is_optimistic = run.arguments.holdout == 0
    accuracies = head_accuracies(settings, heads, validation_batches())
    chosen_by = accuracies if is_optimistic else head_accuracies(settings, heads, choice_batches())
    results = {}
    for probe, index in choose_heads(settings, chosen_by).items():
        scores = head_scores(settings[index], heads[index], validation_batches())
        bad = int((~scores.isfinite().all(dim=1)).sum())
        if bad:
            run.add_note(
                f"The best {probe} head of {spec} has diverged on {bad:,} of {counted(len(scores), 'image')}, which"
                " count as wrong: try lower learning_rates."
            )
        results[_OPTIMISTIC.format(probe) if is_optimistic else probe] = {
            **measure(run, scores),
            "chosen": str(settings[index]),
            "border": None if bad else _border_of(settings, settings[index]),
            "chosen_on": run.validation.name if is_optimistic else f"{run.arguments.holdout:g} of {run.train.name}",
            "heads": [
                {**dataclasses.asdict(entry), "accuracy": accuracy, "accuracy_of_choice": chosen}
                for entry, accuracy, chosen in zip(settings, accuracies, chosen_by, strict=True)
                if entry.probe == probe
            ],
        }
    return results


def _border_of(settings: list[HeadSettings], best: HeadSettings) -> str | None:
    """Whether the best head has the "smallest" or "largest" learning rate of the sweep, or None. At such a border a
    better learning rate may lie outside the sweep."""
    rates = sorted({entry.learning_rate for entry in settings})
    if len(rates) == 1 or rates[0] < best.learning_rate < rates[-1]:
        return None
    return "smallest" if best.learning_rate == rates[0] else "largest"
