# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The classifier that is fine-tuned, and its image processor.

Shapes: C channels, H rows, W columns.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from transformers import AutoModelForImageClassification, BaseImageProcessor, PreTrainedConfig, PreTrainedModel

from ..arguments import require
from ..data.datasets import prepare_image
from ..data.transforms import build_image_processor, normalize_pixel_values
from ..encoders import load_config, load_encoder, one_line
from ..modeling_ijepa import IJepaPreTrainedModel
from ..saved_weights import require_finite
from .arguments import ModelArguments
from .head import load_with_matched_head


# Image processor
def resize_processor(processor: BaseImageProcessor, image_size: tuple[int, int]) -> BaseImageProcessor:
    """The same image processor for images of another size (H, W).

    The ratio of the resized shorter side to the centre crop stays the same.
    """
    settings = processor.to_dict()
    height, width = image_size
    if not settings.get("do_center_crop"):
        return type(processor).from_dict({**settings, "size": {"height": height, "width": width}})
    size, crop = settings["size"], settings["crop_size"]
    ratio = size.get("shortest_edge", size.get("height")) / crop["height"]
    sizes = build_image_processor(image_size, resize_ratio=ratio).to_dict()
    return type(processor).from_dict({**settings, "size": sizes["size"], "crop_size": sizes["crop_size"]})


def processor_statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel with which the processor normalises.

    Raises:
        ValueError: if the processor changes pixel values in another way. Training images would lack this change.
    """
    mean, std = [0.0] * num_channels, [1.0] * num_channels
    settings = processor.to_dict()
    if settings.get("do_normalize"):
        mean, std = list(settings["image_mean"]), list(settings["image_std"])
    grey = np.full((256, 256, num_channels), 100, dtype=np.uint8)
    processed = prepare_image(processor, grey)  # (C, H, W)
    expected = normalize_pixel_values(torch.from_numpy(grey).permute(2, 0, 1), mean, std)[:, :1, :1]
    require(
        torch.allclose(processed, expected.expand_as(processed), atol=1e-4),
        f"{type(processor).__name__} does more than resize, crop and normalise by {mean} and {std}.",
    )
    return mean, std


def processed_size(processor: BaseImageProcessor, num_channels: int) -> tuple[int, int]:
    """Height and width of the images that the processor returns."""
    blank = np.zeros((256, 256, num_channels), dtype=np.uint8)
    height, width = prepare_image(processor, blank).shape[-2:]
    return height, width


# Model
def _build_config(arguments: ModelArguments, class_names: Sequence[str], has_several: bool) -> PreTrainedConfig:
    """The configuration of the classifier. For pretrained weights it still has their image size.

    Raises:
        ValueError: if there is none, or if it has no stochastic depth and `drop_path_rate` is given.
    """
    config = load_config(arguments.model)
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: number for number, name in enumerate(class_names)}
    config.problem_type = "multi_label_classification" if has_several else "single_label_classification"
    if arguments.drop_path_rate is not None:
        require(hasattr(config, "drop_path_rate"), f"{config.model_type} models have no drop_path_rate.")
        config.drop_path_rate = arguments.drop_path_rate
    if arguments.from_scratch and arguments.image_size is not None:
        config.image_size = arguments.size_in_config
    return config


def build_model(
    arguments: ModelArguments, class_names: Sequence[str], has_several: bool
) -> tuple[PreTrainedModel, str]:
    """The classifier to train, with float32 weights, and one sentence on its head.

    Args:
        has_several: whether an image has a list of classes.

    Raises:
        ValueError: if it cannot be opened, holds NaN or infinity, or if its image size cannot be changed.
    """
    config = _build_config(arguments, class_names, has_several)
    with _quiet_loading():
        model, head = _initial_model(arguments, config)
    require_finite(model, arguments.model)
    if arguments.image_size is not None and not arguments.from_scratch:
        if not isinstance(model, IJepaPreTrainedModel):
            raise ValueError(f"image_size is for I-JEPA, not for {type(model).__name__}.")
        height, width = arguments.height_and_width
        model.resize_image(height if height == width else (height, width))
    if arguments.tune == "head":
        _freeze_encoder(model)
    # Some stock classes save their weights under old names, which Trainer cannot read when it loads a checkpoint.
    save_pretrained = partial(model.save_pretrained, save_original_format=False)
    model.save_pretrained = save_pretrained  # type: ignore[method-assign]
    return model, head


def _initial_model(arguments: ModelArguments, config: PreTrainedConfig) -> tuple[PreTrainedModel, str]:
    """The classifier with new weights, with those of the context encoder and a new head, or with all that are saved.

    Raises:
        ValueError: if it cannot be opened, or if weights of the encoder are missing.
    """
    if arguments.encoder == "target" and not arguments.from_scratch:
        return load_with_matched_head(arguments.model, load_config(arguments.model), config)
    model = _fresh_classifier(arguments.model, config)
    if not arguments.from_scratch:
        model.base_model.load_state_dict(load_encoder(arguments.model, "context", torch.float32).state_dict())
    return model, "the head is new"


def _fresh_classifier(source: str, config: PreTrainedConfig) -> PreTrainedModel:
    try:
        return AutoModelForImageClassification.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {source!r} cannot be opened: {one_line(error)}") from error


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Hides the warnings that a new head must be fine-tuned, because it will be."""
    loggers = [logging.getLogger(name) for name in ("transformers", "ijepa_transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _freeze_encoder(model: PreTrainedModel) -> None:
    """Excludes the encoder from training: no gradient, no dropout, no stochastic depth.

    Raises:
        ValueError: if the model has no encoder that is separate from its head.
    """
    encoder = model.base_model
    require(encoder is not model, f"{type(model).__name__} has no encoder apart from its head: tune cannot be 'head'.")
    encoder.requires_grad_(False)
    # Before each forward pass, because Trainer sets the whole model to training mode before each step.
    encoder.register_forward_pre_hook(lambda module, inputs: module.eval() and None)
