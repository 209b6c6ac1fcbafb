# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a user should know about the data, said once on stderr."""

import mmap
import sys
import time

from ..launcher import is_first_process
from ..url_secrets import without_secrets


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,000 images", "2 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


_told: set[str] = set()


def tell(sentence: str) -> None:
    """Prints a sentence on stderr, once in a process, and only in the first process of a launch."""
    if sentence not in _told and is_first_process():
        print(f"note: {without_secrets(sentence)}", file=sys.stderr, flush=True)
    _told.add(sentence)


WHITE, LINK, WAIT = range(3)  # kinds of `tell_of_first`
_seen = mmap.mmap(-1, 3)  # memory that this process shares with the data loading processes that it forks


def tell_of_first(kind: int, sentence: str) -> None:
    """Prints a sentence about the first thing of a kind. Of a process and those that it forked only one prints."""
    if _seen[kind] == 0 and is_first_process():
        _seen[kind] = 1
        print(f"note: {without_secrets(sentence)}", file=sys.stderr, flush=True)


def tell_each_minute(kind: int, sentence: str) -> None:
    """Prints a sentence about something that may last, such as waiting for a server. Of a process and those that it
    forked only one prints, once in a minute."""
    minute = int(time.monotonic() // 60) % 255 + 1
    if _seen[kind] != minute:
        _seen[kind] = 0
        tell_of_first(kind, sentence)
        _seen[kind] = minute


def expect_first(kind: int) -> None:
    """Other data begin: `tell_of_first` prints again."""
    _seen[kind] = 0
