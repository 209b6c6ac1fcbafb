# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Evaluates the encoders of a run with k-NN and few-shot probes, on the main process while the others wait."""

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch.utils.data import DataLoader, Subset

from ..arguments import DatasetArguments
from ..configuration_ijepa import IJepaConfig
from ..data.datasets import EvaluationImages
from ..data.sources import open_split
from ..data.transforms import normalize_pixel_values
from ..distributed import whole_weights
from ..encoders import RawPixels, encoder_features, untrained
from ..evaluation.probes import extract_features, few_shot_accuracy, format_table, knn_accuracy, standardize
from ..modeling_ijepa import IJepaModel
from .arguments import PretrainingArguments
from .preemption import Preempted, ignore_stop_signals


if TYPE_CHECKING:
    from .build import Run


class Probe:
    """k-NN and few-shot accuracy of frozen encoders on a labelled train and validation split. Main process only."""

    def __init__(self, arguments: PretrainingArguments, config: IJepaConfig, processor, accelerator, stop):
        self.arguments, self.processor, self.accelerator, self.stop = arguments, processor, accelerator, stop
        self.loaders = [self._loader(split, config) for split in (arguments.train_split, arguments.validation_split)]

    def _loader(self, split, config):
        other = self.arguments.validation_data  # its columns are found: those that were named are of `data`
        dataset = open_split(DatasetArguments(other) if other else self.arguments, split, labels="required")
        labelled = (torch.as_tensor(dataset["label"][:]) >= 0).nonzero().flatten()  # -1 means unlabelled
        order = torch.randperm(len(labelled), generator=torch.Generator().manual_seed(0))
        chosen = labelled[order[: self.arguments.max_probe_images]].sort().values
        if len(chosen) == 0:
            raise ValueError(f"validation_split asks for a k-NN, but no image of the {split!r} split has a label.")
        images = EvaluationImages(
            dataset, config.image_height_and_width, config.num_channels, self.arguments.eval_resize_ratio
        )
        return DataLoader(
            Subset(images, chosen.tolist()),
            batch_size=self.arguments.images_per_pass,
            num_workers=self.arguments.num_workers,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # or the loader draws from the generator that training uses
        )

    def features_of(self, encoder: IJepaModel | RawPixels) -> tuple[torch.Tensor, ...]:
        """Standardised features and labels of the training split, then of the validation split."""

        def embed(pixel_values):
            if self.stop:
                raise Preempted
            pixel_values = normalize_pixel_values(pixel_values, self.processor.image_mean, self.processor.image_std)
            with nullcontext() if isinstance(encoder, RawPixels) else self.accelerator.autocast():
                return encoder_features(encoder, pixel_values, ("last",))["last"]

        encoder.eval()
        (train, train_labels), (test, test_labels) = (
            extract_features(embed, loader, self.accelerator.device) for loader in self.loaders
        )
        train, test = standardize(train, test)
        return train, train_labels, test, test_labels

    def knn(self, encoder: IJepaModel | RawPixels) -> float:
        return self.row("", encoder, shots=())[self.knn_name]

    @property
    def knn_name(self) -> str:
        return f"{min(self.arguments.knn_neighbors, len(self.loaders[0].dataset))}-NN"

    def row(self, name: str, encoder: IJepaModel | RawPixels, shots: tuple[int, ...] = (5,)) -> dict:
        """One row of the final table; few-shot accuracy only where every class has enough images."""
        features = self.features_of(encoder)
        row = {"features": name, self.knn_name: knn_accuracy(*features, k=int(self.knn_name.removesuffix("-NN")))}
        for count in shots:
            if features[1].unique(return_counts=True)[1].min() >= count:
                result = few_shot_accuracy(*features, shots=count, num_draws=5)
                row.update({f"{count}-shot": result.mean, f"{count}-shot std": result.std})
        return row


# Evaluating: on the main process, while the others wait
def evaluate(run: "Run") -> dict:
    """The k-NN of the target encoder beside that of a random one; nothing if a signal interrupts it."""
    encoders = whole_encoders(run, "ijepa")
    if not run.accelerator.is_main_process:
        return {}
    try:
        return {**run.baseline, "knn_accuracy": run.probe.knn(encoders["ijepa"])}
    except Preempted:
        return {}  # the run stops, and --resume makes up for it


def whole_encoders(run: "Run", *names: str) -> dict[str, IJepaModel]:
    """Encoders that compute on their own. Call it on all processes; only the main one gets them."""
    if not run.launch.shards_weights:
        return {name: getattr(run.networks, name) for name in names}
    weights = whole_weights(run.accelerator, run.model)
    return {name: plain_encoder(run, weights, f"{name}.") for name in names if run.accelerator.is_main_process}


def plain_encoder(run: "Run", weights: dict[str, torch.Tensor], prefix: str) -> IJepaModel:
    encoder = IJepaModel._from_config(run.config)
    encoder.load_state_dict({key.removeprefix(prefix): weights[key] for key in weights if key.startswith(prefix)})
    return encoder.to(run.accelerator.device)


def random_encoder(run: "Run") -> IJepaModel:
    """An untrained encoder of the same architecture: what every probe is compared with."""
    return untrained(IJepaModel, run.config, run.arguments.seed).to(run.accelerator.device)


def tabulate(run: "Run", trained: dict[str, IJepaModel]) -> str | None:
    encoders = {
        "raw pixels": RawPixels(),
        "random encoder": random_encoder(run),
        "I-JEPA target encoder": trained["ijepa"],
        "I-JEPA context encoder": trained["context_encoder"],
    }
    try:
        return format_table([run.probe.row(name, encoder) for name, encoder in encoders.items()])
    except Preempted:
        return None  # the caller asks all processes
