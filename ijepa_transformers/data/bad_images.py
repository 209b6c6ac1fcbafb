# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Counts images that cannot be read, and stops a run that has too many."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import datasets
import torch

from .decoding import BadImageError, read_image
from .sources import image_name


class BadImageLog:
    """The bad images of a run, each counted and written once, in the main process.

    Args:
        path: a JSON-lines file with one `{"index", "name", "reason"}` per bad image (no index where images are
            streamed). An existing file is read back, so that a resumed run goes on counting where it was.
        limit: how many bad images are tolerated: an int is a count, a float in [0, 1) a fraction of the data set.
        dataset: the data set of `load_image_dataset`, in which the indices point; None where images are streamed.
        num_channels: as in `PretrainingImages`.
        writes: False in all processes but the main one, which count along, and so stop along, but do not write.
        num_images: in the data set, where `dataset` is None.

    Raises:
        BadImageError: as soon as more than `limit` different images are bad, also when the file read back says so.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        limit: int | float,
        dataset: datasets.Dataset | None,
        num_channels: int = 3,
        writes: bool = True,
        num_images: int | None = None,
    ):
        if limit < 0 or (isinstance(limit, float) and limit >= 1):
            raise ValueError(f"limit must be a count or a fraction in [0, 1) of the data set, got {limit!r}")
        self.path = Path(path)
        self.num_images = num_images if dataset is None else len(dataset)
        self.limit = int(limit * self.num_images) if isinstance(limit, float) else limit
        self.dataset = dataset
        self.num_channels = num_channels
        self.writes = writes
        self.indices = self._read_back()
        self._check()

    def add(self, found: Iterable[int | dict]) -> int:
        """Counts and writes the images not met before; returns the number of different bad images so far.

        Args:
            found: indices, or, of streamed images, records `{"name", "reason"}`.
        """
        by_key = {entry["name"] if isinstance(entry, dict) else entry: entry for entry in found}
        new_keys = sorted(set(by_key) - self.indices)
        if new_keys:
            if self.writes:
                records = [self._record(by_key[key]) for key in new_keys]
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in records))
            self.indices.update(new_keys)
            self._check()
        return len(self.indices)

    def _record(self, entry: int | dict) -> dict:
        return entry if isinstance(entry, dict) else {"index": entry, **self._describe(entry)}

    def _read_back(self) -> set[int | str]:
        if not self.path.exists():
            return set()
        text = self.path.read_text(encoding="utf-8")
        whole_lines = text[: text.rfind("\n") + 1]
        if whole_lines != text and self.writes:
            # A killed run may leave half a line, to which the next record must not be glued.
            repaired = self.path.with_name(f".tmp-{self.path.name}")
            repaired.write_text(whole_lines, encoding="utf-8")
            repaired.replace(self.path)
        return {self._key(line) for line in whole_lines.splitlines()}

    def _key(self, line: str) -> int | str:
        try:
            record = json.loads(line)
            return record.get("index", record["name"])
        except (ValueError, KeyError, AttributeError):
            raise ValueError(f"{self.path} has a line that is no record of a bad image: {line[:100]!r}") from None

    def _describe(self, index: int) -> dict[str, str]:
        """The reason comes from reading the file once more: a worker hands over numbers only."""
        name = image_name(self.dataset, index)
        try:
            read_image(self.dataset[index]["image"], index, self.num_channels)
        except BadImageError as error:
            return {"name": name, "reason": error.reason}
        return {"name": name, "reason": "could not be read at first, but later it could: is the storage reliable?"}

    def _check(self):
        if len(self.indices) > self.limit:
            raise BadImageError(
                f"{len(self.indices)} of {self.num_images} images cannot be read, more than the limit of "
                f"{self.limit}; {self.path} lists them"
            )


def bad_indices(batch: dict[str, torch.Tensor], num_images: int) -> list[int]:
    """The bad images met in a collated batch of `PretrainingImages`, from its `index` (B,) and `num_bad` (B,)."""
    pairs = zip(batch["index"].tolist(), batch["num_bad"].tolist(), strict=True)
    return sorted({(index + skipped) % num_images for index, num_bad in pairs for skipped in range(num_bad)})
