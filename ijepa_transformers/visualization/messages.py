# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What `ijepa visualize` prints: a head, and an end with the verdict."""

import os
from pathlib import Path

from ..data.notices import counted
from ..display import command, command_again, data_flags, show_facts, show_section
from ..display import show_end as show_common_end
from .arguments import VisualizationArguments
from .beliefs import decoder_path
from .study import Study


def show_head(study: Study) -> None:
    """Prints what is shown, and where the page will be."""
    arguments, networks = study.arguments, study.networks
    encoder = f", {arguments.encoder} encoder" if networks.pretraining is not None else ""
    bad = f", {study.pool.num_bad:,} could not be read" if study.pool.num_bad else ""
    show_facts(
        {
            "model": f"{arguments.model}{encoder}",
            "data": f"{arguments.data}, split {arguments.split!r}: {counted(len(study.pool.images), 'image')}{bad}",
            "computation": networks.encoder.device.type,
            "output": arguments.output,
        }
    )


def show_end(study: Study, verdict: str, num_bytes: int) -> None:
    """Prints the verdict of the page, where things are, and commands to go on with."""
    arguments = study.arguments
    show_section("Verdict", verdict)
    places = {"page": f"{arguments.output} ({num_bytes / 1e6:.1f} MB)"}
    if arguments.pictures_dir:
        places["pictures"] = arguments.pictures_dir
    if arguments.decoder:
        places["decoder"] = str(decoder_path(arguments))
    show_common_end(places, next_commands(arguments, study.networks.pretraining is not None))


def next_commands(arguments: VisualizationArguments, has_predictor: bool) -> list[str]:
    """Commands for the same model and images."""
    is_here = os.path.exists(arguments.model)
    model = str(Path(arguments.model)) if is_here else arguments.model
    output_dir = f"{model if is_here else arguments.own_name}_features"
    encoder = None if arguments.encoder == "target" else arguments.encoder
    source = {"model": model, "encoder": encoder, **data_flags(arguments), "split": arguments.split}
    source["sixteen_bit_max"] = arguments.sixteen_bit_max
    decoder = command_again("visualize", arguments, decoder=True)
    return [
        *([decoder] if has_predictor and not arguments.decoder else []),
        command("search", **source, duplicates=True, outliers=True),
        command("extract", **source, output_dir=output_dir),
    ]
