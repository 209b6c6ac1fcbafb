# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a user should know about the data, said once on stderr."""

import sys

from ..launcher import is_first_process


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 image", "2,000 images", "2 classes"."""
    ending = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{ending}"


_told: set[str] = set()


def tell(sentence: str) -> None:
    """Prints a sentence on stderr, once in a process, and only in the first process of a launch."""
    if sentence not in _told and is_first_process():
        print(f"note: {sentence}", file=sys.stderr, flush=True)
    _told.add(sentence)
