# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A run that is resumed after its end: nothing is left to do, and neither data nor model are opened.

This module imports nothing heavy, so that the command can say so at once.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import verdict
from ..data.splits import AUTO as ANY_SPLIT
from ..data.splits import OR
from ..display import show, show_end, show_section
from ..files import read_json_object, read_rows
from ..launcher import is_first_process
from ..mask_arguments import without_removed_keys
from .arguments import AUTO, UncheckedArguments, parse_unchecked_arguments
from .defaults import with_mask_mode
from .next_commands import next_commands


STATUS_FILE, STATE_FILE = "run_status.json", "run_state.json"
# What changes the end of a run without changing how it trains, and where its images are. If one is new, the run is
# opened, and its end is done again.
_OF_THE_END = ("data", "validation_data", "knn_neighbors", "max_probe_images", "push_to_hub", "hub_model_id")
_MODEL = ("model*.safetensors", "pytorch_model*.bin")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has all its steps and its end. `validation_split` is what it was judged on; None if it was not."""

    output_dir: Path
    steps: int
    validation_split: str | None


def finished_run(arguments: UncheckedArguments) -> FinishedRun | None:
    """The run to resume, if nothing is left to do.

    None if something is left, if the arguments are not those of the run, or if the files do not tell. Then the run is
    opened as usual, and says what is wrong. The weights of the checkpoint are not read, because nothing continues
    from them.
    """
    output_dir = Path(arguments.output_dir)
    checkpoints = sorted(output_dir.glob("checkpoints/step-*"))
    if not arguments.resume or arguments.print_memory_estimate or not checkpoints:
        return None
    try:
        return _finished_run(arguments, output_dir, checkpoints[-1])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _finished_run(arguments: UncheckedArguments, output_dir: Path, checkpoint: Path) -> FinishedRun | None:
    """As `finished_run`. Raises OSError, ValueError, KeyError or TypeError if a file does not hold what it should."""
    state = read_json_object(checkpoint / STATE_FILE)
    before = without_removed_keys(state["arguments"], str(checkpoint))
    if set(before) - {entry.name for entry in dataclasses.fields(arguments)}:
        return None
    step, asked = int(checkpoint.name.removeprefix("step-")), _without_auto(arguments, before)
    is_finished = (
        read_json_object(output_dir / STATUS_FILE)["status"] == "finished"
        and any(path for pattern in _MODEL for path in output_dir.glob(pattern))
        and not asked.differences(before)
        and step == asked.total_steps(state["num_images"] // asked.batch_size)
        and _has_same_end(asked, before)
    )
    return FinishedRun(output_dir, step, before.get("validation_split")) if is_finished else None


def _without_auto(arguments: UncheckedArguments, before: Mapping[str, Any]) -> UncheckedArguments:
    """The arguments with the values that `auto` had in the run."""
    if arguments.per_device_batch_size == AUTO:
        arguments = dataclasses.replace(arguments, per_device_batch_size=before["per_device_batch_size"])
    return with_mask_mode(arguments, before["mask_mode"]) if arguments.mask_mode == AUTO else arguments


def _has_same_end(arguments: UncheckedArguments, before: Mapping[str, Any]) -> bool:
    asked, split = arguments.validation_split, before.get("validation_split")
    is_same_split = asked == split or (asked is not None and (asked == ANY_SPLIT or OR in asked))
    return is_same_split and all(getattr(arguments, name) == before.get(name) for name in _OF_THE_END)


def told_as_finished(argv: Sequence[str]) -> bool:
    """Whether a command line resumes a run that is finished. If so, this is printed.

    Exits as `parse_arguments` does.
    """
    arguments = parse_unchecked_arguments(argv)
    finished = finished_run(arguments)
    if finished and is_first_process():
        show_finished(arguments, finished)
    return finished is not None


def show_finished(arguments: UncheckedArguments, finished: FinishedRun) -> None:
    """Prints that nothing is left to do, the verdict, and commands to go on with."""
    output_dir = finished.output_dir
    show(
        f"The run in {output_dir} is finished: all {finished.steps:,} steps are done. For a longer one, choose another"
        " output_dir."
    )
    if found := saved_verdict(output_dir):
        show_section("Verdict", verdict.text_of(found.get("sentences", []), found.get("advice", [])))
    arguments = dataclasses.replace(arguments, validation_split=finished.validation_split)
    show_end({"model": output_dir}, next_commands(arguments))


def last_metrics(output_dir: Path) -> dict[str, Any]:
    """The last row of metrics.jsonl; empty if there is none."""
    rows, _ = read_rows(output_dir / "metrics.jsonl", lambda row: "step" in row)
    return rows[-1] if rows else {}


def saved_verdict(output_dir: Path) -> dict[str, Any] | None:
    """The content of verdict.json; None if it cannot be read."""
    try:
        return json.loads((output_dir / verdict.FILE_NAME).read_text())
    except (OSError, ValueError):
        return None
