# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""What the command and the local page ask: photos like a query, near duplicates, outliers, and small pictures."""

import os
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import PreTrainedModel

from ..arguments import require
from ..data.bit_depth import setting_of
from ..data.datasets import ProcessedImages
from ..data.decoding import BadImageError, ImageValue, OpenedImage, decode_image, path_of_uri
from ..data.notices import counted
from ..data.sources import open_split
from ..evaluation.embedding import embed
from ..execution import configure
from .arguments import FEW, SearchArguments
from .doubts import doubt_about
from .index import Encoder, PhotoIndex, open_index, open_photos
from .random_pairs import RandomPairs
from .similarity import LEAST_PHOTOS, Comparison, SimilaritySearch


@dataclass(frozen=True)
class Match:
    """A photo: its row in the data, its name, and a similarity."""

    row: int
    name: str
    similarity: float


@dataclass(frozen=True)
class Duplicates:
    """Photos that are near duplicates of one another, and the similarity of the most similar two."""

    names: list[str]
    rows: list[int]
    similarity: float


@dataclass
class Query:
    """A query image: its path and its pixels as the model takes them, (channels, height, width)."""

    path: str
    pixel_values: torch.Tensor


class PhotoFinder:
    """Searches an index. `open_finder` builds it.

    Photos that cannot be read are left out; `unreadable` has their names and the reasons. `doubt` says why
    similarities of this model tell little, if that is known.
    """

    def __init__(
        self, data: str, model: PreTrainedModel, images: ProcessedImages, index: PhotoIndex, doubt: str | None
    ):
        self.data, self.model, self.images, self.index, self.doubt = data, model, images, index, doubt
        self.rows = [row for row, error in enumerate(index.errors) if error is None]
        self.unreadable = [
            (name, error) for name, error in zip(index.names, index.errors, strict=True) if error is not None
        ]
        require(self.rows, f"No photo of {data!r} can be read.")
        self._search = SimilaritySearch(torch.from_numpy(index.features[self.rows]))
        self._place = {row: place for place, row in enumerate(self.rows)}  # in the search
        self._comparisons: dict[float, Comparison] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def path(self, row: int) -> str | None:
        """The path of a photo. None if it is in a table."""
        value = self.images.dataset[row]["image"]
        return path_of_uri(value["path"]) if value["bytes"] is None else None

    def like_query(self, query: Query, k: int | None) -> list[Match]:
        """The `k` photos most like a query. A query that is a file of the folder is not listed itself.

        Raises:
            ValueError: if there are fewer photos than `k`.
        """
        row = self._row_of_file(query.path)
        if row in self._place:
            return self.like_photo(row, k)
        features = embed(self.model, query.pixel_values[None], ["pooler_output"])["pooler_output"].float()
        return self._matches(features, self._count(k, len(self)))

    def like_photo(self, row: int, k: int | None) -> list[Match]:
        """The `k` other photos that are most like a photo of the folder.

        Raises:
            ValueError: if there are fewer other photos than `k`.
        """
        features = torch.from_numpy(self.index.features[row : row + 1])
        return self._matches(features, self._count(k, len(self) - 1, "other "), self._place[row])

    def _count(self, k: int | None, available: int, kind: str = "") -> int:
        require(k is None or k <= available, f"k is {k}, but there are {counted(available, f'{kind}photo')}.")
        return min(FEW, available) if k is None else k

    def _matches(self, features: torch.Tensor, k: int, without: int | None = None) -> list[Match]:
        if k == 0:
            return []
        found = self._search.query(features, k, without)
        return [
            self._match(place, value)
            for place, value in zip(found.rows[0].tolist(), found.similarities[0].tolist(), strict=True)
        ]

    def _match(self, place: int, similarity: float) -> Match:
        row = self.rows[place]
        return Match(row, self.index.names[row], similarity)

    def _row_of_file(self, path: str) -> int | None:
        """The row of a file, if it is one of the photos. Only photos whose files have the same name are looked at."""
        names = {os.path.basename(os.path.abspath(path)), os.path.basename(os.path.realpath(path))}
        rows = [row for row, name in enumerate(self.index.names) if os.path.basename(path_of_uri(name)) in names]
        places = [(row, place) for row in rows if (place := self.path(row)) is not None]
        first = [row for row, place in places if os.path.abspath(place) == os.path.abspath(path)]
        linked = [row for row, place in places if os.path.realpath(place) == os.path.realpath(path)]
        return next(iter(first + linked), None)

    def random_pairs(self) -> RandomPairs | None:
        """How similar two photos are that were taken at random; None if similarities mean nothing here."""
        return self._search.random_pairs() if len(self) >= LEAST_PHOTOS else None

    def usual_threshold(self) -> float:
        """The least similarity of near duplicates, if the user names none."""
        return self._search.usual_threshold()

    def duplicates(self, threshold: float) -> list[Duplicates]:
        """Groups of photos whose cosine similarity is at least `threshold`, the most similar first."""
        groups = []
        for group in self._comparison(threshold).groups:
            rows = [self.rows[place] for place in group.rows]
            groups.append(Duplicates([self.index.names[row] for row in rows], rows, group.similarity))
        return groups

    def outliers(self, k: int | None) -> list[Match]:
        """The `k` photos that are least like their nearest neighbours, the least first, each with its mean cosine
        similarity to them.

        Raises:
            ValueError: if there are fewer photos than `k`.
        """
        count = self._count(k, len(self))
        comparison = next(iter(self._comparisons.values()), None) or self._comparison(1)
        return [self._match(place, float(comparison.closeness[place])) for place in comparison.outliers(count)]

    def _comparison(self, threshold: float) -> Comparison:
        if threshold not in self._comparisons:
            self._comparisons = {threshold: self._search.compare_all(threshold)}
        return self._comparisons[threshold]

    def read_query(self, path: str) -> Query:
        """Reads a query as all images are read.

        Raises:
            ValueError: if it cannot be read.
        """
        return read_query(self.images, path)

    def picture(self, row: int, size: int) -> Image.Image:
        """A photo, at most `size` pixels wide and high."""
        return picture_of(self.images, self.images.dataset[row]["image"], size)

    def query_picture(self, path: str, size: int) -> Image.Image:
        """A query, at most `size` pixels wide and high."""
        return picture_of(self.images, {"path": path, "bytes": None}, size)


