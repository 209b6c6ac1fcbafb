# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa pretrain`: pretrains I-JEPA on any images, from start to end."""

import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from ..api import Result, process_as_before
from ..checkpoints import CheckpointError
from ..data.decoding import BadImageError
from ..display import as_typed
from ..distributed import any_process, end_process_group, on_main_process
from ..failures import FAILED, REFUSED, DivergedError, cause_of, end, end_workers
from ..failures import explain as explain_common
from ..files import write_text
from ..launcher import is_first_process
from ..preemption import PREEMPTED, Preempted, StopRequest
from ..trackers import finish_trackers, quiet_writers, start_trackers
from .arguments import PROGRAM, PretrainingArguments, parse_pretraining_arguments, pretraining_arguments
from .batch_size import memory_estimate
from .build import Run, build_run
from .checkpointing import DirectoryLock
from .evaluate import baseline, final_rows, measure_spreads
from .exporting import export
from .finished import STATUS_FILE, finished_run, last_metrics, saved_verdict, show_finished
from .judging import verdict_of
from .loop import divergence, train
from .messages import show_head, show_results
from .records import begin_records
from .sanity import warnings_for
from .saving import push_to_hub, resume


# Exit code, beside those of `failures`


class SettingsError(ValueError):
    """The run cannot start with these arguments. Nothing was written."""


@quiet_writers()
def run(arguments: PretrainingArguments) -> Result:
    """Pretrains from start to end. Call it in the main thread of every process, because it listens to signals.

    Raises:
        SettingsError: if the arguments cannot work with the data, the output directory or the launch mode.
        Preempted: if a signal stopped the run. What was trained is saved; `resume` continues it.
        DivergedError, BadImageError, CheckpointError, OSError: if the run fails. The last checkpoint stays.
    """
    if finished := finished_run(arguments):
        if is_first_process():
            show_finished(arguments, finished)
        output_dir = finished.output_dir
        return Result(output_dir, last_metrics(output_dir), verdict=saved_verdict(output_dir))
    others = multiprocessing.active_children()
    with StopRequest() as stop, DirectoryLock(Path(arguments.output_dir)) as lock:
        try:
            built = build_run(arguments, lock, stop)
        except (ValueError, OSError) as error:
            raise _as_settings_error(error) from error
        stop.raises_at_once = False  # from here on the loop stops, where everything can be saved
        try:
            claim(built)
            # TensorBoard hides what a killed run has logged after the checkpoint.
            tensorboard = {"purge_step": built.first_step + 1}
            start_trackers(built.accelerator, built.output_dir, {"tensorboard": tensorboard})
        except (ValueError, OSError) as error:
            raise _as_settings_error(error) from error
        with _recorded_status(built, others):
            start(built)
            train(built)
            finish(built)
        verdict = built.verdict.as_json() if built.verdict else None
        return Result(built.output_dir, built.metrics[-1] if built.metrics else {}, built.results, verdict)


def _as_settings_error(error: Exception) -> SettingsError:
    """With the file and the reason of an error of the disk, without its number."""
    sentence = explain_common(error) if isinstance(error, OSError) else None
    return SettingsError(sentence or str(error))


@contextmanager
def _recorded_status(run: Run, others: Collection[BaseProcess]) -> Iterator[None]:
    """Writes how the block ended, and closes the run unless it failed: then other processes may still wait."""
    try:
        yield
    except Preempted:
        _write_status(run, "preempted")
        reason = run.stop.reason or "another process was asked to"
        run.accelerator.print(f"stopped ({reason}); --resume continues.")
        close(run, others)
        raise
    except Exception:
        _write_status(run, "failed")
        raise
    _write_status(run, "finished")
    close(run, others)


def _write_status(run: Run, status: str) -> None:
    """Writes run_status.json for job scripts, because launchers have exit codes of their own."""
    if run.accelerator.is_main_process and run.lock.is_taken:
        with suppress(OSError):  # on a full disk, the user must read the first error, not this one
            write_text(run.output_dir / STATUS_FILE, json.dumps({"status": status}) + "\n")


def claim(run: Run) -> None:
    """Makes the directory of the run and locks it.

    Raises:
        ValueError: if another command has it, or had it since this one looked at the directory.
        OSError: if it cannot be made or written.
    """
    on_main_process(run.accelerator, lambda: _claim(run))


def _claim(run: Run) -> None:
    run.output_dir.mkdir(parents=True, exist_ok=True)
    if run.lock.is_taken:
        return
    run.lock.take()  # there was no directory when this run looked for a checkpoint
    if any(path != run.lock.path for path in run.output_dir.iterdir()):
        raise ValueError(
            f"Another command has just written to {run.output_dir}: choose another output_dir. If it was a run,"
            " --resume continues it."
        )


