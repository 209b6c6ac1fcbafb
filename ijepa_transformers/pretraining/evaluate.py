# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluates the encoders of a run with k-NN and few-shot probes.

Every process embeds its share of the images. The main process gets all features, and searches the neighbours on its
device.
"""

from contextlib import nullcontext, suppress
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, cast

import datasets
import torch
from accelerate import Accelerator
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import BitImageProcessorPil

from ..arguments import DatasetArguments
from ..configuration_ijepa import IJepaConfig
from ..data.bit_depth import setting_of
from ..data.datasets import EvaluationImages
from ..data.labels import describe_classes, labels_of, require_equal_classes
from ..data.sources import available_split, open_split, split_to_judge_on
from ..data.splits import AUTO, require_other_split
from ..data.transforms import normalize_pixel_values
from ..distributed import (
    any_process,
    gathered_on_main_process,
    on_main_process,
    send_to_all,
    shared_dataset,
    whole_weights,
)
from ..encoders import RawPixels, encoder_features, untrained
from ..evaluation.collapse import spread_of
from ..evaluation.probes import extract_features, few_shot_accuracy, knn_accuracy, standardize
from ..failures import DivergedError
from ..modeling_ijepa import IJepaForPretraining, IJepaModel
from ..preemption import Preempted, StopRequest, ignore_stop_signals
from ..verdict import PIXELS, RANDOM, Spread
from .arguments import PretrainingArguments


if TYPE_CHECKING:
    from .build import Run


Encoder = IJepaModel | RawPixels
TARGET, CONTEXT = "I-JEPA target encoder", "I-JEPA context encoder"  # in the final table
NUM_IMAGES = 1024  # for rank and spread at the end
SHOTS = 5  # images of each class of a few-shot accuracy
NUM_DRAWS = 5  # of the labelled images of a few-shot accuracy
Features = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # train (N, D), labels (N,), test, labels


class Embedding:
    """Pooled features (B, D) of uint8 images (B, C, H, W) by an encoder, which is put into evaluation mode."""

    def __init__(self, encoder: Encoder, processor: BitImageProcessorPil, accelerator: Accelerator, stop: StopRequest):
        self.encoder, self.processor = encoder.eval(), processor
        self.accelerator, self.stop = accelerator, stop

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Raises Preempted if the run was asked to stop."""
        if self.stop:
            raise Preempted
        pixel_values = normalize_pixel_values(pixel_values, self.processor.image_mean, self.processor.image_std)
        with nullcontext() if isinstance(self.encoder, RawPixels) else self.accelerator.autocast():
            return encoder_features(self.encoder, pixel_values, ("last",))["last"]


def _require_finite(are_finite: bool) -> None:
    if not are_finite:
        raise DivergedError(
            "The features hold NaN or infinity, so training has diverged. A lower learning rate or max_grad_norm may"
            " help, in a new run."
        )


def _require_common_class(train: torch.Tensor, test: torch.Tensor, splits: tuple[str, str]) -> None:
    if not torch.isin(test, train).any():
        raise ValueError(
            f"validation_split asks for a k-NN, but no labelled image of the {splits[1]!r} split has a class of the"
            f" {splits[0]!r} split."
        )


