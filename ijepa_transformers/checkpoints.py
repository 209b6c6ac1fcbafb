# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the checkpoints of pretraining and of fine-tuning share: a manifest, and how it is written and checked.

A manifest has the size and the SHA-256 of every file of a checkpoint. It is written last. So a checkpoint without one
was interrupted, and one whose files differ from it was damaged later, by a disk or a transfer.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from .files import sync_to_disk


MANIFEST = "manifest.json"


class CheckpointError(OSError):
    """A checkpoint cannot be written. The message names it, the reason, and the checkpoint that is left."""


class FileEntry(TypedDict):
    size: int  # bytes
    sha256: str


def cannot_write(step: int, directory: Path, error: Exception, left: Path | None) -> CheckpointError:
    """The error for the checkpoint of `step`, which cannot be written to `directory`; `left` is the last one there."""
    rest = f"the last one is {left}." if left else "there is none yet."
    return CheckpointError(f"the checkpoint of step {step:,} cannot be written to {directory} ({error}); {rest}")


def describe_files(directory: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    """Sizes and hashes of the files with these names, relative to `directory`.

    Raises:
        OSError: if a file cannot be read.
    """
    with ThreadPoolExecutor(4) as threads:  # hashing releases Python's global lock
        return dict(zip(names, threads.map(lambda name: _describe_file(directory / name), names), strict=True))


def _describe_file(path: Path) -> FileEntry:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(directory: Path, step: int, files: dict[str, FileEntry]) -> None:
    """Writes the manifest of a checkpoint after `step` optimizer steps, and waits until the disk has it."""
    manifest = directory / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2))
    for path in (manifest, directory, *(path for path in directory.rglob("*") if path.is_dir())):
        sync_to_disk(path)


def damage_of(checkpoint: Path, step: int | None) -> str | None:
    """What is wrong with a checkpoint. None if every file of its manifest is there, bit for bit.

    Args:
        step: how many optimizer steps were done; None if the name of the directory does not say it.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        written_at = manifest["step"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST}, which is written last, is missing or unreadable"
    if step not in (None, written_at):
        return f"its manifest is that of step {written_at}"
    for name, (size, _) in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return _changed_file(checkpoint, {name: digest for name, (_, digest) in files.items()})


def _changed_file(checkpoint: Path, digests: dict[str, str]) -> str | None:
    try:
        found = describe_files(checkpoint, list(digests))
    except OSError as error:
        return f"a file cannot be read: {error}"
    changed = [name for name, digest in digests.items() if found[name]["sha256"] != digest]
    return f"the content of {changed[0]} has changed" if changed else None


def newest_whole_checkpoint(
    directory: Path, candidates: Sequence[Path], damage: Callable[[Path], str | None], report: Callable[[str], None]
) -> Path | None:
    """The newest whole checkpoint, or None if there are no candidates. Damaged ones are reported and skipped.

    Args:
        directory: of the candidates, for the message.
        candidates: checkpoints, the oldest first.
        damage: says what is wrong with a checkpoint; None if it is whole.

    Raises:
        ValueError: if there are candidates, but all are damaged. Then the user must decide whether to start again.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(candidates):
        found = damage(checkpoint)
        if found is None:
            for newer, problem in damaged.items():
                report(f"Checkpoint {newer} is damaged ({problem}); an older one is used.")
            return checkpoint
        damaged[checkpoint] = found
    if candidates:
        problem = damaged[candidates[-1]]
        which = (
            f"All {len(candidates)} checkpoints in {directory} are damaged, the newest because {problem}. Restore a"
            " copy, or move them away"
            if len(candidates) > 1
            else f"The only checkpoint in {directory} is damaged, because {problem}. Restore a copy, or move it away"
        )
        raise ValueError(f"{which} to start again from step 0.")
    return None


def remove_checkpoint(checkpoint: Path) -> None:
    """Renames the checkpoint first, because one that is half removed must not look like a checkpoint."""
    renamed = checkpoint.with_name(f".tmp-removed-{checkpoint.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.replace(checkpoint, renamed)
    shutil.rmtree(renamed)
