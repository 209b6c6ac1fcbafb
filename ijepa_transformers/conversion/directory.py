# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Rewrites a directory that the script of Transformers converted: `ijepa convert --from_directory`.

`from_pretrained` and `save_pretrained` give the weights their current names and keep their values. This module adds an
image processor like that of the published training, and reports what else differs from it. Such directories hold the
context encoder, and so does the new one. The paper evaluates the target encoder, which only Meta's file holds.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCardData
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from ..arguments import require
from ..configuration_ijepa import IJepaConfig
from ..data.bit_depth import setting_of
from ..data.datasets import prepare_image
from ..data.notices import counted
from ..data.transforms import build_image_processor, default_image_statistics, normalize_pixel_values
from ..display import show, show_facts
from ..encoders import one_line, open_processor, opening
from ..files import read_json_object
from ..model_card import USAGE, in_code, in_markdown, in_quotes, inherited_license, write_card
from ..modeling_ijepa import IJepaForImageClassification, IJepaModel
from ..saved_weights import refuse_integer_weights
from .command_line import show_written, written_aside
from .meta_file import check_finite


PROCESSOR_FILE = "preprocessor_config.json"
MODEL_CLASSES: dict[str, type[IJepaModel | IJepaForImageClassification]] = {
    "IJepaModel": IJepaModel,
    "IJepaForImageClassification": IJepaForImageClassification,
}
PUBLISHED_EPSILON = 1e-6
REPLACEMENT = "then that of the published training is written"
CARD = """\
# {name}

One I-JEPA encoder ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)), rewritten from {source} by
[ijepa-transformers](https://pypi.org/project/ijepa-transformers/) without changing a weight. Copies converted with the
script of Transformers hold the *context* encoder; the paper evaluates the *target* encoder.

{findings}

{usage}
"""


def convert_directory(
    source: str | os.PathLike,
    output: str | os.PathLike,
    keep_image_processor: bool = False,
    layer_norm_eps: float | None = None,
) -> None:
    """Rewrites the directory `source` as `output`, and prints what differs from the published training.

    Args:
        source: directory of a stock encoder or classifier, with early or current names of weights.
        output: directory to write. It must be empty or not exist.
        keep_image_processor: keeps the directory's image processor. For weights that were fine-tuned with it.
        layer_norm_eps: replaces the epsilon of the configuration.

    Raises:
        ValueError: if the directory is not a complete model, or if its image processor is kept and does not fit the
            model. Then nothing is written.
    """
    source, output = Path(source), Path(output)
    with written_aside(output) as directory:
        model, surplus = _load_model(source)
        show_facts({"source": f"{source}, {type(model).__name__}", "output": output})
        check_finite(str(source), model.state_dict())
        findings = _convert_processor(source, directory, model.config, keep_image_processor)
        findings += _epsilon_faults(model.config, layer_norm_eps)
        findings += [f"The weights have {len(surplus)} surplus keys, left out: {surplus[0]!r}."] if surplus else []
        if layer_norm_eps is not None:
            model.config.layer_norm_eps = layer_norm_eps
        model.save_pretrained(directory)
        _write_readme(directory, output.absolute().name, source, findings)
    for finding in findings:
        show(finding)
    if inherited_license(str(source)) is None:
        show(f"{source} names no licence; converted weights of Meta's are under CC BY-NC 4.0.")
    show_written(output)


