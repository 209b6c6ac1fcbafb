# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Experiment trackers such as TensorBoard. One that cannot start is refused; one that fails later costs its rows only.

The run writes all metrics to its own files too, so it goes on, and a sentence says which tracker gets no more rows.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker

from .display import show
from .distributed import any_process


_TENSORBOARD_THREAD = "_AsyncWriterThread"  # which writes TensorBoard's file
_errors_of_threads: list[BaseException] = []
_told: list[BaseException] = []  # errors


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Inside, the threads of TensorBoard print no tracebacks. Their errors are told by what calls TensorBoard."""
    before = threading.excepthook
    _errors_of_threads.clear()
    _told.clear()

    def remember(failure: threading.ExceptHookArgs) -> None:
        if type(failure.thread).__name__ != _TENSORBOARD_THREAD or failure.exc_value is None:
            before(failure)
        else:
            _errors_of_threads.append(failure.exc_value)

    threading.excepthook = remember
    try:
        yield
    finally:
        threading.excepthook = before


def reason_of(error: BaseException) -> str:
    """The message of an error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tell_of(name: str, error: BaseException) -> None:
    """Tells of an error, once: that of a thread comes again from the next call of TensorBoard."""
    if any(error is other for other in _told):
        return
    _told.append(error)
    show(
        f"WARNING: the tracker {name} failed ({reason_of(error)}), so it gets no more rows. The run goes on; its own"
        " files have all metrics."
    )


def cannot_start(argument: str, name: str, error: BaseException | None) -> ValueError:
    """The error for a tracker that does not start. `error` is that of this process, if it has one."""
    reason = reason_of(error) if error else "as the first process says"
    return ValueError(f"{argument}: {name} cannot start here ({reason}). Mend this, or leave the tracker out.")


# Of Accelerate
def start_trackers(accelerator: Accelerator, output_dir: Path, settings: dict[str, dict[str, Any]]) -> None:
    """Starts the trackers of a run. A collective call.

    Args:
        output_dir: of the run, whose name the run has in the trackers.
        settings: arguments of a tracker by its name.

    Raises:
        ValueError: on all processes, if one cannot start. What it has made in `output_dir` is removed.
    """
    before, failure = set(output_dir.iterdir()) if accelerator.is_main_process else set(), None
    try:
        accelerator.init_trackers(output_dir.name, init_kwargs=settings)
    except Exception as error:  # each tracker has errors of its own
        failure = error
    if any_process(accelerator, failure is not None):
        for path in set(output_dir.iterdir()) - before if accelerator.is_main_process else ():
            shutil.rmtree(path, ignore_errors=True)
        raise cannot_start("trackers", ", ".join(map(str, accelerator.log_with)), failure)


def log_to_trackers(accelerator: Accelerator, row: dict[str, Any], step: int) -> None:
    """Gives a row to all trackers. One that fails is told of and gets no more rows."""
    for tracker in list(accelerator.trackers):
        try:
            tracker.log(row, step=step)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            tell_of(tracker.name, error)


def finish_trackers(accelerator: Accelerator) -> None:
    """Ends all trackers, and tells of those that could not write what they had."""
    trackers: list[GeneralTracker] = accelerator.trackers
    accelerator.trackers = []
    for tracker in trackers:
        try:
            tracker.finish()
        except Exception as error:
            tell_of(tracker.name, error)
    tell_of_threads()


def tell_of_threads() -> None:
    """Tells of errors of TensorBoard's threads that no call has raised again."""
    for error in _errors_of_threads:
        tell_of("tensorboard", error)
