# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""The features of a folder of photos, kept in a directory and brought up to date.

The directory has the layout of `ijepa extract`, and may be one of its output directories. Features of photos that
came later are in the folders `added-0001`, `added-0002`, ... in it, each with the same layout. A shard of any of these
counts as long as its record says that all of its images are unchanged. What no shard has is computed and added. So
nothing is computed twice after a kill, and a new photo costs one image. A photo that was changed or removed costs its
shard.

Shape legend: N photos of the folder, D features.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from transformers import PreTrainedModel

from ..data.datasets import ProcessedImages
from ..data.notices import counted, tell
from ..display import on_standard_error, show_facts
from ..encoders import weights_digest
from ..evaluation.extraction import build_run, extract, finish, image_names, open_model, start
from ..evaluation.extraction_arguments import FeatureExtractionArguments
from ..evaluation.shard_files import shard_files
from ..evaluation.shard_records import problem_of, read_records
from ..files import check_output_directory, read_json_object, refuse_among_images, refuse_other_files
from ..locks import OutputLock
from .arguments import SearchArguments


_SETTINGS = "settings.json"
_SHARD_SIZE = 64  # photos that are computed again if one of them was changed or removed
_COLUMNS = ["index", "name", "error", "pooler_output"]
_OF_ENCODER = ("model", "encoder", "dtype", "batch_size", "num_workers")
# What features depend on, in the settings of `ijepa extract`, with the words for it.
_DEPENDS_ON = {"weights_sha256": "other weights", "processor": "another image processor", "dtype": "another precision"}


@dataclass
class Encoder:
    """An opened encoder with the photos as it takes them."""

    arguments: FeatureExtractionArguments
    model: PreTrainedModel
    images: ProcessedImages

    def settings(self) -> dict[str, Any]:
        """What the features depend on besides the photos."""
        return {
            "weights_sha256": weights_digest(self.model),
            "processor": json.loads(self.images.processor.to_json_string()),
            "dtype": self.arguments.dtype,
        }


def open_photos(arguments: SearchArguments, dataset: datasets.Dataset) -> Encoder:
    """Opens the encoder for these photos.

    Raises:
        ValueError: as `open_model`.
    """
    data = ("data", "data_config", "image_column", "label_column", "sixteen_bit_max", "split")
    values = {name: getattr(arguments, name) for name in (*data, *_OF_ENCODER)}
    extraction = FeatureExtractionArguments(**values, output_dir="none yet", shard_size=_SHARD_SIZE)
    return Encoder(extraction, *open_model(extraction, dataset))


@dataclass
class PhotoIndex:
    """The features of all photos.

    Attributes:
        directory: where they are kept.
        names: (N) of the photos, relative to the folder.
        features: (N, D), float32; NaN for a photo that cannot be read.
        errors: (N) why a photo cannot be read; None for the others.
        num_computed: how many were computed by this call.
    """

    directory: Path
    names: list[str]
    features: np.ndarray
    errors: list[str | None]
    num_computed: int = 0


def open_index(arguments: SearchArguments, encoder: Encoder) -> PhotoIndex:
    """The features of all photos. Those that are missing in the directory are computed and written to it.

    The head and the progress go to standard error.

    Raises:
        ValueError: if the directory has features of another model or other files. If the user named it, also if it has
            features of other photos.
    """
    settings = encoder.settings()
    directory = Path(arguments.index).expanduser() if arguments.index else _default_directory(arguments, settings)
    _check_directory(directory, arguments.data)
    dataset = encoder.images.dataset
    names = image_names(dataset, range(len(dataset)), arguments.data)
    if not arguments.index:
        _remove_parts_without_settings(directory)
    found = _Found(directory, names, dataset, settings)
    for part in _parts(directory):
        found.add(part)
    missing = found.missing()
    if missing:
        if arguments.index:
            found.refuse_other_photos()
        found.tell_of_damaged()
    with on_standard_error():
        _show_head(arguments, directory, len(names), len(missing))
        if missing:
            found.add(_compute(encoder, directory, missing, _have_own_names(names, dataset)))
    if found.features is None or found.missing():
        raise ValueError(f"Photos of {arguments.data!r} changed while they were read. Run the same command again.")
    if not arguments.index:
        found.remove_damaged()
    return PhotoIndex(directory, names, found.features, found.errors, len(missing))


def _show_head(arguments: SearchArguments, directory: Path, num_photos: int, num_missing: int) -> None:
    computed = f"{num_missing:,} of {num_photos:,} to compute" if num_missing else "all were computed before"
    show_facts(
        {
            "model": f"{arguments.model}, {arguments.encoder} encoder",
            "data": f"{arguments.data}, split {arguments.split!r}: {counted(num_photos, 'photo')}",
            "features": computed,
            "index": directory,
        }
    )


def _default_directory(arguments: SearchArguments, settings: dict[str, Any]) -> Path:
    """A directory for these photos and this model, so that another model has another one."""
    place = os.path.expanduser(arguments.data)
    data = os.path.realpath(place) if os.path.exists(place) else arguments.data
    key = [data, arguments.data_config, arguments.image_column, arguments.split, settings]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "ijepa" / "search" / f"{re.sub(r'[^a-zA-Z0-9]+', '-', Path(data).name)[:40]}-{digest[:16]}"


def _check_directory(directory: Path, data: str) -> None:
    """Raises ValueError if the directory cannot be an index of these photos."""
    check_output_directory(directory, "index")
    refuse_among_images(directory, data, "index")
    refuse_other_files(directory, [_SETTINGS], "index")


def _parts(directory: Path) -> list[Path]:
    """The directory and the folders of photos that came later, as far as they hold features."""
    return [part for part in (directory, *sorted(directory.glob("added-*"))) if (part / _SETTINGS).exists()]


