# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Batches of images for an encoder, and its features.

Shape legend: B images of a batch, N tokens, D features.
"""

from typing import TypeAlias

import torch
from transformers import PreTrainedModel


LoadedBatch: TypeAlias = tuple[torch.Tensor | None, list[str | None]]  # what `collate` returns


@torch.no_grad()
def embed(model: PreTrainedModel, pixel_values: torch.Tensor, outputs: list[str]) -> dict[str, torch.Tensor]:
    """`pooler_output` (B, D) and `last_hidden_state` (B, N, D) of images (B, channels, height, width), on the CPU.

    Raises:
        ValueError: if the model has no such output.
    """
    result = model(pixel_values.to(model.device, model.dtype))
    features: dict[str, torch.Tensor] = {}
    for name in outputs:
        value = getattr(result, name, None)
        if value is None:
            raise ValueError(f"{type(model).__name__} has no output {name!r}.")
        # Convolutional networks pool to (B, D, 1, 1).
        features[name] = (value.flatten(1) if name == "pooler_output" else value).cpu()
    return features


def collate(samples: list[torch.Tensor | str]) -> LoadedBatch:
    """Pixels (B, channels, height, width) and reasons of a batch.

    The pixels of a bad image are zeros, so the other images keep their positions in the batch and their features.

    Returns:
        The pixels, or None if all images are bad; and for each image the reason why it is bad, or None.

    Raises:
        ValueError: if the images have different sizes.
    """
    errors = [sample if isinstance(sample, str) else None for sample in samples]
    images = [sample for sample in samples if not isinstance(sample, str)]
    if len({image.shape for image in images}) > 1:
        raise ValueError("The image processor gives images of different sizes; pass --batch_size 1.")
    if not images:
        return None, errors
    blank = torch.zeros_like(images[0])
    return torch.stack([blank if isinstance(sample, str) else sample for sample in samples]), errors
