# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains linear and attentive heads on frozen features and chooses among their settings."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..data.order import epoch_order
from .arguments import head_features
from .features import AUGMENTED, DivergedError, OpenedEncoder, Run, Split, SplitFeatures, stream, streams_evaluation
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


OPTIMISTIC = "{} (optimistic: chosen on the validation split)"


def measure(run: Run, scores: torch.Tensor) -> dict[str, float]:
    """Top-1, top-5 and mean per-class accuracy of scores (N, classes) on the validation split."""
    references = class_indices(run.train.labels, run.validation.labels)
    return accuracy_metric().compute(predictions=scores.float().numpy(), references=references.numpy())


def heads_of(run: Run, opened: OpenedEncoder) -> list[HeadSettings]:
    """The sweep."""
    arguments = run.arguments
    names, norms = head_features(arguments, opened.is_raw), [norm == "batch_norm" for norm in arguments.head_norms]
    return head_grid(names, norms, arguments.optimizers, arguments.learning_rates, arguments.weight_decays)


@dataclass
class HeadData:
    """Where the batches of the heads come from: features kept in memory, or the encoder running along.

    Args:
        train, validation: the kept features.
        kinds: the features that the heads read.
    """

    run: Run
    opened: OpenedEncoder
    train: SplitFeatures
    validation: SplitFeatures
    kinds: list[str]

    @property
    def streams_training(self) -> bool:
        return streams_evaluation(self.run, self.opened) or self.run.arguments.augment != "none"

    def labels(self, split: Split, places: torch.Tensor) -> torch.Tensor:
        """Class indices (N,), on the device."""
        return class_indices(self.run.train.labels, split.labels[places]).to(self.run.accelerator.device)

    def evaluation(self, features: SplitFeatures, places: torch.Tensor) -> Callable[[], Iterable[Batch]]:
        """What gives the batches of these images, seen as in evaluation, as often as it is called."""
        split, size = features.split, self.run.arguments.batch_size
        if not streams_evaluation(self.run, self.opened):
            return lambda: self.kept(features, places, size)
        images, keys = self.opened.images(split.dataset), split.indices[places].tolist()
        return lambda: self.streamed(images, keys, self.labels(split, places), size)

    def training(self, places: torch.Tensor, size: int) -> Callable[[int], Iterable[Batch]]:
        """What gives the batches of an epoch, of `size` images each; the last images of the order may be left over."""
        split, arguments = self.run.train, self.run.arguments

        def chosen(epoch: int) -> torch.Tensor:
            order = torch.from_numpy(epoch_order(len(places), arguments.seed, epoch))
            return places[order[: len(places) // size * size]]

        if not self.streams_training:
            return lambda epoch: self.kept(self.train, chosen(epoch), size)
        images = self.opened.images(split.dataset)
        augmented = AUGMENTED[arguments.augment](images, arguments.seed) if arguments.augment != "none" else None

        def batches(epoch: int) -> Iterator[Batch]:
            indices = split.indices[chosen(epoch)].tolist()
            keys = [(epoch, index) for index in indices] if augmented else indices
            return self.streamed(augmented or images, keys, self.labels(split, chosen(epoch)), size)

        return batches

    def kept(self, features: SplitFeatures, places: torch.Tensor, size: int) -> Iterator[Batch]:
        device = self.run.accelerator.device
        labels = self.labels(features.split, places)
        for part, part_labels in zip(places.split(size), labels.split(size), strict=True):
            yield {kind: features.at(kind, part).to(device) for kind in self.kinds}, part_labels

    def streamed(self, images, keys: Sequence, labels: torch.Tensor, size: int) -> Iterator[Batch]:
        parts = map(finite, stream(self.run, self.opened, images, keys, self.kinds))
        return zip(rebatch(parts, size), labels.split(size), strict=True)


def finite(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same features. Raises DivergedError if they are not finite, at the first ones instead of after the sweep."""
    if not all(value.isfinite().all() for value in features.values()):
        raise DivergedError("NaN or infinity in its features")
    return features


def sweep(run: Run, opened: OpenedEncoder, train: SplitFeatures, validation: SplitFeatures) -> dict[str, dict]:
    """The linear and the attentive probe, by the name of their column: all heads, and what the best one reaches."""
    arguments, settings = run.arguments, heads_of(run, opened)
    if not settings:
        return {}
    data = HeadData(run, opened, train, validation, sorted({entry.features for entry in settings}))
    fit, held = split_holdout(len(run.train.indices), arguments.holdout, arguments.seed)
    size = min(arguments.batch_size, len(fit))
    training = data.training(fit, size)
    judging = data.evaluation(validation, torch.arange(len(run.validation.indices)))
    choosing = data.evaluation(train, held) if len(held) else judging
    if not (run.accelerator.is_main_process or data.streams_training):
        return {}  # where the encoder does not run along, the main process trains alone
    heads = train_heads(
        settings,
        training,
        run.trials[opened.spec].widths,
        len(run.train.labels.unique()),
        epochs=arguments.epochs,
        steps_per_epoch=len(fit) // size,
        schedule=arguments.schedule,
        warmup_epochs=arguments.warmup_epochs,
        seed=arguments.seed,
        device=run.accelerator.device,
    )
    return judge_heads(run, settings, heads, choosing, judging)


def judge_heads(
    run: Run,
    settings: list[HeadSettings],
    heads: torch.nn.ModuleList,
    choosing: Callable[[], Iterable[Batch]],
    validation: Callable[[], Iterable[Batch]],
) -> dict[str, dict]:
    """Chooses the best head of each probe, then measures it on the validation split.

    The validation accuracies of the other heads are for the record: they are not looked at here, unless the choice is
    made on the validation split as published.
    """
    is_optimistic = run.arguments.holdout == 0
    accuracies = head_accuracies(settings, heads, validation())
    chosen_by = accuracies if is_optimistic else head_accuracies(settings, heads, choosing())
    results = {}
    for probe, index in choose_heads(settings, chosen_by).items():
        results[OPTIMISTIC.format(probe) if is_optimistic else probe] = {
            **measure(run, head_scores(settings[index], heads[index], validation())),
            "chosen": str(settings[index]),
            "border": border_of(settings, settings[index]),
            "chosen_on": run.validation.name if is_optimistic else f"{run.arguments.holdout:g} of {run.train.name}",
            "heads": [
                {**dataclasses.asdict(entry), "accuracy": accuracy, "accuracy_of_choice": chosen}
                for entry, accuracy, chosen in zip(settings, accuracies, chosen_by, strict=True)
                if entry.probe == probe
            ],
        }
    return results


def border_of(settings: list[HeadSettings], best: HeadSettings) -> str | None:
    """Whether the best head has an extreme learning rate of its sweep, so that the optimum may lie outside."""
    rates = sorted({entry.learning_rate for entry in settings})
    if len(rates) == 1 or rates[0] < best.learning_rate < rates[-1]:
        return None
    return "smallest" if best.learning_rate == rates[0] else "largest"