class Probe:
    """k-NN and few-shot accuracy of frozen encoders on the training and validation split.

    Its methods are collective calls: every process embeds its share of the batches. Only the main process gets
    results, the others get None. The batches are those of a single process, so the features are the same.

    Args:
        stop: asked before every batch, because evaluating a large encoder takes minutes.

    Raises:
        ValueError: if a split cannot be opened or has no labelled image, or if the two are one, have no class in
            common or number their classes differently.
    """

    def __init__(
        self,
        arguments: PretrainingArguments,
        config: IJepaConfig,
        processor: BitImageProcessorPil,
        accelerator: Accelerator,
        stop: StopRequest,
    ):
        self.arguments, self.processor, self.accelerator, self.stop = arguments, processor, accelerator, stop
        splits = arguments.train_split, cast(str, arguments.validation_split)  # without the latter, no probe is built
        require_other_split(*splits)
        opened = [self._open(split) for split in splits]
        require_equal_classes(*opened, *splits)
        train, train_labels = self._images(opened[0], splits[0], config)
        test, test_labels = self._images(opened[1], splits[1], config)
        _require_common_class(train_labels, test_labels, splits)
        self.images = [train, test]
        self.loader = self._loader()
        self.num_neighbors = min(arguments.knn_neighbors, self._num_train_images())
        self.knn_name = f"{self.num_neighbors}-NN"

    def _images(self, dataset: datasets.Dataset, split: str, config: IJepaConfig) -> tuple[Subset, torch.Tensor]:
        """At most `max_probe_images` labelled images of the split, the same in every run, and the classes of all."""
        labels = torch.from_numpy(labels_of(dataset))
        labelled = (labels >= 0).nonzero().flatten()  # -1 means unlabelled
        order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
        chosen = labelled[order[: self.arguments.max_probe_images]].sort().values
        if len(chosen) == 0:
            raise ValueError(f"validation_split asks for a k-NN, but no image of the {split!r} split has a label.")
        if self.arguments.verbose:
            self.accelerator.print(f"split {split!r}, {describe_classes(dataset)}", flush=True)
        images = EvaluationImages(
            dataset,
            config.image_height_and_width,
            config.num_channels,
            self.arguments.eval_resize_ratio,
            setting_of(self.processor),
        )
        return Subset(images, chosen.tolist()), labels[labelled]

    def _batches(self) -> list[list[int]]:
        """Indices of all batches: those of the training images, then those of the validation images."""
        ends = len(self.images[0]), len(self.images[0]) + len(self.images[1])
        size = self.arguments.images_per_pass
        return [
            list(range(start, min(start + size, end)))
            for first, end in zip((0, ends[0]), ends, strict=True)
            for start in range(first, end, size)
        ]

    def _loader(self) -> DataLoader:
        """The batches of this process: every n-th of n processes.

        One set of processes serves both splits and all evaluations of a run. Without fork, starting one takes seconds.
        """
        return DataLoader(
            ConcatDataset(self.images),
            batch_sampler=self._batches()[self.accelerator.process_index :: self.accelerator.num_processes],
            num_workers=self.arguments.num_workers,
            persistent_workers=self.arguments.num_workers > 0,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # without it the loader would advance the generator that training uses
        )

    def _open(self, split: str) -> datasets.Dataset:
        """A split of `validation_data`, whose columns are found by themselves, or of `data`."""
        other = self.arguments.validation_data
        source = DatasetArguments(other) if other else self.arguments
        return shared_dataset(self.accelerator, lambda: open_split(source, split, labels="required"))

    def _num_train_images(self) -> int:
        return len(self.images[0])

    @property
    def num_test_images(self) -> int:
        """Labelled images that the accuracies are measured on."""
        return len(self.images[1])

    def features_of(self, encoder: Encoder) -> Features | None:
        """Standardised features and labels of the training split, then of the validation split.

        Raises:
            Preempted: on all processes, if one was asked to stop.
            DivergedError: on all processes, if features are not finite.
        """
        gathered = gathered_on_main_process(self.accelerator, self._features_of_share(encoder))
        if gathered is None:
            return None
        features, labels = (_in_turns([share[kind] for share in gathered]) for kind in (0, 1))
        count = len(self.images[0])
        train, test = standardize(features[:count], features[count:])
        return train, labels[:count], test, labels[count:]

    def _features_of_share(self, encoder: Encoder) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Features (B, D) and labels (B,) of each batch of this process, on the CPU."""
        embedding = Embedding(encoder, self.processor, self.accelerator, self.stop)
        features, labels = [], []
        try:
            for batch in self.loader:
                found, known = extract_features(embedding, [batch], self.accelerator.device)
                features.append(found)
                labels.append(cast(torch.Tensor, known))  # all images have labels
            preempted = False
        except Preempted:
            preempted = True
        if any_process(self.accelerator, preempted):
            raise Preempted
        diverged = not all(each.isfinite().all() for each in features)
        _require_finite(not any_process(self.accelerator, diverged))
        return features, labels

    def knn(self, encoder: Encoder) -> float | None:
        """Accuracy of k-NN on the main process."""
        found = self.features_of(encoder)
        return self._knn(*found) if found else None

    def _knn(
        self, train: torch.Tensor, train_labels: torch.Tensor, test: torch.Tensor, test_labels: torch.Tensor
    ) -> float:
        """On the device of training: 50,000 images take minutes on a CPU."""
        device = self.accelerator.device
        return knn_accuracy(train.to(device), train_labels, test.to(device), test_labels, k=self.num_neighbors)

    def row(self, name: str, encoder: Encoder, shots: int = SHOTS) -> dict[str, str | float] | None:
        """One row of the final table. Few-shot accuracy is left out where a class has too few images."""
        found = self.features_of(encoder)
        if found is None:
            return None
        train, train_labels, test, test_labels = found
        accuracy = self._knn(train, train_labels, test, test_labels)
        row: dict[str, str | float] = {"features": name, self.knn_name: accuracy}
        if train_labels.unique(return_counts=True)[1].min() >= shots:
            result = few_shot_accuracy(train, train_labels, test, test_labels, shots=shots, num_draws=NUM_DRAWS)
            row |= {f"{shots}-shot": result.mean, f"{shots}-shot std": result.std}
        return row


def _in_turns(shares: list[list[torch.Tensor]]) -> torch.Tensor:
    """The batches of all processes as one tensor, in the order of a single process. Each of n has every n-th batch."""
    batches = [batch for turn in zip_longest(*shares) for batch in turn if batch is not None]
    return torch.cat(batches)


def with_available_split(arguments: PretrainingArguments, accelerator: Accelerator) -> PretrainingArguments:
    """The arguments with one name as `validation_split`, where "validation or test" or "auto" was asked. None where
    "auto" finds no split. All processes must call it.

    Raises:
        ValueError: if the data have none of these splits.
    """
    asked = arguments.validation_split
    if asked is None:
        return arguments
    source = DatasetArguments(arguments.validation_data) if arguments.validation_data else arguments
    return replace(arguments, validation_split=on_main_process(accelerator, lambda: split_to_judge_on(source, asked)))


def unused_labels(arguments: PretrainingArguments, accelerator: Accelerator) -> str:
    """That labels of the data could judge the run, in sentences; empty if there are none, or if they are used. All
    processes must call it."""
    if arguments.validation_split or arguments.validation_data or arguments.streaming:
        return ""
    return on_main_process(accelerator, lambda: _unused_labels(arguments))


def _unused_labels(arguments: PretrainingArguments) -> str:
    try:
        split = available_split(arguments, AUTO)
        opened = [open_split(arguments, name) for name in (arguments.train_split, split)]
    except ValueError:  # most data have no such split
        return ""
    if split == arguments.train_split or not all("label" in dataset.column_names for dataset in opened):
        return ""
    return (
        f"The splits {arguments.train_split!r} and {split!r} have labels. --validation_split {split} judges the run by"
        " them; after the run, add --resume true."
    )


def evaluate(run: "Run") -> dict[str, float]:
    """The k-NN accuracy of the target encoder and of a random encoder. All processes must call it.

    Empty on all but the main process, without a probe, and if a signal interrupts the evaluation.
    """
    if run.probe is None:
        return {}
    with suppress(Preempted):  # the run stops, and --resume makes up for it
        accuracy = run.probe.knn(whole_encoders(run, "ijepa")["ijepa"])
        return {} if accuracy is None else {**run.baseline, "knn_accuracy": accuracy}
    return {}


def baseline(run: "Run") -> dict[str, float]:
    """The k-NN accuracy of the random encoder. All processes must call it.

    Empty on all but the main process, without a probe, and if a signal interrupts the evaluation.
    """
    if run.probe is None:
        return {}
    with suppress(Preempted):  # the caller asks all processes whether to stop
        accuracy = run.probe.knn(random_encoder(run))
        return {} if accuracy is None else {"random_knn_accuracy": accuracy}
    return {}


def whole_encoders(run: "Run", *names: str) -> dict[str, IJepaModel]:
    """Encoders with whole weights on every process. All processes must call it.

    Where processes share the weights, each of them holds the whole encoders as long as they are used.
    """
    if not run.launch.shards_weights:
        return {name: getattr(run.networks, name) for name in names}
    weights = whole_weights(run.accelerator, run.model)  # on the main process
    return {name: _plain_encoder(run, weights, f"{name}.") for name in names}


def _plain_encoder(run: "Run", weights: dict[str, torch.Tensor], prefix: str) -> IJepaModel:
    encoder = IJepaModel._from_config(run.config)
    if run.accelerator.is_main_process:
        encoder.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    encoder.to(run.accelerator.device)
    send_to_all(run.accelerator, encoder.state_dict().values())
    return encoder


def random_encoder(run: "Run") -> IJepaModel:
    """The untrained encoder that every accuracy is compared with: the one that the run began with.

    It is drawn again from the seed as `build_run` draws it, so a resumed run has the same. Another draw would not do:
    20-NN of random encoders goes from .58 to .71 on digits. With `init_from`, it is a random encoder of the seed.
    """
    attention = run.networks.config._attn_implementation
    model = untrained(IJepaForPretraining, run.config, run.arguments.seed, attn_implementation=attention)
    return cast(IJepaForPretraining, model).ijepa.to(run.accelerator.device)


def final_rows(run: "Run", probe: Probe) -> list[dict[str, str | float]] | None:
    """The accuracies of pixels, a random encoder and both trained encoders. All processes must call it.

    None on all but the main process, and if a signal interrupts the evaluation.
    """
    trained = whole_encoders(run, "ijepa", "context_encoder")
    encoders: dict[str, Encoder] = {
        PIXELS: RawPixels(),
        RANDOM: random_encoder(run),
        TARGET: trained["ijepa"],
        CONTEXT: trained["context_encoder"],
    }
    try:
        rows = [probe.row(name, encoder) for name, encoder in encoders.items()]
    except Preempted:
        return None  # the caller asks all processes whether to stop
    return [row for row in rows if row is not None] or None


def measure_spreads(run: "Run") -> None:
    """Sets `run.spread` of the target encoder and `run.random_spread` of the random encoder, on the main process.

    Both are of the same images without random crops, at most `NUM_IMAGES` and no more than the run has trained on.
    Nothing is set if no step moved the weights, if fewer than two images can be read, or if a signal interrupts it.
    All processes must call it.

    Raises:
        DivergedError: if features are not finite.
    """
    target = whole_encoders(run, "ijepa")
    if not run.accelerator.is_main_process or run.monitor.num_updates == 0:
        return
    count = min(NUM_IMAGES, run.schedules.total_steps * run.arguments.batch_size)
    images = list(run.data.views(count))
    if len(images) < 2:
        return
    with suppress(Preempted):  # the caller asks all processes whether to stop
        run.random_spread = _spread(run, random_encoder(run), images)
        run.spread = _spread(run, target["ijepa"], images)


def _spread(run: "Run", encoder: IJepaModel, images: list[torch.Tensor]) -> Spread:
    """Rank and spread of the features of images. They are exactly 0 and 1 if the images do not differ."""
    embedding = Embedding(encoder, run.processor, run.accelerator, run.stop)
    do_differ, size = any(not torch.equal(image, images[0]) for image in images), run.arguments.images_per_pass
    starts = range(0, len(images) if do_differ else 1, size)
    batches = ({"pixel_values": torch.stack(images[start : start + size])} for start in starts)
    features, _ = extract_features(embedding, batches, run.accelerator.device)
    _require_finite(bool(features.isfinite().all()))
    return spread_of(features if do_differ else features[:1].expand(len(images), -1))
