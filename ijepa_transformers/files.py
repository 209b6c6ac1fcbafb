# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Writes files under another name and renames them, so that a file is complete or absent. Reads JSON lines."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a temporary path to write to. It is renamed to `path` when the block ends without an error.

    So a file at `path` is always complete. Folders above it are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp-{path.name}")
    yield unfinished
    sync_to_disk(unfinished)
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as UTF-8. After an interruption the file is complete, absent or still the old one."""
    with written_aside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turns exceptions inside the block into OSErrors, because torch.save and safetensors raise their own classes."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def files_below(directory: Path) -> list[Path]:
    """All files in a directory, at any depth, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def sync_to_disk(path: Path) -> None:
    """Waits until a file or directory is stored on the disk (fsync)."""
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


def read_rows(path: Path, is_row: Callable[[dict[str, Any]], bool]) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file of JSON lines, and how many of its lines are not rows.

    A killed process may leave half a line, and a machine that loses power zeros. Blank lines are not counted.

    Args:
        path: the file. If it does not exist, there are no rows.
        is_row: whether a JSON object is a row of this file.

    Raises:
        OSError: if the file cannot be read.
    """
    content = path.read_bytes() if path.exists() else b""
    lines = [line for line in content.split(b"\n") if line.strip()]
    found = [_json_object(line) for line in lines]
    rows = [row for row in found if row is not None and is_row(row)]
    return rows, len(lines) - len(rows)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes a file of JSON lines, one for each row, as `write_text`."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
