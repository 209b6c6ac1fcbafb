# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Rewrites a directory that was converted with the script of Transformers as a directory of this package:

    python conversion/upgrade_hub_checkpoint.py --model ijepa_vith14_1k --output ijepa_vith14_context

Weights get their present names, whatever names they had, and keep their values. The image processor is corrected if it
is not what the published weights were trained with, and everything else that is amiss is said. The encoder stays what
it was: such copies hold the context encoder (the paper evaluates the target encoder, which only Meta's file holds).
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers.utils import logging

from ..configuration_ijepa import IJepaConfig
from ..data.transforms import build_image_processor
from ..model_card import USAGE, in_markdown, in_quotes, write_card
from ..modeling_ijepa import IJepaForImageClassification, IJepaModel
from .command_line import run, written_aside


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, a script sees only its own folder
PROCESSOR_FILE = "preprocessor_config.json"
MODEL_CLASSES = {"IJepaModel": IJepaModel, "IJepaForImageClassification": IJepaForImageClassification}
PUBLISHED_EPSILON = 1e-6
CARD = """\
# {name}

One I-JEPA encoder ([arXiv 2301.08243](https://arxiv.org/abs/2301.08243)), rewritten from `{source}` by
[ijepa-transformers](https://pypi.org/project/ijepa-transformers/) without changing a weight. Copies converted with the
script of Transformers hold the *context* encoder; the paper evaluates the *target* encoder.

{findings}

{usage}
"""


def processor_faults(directory: Path) -> list[str]:
    """What a directory's image processor does otherwise than the published training, a sentence each."""
    if not (directory / PROCESSOR_FILE).is_file():
        return [f"There is no {PROCESSOR_FILE}."]
    settings, faults = json.loads((directory / PROCESSOR_FILE).read_text()), []
    mean, std = settings.get("image_mean") or [0.5] * 3, settings.get("image_std") or [0.5] * 3  # ViT's defaults
    if set(mean) == set(std) == {0.5}:
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


def epsilon_fault(config: IJepaConfig, replacement: float | None) -> list[str]:
    """A sentence if layer norms run with another epsilon than the published training's."""
    if config.layer_norm_eps == PUBLISHED_EPSILON:
        return []
    fault = f"layer_norm_eps is {config.layer_norm_eps}; the published weights were trained with {PUBLISHED_EPSILON}."
    if replacement is None:
        return [f"{fault} Kept (--layer_norm_eps {PUBLISHED_EPSILON} corrects it)."]
    return [f"{fault} Now it is {replacement}."]


def load_model(directory: Path) -> tuple[IJepaModel | IJepaForImageClassification, list[str]]:
    """The directory's encoder or classifier, in its own precision, and the keys of the weights that it has no use for.

    Raises:
        ValueError: if the directory holds no model of those classes, or not all its weights.
    """
    model_class = MODEL_CLASSES[_architecture(directory)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what Transformers reports in a table is said here in a sentence
    try:
        model, information = model_class.from_pretrained(
            directory, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{directory} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    finally:
        logging.set_verbosity(verbosity)
    for key, found, needed in sorted(information["mismatched_keys"]):
        raise ValueError(f"{directory} has {key!r} of shape {tuple(found)}, expected {tuple(needed)}.")
    for key in sorted(information["missing_keys"]):  # from_pretrained draws a missing classifier afresh
        raise ValueError(f"{directory} lacks the weights {key!r}.")
    return model, sorted(information["unexpected_keys"])


def _architecture(directory: Path) -> str:
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json.")
    settings = json.loads((directory / "config.json").read_text())
    if settings.get("model_type") != "ijepa":
        raise ValueError(f"{directory} holds a model of type {settings.get('model_type')!r}, not 'ijepa'.")
    name = (settings.get("architectures") or ["IJepaModel"])[0]
    if name not in MODEL_CLASSES:
        raise ValueError(f"{directory} holds an {name}; only {' and '.join(MODEL_CLASSES)} need an upgrade.")
    return name


def write_readme(directory: Path, name: str, source: Path, findings: list[str]) -> None:
    """The source's card with what was found, or a card without licence if the source has none."""
    found = "\n".join(f"- {finding}" for finding in findings)
    if (source / "README.md").is_file():
        text = (source / "README.md").read_text().rstrip()
        text += f"\n\n## Rewritten by ijepa-transformers\n\n{found or 'Only names changed.'}\n"
        (directory / "README.md").write_text(text)
        return
    data = ModelCardData(library_name="transformers", pipeline_tag="image-feature-extraction", tags=["ijepa"])
    usage = USAGE.format(name=in_quotes(name))
    body = CARD.format(name=in_markdown(name), source=in_markdown(source.name), findings=found, usage=usage)
    write_card(directory, data, body)


def licence_of(directory: Path) -> str | None:
    """The licence that the directory's card names, or None."""
    card = directory / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def upgrade(
    model: str | os.PathLike,
    output: str | os.PathLike,
    keep_image_processor: bool = False,
    layer_norm_eps: float | None = None,
) -> None:
    """Rewrites the directory `model` as `output`; the arguments are those of the command line.

    Raises:
        ValueError: with one sentence, if the directory cannot be read whole; then nothing is left at `output`.
    """
    source, output = Path(model), Path(output)
    with written_aside(output) as directory:
        upgraded, left_out = load_model(source)
        faults = processor_faults(source)
        corrects = bool(faults) and not keep_image_processor
        findings = [f"{fault} {'Corrected' if corrects else 'Kept'}." for fault in faults]
        findings += epsilon_fault(upgraded.config, layer_norm_eps)
        findings += [f"The weights have {len(left_out)} surplus keys, left out: {left_out[0]!r}."] if left_out else []
        if layer_norm_eps is not None:
            upgraded.config.layer_norm_eps = layer_norm_eps
        upgraded.save_pretrained(directory)
        write_image_processor(directory, source, upgraded.config, corrects)
        write_readme(directory, output.name, source, findings)
    for finding in findings:
        print(finding)
    if licence_of(source) is None:
        print(f"{source} names no licence; converted weights of Meta's are under CC BY-NC 4.0.")
    print(f"wrote {output}")


def write_image_processor(directory: Path, source: Path, config: IJepaConfig, corrects: bool) -> None:
    if corrects:
        build_image_processor(config.image_height_and_width, config.num_channels).save_pretrained(directory)
    elif (source / PROCESSOR_FILE).is_file():
        shutil.copyfile(source / PROCESSOR_FILE, directory / PROCESSOR_FILE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory with the weights of the stock classes")
    parser.add_argument("--output", required=True, help="directory to write; must not exist or be empty")
    parser.add_argument(
        "--keep_image_processor",
        action="store_true",
        help="for weights that were fine-tuned with the image processor that they came with",
    )
    parser.add_argument("--layer_norm_eps", type=float, help="write this epsilon instead of the directory's")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    run(upgrade, build_parser(), argv)
