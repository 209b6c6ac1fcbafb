# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Shared by the conversion commands: output that is complete or not there, and errors in one sentence."""

import argparse
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..display import in_python, show_end
from ..failures import REFUSED, failures_told
from ..files import check_output_directory, disk_errors_of
from ..locks import alone_with


@contextmanager
def written_aside(output: Path) -> Iterator[Path]:
    """Gives a path beside `output` to write to. It is renamed to `output` if the block ends without an error.

    If `output` is a symbolic link, what it leads to is written, and the link stays.

    Raises:
        ValueError: if `output` exists and is no empty directory, cannot be written, or is a link that leads back to
            itself, or if another command is writing it.
    """
    _check_free(output)
    output = Path(os.path.realpath(output))
    if output.is_symlink():
        raise ValueError(f"{output} is a link that leads back to itself; choose another --output.")
    check_output_directory(output.parent, f"--output {str(output)!r}: the folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with alone_with(output):
        unfinished = output.with_name(f".tmp-{output.name}")
        _remove(unfinished)  # an earlier conversion was killed
        try:
            with disk_errors_of(output):
                yield unfinished
                _check_free(output)
                os.replace(unfinished, output)
        finally:
            _remove(unfinished)


def _check_free(output: Path) -> None:
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{output} already exists; choose another --output or remove it first.")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def show_written(model: Path) -> None:
    """Prints where a converted model is, and how to open it."""
    code = f"from ijepa_transformers.encoders import load_encoder; print(load_encoder({in_python(model)}))"
    show_end({"model": model}, [shlex.join(["python", "-c", code])])


def run(command: Callable[..., None], arguments: argparse.Namespace, program: str) -> None:
    """Runs a command with its parsed arguments. An error becomes one sentence and exit code 2."""
    disable_progress_bar()  # the one that Transformers shows while it loads or saves a model
    with failures_told(program, REFUSED):
        command(**vars(arguments))
