# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Rewrites a directory that the script of Transformers converted: `ijepa convert --from_directory`.

`from_pretrained` and `save_pretrained` give the weights their current names and keep their values. This module adds an
image processor like that of the published training, and reports what else differs from it. Such directories hold the
context encoder, and so does the new one. The paper evaluates the target encoder, which only Meta's file holds.
"""

import os
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData
from transformers.utils import logging

from ..configuration_ijepa import IJepaConfig
from ..data.transforms import build_image_processor
from ..encoders import opening
from ..files import read_json_object
from ..model_card import USAGE, in_code, in_markdown, in_quotes, inherited_license, write_card
from ..modeling_ijepa import IJepaForImageClassification, IJepaModel
from .command_line import written_aside
from .meta_file import check_finite


PROCESSOR_FILE = "preprocessor_config.json"
MODEL_CLASSES: dict[str, type[IJepaModel | IJepaForImageClassification]] = {
    "IJepaModel": IJepaModel,
    "IJepaForImageClassification": IJepaForImageClassification,
}
PUBLISHED_EPSILON = 1e-6
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
        ValueError: if the directory is not a complete model. Then nothing is written.
    """
    source, output = Path(source), Path(output)
    with written_aside(output) as directory:
        model, surplus = _load_model(source)
        check_finite(str(source), model.state_dict())
        faults = _processor_faults(source)
        is_replaced = bool(faults) and not keep_image_processor
        findings = [f"{fault} {'Corrected' if is_replaced else 'Kept'}." for fault in faults]
        findings += _epsilon_faults(model.config, layer_norm_eps)
        findings += [f"The weights have {len(surplus)} surplus keys, left out: {surplus[0]!r}."] if surplus else []
        if layer_norm_eps is not None:
            model.config.layer_norm_eps = layer_norm_eps
        model.save_pretrained(directory)
        if is_replaced:
            processor = build_image_processor(model.config.image_height_and_width, model.config.num_channels)
            processor.save_pretrained(directory)
        elif (source / PROCESSOR_FILE).is_file():
            shutil.copyfile(source / PROCESSOR_FILE, directory / PROCESSOR_FILE)
        _write_readme(directory, output.absolute().name, source, findings)
    for finding in findings:
        print(finding)
    if inherited_license(str(source)) is None:
        print(f"{source} names no licence; converted weights of Meta's are under CC BY-NC 4.0.")
    print(f"wrote {output}")


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


def _processor_faults(directory: Path) -> list[str]:
    """How a directory's image processor differs from the published training, one sentence for each difference."""
    if not (directory / PROCESSOR_FILE).is_file():
        return [f"There is no {PROCESSOR_FILE}."]
    settings, faults = read_json_object(directory / PROCESSOR_FILE), []
    mean, std = (settings.get(name) or 0.5 for name in ("image_mean", "image_std"))  # 0.5 is ViT's default
    if all(set(each if isinstance(each, list) else [each]) == {0.5} for each in (mean, std)):
        faults.append(
            f"The image processor normalises with mean {mean} and std {std}; the published weights were trained with"
            " ImageNet's mean and standard deviation."
        )
    size = settings.get("size")
    squashes = isinstance(size, int) or (isinstance(size, dict) and set(size) == {"height", "width"})
    if settings.get("do_resize", True) and squashes and not settings.get("do_center_crop"):
        faults.append(
            f"The image processor squashes images to {size}; the published evaluation resizes the shorter side and"
            " crops the centre."
        )
    return faults


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
