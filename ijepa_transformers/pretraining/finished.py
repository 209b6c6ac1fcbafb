# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""A run that is resumed after its end: nothing is left to do, and neither data nor model are opened."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .. import verdict
from ..data.splits import AUTO, OR
from ..files import read_rows
from ..modeling_ijepa import weight_files
from .arguments import PretrainingArguments
from .checkpointing import checkpoint_step
from .state import read_state


STATUS_FILE = "run_status.json"
# What changes the end of a run without changing how it trains, and where its images are. If one is new, the run is
# opened, and its end is done again.
_OF_THE_END = ("data", "validation_data", "knn_neighbors", "max_probe_images", "push_to_hub", "hub_model_id")


class AlreadyFinished(Exception):
    """The run to resume has all its steps and its end.

    Attributes:
        steps: how many it has.
        validation_split: what it was judged on; None if it was not.
        accelerator: of this process, to be closed.
    """

    def __init__(self, steps: int, validation_split: str | None, accelerator: Accelerator):
        super().__init__(f"all {steps:,} steps are done")
        self.steps, self.validation_split, self.accelerator = steps, validation_split, accelerator


def is_finished(arguments: PretrainingArguments, checkpoint: Path) -> bool:
    """Whether the run of a whole checkpoint has ended, and its model is there.

    Args:
        arguments: of the process that resumes it. They train as those of the run.
        checkpoint: the newest whole one.

    Raises:
        ValueError: as `read_state`.
    """
    output_dir, state = Path(arguments.output_dir), read_state(checkpoint)
    total_steps = arguments.total_steps(state["num_images"] // arguments.batch_size)
    return (
        checkpoint_step(checkpoint) == total_steps
        and status_of(output_dir) == "finished"
        and bool(weight_files(output_dir))
        and _has_same_end(arguments, state["arguments"])
    )


def _has_same_end(arguments: PretrainingArguments, before: dict[str, Any]) -> bool:
    asked, split = arguments.validation_split, before.get("validation_split")
    is_same_split = asked == split or (asked is not None and (asked == AUTO or OR in asked))
    return is_same_split and all(getattr(arguments, name) == before.get(name) for name in _OF_THE_END)


def status_of(output_dir: Path) -> str | None:
    """What run_status.json says; None if it says nothing."""
    try:
        return json.loads((output_dir / STATUS_FILE).read_text())["status"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


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
