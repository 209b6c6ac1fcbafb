# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes and finds checkpoints that are complete or not there, and locks the directory of a run.

A checkpoint is a directory `checkpoints/step-00001000`. It holds whatever `Accelerator.save_state` writes, a
configuration and a manifest with the size and the SHA-256 of every file, which is written last. With one process or
DDP its weights are the files of a model. The directory is written under another name and renamed when every process is
done. So a run that is killed at any moment leaves only whole checkpoints behind. If a disk or a transfer damages one
later, this is noticed before anything of it is loaded.

Files are hashed by reading them back, because libraries write them: the hash of a tensor in memory would not tell what
is on the disk.

The directory must be on a file system that all processes share.
"""

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from safetensors.torch import load_file

from ..checkpoints import (
    CheckpointError,
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
from ..locks import SILENT, OutputLock, tell_of_waiting
from ..modeling_ijepa import PRETRAINING_INDEX, weight_files


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
            self._wait_for_file()
        except Timeout:
            holder = self.path.read_text().strip()
            name = f" ({holder})" if holder else ""  # old versions of filelock empty the file while they wait
            raise ValueError(f"Another run{name} is writing to {self.path.parent}.") from None
        except NotImplementedError:  # filelock 3 raises this for ENOSYS
            pass
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise

    def _wait_for_file(self) -> None:
        try:
            self._lock.acquire(timeout=min(SILENT, LOCK_PATIENCE), poll_interval=0.5)
        except Timeout:
            if LOCK_PATIENCE <= SILENT:
                raise
            tell_of_waiting(self.path.parent, LOCK_PATIENCE)
            self._lock.acquire(timeout=LOCK_PATIENCE - SILENT, poll_interval=0.5)

    def __enter__(self) -> "DirectoryLock":
        return self

    def __exit__(self, *error: object) -> None:
        self._directory_lock.release()
        self._lock.release()
        self.is_taken = False


def _keep_models_in_checkpoints(accelerator: Accelerator) -> None:
    """Lets `Accelerator.save_state` write the weights in the files of a model, and `load_state` read these.

    Nothing changes under FSDP2 and DeepSpeed, which write files of their own. Checkpoints of earlier versions have one
    file for all networks, which Accelerate reads.
    """

    def write(models: list[torch.nn.Module], weights: list[dict[str, torch.Tensor]], directory: str) -> None:
        if weights and accelerator.is_main_process:
            accelerator.unwrap_model(models[0]).save_pretrained(directory)
        weights.clear()  # Accelerate writes what is left

    def read(models: list[torch.nn.Module], directory: str) -> None:
        if models and (Path(directory) / PRETRAINING_INDEX).exists():
            weights = {key: value for path in weight_files(Path(directory)) for key, value in load_file(path).items()}
            accelerator.unwrap_model(models.pop()).load_state_dict(weights)  # Accelerate reads what is left

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(read)


def checkpoint_step(checkpoint: Path) -> int:
    """The number of optimizer steps that were done when this checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other.

    The state is written at once. To wait for the disk, to hash, to write the manifest and to rename can happen in a
    thread of the main process while the run goes on. Until it is done there is no checkpoint, only `.tmp-...`.

    Args:
        directory: the `checkpoints` directory of the run.
        keep: all but the newest `keep` are removed.
        in_background: whether to use the thread. The main process then hashes the files of all processes.
    """

    def __init__(self, accelerator: Accelerator, directory: Path, keep: int, in_background: bool = False):
        self.accelerator, self.directory, self.keep, self.in_background = accelerator, directory, keep, in_background
        self.last: Path | None = None  # the newest checkpoint of this process, which may not be complete yet
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._pending: list[Future[None]] = []
        _keep_models_in_checkpoints(accelerator)

    def save(self, step: int, write_extra: Callable[[Path], None], waits: bool = True) -> None:
        """Saves the state of every prepared object after `step` optimizer steps. A collective call.

        Args:
            write_extra: called on every process with the directory. It may add files.
            waits: whether the checkpoint must be complete before this returns.

        Raises:
            CheckpointError: if this process or the main process cannot write its part, or could not write the
                checkpoint before. The older ones stay. A process that fails alone must end at once, because the others
                may wait for it inside a library.
        """
        self.wait()
        unfinished = self.directory / f".tmp-{step}"
        self.last = finished = self.directory / f"step-{step:08d}"
        with self._told(step, unfinished):
            on_main_process(self.accelerator, lambda: _make_empty(unfinished))
            with disk_errors():
                self.accelerator.save_state(str(unfinished))
                write_extra(unfinished)
            self.accelerator.wait_for_everyone()
            if not self.in_background:
                parts = gather_object([_describe_share(self.accelerator, unfinished)])
                files = {name: entry for part in parts for name, entry in part.items()}
                on_main_process(self.accelerator, lambda: _finish(unfinished, finished, files))
                if self.accelerator.is_main_process:
                    _prune(finished, self.keep)
                return
            names = _names_of_all(unfinished)
        if self.accelerator.is_main_process:
            self._pending.append(self._threads.submit(self._complete, step, unfinished, finished, names))
        if waits:
            self.wait()

    def afterwards(self, function: Callable[[], None]) -> None:
        """Calls a function on the main process when the last checkpoint is complete: in the thread, if there is one.

        It is not called if the checkpoint cannot be written. What it raises is raised here or by the next `wait`, on
        all processes. A collective call.
        """
        if not self.in_background:
            on_main_process(self.accelerator, function)
        elif self.accelerator.is_main_process:
            self._pending.append(self._threads.submit(_call_after, [*self._pending], function))

    def wait(self) -> None:
        """Waits until the last checkpoint is complete, and what comes after it done. A collective call.

        Raises:
            CheckpointError: on all processes, if it cannot be written.
            OSError: on all processes, if what comes after it fails.
        """
        if self.in_background:
            on_main_process(self.accelerator, self._take_result)

    def join(self) -> None:
        """Waits for the thread of this process, and raises nothing: for the end of a run that has failed already."""
        wait_for(self._pending)

    def _take_result(self) -> None:
        pending, self._pending = self._pending, []
        wait_for(pending)
        for future in pending:
            future.result()

    def _complete(self, step: int, unfinished: Path, finished: Path, names: list[str]) -> None:
        with self._told(step, unfinished):
            _finish(unfinished, finished, _describe(unfinished, names))
        _prune(finished, self.keep)

    @contextmanager
    def _told(self, step: int, unfinished: Path) -> Iterator[None]:
        """Raises CheckpointError for an error of the disk, and removes what was written."""
        try:
            yield
        except CheckpointError:
            raise
        except OSError as error:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            left = max(_checkpoints_in(self.directory), default=None)
            raise cannot_write(step, self.directory, error, left) from error


def _call_after(earlier: list[Future[None]], function: Callable[[], None]) -> None:
    if not any(future.exception() for future in earlier):
        function()


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _names_of_all(directory: Path) -> list[str]:
    """The files of all processes, sorted. A collective call."""
    # A process sees its own files. On a network file system it may not see those of the others for a while.
    return sorted(set(gather_object([str(file.relative_to(directory)) for file in files_below(directory)])))


def _describe_share(accelerator: Accelerator, directory: Path) -> dict[str, FileEntry]:
    """Every process hashes its share of the files, because for a large model it takes as long as writing them."""
    return _describe(directory, _names_of_all(directory)[accelerator.process_index :: accelerator.num_processes])


def _describe(directory: Path, names: list[str]) -> dict[str, FileEntry]:
    """Waits until these files are on the disk, and hashes them."""
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
