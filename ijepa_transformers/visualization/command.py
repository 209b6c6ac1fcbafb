# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa visualize`: one self-contained page that shows what a model learned."""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from pathlib import Path

import datasets
import torch
import transformers
from transformers.utils.logging import disable_progress_bar

from .. import __version__
from ..data.notices import counted
from ..display import as_typed
from ..failures import FAILED, REFUSED, failures_told
from ..files import check_output_directory, check_page, refuse_among_images, write_text
from ..locks import OutputLock, alone_with
from .arguments import PROGRAM, VisualizationArguments, parse_visualization_arguments
from .judging import cards, headline, judge_pool, measured_on, shown_verdict
from .messages import show_end, show_head
from .page import Section, build_page, refuse_other_pictures, write_pictures
from .sections import SECTIONS
from .study import Study, build_study


def _describe(study: Study, argv: Sequence[str]) -> dict[str, str]:
    """The folded table at the end of the page."""
    arguments, networks, config = study.arguments, study.networks, study.networks.config
    shown = f"the {arguments.encoder} encoder" if networks.pretraining is not None else "the only one it has"
    bad = f", {study.pool.num_bad:,} could not be read" if study.pool.num_bad else ""
    image_height, image_width = config.image_height_and_width
    shown_as = "" if config.num_channels in (1, 3) else " (pictures show their mean in grey)"
    predictor = "none in this directory"
    if networks.pretraining is not None:
        depth, width = config.predictor_num_hidden_layers, config.predictor_hidden_size
        predictor = f"{depth} layers of width {width}, {_count_parameters(networks.pretraining.predictor)}"
    return {
        "Model": f"{arguments.model} (saved from {networks.saved_from})",
        "Encoder shown": f"{shown}: {config.num_hidden_layers} layers of width {config.hidden_size} with"
        f" {config.num_attention_heads} heads, {_count_parameters(networks.encoder)}",
        "Predictor": predictor,
        "Images": f"{image_height} x {image_width} pixels, {counted(config.num_channels, 'channel')}{shown_as},"
        f" {config.grid_size[0]} x {config.grid_size[1]} patches"
        f" of {study.patch_size[0]} x {study.patch_size[1]} pixels",
        "Data": f"{arguments.data}, split {arguments.split}: {counted(len(study.pool.images), 'image')}{bad}",
        "Made on": f"{datetime.now(timezone.utc):%d %B %Y, %H:%M} UTC by ijepa-transformers {__version__}, torch"
        f" {torch.__version__}, transformers {transformers.__version__}",
        "Command": as_typed(PROGRAM, argv),
    }


def _count_parameters(model: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters"


def execute(arguments: VisualizationArguments, argv: Sequence[str]) -> None:
    """Carries out the command of the parsed arguments; `argv` is what they were parsed from. Exits as a command."""
    disable_progress_bar()  # of Transformers' loading
    datasets.disable_progress_bars()
    with failures_told(PROGRAM, REFUSED):
        output = check_page(arguments.output)
        pictures = OutputLock(Path(arguments.pictures_dir)) if arguments.pictures_dir else None
        if pictures:
            check_output_directory(pictures.directory, "pictures_dir")
            refuse_among_images(pictures.directory, arguments.data, "pictures_dir")
            pictures.take_if_there()
            refuse_other_pictures(pictures.directory)
    with failures_told(PROGRAM, REFUSED), alone_with(output), pictures or nullcontext():
        study = build_study(arguments)
        show_head(study)
        sections = [section(study) for section in SECTIONS]
        _write(study, sections, output, pictures, argv)


def _write(
    study: Study, sections: list[Section], output: Path, pictures: OutputLock | None, argv: Sequence[str]
) -> None:
    """Writes the page and the pictures. Exits as a command."""
    arguments = study.arguments
    with failures_told(PROGRAM, FAILED):
        on_these_images = judge_pool(study)
        verdict = shown_verdict(study, on_these_images)
        title, top = f"What {arguments.own_name!r} has learned", headline(verdict, on_these_images)
        page = build_page(title, top, cards(study, verdict, on_these_images), sections, _describe(study, argv))
        if pictures:
            pictures.claim()
            write_pictures(pictures.directory, sections)
        write_text(output, page)
    show_end(study, f"{top.headline}\n{measured_on(verdict, on_these_images)}", len(page))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    execute(parse_visualization_arguments(argv), argv)
