# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The files of JSON lines that a run appends to: metrics.jsonl, skipped_steps.jsonl and bad_images.jsonl.

A run that starts at step 0 begins them anew. A resumed run keeps the rows up to its checkpoint, each step once.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..distributed import on_main_process
from ..files import read_rows, write_rows
from .build import Run


METRICS, SKIPPED_STEPS = "metrics.jsonl", "skipped_steps.jsonl"
_TEXTS = {"reason"}  # all other metrics are numbers
_IN_EVERY_ROW = {"step", "loss", "learning_rate"}


def begin_records(run: Run) -> None:
    """Removes the rows that a run without a checkpoint left behind."""
    on_main_process(run.accelerator, lambda: _remove_records(run))


def _remove_records(run: Run) -> None:
    for name in (METRICS, SKIPPED_STEPS):
        (run.output_dir / name).unlink(missing_ok=True)
    run.data.log.tidy()


def continue_records(run: Run) -> None:
    """Reads the metrics up to the checkpoint into `run.metrics`, and drops later and damaged rows from all files."""
    run.metrics = _rows_until(run, METRICS, is_metrics_row)
    _rows_until(run, SKIPPED_STEPS, is_skipped_step)
    log = run.data.log
    _report_dropped(run, log.path, log.num_dropped)
    on_main_process(run.accelerator, log.tidy)


def write_metrics(run: Run) -> None:
    """Writes `run.metrics` anew."""
    on_main_process(run.accelerator, lambda: write_rows(run.output_dir / METRICS, run.metrics))


def _rows_until(run: Run, name: str, is_row: Callable[[Mapping[str, Any]], bool]) -> list[dict[str, Any]]:
    """The rows up to the checkpoint, each step once. The main process writes them back."""
    path = run.output_dir / name
    rows, num_dropped = on_main_process(run.accelerator, lambda: read_rows(path, is_row))
    _report_dropped(run, path, num_dropped)
    kept = {row["step"]: row for row in rows if row["step"] <= run.first_step}  # the last one of each step
    kept_rows = [kept[step] for step in sorted(kept)]
    if rows or num_dropped:
        on_main_process(run.accelerator, lambda: write_rows(path, kept_rows))
    return kept_rows


def _report_dropped(run: Run, path: Path, count: int) -> None:
    if count:
        rows = "row is" if count == 1 else "rows are"
        run.accelerator.print(f"{path}: {count:,} damaged {rows} dropped.")


def _has_step(row: Mapping[str, Any]) -> bool:
    return type(row.get("step")) is int and row["step"] > 0


def is_skipped_step(row: Mapping[str, Any]) -> bool:
    """Whether the row is one of skipped_steps.jsonl."""
    return _has_step(row) and isinstance(row.get("images"), list)


def is_metrics_row(row: Mapping[str, Any]) -> bool:
    """Whether the row is one of metrics.jsonl, of this or an earlier version."""
    are_numbers = all(name in _TEXTS or isinstance(value, int | float) for name, value in row.items())
    return _has_step(row) and are_numbers and row.keys() >= _IN_EVERY_ROW
