# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What a user should know about the data, said once on stderr."""

import os
import sys


_told: set[str] = set()


def tell(sentence: str) -> None:
    """Prints a sentence on stderr, once in a process, and only in the first process of a launch."""
    if sentence not in _told and os.environ.get("RANK", "0") == "0":
        print(f"note: {sentence}", file=sys.stderr, flush=True)
    _told.add(sentence)
