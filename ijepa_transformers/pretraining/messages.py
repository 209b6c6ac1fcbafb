# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a pretraining run prints before the first step, with a row of metrics, and at its end."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..data.notices import counted
from ..display import show, show_end, show_facts, show_section
from ..execution import choice_on_cpu
from ..process import SYSTEM_ALLOCATOR, keeps_freed_memory
from .build import Run, short_computation, summarize
from .next_commands import next_commands


# The settings that a run prints unless all are asked for.
_HEAD = ("data", "length", "batch", "encoder", "computation")
_MOST_BAD_IMAGES = 3  # are printed by name with a row of metrics


def show_head(run: Run) -> None:
    """Prints what is trained, how long, where it is written, and what was decided for it. Main process only."""
    facts = summarize(run)
    if not run.arguments.verbose:
        facts = {name: facts[name] for name in _HEAD} | {"computation": short_computation(run)}
    show_facts({**facts, "output": run.output_dir})
    for note in [*_speed(run), *run.notes]:
        show(note)


def _speed(run: Run) -> list[str]:
    """What was set to make the run faster, in a line, if anything was."""
    sentences = []
    if run.accelerator.device.type == "cpu":
        attention = "" if run.arguments.attn_implementation else run.networks.config._attn_implementation
        chosen = choice_on_cpu(run.launch.precision, attention)
        sentences += [f"For speed: {chosen}."] if chosen else []
    if run.num_threads < torch.get_num_threads():
        number = torch.get_num_threads()
        sentences.append(f"One thread computes a step; OMP_NUM_THREADS={number} in the environment sets {number}.")
    if keeps_freed_memory():
        sentences.append(f"Freed memory is kept; {SYSTEM_ALLOCATOR} in the environment turns this off.")
    return [" ".join(sentences)] if sentences else []


def show_bad_images(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Prints which images could not be read.

    Args:
        records: rows of bad_images.jsonl.
        path: of that file.
    """
    for record in records[:_MOST_BAD_IMAGES]:
        show(f"bad image {record['name']}: {record['reason']}")
    more = len(records) - _MOST_BAD_IMAGES
    if more > 0:
        show(f"{counted(more, 'more image')} could not be read; {path} lists them")


def show_results(run: Run) -> None:
    """Prints the verdict, the table, where things are, and commands to go on with. Main process only."""
    if run.verdict:
        show_section("Verdict", run.verdict.as_text())
    if run.results:
        show_section(f"Accuracy on the {run.arguments.validation_split!r} split, frozen features:", run.results)
    places: dict[str, Any] = {
        "model": run.output_dir,
        "curves": run.output_dir / "curves.png",
        "metrics": run.output_dir / "metrics.jsonl",
    }
    if run.data.log.indices:
        count = counted(len(run.data.log.indices), "image")
        places["bad images"] = f"{count} could not be read: {run.data.log.path}"
    show_end(places, next_commands(run.arguments))
