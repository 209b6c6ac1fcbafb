# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds and opens images: folders, Parquet and tar shards, Hub data sets and the digits of scikit-learn."""

import glob
import io
import itertools
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow.compute as pc
from PIL import Image

from ..arguments import DatasetArguments, require
from .decoding import FILE_URI, StoredImage, encoded_bytes, open_image, value_name
from .order import SUBSET_STREAM, random_stream


_IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
SHARD_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
_OR = " or "  # between names of splits
_LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label")


def load_image_dataset(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """Opens images for random access.

    Args:
        source: one of
            - "digits": the 1,797 real 8x8 scans of scikit-learn, in their published order: "train" is the first 1,297,
              "test" the last 500. Every digit has 46 to 51 of the test scans.
            - a folder of images, with any depth of sub-folders. Split folders (train, validation or val or valid,
              test) are optional. Class folders are optional too: if every image of a split lies in a sub-folder, and
              there are at least two, the first level names the class. File names never decide a split. Files without
              the extension of an image, hidden files and metadata files are ignored.
            - a folder, file or glob of .parquet, of .tar (WebDataset) or of .arrow files, or a `save_to_disk` folder.
              In a folder of shards the split is the word train, validation, val, valid or test in the path, if any.
            - otherwise the name of a data set on the Hub.
        split: "val" and "valid" mean "validation". Files without a split are "train". "validation or test" is the
            first of the two that is there.
        config_name: the configuration of a Hub data set; other sources have none.
        image_column, label_column: needed only if several columns fit.
        cache_dir: where `datasets` keeps the Arrow files that it makes of Parquet files, tar shards and Hub data sets.

    Returns:
        A data set with the columns "image" (encoded bytes or a path, not decoded) and, if there are labels, "label"
        (`ClassLabel`, with the same ids in every split; integers keep their value).

    Raises:
        ValueError: if the source, the split or a column is absent or ambiguous.
    """
    splits = _open_splits(os.fspath(source), config_name, cache_dir)
    return _with_standard_columns(splits, choose_split(source, splits, split), image_column, label_column)


def open_split(
    arguments: DatasetArguments, split: str, labels: Literal["required", "optional"] = "optional"
) -> datasets.Dataset:
    """Opens one split of the data of a command, see `load_image_dataset`.

    Raises:
        ValueError: as `load_image_dataset`; if the split is empty; or if it has no labels and they are required.
    """
    dataset = load_image_dataset(
        arguments.data,
        split=split,
        config_name=arguments.data_config,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
    )
    require(len(dataset), f"The {split!r} split of {arguments.data!r} is empty.")
    has_labels = "label" in dataset.column_names
    require(has_labels or labels == "optional", f"The {split!r} split of {arguments.data!r} has no labels.")
    return dataset


def available_split(arguments: DatasetArguments, asked: str) -> str:
    """The split that `asked` means in the data of a command. Nothing is opened unless it has the form "A or B".

    Raises:
        ValueError: as `choose_split`, or if the data cannot be opened.
    """
    if _OR not in asked:
        return asked
    return choose_split(arguments.data, _open_splits(arguments.data, arguments.data_config, None), asked)


def choose_split(source: str | os.PathLike, splits: Iterable[str], asked: str) -> str:
    """The name among `splits` that means the same as `asked`.

    Args:
        source: for messages.
        splits: names of the splits that are there.
        asked: one name, where "val" is "validation"; or several, as in "validation or test". The first that is there
            is chosen.

    Raises:
        ValueError: if there is none, or if two of the names mean the same.
    """
    names = {name: _SPLIT_NAMES.get(str(name).lower(), str(name)) for name in splits}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{str(source)!r} has two splits of the same meaning: {', '.join(map(repr, names))}")
    wanted = [_SPLIT_NAMES.get(word.strip().lower(), word.strip()) for word in asked.split(_OR)]
    for choice in wanted:
        for name, meaning in names.items():
            if meaning == choice:
                return name
    missing, there = (" or ".join(map(repr, wanted)), ", ".join(map(repr, sorted(names.values()))))
    raise ValueError(f"{str(source)!r} has no split {missing}; it has {there}")


def image_name(dataset: datasets.Dataset, index: int) -> str:
    """The file name or path of an image, for messages; its number if the source has no names."""
    return value_name(dataset[index]["image"]) or f"image {index}"


@dataclass(frozen=True)
class ResolvedSource:
    """What a source is, before anything is opened.

    Args:
        kind: "digits", "hub", "saved" (a `save_to_disk` folder), "url", "image", ".parquet", ".tar" or ".arrow".
        files: the local files by split. Images of a folder are all in "train"; their paths say the split.
        folder: the folder, if the source is one.
    """

    kind: str
    files: Mapping[str, list[Path]] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def data_files(self) -> dict[str, list[str]]:
        """The files for `datasets.load_dataset`: absolute, and escaped, because it reads names as glob patterns."""
        return {split: [glob.escape(str(file.absolute())) for file in files] for split, files in self.files.items()}


def resolve(source: str, config_name: str | None = None) -> ResolvedSource:
    """Finds out what a source is, and which local files it has.

    Args:
        source: as in `load_image_dataset` or `open_stream`.
        config_name: the configuration of a Hub data set.

    Raises:
        ValueError: if the source is a path where nothing is, holds no images, or holds several kinds of files; or if
            `config_name` is given for another source than a data set of the Hub.
    """
    path = Path(source).expanduser()
    resolved = _resolve_files(source, path)
    if resolved.kind != "hub" and config_name is not None:
        raise ValueError(f"config_name is for Hub data sets only, got {config_name!r} for {source!r}")
    return resolved


def _resolve_files(source: str, path: Path) -> ResolvedSource:
    if source == "digits" or "://" in source:
        return ResolvedSource("digits" if source == "digits" else "url")
    if path.is_dir():
        return _resolve_folder(path)
    if path.is_file() or glob.has_magic(source):
        # A file or a glob is one split, whatever the names of the files are.
        files = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        kind, files = _files_of_one_kind(source, files)
        return ResolvedSource(kind, {"train": files})
    if _looks_like_a_path(source):
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine")
    return ResolvedSource("hub")


def _resolve_folder(folder: Path) -> ResolvedSource:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return ResolvedSource("saved", folder=folder)
    kind, files = _files_of_one_kind(str(folder), _visible_files(folder, (os.path.realpath(folder),)))
    if kind == "image":
        return ResolvedSource(kind, {"train": files}, folder)
    return ResolvedSource(kind, _shards_by_split(folder, files), folder)


def _open_splits(
    source: str, config_name: str | None, cache_dir: str | os.PathLike | None
) -> dict[str, datasets.Dataset]:
    resolved = resolve(source, config_name)
    if resolved.kind == "digits":
        return _open_digits()
    if resolved.kind == "url":
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine; a URL needs streaming")
    if resolved.kind == "saved":
        saved = datasets.load_from_disk(str(resolved.folder))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if resolved.kind == "image":
        files = resolved.files["train"]
        if resolved.folder is None:
            return {"train": _image_paths(files)}
        return _open_image_folder(resolved.folder, [file.relative_to(resolved.folder) for file in files])
    if resolved.kind in SHARD_BUILDERS:
        problem = f"the {resolved.kind} files of {source!r} cannot be read"
        builder, data_files = SHARD_BUILDERS[resolved.kind], resolved.data_files
        return _load_with_datasets(problem, path=builder, data_files=data_files, cache_dir=cache_dir)
    problem = f"{source!r} is neither a file nor a folder on this machine, and it cannot be loaded from the Hub"
    return _load_with_datasets(problem, path=source, name=config_name, cache_dir=cache_dir)


def _looks_like_a_path(source: str) -> bool:
    extensions = (*_IMAGE_EXTENSIONS, *SHARD_BUILDERS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or source.endswith(extensions)


def _load_with_datasets(problem: str, **arguments: Any) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset(**arguments))
    except Exception as error:  # `datasets` wraps the cause in errors of many classes
        reason = error.__cause__ or error
        raise ValueError(f"{problem}: {type(reason).__name__}: {reason}") from error


def _open_digits() -> dict[str, datasets.Dataset]:
    from sklearn.datasets import load_digits  # only needed here

    digits = load_digits()
    scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), published as 0..16
    images = [{"bytes": _png(scan), "path": f"digits/{number:04}.png"} for number, scan in enumerate(scans)]
    features = _features([str(name) for name in digits.target_names])
    parts = {"train": slice(0, 1297), "test": slice(1297, 1797)}
    return {
        split: datasets.Dataset.from_dict({"image": images[part], "label": digits.target[part]}, features=features)
        for split, part in parts.items()
    }


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def _features(class_names: Sequence[str] = ()) -> datasets.Features:
    label = {"label": datasets.ClassLabel(names=list(class_names))} if class_names else {}
    return datasets.Features({"image": datasets.Image(decode=False), **label})


