# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opening an encoder to be judged or used: this package's, a stock one, or any vision model of Transformers."""

import hashlib

import torch
from transformers import AutoConfig, AutoModel, PreTrainedModel

# The same class as transformers.AutoImageProcessor, which transformers 5.17 hides where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .modeling_ijepa import IJepaForPretraining


def load_encoder(source: str, encoder: str, dtype: torch.dtype) -> PreTrainedModel:
    """The encoder of a directory or Hub repository, in evaluation mode.

    Raises:
        ValueError: if it cannot be opened, or has no context encoder and that is asked for.
    """
    try:
        if encoder == "target":
            return AutoModel.from_pretrained(source, dtype=dtype).eval()
        config = AutoConfig.from_pretrained(source)
        if "IJepaForPretraining" not in (config.architectures or ()):
            raise ValueError(f"it was saved from {config.architectures} and holds no context encoder")
        return IJepaForPretraining.from_pretrained(source, dtype=dtype).context_encoder.eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {source!r} cannot be opened: {one_line(error)}") from error


def load_processor(source: str):
    """The image processor of a directory or Hub repository.

    Raises:
        ValueError: if there is none; guessing the normalisation would give wrong features without a word.
    """
    try:
        return AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"The image processor of {source!r} cannot be opened: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def weights_digest(model: PreTrainedModel) -> str:
    """SHA-256 of names and values, so that features of other weights are never mixed in."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
