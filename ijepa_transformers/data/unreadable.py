# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The file that `datasets` cannot read. Its errors do not name it; some of the lines that it logs do."""

import itertools
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa


_LOGGERS = [f"datasets.packaged_modules.{name}.{name}" for name in ("parquet", "arrow")]
_LINE = re.compile(r"Failed to read (?:file|schema from) '(.*)' with error ", re.DOTALL)


@contextmanager
def unreadable_files() -> Iterator[list[str]]:
    """Inside the block, `datasets` prints no line about a file that it cannot read. The list gets the file's name."""
    names: list[str] = []

    def note(record: logging.LogRecord) -> bool:
        found = _LINE.match(record.getMessage())
        if found:
            names.append(found[1])
        return not found

    for logger in map(logging.getLogger, _LOGGERS):
        logger.addFilter(note)
    try:
        yield names
    finally:
        for logger in map(logging.getLogger, _LOGGERS):
            logger.removeFilter(note)


def named_before(noted: list[str], files: Iterable[str]) -> str:
    """The unreadable file as the beginning of a reason, such as "'a.arrow': "; an empty string if it is unknown.

    Args:
        noted: as `unreadable_files` gives it.
        files: of these, Arrow files on this machine are tried if nothing was noted.
    """
    broken: Iterable[str] = noted or (name for name in files if name.endswith(".arrow") and not _is_arrow(name))
    return "".join(f"{name!r}: " for name in itertools.islice(broken, 1))


def _is_arrow(name: str) -> bool:
    """Whether an Arrow file on this machine has a header. True for a URL."""
    if "://" in name:
        return True
    for open_file in (pa.ipc.open_stream, pa.ipc.open_file):
        try:
            with pa.OSFile(name) as file:
                open_file(file)
            return True
        except (OSError, ValueError):
            pass
    return False
