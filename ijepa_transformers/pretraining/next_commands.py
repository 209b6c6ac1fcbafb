# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The commands that a pretraining run proposes at its end. They work as they are printed."""

from pathlib import Path

from ..display import command, data_flags, onnx_commands
from .arguments import UncheckedArguments


def next_commands(arguments: UncheckedArguments) -> list[str]:
    """Commands for the model of a run, with its paths: three, or one if the images can only be streamed."""
    model = str(Path(arguments.output_dir))
    if arguments.streaming and "://" in arguments.data:  # the other commands look images up
        found = [] if arguments.validation_split else onnx_commands(model, f"{model}/encoder.onnx")
    else:
        source = {**data_flags(arguments), "split": arguments.train_split}
        shown = {**source, "split": _split_to_show(arguments)}
        found = [
            command("visualize", model=model, **shown, output=f"{model}/report.html"),
            command("extract", model=model, **source, output_dir=f"{model}_features"),
        ]
        if not arguments.validation_split:
            found.append(command("search", **source, model=model, duplicates=True, outliers=True))
    return [*found, *_probe_commands(arguments, model)]


def _split_to_show(arguments: UncheckedArguments) -> str:
    """A split of the data that the model was not trained on, if the run knows one."""
    held_out = None if arguments.validation_data else arguments.validation_split
    return held_out or arguments.train_split


def _probe_commands(arguments: UncheckedArguments, model: str) -> list[str]:
    """The command that judges the model by labels; none without labels."""
    if not arguments.validation_split:
        return []
    labelled = {"data": arguments.validation_data} if arguments.validation_data else data_flags(arguments)
    splits = {"train_split": arguments.train_split, "validation_split": arguments.validation_split}
    return [command("probe", models=model, **labelled, **splits, output_dir=f"{model}_probes")]