def _load_model(directory: Path) -> tuple[IJepaModel | IJepaForImageClassification, list[str]]:
    """The encoder or classifier in its own precision, and the keys of the weights that it does not use."""
    model_class = MODEL_CLASSES[_architecture(directory)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # Transformers prints a table of the problems that are errors below
    try:
        with opening(str(directory)):
            model, information = model_class.from_pretrained(
                directory, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
            )
            refuse_integer_weights(model, information, str(directory), stem="model")
    finally:
        logging.set_verbosity(verbosity)
    for key, found, needed in sorted(information["mismatched_keys"]):
        raise ValueError(f"{directory} has {key!r} of shape {tuple(found)}, expected {tuple(needed)}.")
    for key in sorted(information["missing_keys"]):  # from_pretrained fills a missing classifier with random weights
        raise ValueError(f"{directory} lacks the weights {key!r}.")
    return model, sorted(information["unexpected_keys"])


def _architecture(directory: Path) -> str:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json.")
    settings = read_json_object(directory / "config.json")
    if settings.get("model_type") != "ijepa":
        raise ValueError(f"{directory} holds a model of type {settings.get('model_type')!r}, not 'ijepa'.")
    names = settings.get("architectures") or ["IJepaModel"]
    name = str(names[0] if isinstance(names, list) else names)
    if name not in MODEL_CLASSES:
        raise ValueError(f"{directory} holds an {name}; only {' and '.join(MODEL_CLASSES)} can be rewritten.")
    return name


# The image processor


def _convert_processor(source: Path, directory: Path, config: IJepaConfig, keep: bool) -> list[str]:
    """Writes the image processor of `source`, or a right one, and tells how the one of `source` differs.

    Raises:
        ValueError: if it cannot be opened, or if it stays and does not fit the model.
    """
    size, num_channels = config.image_height_and_width, config.num_channels
    directory.mkdir(exist_ok=True)
    if not (source / PROCESSOR_FILE).is_file():
        if keep:
            return [f"There is no {PROCESSOR_FILE}, so none is written."]
        build_image_processor(size, num_channels).save_pretrained(directory)
        return [f"There is no {PROCESSOR_FILE}. Corrected."]
    read_json_object(source / PROCESSOR_FILE)  # names a damaged file
    processor = open_processor(str(source))
    faults = _processor_faults(processor)
    if faults and not keep:
        mean, std = (None, None) if _has_vit_statistics(processor) else _statistics(processor, num_channels)
        right = build_image_processor(size, num_channels, mean, std, sixteen_bit_max=setting_of(processor))
        _require_fit(right, source, config)
        right.save_pretrained(directory)
        return [*(f"{fault} Corrected." for fault in faults), *_other_statistics(right, num_channels)]
    _require_fit(processor, source, config)
    (directory / PROCESSOR_FILE).write_bytes((source / PROCESSOR_FILE).read_bytes())
    is_told = _has_vit_statistics(processor)
    return [*(f"{fault} Kept." for fault in faults), *([] if is_told else _other_statistics(processor, num_channels))]


def _processor_faults(processor: BaseImageProcessor) -> list[str]:
    """How an image processor differs from the published training, where the right one is known."""
    faults, settings = [], processor.to_dict()
    if _has_vit_statistics(processor):
        mean, std = (list(settings[name]) for name in ("image_mean", "image_std"))
        faults.append(
            f"The image processor normalises with mean {mean} and std {std}; the published weights were trained with"
            " ImageNet's mean and standard deviation."
        )
    size = {name: value for name, value in dict(settings.get("size") or {}).items() if value}
    if settings.get("do_resize", True) and set(size) == {"height", "width"} and not settings.get("do_center_crop"):
        faults.append(
            f"The image processor squashes images to {size}; the published evaluation resizes the shorter side and"
            " crops the centre."
        )
    return faults


def _has_vit_statistics(processor: BaseImageProcessor) -> bool:
    """Whether it normalises with 0.5, which is ViT's default."""
    values = (getattr(processor, "image_mean", None) or ()), (getattr(processor, "image_std", None) or ())
    return getattr(processor, "do_normalize", True) and all(set(each) == {0.5} for each in values)


def _statistics(processor: BaseImageProcessor, num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation with which it normalises: 0 and 1 if it does not."""
    normalises = getattr(processor, "do_normalize", True)
    mean, std = ((getattr(processor, name, None) if normalises else None) for name in ("image_mean", "image_std"))
    return list(mean or [0.0] * num_channels), list(std or [1.0] * num_channels)


def _other_statistics(processor: BaseImageProcessor, num_channels: int) -> list[str]:
    """A sentence if mean and standard deviation are not ImageNet's. Weights of another training need them."""
    mean, std = _statistics(processor, num_channels)
    if num_channels not in (1, 3) or (mean, std) == default_image_statistics(num_channels):
        return []
    return [
        f"The image processor normalises with mean {mean} and std {std}, not with ImageNet's mean and standard"
        " deviation. Kept."
    ]


def _require_fit(processor: BaseImageProcessor, source: Path, config: IJepaConfig) -> None:
    """Raises ValueError if images that went through the processor are not what the model takes."""
    what, advice = f"{source / PROCESSOR_FILE} does not fit the model", f"Correct it, or remove it: {REPLACEMENT}."
    num_channels = config.num_channels
    expected = (num_channels, *config.image_height_and_width)
    mean, std = _statistics(processor, num_channels)
    for value in (0, 255):
        blank = np.full((256, 320, num_channels), value, dtype=np.uint8)
        try:
            wanted = normalize_pixel_values(torch.from_numpy(blank[:1, :1]).permute(2, 0, 1), mean, std)
            pixels = prepare_image(processor, blank)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"{what}: {one_line(error)}. {advice}") from None
        require(
            tuple(pixels.shape) == expected,
            f"{what}: it makes images of {_as_size(pixels.shape)}, and the model takes {_as_size(expected)}. {advice}",
        )
        require(
            torch.allclose(pixels, wanted.expand_as(pixels), atol=1e-4),
            f"{what}: it does not just resize, crop, divide by 255 and normalise. {advice}",
        )


def _as_size(shape: Sequence[int]) -> str:
    num_channels, height, width = shape
    return f"{height} x {width} pixels and {counted(num_channels, 'channel')}"


def _epsilon_faults(config: IJepaConfig, replacement: float | None) -> list[str]:
    if config.layer_norm_eps == PUBLISHED_EPSILON:
        return []
    fault = f"layer_norm_eps is {config.layer_norm_eps}; the published weights were trained with {PUBLISHED_EPSILON}."
    if replacement is None:
        return [f"{fault} Kept (--layer_norm_eps {PUBLISHED_EPSILON} corrects it)."]
    return [f"{fault} Now it is {replacement}."]


def _write_readme(directory: Path, name: str, source: Path, findings: list[str]) -> None:
    """Writes the source's card with the findings. If the source has no card, writes one without a licence."""
    found = "\n".join(f"- {in_markdown(finding)}" for finding in findings)
    if (source / "README.md").is_file():
        as_it_is = {"encoding": "utf-8", "errors": "surrogateescape"}  # also bytes that are no Unicode
        text = (source / "README.md").read_text(**as_it_is).rstrip()
        text += f"\n\n## Rewritten by ijepa-transformers\n\n{found or 'Only names changed.'}\n"
        (directory / "README.md").write_text(text, **as_it_is)
        return
    data = ModelCardData(library_name="transformers", pipeline_tag="image-feature-extraction", tags=["ijepa"])
    usage = USAGE.format(name=in_quotes(name))
    write_card(
        directory,
        data,
        CARD.format(name=in_markdown(name), source=in_code(source.name), findings=found, usage=usage),
    )