def start(run: Run) -> None:
    """Prints the head, then loads the checkpoint or measures the random encoder."""
    _write_status(run, "running")
    if run.accelerator.is_main_process:
        show_head(run)
    if not run.checkpoint:
        for warning in warnings_for(run.plan):
            run.accelerator.print(f"WARNING: {warning}")
    if not run.checkpoint:
        begin_records(run)
    if run.checkpoint:
        resume(run, run.checkpoint)
        run.accelerator.print(f"resuming {run.checkpoint} at step {run.first_step:,}")
    else:
        run.baseline = baseline(run)
    if run.skipped_steps > run.arguments.max_skipped_steps:
        raise divergence(run)
    if any_process(run.accelerator, bool(run.stop)):
        raise Preempted


def finish(run: Run) -> None:
    """Makes the table of accuracies, the verdict, the last export and the upload."""
    if run.probe:
        run.rows = final_rows(run, run.probe)
    measure_spreads(run)
    if any_process(run.accelerator, bool(run.stop)):
        raise Preempted
    if run.accelerator.is_main_process:
        run.verdict = verdict_of(run)
    export(run)
    run.checkpoints.wait()
    if run.accelerator.is_main_process:
        show_results(run)
    if run.arguments.push_to_hub and run.arguments.hub_model_id and run.accelerator.is_main_process:
        push_to_hub(run, run.arguments.hub_model_id)


def close(run: Run, others: Collection[BaseProcess] = ()) -> None:
    """Ends the data loading processes (not `others`) and the process group. The run cannot be used afterwards."""
    end_workers(others)
    finish_trackers(run.accelerator)
    del run.model, run.optimizer  # they hold the process group
    end_process_group(run.accelerator)


def explain(error: Exception) -> str | None:
    """One sentence for the user. None if the error may be a fault of this program."""
    text, sentence = cause_of(error), explain_common(error)
    if isinstance(error, (BadImageError, DivergedError, CheckpointError)):
        return text
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"{sentence} Lower per_device_batch_size (accumulation makes up for it) or set gradient_checkpointing;"
            " --print_memory_estimate shows the need."
        )
    if isinstance(error, torch.distributed.DistError) or "gloo" in text:
        return (
            f"another process of this run has ended ({text.splitlines()[0]}); --resume continues from what was saved."
        )
    if sentence is None or isinstance(error, ValueError):
        return None
    return f"{sentence.rstrip('.')}. What was saved before is complete; --resume continues from it."


def _print_memory_estimate(arguments: PretrainingArguments) -> None:
    if is_first_process():
        print(memory_estimate(arguments))


def _unused_gpus(argv: Sequence[str]) -> str:
    """How to use all GPUs, if there are several and no launcher; otherwise an empty string."""
    count = torch.cuda.device_count()
    is_launched = any(name == "WORLD_SIZE" or name.startswith("ACCELERATE_") for name in os.environ)
    if count < 2 or is_launched:
        return ""
    launcher = f"ijepa launch --multi_gpu --num_processes {count}"
    return f"{count} GPUs are visible, and one is used. To use all:\n{as_typed(f'{launcher} pretrain', argv)}\n"


def execute(arguments: PretrainingArguments, argv: Sequence[str]) -> None:
    """Runs the command with its parsed arguments; `argv` is what they were parsed from.

    Ends the process with one of the exit codes above unless all went well.
    """
    disable_progress_bar()  # the one that Transformers shows while it loads or saves a model
    if arguments.print_memory_estimate:
        try:
            return _print_memory_estimate(arguments)
        except (ValueError, OSError) as error:
            end(PROGRAM, error, str(error), REFUSED)
    print(_unused_gpus(argv), end="", file=sys.stderr)
    try:
        run(arguments)
    except Preempted:
        sys.exit(PREEMPTED)
    except SettingsError as error:
        end(PROGRAM, error, str(error), REFUSED)
    except Exception as error:
        end(PROGRAM, error, explain(error), FAILED)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    argv = sys.argv[1:] if argv is None else argv
    execute(parse_pretraining_arguments(argv), argv)


def pretrain(**keywords: Any) -> Result:
    """Pretrains I-JEPA: `ijepa pretrain` as a function. Call it in the main thread.

    Args:
        keywords: the flags of `ijepa pretrain --help` by name, and `recipe`.

    Returns:
        output_dir, the last row of metrics.jsonl, the verdict, and the table of accuracies if there is a
        validation_split (none if the run to resume was finished before). With `print_memory_estimate` the table is the
        estimate, and nothing is trained.

    Raises:
        TypeError: for an unknown keyword.
        ValueError: with one sentence, if an argument is wrong or training diverges.
        OSError: if a file cannot be read or written. The last checkpoint stays.
        Preempted: if a signal stopped the run. What was trained is saved; `resume` continues it.

    Example:

    ```python
    from ijepa_transformers import pretrain

    result = pretrain(recipe="quickstart", max_steps=50, output_dir="outputs/first")
    print(result.metrics["loss"])
    ```
    """
    if threading.current_thread() is not threading.main_thread():
        raise ValueError("pretrain must be called in the main thread, because it listens to signals.")
    arguments = pretraining_arguments(**keywords)
    with process_as_before():
        disable_progress_bar()
        if arguments.print_memory_estimate:
            return Result(Path(arguments.output_dir), table=memory_estimate(arguments))
        return run(arguments)
