# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints, and single files, that are complete or not there.

A checkpoint is a directory `checkpoints/step-00001000` that holds whatever `Accelerator.save_state` writes, a
configuration and, last of all, a manifest with the size and the SHA-256 of every file. It is written under another
name and renamed when every process is done, so a run killed at any moment leaves only whole checkpoints behind; what a
disk or a transfer has damaged since then is found out before anything of it is loaded.

The directory must be on a file system that all processes share.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from ..distributed import on_main_process
from ..files import disk_errors, files_below, sync_to_disk


MANIFEST = "manifest.json"
LOCK_FILE = ".lock"
LOCK_PATIENCE = 30.0  # seconds that a start waits for the last process of the run before it to end
# The answers of a file system without locks, on which a run goes on without one.
WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


class CheckpointError(OSError):
    """A checkpoint that cannot be written. The message names it, the reason, and what is left to resume from."""


class DirectoryLock:
    """Keeps a second run out of a directory, from `take` until the process ends, however that ends; or, used as a
    context, until the block ends.

    The lock belongs to the open file, not to the file's name: what a killed process leaves behind locks nothing. On a
    network file system the lock counts on all machines, as far as its server supports `flock`.
    """

    def __init__(self, directory: Path):
        self.path = directory / LOCK_FILE
        self.is_taken = False
        self._lock = FileLock(self.path)

    def take_if_there(self) -> None:
        """Takes the lock if there is a directory, and so something that another run could hold."""
        if self.path.parent.exists():
            self.take()

    def take(self) -> None:
        """Takes the lock, if it is not taken already; the directory must exist.

        Raises:
            ValueError: if another process still holds it after LOCK_PATIENCE seconds.
            OSError: if the lock file cannot be written.
        """
        if self.is_taken:
            return
        try:
            self._lock.acquire(timeout=LOCK_PATIENCE, poll_interval=0.5)
        except Timeout:
            holder = self.path.read_text().strip()
            name = f" ({holder})" if holder else ""  # old versions of filelock empty the file while they wait
            raise ValueError(f"Another run{name} is writing to {self.path.parent}.") from None
        except NotImplementedError:  # how filelock 3 reports ENOSYS
            pass
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
        self.path.write_text(f"process {os.getpid()} on {os.uname().nodename}")
        self.is_taken = True

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._lock.release()
        self.is_taken = False


# Writing
def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps done when this checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator, directory: Path, step: int, write_extra: Callable[[Path], None], keep: int
) -> Path:
    """Saves the state of every prepared object after `step` optimizer steps, then drops all but the newest `keep`.

    Args:
        directory: the `checkpoints` directory of the run.
        write_extra: called on every process with the directory to add files to.

    Returns:
        the directory `step-...`.

    Raises:
        CheckpointError: if this process, or the main one, cannot write its part. The older checkpoints are untouched.
            A process that fails alone must end at once: the others may be waiting for it inside a library.
    """
    unfinished, finished = directory / f".tmp-{step}", directory / f"step-{step:08d}"
    try:
        on_main_process(accelerator, lambda: _make_anew(unfinished))
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
        left = max(_checkpoints(directory), default=None)
        raise CheckpointError(
            f"the checkpoint of step {step:,} cannot be written to {directory} ({error}); "
            + (f"the last one is {left}." if left else "there is none yet.")
        ) from error
    if accelerator.is_main_process:
        _prune(finished, keep)
    return finished


def _make_anew(directory: Path):
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _describe_share(accelerator: Accelerator, directory: Path) -> dict[str, dict]:
    """Every process reads its share of the files, or hashing a large model would take as long as writing it."""
    # A process sees its own files; those of others may take a network file system a while.
    mine = [str(file.relative_to(directory)) for file in files_below(directory)]
    names = sorted(set(gather_object(mine)))[accelerator.process_index :: accelerator.num_processes]
    for name in names:
        sync_to_disk(directory / name)
    return _describe(directory, names)


def _describe(directory: Path, names: list[str]) -> dict[str, dict]:
    with ThreadPoolExecutor(4) as threads:  # hashing leaves Python's lock
        return dict(zip(names, threads.map(lambda name: _describe_file(directory / name), names), strict=True))


def _describe_file(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def _finish(unfinished: Path, finished: Path, files: dict[str, dict]):
    hidden = [name for name in files if not (unfinished / name).is_file()]
    if hidden:
        raise OSError(f"{hidden[0]} of another process cannot be seen: this must be a file system that all share")
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"step": checkpoint_step(finished), "files": files}, indent=2))
    for path in (manifest, unfinished, *(path for path in unfinished.rglob("*") if path.is_dir())):
        sync_to_disk(path)
    if finished.exists():  # damaged, or the run would have gone on from there
        _remove(finished)
    os.replace(unfinished, finished)
    sync_to_disk(finished.parent)


def _remove(checkpoint: Path):
    """Under another name first: half a removed checkpoint must not look like one."""
    doomed = checkpoint.with_name(f".tmp-removed-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def _prune(newest: Path, keep: int):
    """Keeps the newest `keep` up to this one. Later ones were found damaged, or the run would not be here."""
    checkpoints = _checkpoints(newest.parent)
    kept = [checkpoint for checkpoint in checkpoints if checkpoint <= newest][-keep:]
    for checkpoint in set(checkpoints) - set(kept):
        with suppress(OSError):  # it costs room, but no run
            _remove(checkpoint)
    for leftover in newest.parent.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


# Finding
def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file of its manifest is there, bit for bit."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        step = manifest["step"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest is missing or unreadable"
    if step != checkpoint_step(checkpoint):
        return f"its manifest is that of step {step}"
    for name, (size, _) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return _changed_file(checkpoint, {name: digest for name, (_, digest) in files.items()})


def _changed_file(checkpoint: Path, digests: dict[str, str]) -> str | None:
    try:
        found = _describe(checkpoint, list(digests))
    except OSError as error:
        return f"a file cannot be read: {error}"
    changed = [name for name, digest in digests.items() if found[name]["sha256"] != digest]
    return f"the content of {changed[0]} has changed" if changed else None


def newest_checkpoint(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint below `directory`, or None; damaged ones are passed over and reported.

    Raises:
        ValueError: if there are checkpoints, but all are damaged: starting afresh is not for a program to decide.
    """
    checkpoints = _checkpoints(directory)
    for checkpoint in reversed(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        report(f"Checkpoint {checkpoint} is damaged ({problem}); an older one is used.")
    if checkpoints:
        raise ValueError(
            f"All {len(checkpoints)} checkpoints in {directory} are damaged, the newest because"
            f" {damage(checkpoints[-1])}. Put back a copy, or move them away to start again from step 0."
        )
    return None


def _checkpoints(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
