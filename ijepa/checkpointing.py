# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints, and single files, that are complete or not there.

A checkpoint is a directory `checkpoints/step-00001000` that holds whatever `Accelerator.save_state` writes, a
configuration (so that the directory opens as a model too) and, last of all, a manifest. It is written under another
name and renamed when every process is done, so a run killed at any moment leaves only whole checkpoints behind.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator


MANIFEST = "manifest.json"


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to, which becomes `path` when the block ends well: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".tmp-{path.name}")
    yield unfinished
    _sync(unfinished)
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file that is whole or not there, or still the old one."""
    with written_aside(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def checkpoint_step(checkpoint: Path) -> int:
    """The optimizer steps done when this checkpoint was taken."""
    return int(checkpoint.name.removeprefix("step-"))


def save_checkpoint(
    accelerator: Accelerator, directory: Path, step: int, write_extra: Callable[[Path], None], keep: int
) -> Path:
    """Saves the state of every prepared object after `step` optimizer steps, then drops all but the newest `keep`.

    Args:
        directory: the `checkpoints` directory of the run.
        write_extra: called on every process with the directory to add files to.

    Returns:
        the directory `step-...`.
    """
    unfinished, finished = directory / f".tmp-{step}", directory / f"step-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    write_extra(unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _finish(unfinished, finished, step)
        _prune(directory, keep)
    accelerator.wait_for_everyone()
    return finished


def _finish(unfinished: Path, finished: Path, step: int):
    sizes = {str(file.relative_to(unfinished)): file.stat().st_size for file in _files(unfinished)}
    manifest = unfinished / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": sizes}, indent=2))
    for file in _files(unfinished):
        _sync(file)
    shutil.rmtree(finished, ignore_errors=True)  # a run that was resumed from an older checkpoint comes by again
    os.replace(unfinished, finished)
    _sync(finished.parent)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(directory: Path, keep: int):
    for checkpoint in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(checkpoint)
    for leftover in directory.glob(".tmp-*"):
        shutil.rmtree(leftover)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None if every file of its manifest is there in full size."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or unreadable"
    for name, size in sizes.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def newest_checkpoint(directory: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint below `directory`, or None; damaged ones are passed over and reported."""
    for checkpoint in sorted(directory.glob("step-*"), reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        report(f"Checkpoint {checkpoint} is damaged ({problem}); an older one is used.")
    return None


def replace_files(source: Path, destination: Path) -> None:
    """Moves every file of `source` into `destination`, each in one atomic step, and removes `source`."""
    for file in _files(source):
        target = destination / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(source)
