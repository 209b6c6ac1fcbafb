# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Counts images that cannot be read, and stops a run that has too many."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch

from ..files import append_rows, read_rows, write_rows
from .decoding import BadImageError, read_image
from .notices import counted
from .sources import image_name


class BadImageLog:
    """The bad images of a run, each counted and written once, in the main process.

    Args:
        path: a JSON-lines file with one `{"index", "name", "reason"}` per bad image (no index for streamed images).
            An existing file is read, so that a resumed run goes on counting. Its damaged lines are dropped;
            `num_dropped` counts them.
        limit: how many bad images are allowed: an int is a count, a float in [0, 1) a fraction of the data set.
        dataset: the data set of `load_image_dataset` that the indices belong to; None for streamed images.
        num_channels, sixteen_bit_max: as in `PretrainingImages`.
        writes: whether this process writes the file. Only the main process does; the others count too, so that all of
            them stop.
        num_images: in the data set; needed if `dataset` is None.
        is_resumed: whether an existing file belongs to this run. Otherwise it is not read, and `tidy` removes it.

    Raises:
        BadImageError: as soon as more than `limit` different images are bad, also if the existing file has more.
        ValueError: if `limit` is out of range or the number of images is unknown.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        limit: int | float,
        dataset: datasets.Dataset | None,
        num_channels: int = 3,
        writes: bool = True,
        num_images: int | None = None,
        is_resumed: bool = True,
        sixteen_bit_max: int | None = None,
    ):
        if limit < 0 or (isinstance(limit, float) and limit >= 1):
            raise ValueError(f"limit must be a count or a fraction in [0, 1) of the data set, got {limit!r}")
        if dataset is not None:
            num_images = len(dataset)
        if num_images is None:
            raise ValueError("without a dataset, num_images must be given")
        self.path = Path(path)
        self.num_images = num_images
        self.limit = int(limit * self.num_images) if isinstance(limit, float) else limit
        self.dataset = dataset
        self.num_channels = num_channels
        self.sixteen_bit_max = sixteen_bit_max
        self.writes = writes
        self._kept, self.num_dropped = read_rows(self.path, self._is_record) if is_resumed else ([], 0)
        self._is_tidy = is_resumed and not self.num_dropped
        self.newest: list[dict[str, Any]] = []  # the records that the last `add` wrote
        self.indices: set[int | str] = {
            record["name"] if dataset is None else record["index"] for record in self._kept
        }
        self._check()

    def tidy(self) -> None:
        """Removes from the file what is no record of this run."""
        if not self._is_tidy and self.writes:
            if self._kept:
                write_rows(self.path, self._kept)
            else:
                self.path.unlink(missing_ok=True)
        self._is_tidy = True

    def add(self, found: Iterable[int | dict[str, Any]]) -> int:
        """Counts and writes new bad images; returns the number of different bad images so far.

        Args:
            found: indices, or records `{"name", "reason"}` of streamed images.
        """
        by_key = {entry["name"] if isinstance(entry, dict) else entry: entry for entry in found}
        new_keys = sorted(by_key.keys() - self.indices)
        self.newest = []
        if new_keys:
            self.tidy()
            if self.writes:
                self.newest = [self._record(by_key[key]) for key in new_keys]
                append_rows(self.path, self.newest)
            self.indices.update(new_keys)
            self._check()
        return len(self.indices)

    def _record(self, entry: int | dict[str, Any]) -> dict[str, Any]:
        return entry if isinstance(entry, dict) else {"index": entry, **self._describe(entry)}

    def _is_record(self, row: dict[str, Any]) -> bool:
        index = row.get("index")
        has_index = type(index) is int and 0 <= index < self.num_images
        return isinstance(row.get("name"), str) and (self.dataset is None or has_index)

    def _describe(self, index: int) -> dict[str, str]:
        """Name and reason. The image is read once more for the reason, because a batch carries indices only."""
        assert self.dataset is not None  # streamed images come with their records
        name = image_name(self.dataset, index)
        try:
            read_image(self.dataset[index]["image"], index, self.num_channels, self.sixteen_bit_max)
        except BadImageError as error:
            return {"name": name, "reason": error.reason}
        return {"name": name, "reason": "could not be read at first, but could be read later; check the storage"}

    def _check(self) -> None:
        if len(self.indices) > self.limit:
            raise BadImageError(
                f"{len(self.indices)} of {counted(self.num_images, 'image')} cannot be read, more than the limit of "
                f"{self.limit}; {self.path} lists them"
            )


def bad_indices(batch: dict[str, torch.Tensor], num_images: int) -> list[int]:
    """The indices of the bad images in a batch of `PretrainingImages`, from its `index` (B,) and `num_bad` (B,)."""
    pairs = zip(batch["index"].tolist(), batch["num_bad"].tolist(), strict=True)
    return sorted({(index + skipped) % num_images for index, num_bad in pairs for skipped in range(num_bad)})
