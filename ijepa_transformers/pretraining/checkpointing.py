# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes and finds checkpoints that are complete or not there, and locks the directory of a run.

A checkpoint is a directory `checkpoints/step-00001000`. It holds whatever `Accelerator.save_state` writes, a
configuration and a manifest with the size and the SHA-256 of every file, which is written last. The directory is
written under another name and renamed when every process is done. So a run that is killed at any moment leaves only
whole checkpoints behind. If a disk or a transfer damages one later, this is noticed before anything of it is loaded.

The directory must be on a file system that all processes share.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from ..checkpoints import (
    FileEntry,
    cannot_write,
    damage_of,
    describe_files,
    newest_whole_checkpoint,
    remove_checkpoint,
    write_manifest,
)
from ..distributed import on_main_process
from ..files import disk_errors, disk_errors_of, files_below, sync_to_disk
from ..locks import OutputLock


LOCK_FILE = ".lock"
LOCK_PATIENCE = 30.0  # seconds to wait for the last process of the previous run to end
# Error numbers of file systems without locks. There the run continues without a lock.
WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class DirectoryLock:
    """Keeps a second run out of a directory, from `take` until the process ends in any way.

    As a context manager it is released when the block ends. The system releases the lock when a process dies,
    so the file that a killed process leaves does no harm. On a network file system the lock holds on all machines if
    the server supports `flock`. The directory itself is locked too, as the other commands lock theirs.
    """

    def __init__(self, directory: Path):
        self.path = directory / LOCK_FILE
        self.is_taken = False
        self._lock = FileLock(self.path)
        self._directory_lock = OutputLock(directory)

    def take_if_there(self) -> None:
        """Takes the lock if the directory exists. Without a directory there is no other run in it."""
        if self.path.parent.exists():
            self.take()

    def take(self) -> None:
        """Takes the lock if it is not taken already. The directory must exist.

        Raises:
            ValueError: if another run or another command still holds it after LOCK_PATIENCE or PATIENCE seconds.
            OSError: if the lock file cannot be written.
        """
        if self.is_taken:
            return
        if self.path.exists():  # then the message can name the other run
            self._take_file()
        self._directory_lock.take_if_there()
        self._take_file()
        with disk_errors_of(self.path):
            self.path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        self.is_taken = True

    def _take_file(self) -> None:
        if self._lock.is_locked:
            return
        try:
            self._lock.acquire(timeout=LOCK_PATIENCE, poll_interval=0.5)
        except Timeout:
            holder = self.path.read_text().strip()
            name = f" ({holder})" if holder else ""  # old versions of filelock empty the file while they wait
            raise ValueError(f"Another run{name} is writing to {self.path.parent}.") from None
        except NotImplementedError:  # filelock 3 raises this for ENOSYS
            pass
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self._directory_lock.release()
        self._lock.release()
        self.is_taken = False


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimizer steps that were done when this checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator, directory: Path, step: int, write_extra: Callable[[Path], None], keep: int
) -> Path:
    """Saves the state of every prepared object after `step` optimizer steps, then removes all but the newest `keep`.

    Args:
        directory: the `checkpoints` directory of the run.
        write_extra: called on every process with the directory. It may add files.

    Returns:
        the directory `step-...`.

    Raises:
        CheckpointError: if this process or the main process cannot write its part. The older checkpoints stay. A
            process that fails alone must end at once, because the others may wait for it inside a library.
    """
    unfinished, finished = directory / f".tmp-{step}", directory / f"step-{step:08d}"
    try:
        on_main_process(accelerator, lambda: _make_empty(unfinished))
        with disk_errors():
            accelerator.save_state(str(unfinished))
            write_extra(unfinished)
        accelerator.wait_for_everyone()
        parts = gather_object([_describe_share(accelerator, unfinished)])
        files = {name: entry for part in parts for name, entry in part.items()}
        on_main_process(accelerator, lambda: _finish(unfinished, finished, files))
    except OSError as error:
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        left = max(_checkpoints_in(directory), default=None)
        raise cannot_write(step, directory, error, left) from error
    if accelerator.is_main_process:
        _prune(finished, keep)
    return finished


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _describe_share(accelerator: Accelerator, directory: Path) -> dict[str, FileEntry]:
    """Every process hashes its share of the files, because for a large model it takes as long as writing them."""
    # A process sees its own files. On a network file system it may not see those of the others for a while.
    mine = [str(file.relative_to(directory)) for file in files_below(directory)]
    names = sorted(set(gather_object(mine)))[accelerator.process_index :: accelerator.num_processes]
    for name in names:
        sync_to_disk(directory / name)
    return describe_files(directory, names)


def _finish(unfinished: Path, finished: Path, files: dict[str, FileEntry]) -> None:
    hidden = [name for name in files if not (unfinished / name).is_file()]
    if hidden:
        raise OSError(f"{hidden[0]} of another process is not visible here: all processes must share the file system")
    write_manifest(unfinished, checkpoint_step(finished), files)
    if finished.exists():  # it is damaged, otherwise the run would have resumed from it
        remove_checkpoint(finished)
    os.replace(unfinished, finished)
    sync_to_disk(finished.parent)


def _prune(newest: Path, keep: int) -> None:
    """Keeps the newest `keep` up to this one. Later ones are damaged: the run has not resumed from them."""
    checkpoints = _checkpoints_in(newest.parent)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint <= newest][-keep:]
    for checkpoint in set(checkpoints) - set(kept):
        with suppress(OSError):  # a checkpoint too many costs space, but not the run
            remove_checkpoint(checkpoint)
    for leftover in newest.parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint. None if every file of its manifest is there, bit for bit."""
    return damage_of(checkpoint, checkpoint_step(checkpoint))


def newest_checkpoint(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `directory`, or None. Damaged ones are reported and skipped.

    Raises:
        ValueError: if there are checkpoints, but all are damaged. Then the user must decide whether to start again.
    """
    return newest_whole_checkpoint(directory, _checkpoints_in(directory), damage, report)


def _checkpoints_in(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
