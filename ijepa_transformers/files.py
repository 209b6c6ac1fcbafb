# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes files aside and renames them, so that a file is whole or is not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` when the block ends well: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp-{path.name}")
    yield unfinished
    sync_to_disk(unfinished)
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is whole or not there, or still the old one."""
    with written_aside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors() -> Iterator[None]:
    """A failure of whatever class a library chose (torch.save and safetensors have their own) becomes an OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_to_disk(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_files(source: Path, destination: Path) -> None:
    """Moves every file of `source` into `destination`, each in one atomic step, and removes `source`."""
    for file in files_below(source):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        sync_to_disk(file)
        os.replace(file, target)
    sync_to_disk(destination)
    shutil.rmtree(source)
