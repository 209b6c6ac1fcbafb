# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Tells whether a shard of features is still what was computed, and of the images that are there now.

While features are computed, each shard has a record in the folder `.shards`. At the end the records are in
manifest.json, and the folder is gone.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets

from ..checkpoints import describe_files
from ..data.contents import contents_digest, status_digest
from ..files import write_text


MANIFEST, _FOLDER = "manifest.json", ".shards"


@dataclass(frozen=True)
class ShardRecord:
    """Hashes of a shard's file, of the contents of its images with their labels, and of the status of their files.

    The status tells without reading that images are unchanged. It is None for images in memory.
    """

    sha256: str
    inputs_sha256: str
    files_status: str | None

    @classmethod
    def of(cls, path: Path, dataset: datasets.Dataset, rows: Sequence[int]) -> "ShardRecord":
        """The record of a shard that was just written, of these rows of the data set."""
        digest = describe_files(path.parent, [path.name])[path.name]["sha256"]
        return cls(digest, _inputs_digest(dataset, rows), status_digest(dataset, rows))

    @classmethod
    def from_json(cls, values: Any) -> "ShardRecord | None":
        """The record in an entry of the manifest or in a file of the folder. None if there is none."""
        if not isinstance(values, dict):
            return None
        sha256, inputs, status = (values.get(name) for name in ("sha256", "inputs_sha256", "files_status"))
        if isinstance(sha256, str) and isinstance(inputs, str) and isinstance(status, str | None):
            return cls(sha256, inputs, status)
        return None


def _inputs_digest(dataset: datasets.Dataset, rows: Sequence[int]) -> str:
    labels = dataset.select(rows)["label"][:] if "label" in dataset.column_names else None
    return hashlib.sha256(f"{contents_digest(dataset, rows)} {json.dumps(labels)}".encode()).hexdigest()


def refuse_folders(output_dir: Path, names: Iterable[str]) -> None:
    """Raises ValueError if a folder is where one of these files, or the manifest, belongs."""
    for path in (output_dir / name for name in (MANIFEST, *names)):
        if path.is_dir():
            raise ValueError(
                f"{path} is a folder, and a file belongs there: move it away, or choose another output_dir."
            )


def problem_of(path: Path, record: ShardRecord | None, dataset: datasets.Dataset, rows: Sequence[int]) -> str | None:
    """Why a shard must be computed: an empty string if it is not there, else a sentence. None if it is complete."""
    if not path.exists():
        return ""
    if record is None:
        return "there is no record of what was computed"
    if describe_files(path.parent, [path.name])[path.name]["sha256"] != record.sha256:
        return "the file has changed since it was written"
    status = status_digest(dataset, rows)
    is_unchanged = status is not None and status == record.files_status
    if not is_unchanged and _inputs_digest(dataset, rows) != record.inputs_sha256:
        return "its images or labels have changed since"
    return None


def read_records(output_dir: Path) -> dict[str, ShardRecord]:
    """The records of all shards by the name of their file, from the manifest and from the folder."""
    manifest = _read_json(output_dir / MANIFEST)
    listed = manifest.get("files") if isinstance(manifest, dict) else None
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    values = {entry["file"]: entry for entry in entries if isinstance(entry.get("file"), str)}
    values |= {path.stem: _read_json(path) for path in (output_dir / _FOLDER).glob("*.json")}
    records = {name: ShardRecord.from_json(value) for name, value in values.items()}
    return {name: record for name, record in records.items() if record}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_record(output_dir: Path, name: str, record: ShardRecord) -> None:
    """Writes the record of the shard with this file name."""
    write_text(output_dir / _FOLDER / f"{name}.json", json.dumps(asdict(record)))


def reopen(output_dir: Path, records: Mapping[str, ShardRecord]) -> None:
    """Keeps these records in the folder alone, and removes the manifest, because features are computed again."""
    shutil.rmtree(output_dir / _FOLDER, ignore_errors=True)
    for name, record in records.items():
        write_record(output_dir, name, record)
    (output_dir / MANIFEST).unlink(missing_ok=True)


def remove_records(output_dir: Path) -> None:
    """Removes the folder. The manifest has all records."""
    shutil.rmtree(output_dir / _FOLDER, ignore_errors=True)