def _visible_files(folder: Path, parents: tuple[str, ...]) -> Iterator[Path]:
    """The files at any depth, sorted. Links to folders are followed, but not back to a folder above them."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not _is_folder(entry):
            yield folder / entry.name
        elif (real_path := os.path.realpath(entry.path)) not in parents:
            yield from _visible_files(folder / entry.name, (*parents, real_path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed, so that it is counted as a bad image
        return False


def _files_of_one_kind(source: str, files: Iterable[Path]) -> tuple[str, list[Path]]:
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        extension = file.suffix.lower()
        kind = "image" if extension in _IMAGE_EXTENSIONS else extension
        if kind == "image" or kind in SHARD_BUILDERS:
            by_kind.setdefault(kind, []).append(file)
    if not by_kind:
        raise ValueError(
            f"{source!r} holds no images ({', '.join(_IMAGE_EXTENSIONS)}) and no .parquet, .tar or .arrow"
        )
    if len(by_kind) > 1:
        raise ValueError(
            f"{source!r} holds several kinds of data ({', '.join(by_kind)}); name one with a glob, such as "
            f"{os.path.join(source, '**', '*.parquet')!r}"
        )
    return by_kind.popitem()


def _shards_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    without_split: list[Path] = []
    for file in files:
        words = "".join(c if c.isalnum() else " " for c in str(file.relative_to(folder)).lower()).split()
        found = {_SPLIT_NAMES[word] for word in words if word in _SPLIT_NAMES}
        (by_split.setdefault(found.pop(), []) if len(found) == 1 else without_split).append(file)
    if without_split and by_split:
        raise ValueError(f"{str(folder)!r}: the split of {without_split[0].name!r} is unclear; name files with a glob")
    return by_split or {"train": without_split}


def _open_image_folder(folder: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """The splits of a folder. Not by the `imagefolder` builder, which takes splits from file names (`test_1.jpg`)."""
    depth = int(_has_split_folders(str(folder), files))
    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(file.parts[0] if depth else "train", []).append(file)
    classes = {
        split: [file.parts[depth] for file in paths if len(file.parts) > depth + 1]
        for split, paths in by_split.items()
    }
    labelled = {split for split, labels in classes.items() if len(labels) == len(by_split[split])}
    class_names = sorted({label for split in labelled for label in classes[split]})
    opened = {}
    for split, paths in by_split.items():
        files = [folder / file for file in paths]
        has_labels = split in labelled and len(class_names) > 1
        opened[split] = _image_paths(files, classes[split], class_names) if has_labels else _image_paths(files)
    return opened


def _has_split_folders(source: str, files: list[Path]) -> bool:
    tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
    split_folders = {top for top in tops if top.lower() in _SPLIT_NAMES}
    if split_folders and split_folders != tops:
        others = sorted(tops - split_folders)
        raise ValueError(
            f"{source!r} has split folders {sorted(split_folders)} beside other images (in {others[:5]}); keep only "
            f"split folders, or, if these are classes, move them all into a folder {os.path.join(source, 'train')!r}"
        )
    return bool(split_folders)


def _image_paths(files: list[Path], labels: Sequence[str] = (), class_names: Sequence[str] = ()) -> datasets.Dataset:
    columns: dict[str, list] = {"image": [_storable(str(file.absolute())) for file in files]}
    if class_names:
        ids = {name: number for number, name in enumerate(class_names)}
        columns["label"] = [ids[label] for label in labels]
    return datasets.Dataset.from_dict(columns, features=_features(class_names))


def _storable(path: str) -> str:
    """The path, or a URI for a path with bytes that are not UTF-8, because Arrow stores UTF-8 only."""
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        return FILE_URI + urllib.parse.quote(os.fsencode(path))


def _with_standard_columns(
    splits: dict[str, datasets.Dataset], split: str, image_column: str | None, label_column: str | None
) -> datasets.Dataset:
    dataset = splits[split].with_format(None)
    image_column = find_image_column(dataset, image_column)
    label_column = _find_label_column(dataset, label_column)
    images = dataset.select_columns([image_column]).rename_columns({image_column: "image"})
    images = images.cast_column("image", datasets.Image(decode=False))
    if label_column is None:
        return images
    # Labels are cast apart from the images. Casting the whole table would write all images to disk again.
    labels = dataset.select_columns([label_column]).rename_columns({label_column: "label"})
    if not isinstance(labels.features["label"], datasets.ClassLabel):
        columns = [table.unique(label_column) for table in splits.values() if label_column in table.column_names]
        labels = labels.cast_column("label", _class_label(label_column, set().union(*columns) - {None}))
    return datasets.concatenate_datasets([images, labels], axis=1)


def _class_label(column: str, values: set) -> datasets.ClassLabel:
    """The classes of all splits. -1 means unlabelled, as everywhere in `datasets`."""
    if any(isinstance(value, str) for value in values):
        return datasets.ClassLabel(names=sorted(values))
    if min(values, default=0) < -1:
        raise ValueError(f"the class ids in column {column!r} must be -1 or more, got {min(values)}")
    return datasets.ClassLabel(names=[str(number) for number in range(max(values, default=0) + 1)])


def find_image_column(dataset: datasets.Dataset | datasets.IterableDataset, asked: str | None) -> str:
    """The column `asked`, or the only one that holds images if `asked` is None.

    Raises:
        ValueError: if there is none, or several, or if `asked` does not hold images.
    """
    features = dataset.features
    if asked is not None:
        if asked not in features or not (_may_hold_images(features[asked]) or _is_value(features[asked], "string")):
            raise ValueError(f"{asked!r} is not a column of images; the columns are {_columns(dataset)}")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in features if _may_hold_images(features[name]) and _holds_images(dataset, name)]
    if len(found) != 1:
        problem = f"several image columns {found}" if found else "no image column"
        raise ValueError(f"{problem}; choose one with image_column. The columns are {_columns(dataset)}")
    return found[0]


def _may_hold_images(feature: Any) -> bool:  # a feature may be a class of `datasets`, a dict or a list
    is_file = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or is_file or _is_value(feature, "binary")


def _holds_images(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> bool:
    """Whether one of the first ten values starts like an image. Only headers are read."""
    for row in itertools.islice(dataset.select_columns([column]), 10):  # streams have no indices
        value: Any = row[column]
        try:
            stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
            open_image(encoded_bytes(cast(StoredImage, stored)))
            return True
        except Exception:  # PIL raises errors of many classes; this value is not an image
            continue
    return False


def _find_label_column(dataset: datasets.Dataset, asked: str | None) -> str | None:
    features = dataset.features
    if asked is not None:
        if asked not in features or not _may_hold_labels(features[asked]):
            raise ValueError(f"{asked!r} is not a column of class ids or names; the columns are {_columns(dataset)}")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in _LABEL_NAMES if name in features and _may_hold_labels(features[name])]
    if len(found) > 1:  # CIFAR-100: coarse_label and fine_label
        found = [name for name in found if name in _LABEL_NAMES] or found
    if len(found) > 1:
        raise ValueError(f"several label columns {found}; choose one with label_column")
    return found[0] if found else None


def _may_hold_labels(feature: Any) -> bool:
    return isinstance(feature, datasets.ClassLabel) or _is_value(feature, "int", "uint", "string")


def _is_value(feature: Any, *kinds: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_").startswith(kinds)


def _columns(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    return ", ".join(f"{name} ({getattr(feature, 'dtype', 'nested')})" for name, feature in dataset.features.items())


def labels_of(dataset: datasets.Dataset) -> np.ndarray:
    """Class ids (images,), int64; -1 for an image without a label (-1 or null in the data set)."""
    return np.array([-1 if label is None else label for label in dataset["label"][:]], dtype=np.int64)


def select_labelled(
    labels: Sequence[int] | np.ndarray,
    *,
    images_per_class: int | None = None,
    label_fraction: float | None = None,
    seed: int = 0,
) -> list[int]:
    """Selects a class-balanced part of a data set, for training with few labels; returns sorted indices.

    `seed` alone decides the order of the images of a class, and the first ones are taken. So a larger part contains
    every smaller part of the same seed.

    Args:
        labels: class id of every image.
        images_per_class: number of images of every class.
        label_fraction: this share of every class, rounded, and at least one image. Give exactly one of the two.
        seed: of the selection.

    Raises:
        ValueError: if not exactly one is given, a number is out of range, or a class has fewer than `images_per_class`
            images.
    """
    if (images_per_class is None) == (label_fraction is None):
        raise ValueError(f"Give images_per_class or label_fraction, got {images_per_class} and {label_fraction}.")
    if images_per_class is not None and images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}.")
    if label_fraction is not None and not 0 < label_fraction <= 1:
        raise ValueError(f"label_fraction must lie in (0, 1], got {label_fraction}.")
    class_ids = np.asarray(labels)
    order = np.argsort(random_stream(seed, SUBSET_STREAM).random_raw(len(class_ids)), kind="stable")
    selected: list[int] = []
    for label in np.unique(class_ids):
        members = order[class_ids[order] == label]
        count = images_per_class or max(1, round((label_fraction or 0) * len(members)))
        if count > len(members):
            raise ValueError(f"Class {label} has {len(members)} images, fewer than images_per_class {count}.")
        selected += members[:count].tolist()
    return sorted(selected)


def select_listed(dataset: datasets.Dataset, path: str | os.PathLike) -> list[int]:
    """Selects the images that a text file names, one file name per line; returns sorted indices.

    Folders in front of a name are ignored, in the file and in the data set. Blank lines are ignored too.

    Raises:
        ValueError: if the file cannot be read or is empty, or if the data set has no image of a listed name, or
            several.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The list {str(path)!r} cannot be read: {error}") from None
    listed = {os.path.basename(line.strip()) for line in lines} - {""}
    if not listed:
        raise ValueError(f"The list {str(path)!r} names no image.")
    places: dict[str, list[int]] = {}
    for index, image in enumerate(_paths(dataset)):
        places.setdefault(os.path.basename(image or ""), []).append(index)
    unknown = sorted(listed - set(places))
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the {len(listed)} names in {str(path)!r} are not in the data, for example"
            f" {unknown[0]!r}."
        )
    repeated = sorted(name for name in listed if len(places[name]) > 1)
    if repeated:
        raise ValueError(f"{repeated[0]!r} in {str(path)!r} is the name of {len(places[repeated[0]])} images.")
    return sorted(places[name][0] for name in listed)


def _paths(dataset: datasets.Dataset) -> list[str | None]:
    """The path of every image, without reading the images beside it."""
    column = dataset.select_columns(["image"]).with_format("arrow")
    parts = (column[start : start + 1000]["image"] for start in range(0, len(column), 1000))
    return [path for part in parts for path in pc.struct_field(part, "path").to_pylist()]
