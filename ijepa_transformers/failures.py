# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""How a command ends that fails: with one sentence, with a status that is not 0, and without its child processes."""

import errno
import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch

from .launcher import INTERRUPTED, leave_sentence, said_by_the_first
from .url_secrets import without_secrets


# Exit codes.
FAILED = 1
REFUSED = 2  # the arguments cannot work, and nothing was written; argparse exits with this code too
_SHARED_MEMORY = ("shared memory", "Bus error", "</torch_")
_FILE_DESCRIPTORS = ("Too many open files", "items of ancdata")


class DivergedError(ValueError):
    """A loss, gradients, weights or features are not finite, so the encoder is useless."""


def explain(error: BaseException, workers: str = "num_workers") -> str | None:
    """One sentence for the user. None if the error may be a fault of this program.

    Args:
        workers: the argument that sets how many processes load data.
    """
    text = cause_of(error)
    if _is_about_shared_memory(error, text):
        return (
            f"there is too little shared memory (/dev/shm) for {workers} ({_first_line(text)}). Give a container more"
            f" with --shm-size 8g (docker run), or lower {workers}; {workers} 0 needs none."
        )
    if any(sign in text for sign in _FILE_DESCRIPTORS) or getattr(error, "errno", None) == errno.EMFILE:
        return (
            f"too many files are open at once ({_first_line(text)}). Raise the limit with ulimit -n 4096, or lower"
            f" {workers}."
        )
    if "DataLoader worker" in text:
        return (
            f"{_first_line(text)} Often the machine is out of memory, /dev/shm is too small (docker run"
            f" --shm-size 8g), or ulimit -n is too low: lower {workers}."
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return f"out of memory ({_first_line(text) or 'no details'})."
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}." if error.filename and error.strerror else text
    return " ".join(text.split()) if isinstance(error, ValueError) else None


def cause_of(error: BaseException) -> str:
    """The message of an error, without the traceback that stands before it if it comes from a data loading process."""
    text = str(error)
    return text.rstrip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else ""


def _is_about_shared_memory(error: BaseException, text: str) -> bool:
    """Also an OSError without a file name, if `multiprocessing` raised it: its locks lie in /dev/shm."""
    if any(sign in text for sign in _SHARED_MEMORY) and "Too many open files" not in text:
        return True
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.ENOENT, errno.EACCES, errno.ENOSYS):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    return error.filename is None and any("multiprocessing" in frame.filename for frame in frames[-2:])


def end_workers(others: Collection[BaseProcess] = ()) -> None:
    """Kills the data loading processes that are left. One that waits for a slow disk would keep its parent waiting.

    Args:
        others: children of this process that stay, because the run did not start them.
    """
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report a failed worker
    children = [child for child in multiprocessing.active_children() if child not in others]
    for child in children:
        child.kill()
    for child in children:
        child.join()
    signal.signal(signal.SIGCHLD, before)


def end(program: str, error: BaseException, sentence: str | None, status: int) -> NoReturn:
    """Ends the process with one sentence, or with the traceback of an unexpected error."""
    told = without_secrets(f"{program}: error: {sentence or f'{type(error).__name__}: {error}'}")
    leave_sentence(told)
    if not said_by_the_first(told):
        if sentence is None:
            print(without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        else:
            print(told, file=sys.stderr)
    sys.stderr.flush()
    end_workers()  # a normal exit would wait for those that ignore signals
    _forget(error)
    if torch.distributed.is_initialized():
        os._exit(status)  # a normal exit would wait for the other processes, and they may wait for this one
    sys.exit(status)


def _forget(error: BaseException) -> None:
    """Deletes what the failed functions held, quietly: a data loader that was half built complains when it goes."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
        gc.collect()
    finally:
        sys.unraisablehook = hook


@contextmanager
def failures_told(program: str, status: int, workers: str = "num_workers") -> Iterator[None]:
    """Ends the process as a command if the block fails: with one sentence and this status."""
    try:
        yield
    except KeyboardInterrupt as error:
        end(program, error, "interrupted.", INTERRUPTED)
    except Exception as error:
        end(program, error, explain(error, workers), status)
