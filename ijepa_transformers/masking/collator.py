# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Batches with masks, for a `DataLoader`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import default_collate

from .building import Masking


@dataclass(frozen=True)
class MaskingCollator:
    """Collates samples and adds the masks of their slice of the global batch. Stateless, so any worker can use it.

    Each sample is a dict of tensors, such as `pixel_values`, and two integers that are the same in all samples of a
    batch: `step`, the batch counter, and `slot_block`, the number of the slice in the global batch (`rank` in
    `sample`). Both are taken out; `context_indices` and `target_indices` are added, in the shapes that `sample` of the
    masks gives. All slices of a step must have the same number of samples, so drop a last, smaller batch.

    Raises:
        ValueError: if the samples of a batch differ in `step` or in `slot_block`, or lack one of them.
    """

    masking: Masking
    seed: int

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lacking = {name for name in ("step", "slot_block") if any(name not in sample for sample in samples)}
        if lacking:
            raise ValueError(
                f"the samples lack {' and '.join(sorted(lacking))}, from which the masks follow. For samples with"
                " pixel_values alone, as in the Trainer of Transformers, use ijepa_transformers.PretrainingCollator"
            )
        places = {(int(sample["step"]), int(sample["slot_block"])) for sample in samples}
        if len(places) != 1:
            raise ValueError(f"one batch must have one (step, slot_block), got {sorted(places)}")
        step, slot_block = places.pop()
        batch = default_collate([_without(sample, "step", "slot_block") for sample in samples])
        contexts, targets = self.masking.sample(len(samples), self.seed, step, rank=slot_block)
        return {**batch, "context_indices": contexts, "target_indices": targets}


def _without(sample: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name not in names}