def open_finder(arguments: SearchArguments) -> tuple[PhotoFinder, list[Query]]:
    """Opens the photos and the model, reads the queries, and completes the features.

    Raises:
        ValueError: if one of them cannot be opened, or if a query cannot be read. This is found before any feature is
            computed.
    """
    accelerator = Accelerator()
    require(
        accelerator.num_processes == 1,
        "ijepa search is one process: compute the features with ijepa launch extract, and name their"
        " directory as index.",
    )
    encoder = open_photos(arguments, open_split(arguments, arguments.split))
    queries = [read_query(encoder.images, path) for path in arguments.query]
    return _complete(arguments, encoder, accelerator), queries


def _complete(arguments: SearchArguments, encoder: Encoder, accelerator: Accelerator) -> PhotoFinder:
    index = open_index(arguments, encoder)
    doubt = doubt_about(arguments.model, arguments.encoder, encoder.model)
    configure(encoder.model, accelerator.device.type, arguments.dtype)
    return PhotoFinder(arguments.data, encoder.model.to(accelerator.device).eval(), encoder.images, index, doubt)


def read_query(images: ProcessedImages, path: str) -> Query:
    """Reads a query as all images are read.

    Raises:
        ValueError: if it cannot be read.
    """
    path = os.path.expanduser(path)
    require(os.path.lexists(path), f"The query {path!r} cannot be read: there is no such file.")
    require(not os.path.isdir(path), f"The query {path!r} cannot be read: this is a folder.")
    try:
        array = decode_image({"path": path, "bytes": None}, images.num_channels, None, setting_of(images.processor))
    except BadImageError as error:
        reason = error.reason.removeprefix("ValueError: ")
        raise ValueError(f"The query {path!r} cannot be read: {reason}") from None
    return Query(path, images.prepare(array))


def picture_of(images: ProcessedImages, value: ImageValue, size: int) -> Image.Image:
    """An image for people, upright, at most `size` pixels wide and high.

    It is in colour, also if the model sees grey. For a model of other channels it is the mean of the channels.

    Raises:
        BadImageError: if it cannot be read.
    """
    array = _decode_small(value, 3 if images.num_channels == 1 else images.num_channels, images, size)
    if array.shape[2] != 3:
        array = array.mean(2).round().astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(array))
    image.thumbnail((size, size))
    return image


def _decode_small(value: ImageValue, num_channels: int, images: ProcessedImages, size: int) -> np.ndarray:
    """uint8 (H, W, channels). A JPEG is decoded to fewer pixels if these are enough, which takes less time."""
    opened, reduction = OpenedImage(value), 1
    if opened.reducible:
        shorter = min(opened.height_and_width)
        reduction = next((factor for factor in (8, 4, 2) if shorter >= 2 * factor * size), 1)
    try:
        return opened.decode(num_channels, reduction, setting_of(images.processor))
    except BadImageError:
        if num_channels == images.num_channels:
            raise
        return decode_image(value, images.num_channels, None, setting_of(images.processor))  # an array of one channel
