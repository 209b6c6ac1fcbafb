# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the conversion commands share: errors in one sentence, and directories written aside."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar


# Writing the directory
@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """Gives a path beside `output` to write to, and renames it to `output` only when all went well.

    Raises:
        ValueError: if `output` is there already, unless it is an empty directory.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} already exists; choose another --output or remove it first.")
    unfinished = output.with_name(f".tmp-{output.name}")
    _remove(unfinished)  # left by a conversion that was killed
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        os.replace(unfinished, output)
    finally:
        _remove(unfinished)


def _remove(path: Path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def run(command: Callable[..., None], parser: argparse.ArgumentParser, words: list[str] | None = None) -> None:
    """Runs a command with the arguments of the command line; an error is one sentence, and status 2."""
    disable_progress_bar()  # of Transformers' loading and saving
    try:
        command(**vars(parser.parse_args(words)))
    except ValueError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)  # the status argparse gives to wrong arguments