def _remove_parts_without_settings(directory: Path) -> None:
    """Removes the parts of an index in the cache whose settings are damaged. Their photos are computed again."""
    for part in reversed(_parts(directory)):  # the directory itself is the last
        try:
            read_json_object(part / _SETTINGS)
        except ValueError:
            tell(f"{part / _SETTINGS} is damaged, so the features beside it are computed again.")
            with OutputLock(part) as lock:
                lock.take_if_there()
                shutil.rmtree(part)


def _have_own_names(names: Sequence[str], dataset: datasets.Dataset) -> bool:
    """Whether each photo has a name of its own, as files have. Rows of a table may have none."""
    table = dataset.select_columns(["image"]).with_format("arrow")[:]
    return pa.compute.struct_field(table["image"], "path").null_count == 0 and len(set(names)) == len(names)


def _compute(encoder: Encoder, directory: Path, missing: list[int], have_own_names: bool) -> Path:
    """Computes the features of these photos, as `ijepa extract` does, and returns their directory.

    Photos without names of their own are computed as one run, which `extract` continues or refuses.
    """
    images, part = encoder.images, directory
    num_photos = len(images.dataset)
    if have_own_names and (directory / _SETTINGS).exists():
        numbers = [int(path.name[6:]) for path in directory.glob("added-*") if path.name[6:].isdigit()]
        part = directory / f"added-{max(numbers, default=0) + 1:04}"
    if have_own_names and len(missing) < num_photos:
        images = ProcessedImages(images.dataset.select(missing), images.processor, images.num_channels)
    arguments = FeatureExtractionArguments(**{**vars(encoder.arguments), "output_dir": str(part)})
    with OutputLock(part) as lock:
        run = build_run(arguments, lock, (encoder.model, images))
        extract(run, start(run, with_head=False))
        finish(run, with_end=False)
    return part


class _Found:
    """Collects the features of unchanged photos from shards."""

    def __init__(self, directory: Path, names: list[str], dataset: datasets.Dataset, settings: dict[str, Any]):
        self.directory, self.names, self.dataset, self.settings = directory, names, dataset, settings
        self.features: np.ndarray | None = None
        self.errors: list[str | None] = [None] * len(names)
        self._num_shards = 0
        self._damaged: list[Path] = []
        self._rows = {name: row for row, name in enumerate(names)}
        self._is_found = np.zeros(len(names), dtype=bool)
        self._shares_names = False

    def missing(self) -> list[int]:
        """The rows of photos without features."""
        return np.flatnonzero(~self._is_found).tolist()

    def refuse_other_photos(self) -> None:
        """Raises ValueError if there are features, and none has the name of a photo."""
        if self._num_shards and not self._shares_names:
            raise ValueError(f"index {str(self.directory)!r} holds features of other photos: name another index.")

    def tell_of_damaged(self) -> None:
        """Says which shards cannot be read."""
        for path in self._damaged:
            tell(f"{path} is damaged, so its photos are computed again.")

    def remove_damaged(self) -> None:
        """Removes shards that could not be read and were not replaced."""
        for path in self._damaged:
            if _read_shard(path) is None:
                path.unlink(missing_ok=True)

    def add(self, part: Path) -> None:
        """Takes what is still right in the shards of a directory.

        Raises:
            ValueError: if they are of another model.
        """
        self._check_settings(part / _SETTINGS)
        records = read_records(part)
        for path, table in self._tables(part):
            self._num_shards += 1
            names = table["name"].to_pylist()
            self._shares_names |= any(name in self._rows for name in names)
            rows = [self._row_of(*pair) for pair in zip(table["index"].to_pylist(), names, strict=True)]
            known = [row for row in rows if row is not None]
            is_right = len(known) == len(rows) and not self._is_found[known].all()
            if is_right and problem_of(path, records.get(path.name), self.dataset, known) is None:
                self._take(known, table)

    def _tables(self, part: Path) -> Iterator[tuple[Path, pa.Table]]:
        """The shards of a directory with their tables. Damaged ones are left out: their photos are computed again."""
        for path in shard_files(part):
            table = _read_shard(path)
            if table is None:
                self._damaged.append(path)
            else:
                yield path, table

    def _check_settings(self, path: Path) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            before = before if isinstance(before, dict) else {}
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); name another index, or remove this one.") from None
        changed = [words for name, words in _DEPENDS_ON.items() if before.get(name) != self.settings[name]]
        if changed:
            raise ValueError(
                f"index {str(self.directory)!r} holds features of another model ({', '.join(changed)}): name another"
                " index."
            )
        if before.get("format") != "parquet" or "pooled" not in before.get("features", ()):
            raise ValueError(f"index {str(self.directory)!r} has no pooled features in Parquet: name another index.")

    def _row_of(self, index: int, name: str) -> int | None:
        """The row of a photo today. Photos of tables may have no names of their own, but they keep their rows."""
        if index < len(self.names) and self.names[index] == name:
            return index
        return self._rows.get(name)

    def _take(self, rows: list[int], table: pa.Table) -> None:
        values = np.stack(table["pooler_output"].to_numpy())
        if self.features is None:
            self.features = np.full((len(self.names), values.shape[1]), np.nan, dtype=np.float32)
        self.features[rows] = values
        self._is_found[rows] = True
        for row, error in zip(rows, table["error"].to_pylist(), strict=True):
            self.errors[row] = error


def _read_shard(path: Path) -> pa.Table | None:
    """The table of a shard. None if it is damaged."""
    try:
        return pa.parquet.read_table(path, columns=_COLUMNS)
    except (OSError, ValueError, KeyError):
        return None
