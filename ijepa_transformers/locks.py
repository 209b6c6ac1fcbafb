# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Keeps a second command out of a directory or a file that one is writing.

The system ends a lock when its process ends in any way. File systems without locks, and directories on NFS, have none:
there commands run without it, as they do on Windows. (Pretraining also has a lock file, which names its process and
works on NFS.)
"""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


try:
    import fcntl
except ImportError:  # Windows
    HAS_LOCKS = False
else:
    HAS_LOCKS = True

PATIENCE = 30.0  # seconds to wait for the last process of the previous command to end
SILENT = 2.0  # seconds of waiting before it is told
_WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


class OutputLock:
    """The lock of an output directory. It leaves no file. As a context manager it is released at the end of the block.

    A directory that does not exist yet is locked by `claim`, when the command has checked everything.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._descriptor: int | None = None

    def take_if_there(self) -> None:
        """Takes the lock if the directory exists. Without a directory no other command is writing to it.

        Raises:
            ValueError: if another process still holds it after PATIENCE seconds.
        """
        if HAS_LOCKS and self._descriptor is None and self.directory.is_dir():
            self._descriptor = _lock(self.directory, os.O_RDONLY, self.directory)

    def claim(self) -> None:
        """Makes the directory, and takes the lock if it is not taken yet.

        Raises:
            ValueError: if another command has the directory, or had it since this one began.
            OSError: if it cannot be made.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._descriptor is not None or not HAS_LOCKS:
            return
        self.take_if_there()
        if any(self.directory.iterdir()):
            raise ValueError(f"Another command has just written to {self.directory}: start again, or choose another.")

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the lock back, if it is taken."""
        if self._descriptor is not None:
            _unlock(self._descriptor)
        self._descriptor = None


@contextmanager
def alone_with(output: Path) -> Iterator[None]:
    """Locks what will be written to `output`, a file or a new directory, while the block runs.

    A hidden file beside it is the lock, and goes when the block ends. If the folder of `output` does not exist, there
    is no lock.

    Raises:
        ValueError: if another process still holds it after PATIENCE seconds.
    """
    if not HAS_LOCKS or not os.access(output.parent, os.W_OK):
        yield
        return
    path = output.with_name(f".tmp-{output.name}.lock")
    descriptor = _lock(path, os.O_RDWR | os.O_CREAT, output)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is unlocked, so that nobody else has it
        _unlock(descriptor)


def _lock(path: Path, flags: int, output: Path) -> int:
    """The descriptor of the locked `path`; `output` is for the message."""
    began, is_told = time.monotonic(), False
    while True:
        descriptor = os.open(path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, descriptor):
                return descriptor
        except BlockingIOError:
            waited = time.monotonic() - began
            if waited >= PATIENCE:
                os.close(descriptor)
                raise ValueError(f"Another command is writing to {output}: let it end, or choose another.") from None
            if waited >= SILENT and not is_told:
                tell_of_waiting(output, PATIENCE)
                is_told = True
            time.sleep(0.2)
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def tell_of_waiting(output: Path, patience: float) -> None:
    """Says on stderr why a command waits."""
    told = f"note: another command is writing to {output}; this one waits up to {patience:.0f} s for its end."
    print(told, file=sys.stderr, flush=True)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether `path` is still the open file. Its holder may have removed it while this process waited."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unlock(descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for forked processes, which have the descriptor too
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
    finally:
        os.close(descriptor)
