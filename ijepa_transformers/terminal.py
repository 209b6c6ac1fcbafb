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


class LastingStream:
    """A text stream that drops what it cannot write any more, so that printing never ends a run.

    After the first failure its file descriptor leads to /dev/null, also for what is still in its buffer.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

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
        if error.errno not in _GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        with suppress(OSError, ValueError):
            os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Inside the block, standard output and standard error are `LastingStream`s.

    A terminal that is closed, or `| head`, then neither ends the command nor keeps it from ending by itself.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and LastingStream(stream) for stream in before)  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, LastingStream):
                stream.flush()  # here, because the interpreter would report a failure at its end
        sys.stdout, sys.stderr = before
