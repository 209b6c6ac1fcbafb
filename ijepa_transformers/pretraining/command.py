# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""`ijepa pretrain`: pretrains I-JEPA on any images, from start to end."""

import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from ..data.decoding import BadImageError
from ..distributed import any_process, end_process_group, on_main_process
from ..files import write_text
from .arguments import PROGRAM, parse_pretraining_arguments
from .batch_size import memory_estimate
from .build import DivergenceError, Run, build_run, effective_values
from .checkpointing import CheckpointError, DirectoryLock
from .evaluate import random_encoder, tabulate, whole_encoders
from .loop import divergence, train
from .preemption import Preempted, StopRequest, end_workers
from .saving import export, push_to_hub, resume


# Exit codes: 0 finished, 1 failed, 2 wrong arguments or settings (nothing was written), and
PREEMPTED = 75  # stopped by a signal, saved, to be continued with --resume (sysexits.h: try again later)


def claim(run: Run, lock: DirectoryLock) -> None:
    """Takes the directory, if it was not there before, and makes sure that no other run has come in between."""
    if not lock.is_taken:
        lock.take()
        if (run.output_dir / "metrics.jsonl").exists():
            raise ValueError(f"Another run has just begun in {run.output_dir}: choose another output_dir.")


def start(run: Run, lock: DirectoryLock) -> None:
    """Prints the effective values, then loads the checkpoint or measures the random encoder."""
    run.output_dir.mkdir(parents=True, exist_ok=True)
    on_main_process(run.accelerator, lambda: claim(run, lock))
    say_status(run, "running", lock)
    for name, value in effective_values(run).items():
        run.accelerator.print(f"{name:12} {value}")
    run.accelerator.init_trackers(run.output_dir.name)
    if run.checkpoint:
        resume(run)
        run.accelerator.print(f"resuming {run.checkpoint} at step {run.first_step:,}")
    elif run.probe and run.accelerator.is_main_process:
        with suppress(Preempted):  # all processes ask below
            run.baseline = {"random_knn_accuracy": run.probe.knn(random_encoder(run))}
    if run.skipped_steps > run.arguments.max_skipped_steps:
        raise divergence(run)
    if any_process(run.accelerator, run.stop):
        raise Preempted


def finish(run: Run) -> None:
    """The table of accuracies, the last export, and the upload."""
    if run.probe:
        trained = whole_encoders(run, "ijepa", "context_encoder")
        run.results = tabulate(run, trained) if run.accelerator.is_main_process else None
        if any_process(run.accelerator, run.stop):
            raise Preempted
    export(run)
    if run.probe:
        run.accelerator.print(f"\nAccuracy on the {run.arguments.validation_split!r} split, frozen features:\n")
        run.accelerator.print(run.results)
    run.accelerator.print(f"\nmodel  {run.output_dir}\ncurves {run.output_dir / 'curves.png'}")
    if run.arguments.push_to_hub and run.accelerator.is_main_process:
        push_to_hub(run)


def close(run: Run) -> None:
    end_workers()
    run.model = run.optimizer = None
    end_process_group(run.accelerator)


def sentence_for(error: Exception) -> str | None:
    """What to tell a user about an error that is none of this program; None for one that may be."""
    text = str(error)
    if text.startswith("Caught "):  # by a data loading process, which adds its traceback in front
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, (BadImageError, DivergenceError, CheckpointError)):
        return text
    if isinstance(error, OSError):
        return f"{text}. What was saved before is whole; when the cause is gone, --resume continues from it."
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory ({text.splitlines()[0] if text else 'no details'}). Lower per_device_batch_size"
            " (accumulation makes up for it) or set gradient_checkpointing; --print_memory_estimate shows the need."
        )
    if "DataLoader worker" in text:
        return f"{text} Often the machine is out of memory: lower num_workers, then --resume."
    if isinstance(error, torch.distributed.DistError) or "gloo" in text:
        return (
            f"another process of this run has ended ({text.splitlines()[0]}); --resume continues from what was saved."
        )
    return None


def fail(error: Exception, code: int) -> None:
    """Ends the process with one sentence, or with the traceback of an error that nobody expected."""
    sentence = sentence_for(error) if code == 1 else str(error)
    if sentence is None:
        traceback.print_exception(error)
    else:
        print(f"{PROGRAM}: error: {sentence}", file=sys.stderr)
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        os._exit(code)  # the other processes may be waiting, and would be waited for
    sys.exit(code)


def say_status(run: Run, status: str, lock: DirectoryLock) -> None:
    """run_status.json, for job scripts: launchers have exit codes of their own."""
    if run.accelerator.is_main_process and lock.is_taken:
        with suppress(OSError):  # on a full disk the reason for stopping is what the user has to read
            write_text(run.output_dir / "run_status.json", json.dumps({"status": status}) + "\n")


def main(argv: list[str] | None = None) -> None:
    disable_progress_bar()  # of Transformers' loading and saving, which takes no time beside training
    arguments = parse_pretraining_arguments(argv)
    if arguments.print_memory_estimate:
        try:
            if os.environ.get("RANK", "0") == "0":
                print(memory_estimate(arguments))
        except (ValueError, OSError) as error:
            fail(error, 2)
        return
    lock = DirectoryLock(Path(arguments.output_dir))
    with StopRequest(PREEMPTED) as stop, lock:
        try:
            run = build_run(arguments, lock, stop)
        except (ValueError, OSError) as error:
            fail(error, 2)  # the status argparse gives to wrong arguments
        except Exception as error:
            fail(error, 1)
        stop.exits = False  # from here on the loop stops, where everything can be saved
        try:
            start(run, lock)
            train(run)
            finish(run)
        except Preempted:
            say_status(run, "preempted", lock)
            run.accelerator.print(f"stopped ({stop.reason or 'another process was asked to'}); --resume continues.")
            close(run)
            sys.exit(PREEMPTED)
        except Exception as error:
            say_status(run, "failed", lock)
            fail(error, 1)
        say_status(run, "finished", lock)
        close(run)
