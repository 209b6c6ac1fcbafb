# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Standard output and standard error of a command, which may end before the command does."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


# What writing to a closed terminal or to a pipe without a reader gives. A full disk is none of them.
_GONE = {errno.EIO, errno.EPIPE, errno.ENXIO, errno.EBADF}
_STANDARD_OUTPUT = "standard output"


class LastingStream:
    """A text stream that drops what it cannot write any more, so that printing never ends a run.

    After the first failure its file descriptor leads to /dev/null, also for what is still in its buffer.

    Args:
        stream: to write to.
        name: of the stream in errors. Without one there are no errors, because nobody could read them.
    """

    def __init__(self, stream: TextIO, name: str | None):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Raises OSError with the name of the stream if its disk is full."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if self._name is not None and error.errno not in _GONE:
            raise OSError(error.errno, error.strerror, self._name) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, standard output and standard error are `LastingStream`s.

    A terminal that is closed, or `| head`, then neither ends the command nor keeps it from ending by itself. Streams
    that were closed before the command began lead to /dev/null.

    Raises:
        SystemExit: with one sentence, if the disk under standard output is full.
    """
    _open_standard_descriptors()
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        sys.stdout = LastingStream(sys.stdout or nowhere, _STANDARD_OUTPUT)  # type: ignore[assignment]
        sys.stderr = LastingStream(sys.stderr or nowhere, None)  # type: ignore[assignment]
        try:
            yield
            sys.stdout.flush()  # here, because the interpreter would report a failure at its end
        except OSError as error:
            if error.filename != _STANDARD_OUTPUT:
                raise
            print(f"ijepa: error: {error.filename}: {error.strerror}.", file=sys.stderr)
            sys.exit(1)
        finally:
            with suppress(OSError):
                sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before


def _open_standard_descriptors() -> None:
    """Opens /dev/null in the place of closed ones. Otherwise the next file that is opened has the number of standard
    output, and libraries print into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
