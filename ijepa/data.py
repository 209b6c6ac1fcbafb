# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Images in: opening data sets, decoding files, crops, the order of a pretraining run, and what to do with bad files.

Shape legend:
    B images, C channels (1 or 3), H rows, W columns. A decoded image is a uint8 array (H, W, C) in 0..255, a sample's
    `pixel_values` a uint8 tensor (C, H, W). `size` is one number for a square or (height, width), in pixels. A box is
    (top, left, height, width).

Nothing here keeps a state that a resumed run would have to restore: the order of the images is a pure function of
(seed, epoch) and every crop of (seed, epoch, index); neither the number of workers nor an interruption changes them.
Normalisation happens on the device, on uint8 batches, which are a quarter of the bytes of float ones.
"""

import functools
import glob
import io
import itertools
import json
import logging
import math
import os
import stat
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL
import pyarrow.compute as pc
import torch
from PIL import Image, UnidentifiedImageError
from transformers import BitImageProcessorPil


try:
    import simplejpeg
except ImportError:  # slower, with the same pixels
    simplejpeg = None


IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# What a file may be, whatever it is called. PIL knows more, some of it by starting other programs (EPS: Ghostscript).
IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JPEG2000", "PPM")
SHARD_BUILDERS = {".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow"}
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}
LABEL_NAMES = ("label", "labels", "class", "cls", "fine_label")

EVALUATION_RESIZE_RATIO = 256 / 224  # shorter side over crop, the usual ImageNet protocol
# What an image may at most be, so that memory is bounded whatever a file holds (docs/bad_images.md has the figures).
MAX_IMAGE_PIXELS = 2**27  # 134 million: above the largest common cameras (102), below where PIL itself refuses (179)
MAX_ASPECT_RATIO = 256  # longer over shorter side: evaluation resizes the shorter side, and the longer one follows
MAX_FILE_BYTES = 2**29  # encoded
MAX_SUBSTITUTES = 100  # unreadable images in a row that a sample may skip before the run stops

# First number of a random stream's key, so that no two uses share a stream.
_ORDER_STREAM, _CROP_STREAM, _AUGMENTATION_STREAM, _MIX_STREAM, _SUBSET_STREAM = range(5)
_BLOCK_STREAM, _FORWARD_STREAM = 5, 6

_EXIF_ORIENTATION = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
# Whether to turn the rows upside down, to mirror the columns, and then to exchange rows and columns.
_UPRIGHT_BY_ORIENTATION = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_JPEG_FORMATS = ("JPEG", "MPO")  # PIL's name for a JPEG that holds further images: phones write them
_REDUCTIONS = (8, 4, 2)  # that libjpeg can decode at, beside 1
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_PIXELS_AT_A_TIME = 2**20
_URI = "file://"

# A broken file is told of once, by its name, in a BadImageError, and not by PIL as well, without a name.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)


# Bad images


class BadImageError(ValueError):
    """An image that cannot be read, or too many of them. The message holds the file's name and the reason."""

    def __init__(self, name, reason=None):
        # One argument must be enough: a DataLoader re-raises a worker's error as type(error)(message).
        super().__init__(name if reason is None else f"{name}: {reason}")
        self.reason = reason


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
            _read_image(self.dataset[index]["image"], index, self.num_channels)
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


# Opening data sets


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
              test) are optional, and so are class folders: if every image of a split lies in a sub-folder, and there
              are at least two, the first level names the class. File names never decide a split. Files with other
              extensions than IMAGE_EXTENSIONS, hidden files and metadata files are not read.
            - a folder, file or glob of .parquet, of .tar (WebDataset) or of .arrow files, or a `save_to_disk` folder.
              In a folder of shards the split is the word train, validation, val, valid or test in the path, if any.
            - otherwise the name of a data set on the Hub.
        split: "val" and "valid" mean "validation". Files without a split are "train".
        config_name: the configuration of a Hub data set; nothing else has one.
        image_column, label_column: needed only where the right one is not obvious.
        cache_dir: where `datasets` keeps the Arrow files that it makes of Parquet files, tar shards and Hub data sets.

    Returns:
        A data set with the columns "image" (encoded bytes or a path, not decoded) and, if there are labels, "label"
        (`ClassLabel`; the same ids in every split; ints keep their value).

    Raises:
        ValueError: if the source, the split or a column is absent or ambiguous.
    """
    splits = _open_splits(os.fspath(source), config_name, cache_dir)
    return _with_standard_columns(splits, choose_split(source, splits, split), image_column, label_column)


def choose_split(source: str | os.PathLike, splits: Iterable[str], asked: str) -> str:
    """The name among `splits` that means the same as `asked` ("val" is "validation").

    Raises:
        ValueError: if there is none, or if two of the names mean the same.
    """
    names = {name: SPLIT_NAMES.get(str(name).lower(), str(name)) for name in splits}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{str(source)!r} has two splits of the same meaning: {', '.join(map(repr, names))}")
    asked = SPLIT_NAMES.get(asked.lower(), asked)
    for name, meaning in names.items():
        if meaning == asked:
            return name
    raise ValueError(f"{str(source)!r} has no split {asked!r}; it has {', '.join(map(repr, sorted(names.values())))}")


def image_name(dataset: datasets.Dataset, index: int) -> str:
    """The file name or path of an image, for messages; its number where the source keeps no names."""
    return _value_name(dataset[index]["image"]) or f"image {index}"


def _open_splits(source: str, config_name: str | None, cache_dir) -> dict[str, datasets.Dataset]:
    path = Path(source).expanduser()
    is_local = source == "digits" or path.exists() or glob.has_magic(source) or looks_like_a_path(source)
    if is_local and config_name is not None:
        raise ValueError(f"config_name is for Hub data sets only, got {config_name!r} for {source!r}")
    if source == "digits":
        return _open_digits()
    if path.is_dir():
        return _open_folder(path, cache_dir)
    if path.is_file():
        return _open_files(source, [path], cache_dir)
    if glob.has_magic(source):
        return _open_files(source, sorted(map(Path, glob.glob(str(path), recursive=True))), cache_dir)
    if is_local:
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine")
    problem = f"{source!r} is neither a file nor a folder on this machine, and it cannot be loaded from the Hub"
    return _load_with_datasets(problem, path=source, name=config_name, cache_dir=cache_dir)


def looks_like_a_path(source: str) -> bool:
    extensions = (*IMAGE_EXTENSIONS, *SHARD_BUILDERS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or source.endswith(extensions)


def _load_with_datasets(problem: str, **arguments) -> dict[str, datasets.Dataset]:
    try:
        return dict(datasets.load_dataset(**arguments))
    except Exception as error:  # `datasets` wraps what went wrong in errors of many classes
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


def _open_folder(folder: Path, cache_dir) -> dict[str, datasets.Dataset]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        saved = datasets.load_from_disk(str(folder))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    kind, files = files_of_one_kind(str(folder), visible_files(folder, (os.path.realpath(folder),)))
    if kind == "image":
        return _open_image_folder(folder, [file.relative_to(folder) for file in files])
    return _open_shards(str(folder), kind, shards_by_split(folder, files), cache_dir)


def _open_files(source: str, files: list[Path], cache_dir) -> dict[str, datasets.Dataset]:
    """Files that the caller named one by one, or by a glob, are one split whatever they are called."""
    kind, files = files_of_one_kind(source, files)
    if kind == "image":
        return {"train": _image_paths(files)}
    return _open_shards(source, kind, {"train": files}, cache_dir)


def visible_files(folder: Path, parents: tuple[str, ...]) -> Iterator[Path]:
    """Files at any depth, sorted, through links to folders but not in circles."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if not _is_folder(entry):
            yield folder / entry.name
        elif (real_path := os.path.realpath(entry.path)) not in parents:
            yield from visible_files(folder / entry.name, (*parents, real_path))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle: listed, so that it is counted as a bad image
        return False


def files_of_one_kind(source: str, files: Iterable[Path]) -> tuple[str, list[Path]]:
    by_kind = {}
    for file in files:
        extension = file.suffix.lower()
        kind = "image" if extension in IMAGE_EXTENSIONS else extension
        if kind == "image" or kind in SHARD_BUILDERS:
            by_kind.setdefault(kind, []).append(file)
    if not by_kind:
        raise ValueError(f"{source!r} holds no images ({', '.join(IMAGE_EXTENSIONS)}) and no .parquet, .tar or .arrow")
    if len(by_kind) > 1:
        raise ValueError(
            f"{source!r} holds several kinds of data ({', '.join(by_kind)}); name one with a glob, such as "
            f"{os.path.join(source, '**', '*.parquet')!r}"
        )
    return by_kind.popitem()


def shards_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split = {}
    for file in files:
        words = "".join(c if c.isalnum() else " " for c in str(file.relative_to(folder)).lower()).split()
        found = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        by_split.setdefault(found.pop() if len(found) == 1 else None, []).append(file)
    if None in by_split and len(by_split) > 1:
        raise ValueError(
            f"{str(folder)!r}: the split of {by_split[None][0].name!r} is unclear; name files with a glob"
        )
    return by_split if None not in by_split else {"train": by_split[None]}


def _open_shards(source: str, kind: str, files: dict[str, list[Path]], cache_dir) -> dict[str, datasets.Dataset]:
    data_files = {split: [glob.escape(str(file.absolute())) for file in paths] for split, paths in files.items()}
    problem = f"the {kind} files of {source!r} cannot be read"
    return _load_with_datasets(problem, path=SHARD_BUILDERS[kind], data_files=data_files, cache_dir=cache_dir)


def _open_image_folder(folder: Path, files: list[Path]) -> dict[str, datasets.Dataset]:
    """Lists the files itself, because the `imagefolder` builder takes splits from file names (`test_1.jpg`)."""
    depth = int(_has_split_folders(str(folder), files))
    by_split = {}
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
        has_labels = split in labelled and len(class_names) > 1
        labels, names = (classes[split], class_names) if has_labels else ((), ())
        opened[split] = _image_paths([folder / file for file in paths], labels, names)
    return opened


def _has_split_folders(source: str, files: list[Path]) -> bool:
    tops = {file.parts[0] if len(file.parts) > 1 else "" for file in files}
    split_folders = {top for top in tops if top.lower() in SPLIT_NAMES}
    if split_folders and split_folders != tops:
        others = sorted(tops - split_folders)
        raise ValueError(
            f"{source!r} has split folders {sorted(split_folders)} beside other images (in {others[:5]}); keep only "
            f"split folders, or, if these are classes, move them all into a folder {os.path.join(source, 'train')!r}"
        )
    return bool(split_folders)


def _image_paths(files: list[Path], labels: Sequence[str] = (), class_names: Sequence[str] = ()) -> datasets.Dataset:
    columns = {"image": [_storable(str(file.absolute())) for file in files]}
    if class_names:
        ids = {name: number for number, name in enumerate(class_names)}
        columns["label"] = [ids[label] for label in labels]
    return datasets.Dataset.from_dict(columns, features=_features(class_names))


def _storable(path: str) -> str:
    """Arrow stores UTF-8 only: a path with other bytes is written as a URI, which `_read_file` takes back."""
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        return _URI + urllib.parse.quote(os.fsencode(path))


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
    # Labels are cast on their own: casting them inside the table would rewrite all images on disk.
    labels = dataset.select_columns([label_column]).rename_columns({label_column: "label"})
    if not isinstance(labels.features["label"], datasets.ClassLabel):
        columns = [table.unique(label_column) for table in splits.values() if label_column in table.column_names]
        labels = labels.cast_column("label", _class_label(label_column, set().union(*columns) - {None}))
    return datasets.concatenate_datasets([images, labels], axis=1)


def _class_label(column: str, values: set) -> datasets.ClassLabel:
    """One class list for all splits, from all splits. -1 means unlabelled, as everywhere in `datasets`."""
    if any(isinstance(value, str) for value in values):
        return datasets.ClassLabel(names=sorted(values))
    if min(values, default=0) < -1:
        raise ValueError(f"the class ids in column {column!r} must be -1 or more, got {min(values)}")
    return datasets.ClassLabel(names=[str(number) for number in range(max(values, default=0) + 1)])


def find_image_column(dataset: datasets.Dataset | datasets.IterableDataset, asked: str | None) -> str:
    """The column `asked`, or else the only one that holds images. Raises ValueError if there is none, or several."""
    features = dataset.features
    if asked is not None:
        if asked not in features or not (_may_hold_images(features[asked]) or _is_value(features[asked], "string")):
            raise ValueError(f"{asked!r} is no column of images; the columns are {_columns(dataset)}")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    found = found or [name for name in features if _may_hold_images(features[name]) and _holds_images(dataset, name)]
    if len(found) != 1:
        problem = f"several image columns {found}" if found else "no image column"
        raise ValueError(f"{problem}; choose one with image_column. The columns are {_columns(dataset)}")
    return found[0]


def _may_hold_images(feature) -> bool:
    is_file = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or is_file or _is_value(feature, "binary")


def _holds_images(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> bool:
    """True if one of the first ten values starts like an image; only file headers are read."""
    for row in itertools.islice(dataset.select_columns([column]), 10):  # streams have no indices
        value = row[column]
        try:
            _open_image(_encoded(value if isinstance(value, dict) else {"bytes": value, "path": None}))
            return True
        except Exception:  # whatever PIL says: this value is no image
            continue
    return False


def _find_label_column(dataset: datasets.Dataset, asked: str | None) -> str | None:
    features = dataset.features
    if asked is not None:
        if asked not in features or not _may_hold_labels(features[asked]):
            raise ValueError(f"{asked!r} is no column of class ids or names; the columns are {_columns(dataset)}")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in LABEL_NAMES if name in features and _may_hold_labels(features[name])]
    if len(found) > 1:  # CIFAR-100: coarse_label and fine_label
        found = [name for name in found if name in LABEL_NAMES] or found
    if len(found) > 1:
        raise ValueError(f"several label columns {found}; choose one with label_column")
    return found[0] if found else None


def _may_hold_labels(feature) -> bool:
    return isinstance(feature, datasets.ClassLabel) or _is_value(feature, "int", "uint", "string")


def _is_value(feature, *kinds: str) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_").startswith(kinds)


def _columns(dataset: datasets.Dataset | datasets.IterableDataset) -> str:
    return ", ".join(f"{name} ({getattr(feature, 'dtype', 'nested')})" for name, feature in dataset.features.items())


# Labels


def labels_of(dataset: datasets.Dataset) -> np.ndarray:
    """Class ids (images,), int64; -1 for an image without a label, which a data set may also write as null."""
    return np.array([-1 if label is None else label for label in dataset["label"][:]], dtype=np.int64)


def select_labelled(
    labels: Sequence[int], *, images_per_class: int | None = None, label_fraction: float | None = None, seed: int = 0
) -> list[int]:
    """A class-balanced part of a data set, for training with few labels: sorted indices.

    The images of a class stand in an order that only `seed` decides, and the first of them are taken. So a larger part
    holds every smaller one of the same seed.

    Args:
        labels: class id of every image.
        images_per_class: as many of every class.
        label_fraction: this share of every class, rounded, and at least one image. Exactly one of both is given.
        seed: of the selection.

    Raises:
        ValueError: if a number is out of range, or a class has fewer than `images_per_class` images.
    """
    if (images_per_class is None) == (label_fraction is None):
        raise ValueError(f"Give images_per_class or label_fraction, got {images_per_class} and {label_fraction}.")
    if images_per_class is not None and images_per_class < 1:
        raise ValueError(f"images_per_class must be at least 1, got {images_per_class}.")
    if label_fraction is not None and not 0 < label_fraction <= 1:
        raise ValueError(f"label_fraction must lie in (0, 1], got {label_fraction}.")
    labels = np.asarray(labels)
    order = np.argsort(_random_stream(seed, _SUBSET_STREAM).random_raw(len(labels)), kind="stable")
    selected = []
    for label in np.unique(labels):
        members = order[labels[order] == label]
        count = images_per_class if label_fraction is None else max(1, round(label_fraction * len(members)))
        if count > len(members):
            raise ValueError(f"Class {label} has {len(members)} images, fewer than images_per_class {count}.")
        selected += members[:count].tolist()
    return sorted(selected)


def select_listed(dataset: datasets.Dataset, path: str | os.PathLike) -> list[int]:
    """The images that a text file names, one file name per line, such as a published list: sorted indices.

    Folders before a name are ignored, in the file and in the data set; blank lines too.

    Raises:
        ValueError: if the file cannot be read or is empty, or names an image that is absent, or that is there twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The list {str(path)!r} cannot be read: {error}") from None
    listed = {os.path.basename(line.strip()) for line in lines} - {""}
    if not listed:
        raise ValueError(f"The list {str(path)!r} names no image.")
    places = {}
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


# Decoding


def jpeg_decoder() -> str:
    """What decodes JPEG files here, with its version: simplejpeg where it is installed, else PIL."""
    return f"simplejpeg {simplejpeg.__version__}" if simplejpeg else f"PIL {PIL.__version__}"


def decode_image(value, num_channels: int = 3, name: str | None = None) -> np.ndarray:
    """Decodes an image to uint8 (H, W, C), upright as its EXIF orientation says.

    Transparent pixels are laid on white, 16-bit values are scaled (65535 becomes 255), of an animation the first frame
    is taken, palettes and CMYK become RGB, and one channel is the luma of ITU-R 601. Colour profiles are ignored, and
    so is EXIF data that cannot be read. The content decides the format, one of IMAGE_FORMATS, not the file's name.

    Args:
        value: `{"bytes": ..., "path": ...}` as in a column `Image(decode=False)`, or a PIL image.
        num_channels: 1 or 3.
        name: what messages call the image; its path by default.

    Raises:
        BadImageError: if the image cannot be decoded to its last pixel, or is beyond MAX_IMAGE_PIXELS,
            MAX_ASPECT_RATIO or MAX_FILE_BYTES, which is known before anything is decoded. A JPEG that is damaged
            before its end marker does decode: what is missing is grey, and libjpeg does not tell.
    """
    return np.require(_OpenedImage(value, name).decode(num_channels), requirements=["C_CONTIGUOUS", "WRITEABLE"])


class _OpenedImage:
    """An image of which only the header was read: it is within the limits, but not decoded yet.

    Args:
        value, name: as in `decode_image`.

    Raises:
        BadImageError: as `decode_image`.
    """

    def __init__(self, value, name: str | None = None):
        self.name = name or _value_name(value) or "an image without a name"
        with _faults_as_bad_image(self.name):
            self._encoded = None if isinstance(value, Image.Image) else _encoded(value)
            self._image = value if self._encoded is None else _open_image(self._encoded)
            self._size = self._image.size  # decoding may reduce it
            _check_size(*self._size)
            _check_tiles(getattr(self._image, "tag_v2", {}))

    @property
    def reducible(self) -> bool:
        """Whether `decode` can make the image smaller."""
        return self._encoded is not None and self._image.format in _JPEG_FORMATS

    @property
    def height_and_width(self) -> tuple[int, int]:
        """Of the upright image; for JPEG files, whose orientation is known before they are decoded."""
        width, height = self._size
        return (width, height) if _turns(self._image)[2] else (height, width)

    def reduced_box(self, box: tuple[int, int, int, int], reduction: int) -> tuple[float, float, float, float]:
        """Where a box of the upright image lies in what `decode` makes of it."""
        upside_down, mirrored, exchanged = _turns(self._image)
        turned_round = (mirrored, upside_down) if exchanged else (upside_down, mirrored)
        # Sides are rounded up at their end as stored, which is the beginning of a side that is turned round.
        top, left = (
            start + (-side % reduction if turned else 0)
            for start, side, turned in zip(box[:2], self.height_and_width, turned_round, strict=True)
        )
        return top / reduction, left / reduction, box[2] / reduction, box[3] / reduction

    def decode(self, num_channels: int, reduction: int = 1) -> np.ndarray:
        """Upright uint8 (H, W, C), which may be read-only and a view; once only.

        Args:
            num_channels: 1 or 3.
            reduction: 2, 4 or 8 divides a `reducible` image's sides, rounded up: libjpeg then decodes fewer of the
                frequencies, which takes less time.

        Raises:
            BadImageError: the image cannot be decoded to its last pixel.
        """
        if num_channels not in (1, 3):
            raise ValueError(f"num_channels must be 1 or 3, got {num_channels!r}")
        with _faults_as_bad_image(self.name):
            array = _decode_jpeg(self._encoded, self._image, num_channels, reduction) if self.reducible else None
            if array is None:
                array = _decode_with_pil(self._image, num_channels, reduction)
            return _upright(array, *_turns(self._image))


@contextmanager
def _faults_as_bad_image(name: str):
    try:
        yield
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError, struct.error and more
        raise BadImageError(name, _reason(error)) from error


def _decode_jpeg(encoded: bytes, image: Image.Image, num_channels: int, reduction: int) -> np.ndarray | None:
    """The pixels (H, W, C) as PIL would decode them, by simplejpeg, which does so faster; None to leave them to PIL.

    Both are libjpeg-turbo. But simplejpeg, being strict, gives up where libjpeg only warns: at a file that is cut off,
    which PIL refuses too, and at one that is damaged, which PIL may accept. So what is refused, and why, is for PIL.
    """
    if simplejpeg is None or image.mode not in ("L", "RGB"):
        return None
    colorspace = "GRAY" if image.mode == "L" and num_channels == 1 else "RGB"
    width, height = image.size
    smallest = {"min_width": -(-width // reduction), "min_height": -(-height // reduction)} if reduction > 1 else {}
    try:
        if simplejpeg.decode_jpeg_header(encoded)[:2] != (height, width):
            return None  # the limits were checked for the size that PIL has read
        array = simplejpeg.decode_jpeg(encoded, colorspace, min_factor=reduction, **smallest)  # (H, W, C)
    except ValueError:
        return None
    is_luma = num_channels == 1 and image.mode == "RGB"
    return _as_array(Image.fromarray(array).convert("L")) if is_luma else array


def _decode_with_pil(image: Image.Image, num_channels: int, reduction: int) -> np.ndarray:
    if reduction > 1:
        image.draft(None, (image.width // reduction, image.height // reduction))
    image.load()
    array = np.asarray(_with_channels(image, num_channels))  # read-only, which saves a copy
    return array if array.ndim == 3 else array[:, :, None]


def _open_image(encoded: bytes) -> Image.Image:
    """Reads the header only."""
    return Image.open(io.BytesIO(encoded), formats=IMAGE_FORMATS)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


def _check_tiles(tags) -> None:
    """libtiff takes memory for a whole tile before it reads one, however small the image in its corner is."""
    width, height = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0)
    if width * height > MAX_IMAGE_PIXELS:
        raise ValueError(f"tiles of {width} x {height} pixels are more than {MAX_IMAGE_PIXELS:,}")


def _read_image(value, index: int, num_channels: int) -> np.ndarray:
    return _OpenedImage(value, _name_in_messages(value, index)).decode(num_channels)


def _name_in_messages(value, index: int) -> str:
    return _value_name(value) or f"image {index}"


def _value_name(value) -> str | None:
    return value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)


def _encoded(value: dict | None) -> bytes:
    if value is None or (value.get("bytes") is None and value.get("path") is None):
        raise ValueError("there is neither a path nor bytes")
    encoded = _read_file(value["path"]) if value.get("bytes") is None else value["bytes"]
    if not encoded:
        raise ValueError("the file is empty")
    _check_file_size(len(encoded))
    return encoded


def _read_file(path: str) -> bytes:
    """Looks before it opens: opening a pipe would wait for a writer that never comes."""
    if path.startswith(_URI):
        path = os.fsdecode(urllib.parse.unquote_to_bytes(path.removeprefix(_URI)))
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("this is no regular file")
    _check_file_size(status.st_size)
    with open(path, "rb") as file:
        # Python takes memory for what it is asked to read. A file of /proc says that it has no size.
        return file.read((status.st_size or MAX_FILE_BYTES) + 1)


def _check_file_size(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise ValueError(f"the file has {num_bytes:,} bytes, more than {MAX_FILE_BYTES:,}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own message is the address of a buffer
        return "this is no image that PIL knows"
    return f"{type(error).__name__}: {error}"


def _turns(image: Image.Image) -> tuple[bool, bool, bool]:
    """What makes the image upright, as in _UPRIGHT_BY_ORIENTATION."""
    as_stored = (False, False, False)
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # the pixels are there, only what was said about them is broken
        return as_stored
    return _UPRIGHT_BY_ORIENTATION.get(orientation, as_stored) if isinstance(orientation, int) else as_stored


def _upright(array: np.ndarray, upside_down: bool, mirrored: bool, exchanged: bool) -> np.ndarray:
    """A view of the array."""
    array = array[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
    return array.swapaxes(0, 1) if exchanged else array


def _with_channels(image: Image.Image, num_channels: int) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES:
        image = _eight_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; store 8 or 16 bits")
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        image = image.convert("RGB")  # the only mode without a way to L
    mode = "L" if num_channels == 1 else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image) -> Image.Image:
    """PIL's own convert("L") cuts 16-bit values at 255, which makes nearly all of them white."""
    pixels = np.asarray(image)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise ValueError(
            f"integer pixels from {pixels.min()} to {pixels.max()}; only 8 and 16 bits have a known range"
        )
    result = np.empty(pixels.shape, np.uint8)
    rows = max(1, _PIXELS_AT_A_TIME // pixels.shape[1])  # or floats would take eight times the memory of the file
    for start in range(0, len(pixels), rows):
        result[start : start + rows] = np.rint(pixels[start : start + rows] / 257)
    return Image.fromarray(result)


def _as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    array = np.array(image) if isinstance(image, Image.Image) else image
    return array if array.ndim == 3 else array[:, :, None]  # (H, W, C)


# Transforms


def random_resized_crop(
    image: Image.Image | np.ndarray,
    size: int | tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
    *,
    horizontal_flip: bool = False,
    interpolation: str = "bilinear",
) -> torch.Tensor:
    """The only augmentation of I-JEPA (appendix A.1): a random part of the image, resized with antialiasing.

    Args:
        image: uint8 (H, W, C), or a PIL image of mode L or RGB.
        size: of the result. For a size that is not square, `ratio` is relative to the result's width / height, so
            that the stretching of the content stays within `ratio`.
        scale: smallest and largest part of the image's area.
        ratio: smallest and largest width / height of the crop, log-uniform in between.
        generator: where all randomness comes from.
        horizontal_flip: mirror half of the results. Off in the paper; the crops are the same with and without.
        interpolation: "bilinear" (as published) or "bicubic".

    Returns:
        uint8 (C, height, width).
    """
    array = _as_array(image)
    height, width = _height_and_width(size)
    box = sample_crop(*array.shape[:2], width / height, scale, ratio, generator)
    return _flipped_at_random(_resize_box(array, box, (height, width), interpolation), horizontal_flip, generator)


def _reduced_random_resized_crop(
    image: _OpenedImage,
    num_channels: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
    horizontal_flip: bool,
    interpolation: str,
) -> torch.Tensor:
    """`random_resized_crop` of a `reducible` image, decoded no larger than the crop needs.

    The crop is the same part of the image. Where it is at least two, four or eight times as large as the result in
    both directions, libjpeg makes the image smaller by as much while it decodes; the pixels come out a little
    different (docs/loading.md has figures). Elsewhere they are the same.
    """
    box = sample_crop(*image.height_and_width, size[1] / size[0], scale, ratio, generator)
    reduction = next((n for n in _REDUCTIONS if box[2] >= n * size[0] and box[3] >= n * size[1]), 1)
    array = image.decode(num_channels, reduction)
    if reduction == 1:
        resized = _resize_box(array, box, size, interpolation)
    else:
        resized = _resize_fractional_box(array, image.reduced_box(box, reduction), size, interpolation)
    return _flipped_at_random(resized, horizontal_flip, generator)


def _resize_box(array: np.ndarray, box, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """A box of (H, W, C), resized with antialiasing to (C, *size)."""
    top, left, height, width = box
    # Copied, because torch takes no view that runs backwards or is read-only; it would copy any other one itself.
    crop = torch.from_numpy(array[top : top + height, left : left + width].copy()).permute(2, 0, 1)
    # On uint8 this gives PIL's result up to one grey level in about a quarter of the time.
    return torch.nn.functional.interpolate(crop[None], size, mode=interpolation, antialias=True)[0]


def _resize_fractional_box(array: np.ndarray, box, size: tuple[int, int], interpolation: str) -> torch.Tensor:
    """As `_resize_box`, by PIL, for a box whose edges lie between pixels."""
    top, left, height, width = box
    first_row, first_column = int(top), int(left)
    array = array[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    top, left = top - first_row, left - first_column
    image = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    resample = Image.Resampling[interpolation.upper()]
    resized = image.resize((size[1], size[0]), resample, box=(left, top, left + width, top + height))
    return torch.from_numpy(_as_array(resized)).permute(2, 0, 1)


def _flipped_at_random(image: torch.Tensor, horizontal_flip: bool, generator: np.random.Generator) -> torch.Tensor:
    if horizontal_flip and generator.random() < 0.5:
        image = image.flip(-1)
    return image.contiguous()


def sample_crop(
    height: int,
    width: int,
    target_ratio: float,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width) of a crop; after ten draws that do not fit, the centre as large as fits."""
    # Only Generator.random() is used: its stream has never changed between NumPy versions, unlike integers().
    for _ in range(10):
        area, shape, vertical, horizontal = generator.random(4)
        crop_area = height * width * (scale[0] + area * (scale[1] - scale[0]))
        crop_ratio = target_ratio * ratio[0] * (ratio[1] / ratio[0]) ** shape
        crop_height, crop_width = round(math.sqrt(crop_area / crop_ratio)), round(math.sqrt(crop_area * crop_ratio))
        if 0 < crop_height <= height and 0 < crop_width <= width:
            top, left = int(vertical * (height - crop_height + 1)), int(horizontal * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_ratio = min(max(width / height, target_ratio * ratio[0]), target_ratio * ratio[1])
    crop_height = max(1, min(height, round(width / crop_ratio)))
    crop_width = max(1, min(width, round(height * crop_ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def resize_center_crop(
    image: Image.Image | np.ndarray, size: int | tuple[int, int], resize_ratio: float = EVALUATION_RESIZE_RATIO
) -> torch.Tensor:
    """The evaluation view, equal to what `build_image_processor` computes: bicubic resize, centre crop.

    For a square size the shorter side becomes resize_ratio x size. For another size the whole image becomes
    resize_ratio x (height, width), which keeps the shape of the content only where the image has about the shape of
    `size`: stock image processors know no third way.

    Args:
        image: uint8 (H, W, C), or a PIL image of mode L or RGB.
        size: of the result.
        resize_ratio: 1 or more; 1 keeps small images whole (CIFAR and digits).

    Returns:
        uint8 (C, height, width).
    """
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
    height, width = _height_and_width(size)
    resized_height, resized_width = _resized_size(image.height, image.width, size, resize_ratio)
    image = image.resize((resized_width, resized_height), Image.Resampling.BICUBIC)
    top, left = (resized_height - height) // 2, (resized_width - width) // 2
    image = image.crop((left, top, left + width, top + height))
    return torch.from_numpy(_as_array(image)).permute(2, 0, 1).contiguous()


def _height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size!r}")
    return height, width


def _evaluation_box(size: int | tuple[int, int], resize_ratio: float) -> tuple[int, int]:
    if resize_ratio < 1:
        raise ValueError(f"resize_ratio must be 1 or more, got {resize_ratio!r}: the crop would leave the image")
    height, width = _height_and_width(size)
    return round(resize_ratio * height), round(resize_ratio * width)


def _resized_size(height: int, width: int, size: int | tuple[int, int], resize_ratio: float) -> tuple[int, int]:
    box_height, box_width = _evaluation_box(size, resize_ratio)
    if box_height != box_width:
        return box_height, box_width
    # Rounded down like `transformers` does, so that both give the same pixels.
    if height <= width:
        return box_height, int(box_height * width / height)
    return int(box_height * height / width), box_height


def default_image_statistics(num_channels: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of pixels in 0..1: ImageNet's, as published; for one channel, of their luma."""
    statistics = {3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), 1: ([0.459], [0.226])}
    if num_channels not in statistics:
        raise ValueError(f"num_channels must be 1 or 3, got {num_channels!r}")
    return statistics[num_channels]


def normalize_pixel_values(
    pixel_values: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> torch.Tensor:
    """(uint8 / 255 - mean) / std as float32, on the tensor's device.

    Args:
        pixel_values: uint8 (..., C, H, W).
        image_mean, image_std: one number per channel, for pixels in 0..1.
    """
    if pixel_values.dtype != torch.uint8:
        raise TypeError(f"pixel_values must be uint8 in 0..255, got {pixel_values.dtype}: normalised already?")
    if not len(image_mean) == len(image_std) == pixel_values.shape[-3]:
        raise ValueError(f"mean {image_mean} and std {image_std} do not fit {pixel_values.shape[-3]} channels")
    mean, std = (_of_levels(tuple(values), pixel_values.device) for values in (image_mean, image_std))
    return (pixel_values.float() - mean) / std


@functools.cache  # or every step would wait for the device to take these few numbers
def _of_levels(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers for pixels in 0..1, made those for 0..255: (C, 1, 1)."""
    return 255 * torch.tensor(values, device=device).view(-1, 1, 1)


def build_image_processor(
    image_size: int | tuple[int, int],
    num_channels: int = 3,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    resize_ratio: float = EVALUATION_RESIZE_RATIO,
) -> BitImageProcessorPil:
    """A stock image processor that does what `resize_center_crop` and `normalize_pixel_values` do.

    `save_pretrained` writes a `preprocessor_config.json` without the word PIL, and `AutoImageProcessor` opens it with
    or without torchvision. transformers 5.17 without torchvision hides AutoImageProcessor, whatever the file says:
    there, `BitImageProcessorPil.from_pretrained` opens it. BiT's is the class whose fields are these steps (DINOv2
    uses it too); `ViTImageProcessor` has no centre crop of its own.

    The stock class differs from `decode_image` in three points. It does not rotate by EXIF if it gets a PIL image. For
    num_channels 3 it clips 16-bit images. For num_channels 1 it takes PIL images of mode L or arrays (H, W, 1) or
    (1, H, W), and raises a ValueError about the mean for colour, because it can convert to RGB but not to grey; do
    `image.convert("L")` first.
    """
    mean, std = default_image_statistics(num_channels)
    height, width = _height_and_width(image_size)
    box_height, box_width = _evaluation_box(image_size, resize_ratio)
    is_square = box_height == box_width
    return BitImageProcessorPil(
        size={"shortest_edge": box_height} if is_square else {"height": box_height, "width": box_width},
        crop_size={"height": height, "width": width},
        resample=Image.Resampling.BICUBIC,
        do_convert_rgb=num_channels == 3,
        image_mean=list(mean if image_mean is None else image_mean),
        image_std=list(std if image_std is None else image_std),
    )


# Samples


class PretrainingImages(torch.utils.data.Dataset):
    """Random crops for pretraining, addressed by the keys of `PretrainingBatchSampler`.

    An image that cannot be read is replaced by the next one that can, so that all batches keep their size; `num_bad`
    says how many were skipped. The bad images of a sample are `index`, `index` + 1, ..., `index` + `num_bad` - 1,
    modulo the size of the data set (see `bad_indices`).

    Args:
        dataset: of `load_image_dataset`.
        image_size: of the samples.
        num_channels: 1 or 3.
        crop_scale, crop_ratio, horizontal_flip, interpolation: as in `random_resized_crop`; the published recipe by
            default.
        fast_large_photos: decode a JPEG two, four or eight times smaller where its crop stays at least as large as
            the sample. Faster on photos of some megapixels, but the pixels differ a little (docs/loading.md).
        seed: of the crops, which are a pure function of (seed, epoch, index).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | tuple[int, int],
        *,
        num_channels: int = 3,
        crop_scale: tuple[float, float] = (0.3, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        horizontal_flip: bool = False,
        interpolation: str = "bilinear",
        fast_large_photos: bool = False,
        seed: int = 0,
    ):
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale must be a range inside (0, 1], got {crop_scale!r}")
        if not 0 < crop_ratio[0] <= crop_ratio[1]:
            raise ValueError(f"crop_ratio must be a range of positive numbers, got {crop_ratio!r}")
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}")
        default_image_statistics(num_channels)  # raises for other numbers of channels
        self.dataset = dataset
        self.image_size = _height_and_width(image_size)
        self.num_channels = num_channels
        self.crop_scale = crop_scale
        self.crop_ratio = crop_ratio
        self.horizontal_flip = horizontal_flip
        self.interpolation = interpolation
        self.fast_large_photos = fast_large_photos
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int, int, int]) -> dict[str, torch.Tensor | int]:
        """key (step, slot_block, epoch, index) -> `pixel_values` uint8 (C, H, W) and the ints `step`, `slot_block`,
        `index`, `num_bad`."""
        step, slot_block, epoch, index = key
        pixel_values, num_bad = self._first_readable(epoch, index)
        return {
            "pixel_values": pixel_values,
            "step": step,
            "slot_block": slot_block,
            "index": index,
            "num_bad": num_bad,
        }

    def read_crop(self, value, name: str, epoch: int, *identity: int) -> torch.Tensor:
        """The crop in an epoch of an image that is still encoded, uint8 (C, H, W).

        Args:
            value, name: as in `decode_image`.
            epoch: in which it is seen.
            identity: its index, or shard and row.

        Raises:
            BadImageError: as `decode_image`.
        """
        image = _OpenedImage(value, name)
        if not (self.fast_large_photos and image.reducible):
            return self.crop(image.decode(self.num_channels), epoch, *identity)
        return _reduced_random_resized_crop(
            image,
            self.num_channels,
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            self._crop_generator(epoch, *identity),
            self.horizontal_flip,
            self.interpolation,
        )

    def crop(self, image: Image.Image | np.ndarray, epoch: int, *identity: int) -> torch.Tensor:
        """The crop in an epoch of a decoded image, uint8 (C, H, W)."""
        return random_resized_crop(
            image,
            self.image_size,
            self.crop_scale,
            self.crop_ratio,
            self._crop_generator(epoch, *identity),
            horizontal_flip=self.horizontal_flip,
            interpolation=self.interpolation,
        )

    def _crop_generator(self, epoch: int, *identity: int) -> np.random.Generator:
        return np.random.Generator(_random_stream(self.seed, _CROP_STREAM, epoch, *identity))

    def _first_readable(self, epoch: int, index: int) -> tuple[torch.Tensor, int]:
        for num_bad in range(min(MAX_SUBSTITUTES, len(self))):
            substitute = (index + num_bad) % len(self)
            value = self.dataset[substitute]["image"]
            try:
                # The requested index seeds the crop of a substitute too: it is seen again under its own index.
                return self.read_crop(value, _name_in_messages(value, substitute), epoch, index), num_bad
            except BadImageError as error:
                last = error
        raise BadImageError(
            f"{num_bad + 1} images in a row from image {index} on cannot be read; the last one is {last}"
        )


class EvaluationImages(torch.utils.data.Dataset):
    """Evaluation views: `pixel_values` uint8 (C, H, W) of `resize_center_crop` and, if there are labels, `labels`.

    A file that cannot be read raises a BadImageError with its name: leaving it out, or putting another in its place,
    would change the published number without a word.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_size: int | tuple[int, int],
        num_channels: int = 3,
        resize_ratio: float = EVALUATION_RESIZE_RATIO,
    ):
        default_image_statistics(num_channels)  # raises for other numbers of channels
        self.dataset = dataset
        self.image_size = _height_and_width(image_size)
        self.num_channels = num_channels
        self.resize_ratio = resize_ratio

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = _read_image(row["image"], index, self.num_channels)
        labels = {"labels": row["label"]} if "label" in row else {}
        return {"pixel_values": resize_center_crop(image, self.image_size, self.resize_ratio), **labels}


@dataclass
class ProcessedImages(torch.utils.data.Dataset):
    """What the model takes of each image: (channels, height, width), or the reason why the image cannot be read."""

    dataset: datasets.Dataset
    processor: object
    num_channels: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return self.prepare(decode_image(self.dataset[index]["image"], self.num_channels))
        except BadImageError as error:
            return error.reason

    def prepare(self, image: np.ndarray) -> torch.Tensor:
        """A decoded image (height, width, channels) through the image processor."""
        return self.processor(image, input_data_format="channels_last", return_tensors="pt")["pixel_values"][0]


class LabelledImages(ProcessedImages):
    """What the model takes of each image, `pixel_values` float (channels, height, width), and its `labels`.

    A file that cannot be read raises a BadImageError with its name, as in `EvaluationImages`.
    """

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        row = self.dataset[index]
        image = _read_image(row["image"], index, self.num_channels)
        return {"pixel_values": self.prepare(_as_array(image)), "labels": row["label"]}


class FineTuningImages(PretrainingImages):
    """Random crops with labels, addressed by the keys (epoch, index) of `EpochSampler`.

    An image that cannot be read raises a BadImageError with its name: a substitute would bring its own label, and a
    small labelled set has no images to lose without a word.

    Args:
        dataset, image_size, num_channels, crop_scale, crop_ratio, horizontal_flip, interpolation, seed: as in
            `PretrainingImages`.
        augment: what happens to a crop, uint8 (C, H, W) to uint8 (C, H, W), such as torchvision's RandAugment. Its
            randomness, taken from torch's global generator, is a pure function of (seed, epoch, index) as well.
    """

    def __init__(self, dataset: datasets.Dataset, image_size, *, augment: Callable | None = None, **settings):
        super().__init__(dataset, image_size, **settings)
        self.augment = augment

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor | int]:
        """`pixel_values` uint8 (C, H, W) and the ints `labels`, `epoch` and `index`."""
        epoch, index = key
        row = self.dataset[index]
        pixel_values = self.read_crop(row["image"], _name_in_messages(row["image"], index), epoch, index)
        if self.augment is not None:
            with seeded_torch(self.seed, _AUGMENTATION_STREAM, epoch, index):
                pixel_values = self.augment(pixel_values)
        return {"pixel_values": pixel_values, "labels": row["label"], "epoch": epoch, "index": index}


@dataclass
class FineTuningCollator:
    """Batches for a classifier: normalised images and their labels, mixed with one another while training.

    Samples of `FineTuningImages` are normalised and, if there are `mixers`, mixed by one of them, drawn at random for
    each batch; the labels become (B, classes) shares then. Samples of `LabelledImages` are never mixed. The randomness
    is a pure function of the seed and of the samples' keys, so it outlives interruptions and any number of workers.

    Args:
        image_mean, image_std: as in `normalize_pixel_values`.
        mixers: such as torchvision's MixUp and CutMix: (images (B, C, H, W), labels (B,)) to both, mixed.
        seed: of the mixing.
    """

    image_mean: Sequence[float]
    image_std: Sequence[float]
    mixers: Sequence[Callable] = ()
    seed: int = 0

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values` float (B, C, H, W) and `labels` int (B,), or float (B, classes) if mixed."""
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.tensor([sample["labels"] for sample in samples])
        if "epoch" in samples[0]:
            pixel_values = normalize_pixel_values(pixel_values, self.image_mean, self.image_std)
            if self.mixers:
                pixel_values, labels = self._mix(pixel_values, labels, samples)
        return {"pixel_values": pixel_values, "labels": labels}

    def _mix(self, pixel_values, labels, samples):
        keys = (samples[0]["epoch"], *(sample["index"] for sample in samples))
        with seeded_torch(self.seed, _MIX_STREAM, *keys):
            mixer = self.mixers[int(torch.randint(len(self.mixers), ()))]
            return mixer(pixel_values, labels)


# Order


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, int64 (num_images,): the stable sorting order of raw Philox words.

    NumPy guarantees the words of a bit generator for ever, but not `Generator.permutation`.
    """
    return np.argsort(_random_stream(seed, _ORDER_STREAM, epoch).random_raw(num_images), kind="stable")


def block_order(num_images: int, seed: int, lane: int, epoch: int, block: int) -> np.ndarray:
    """The permutation of a block of a stream (streaming.py), int64 (num_images,), made like that of an epoch."""
    return np.argsort(_random_stream(seed, _BLOCK_STREAM, lane, epoch, block).random_raw(num_images), kind="stable")


class EpochSampler(torch.utils.data.Sampler):
    """Every image once per epoch, as keys (epoch, index) for `FineTuningImages`, in the order of `epoch_order`.

    Which epoch comes next is the attribute `epoch`: set it before each epoch, and before a resumed one.
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images = num_images
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch
        return ((epoch, index) for index in epoch_order(self.num_images, self.seed, epoch).tolist())


def _random_stream(seed: int, *key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


def forward_seed(seed: int, step: int, slot_block: int) -> int:
    """What `torch.manual_seed` takes before the forward pass of a slot block: stochastic depth as a pure function."""
    return int(_random_stream(seed, _FORWARD_STREAM, step, slot_block).random_raw()) % 2**63


@contextmanager
def seeded_torch(seed: int, *key: int):
    """Inside, torch's global CPU generator starts from the arguments alone; afterwards it is what it was before."""
    state = torch.default_generator.get_state()
    # Not torch.manual_seed, which would seed the accelerators as well, and nobody would set those back.
    torch.default_generator.manual_seed(int(_random_stream(seed, *key).random_raw()) % 2**63)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class PretrainingBatchSampler(torch.utils.data.Sampler):
    """Which images a rank sees in which step, as a pure function of its arguments. Do not let Accelerate prepare it.

    An optimizer step takes one global batch of batch_size x accumulation_steps x world_size images, which falls into
    equal slot blocks. In micro-step k, rank r takes the slot block k x world_size + r. An epoch is one permutation of
    the images, of which the last incomplete global batch is dropped.

    Args:
        num_images: in the data set.
        batch_size: images per rank and micro-step.
        total_steps: the optimizer step after the last one.
        seed: of the order.
        start_step: the optimizer step to go on with after an interruption.

    Yields:
        Lists of `batch_size` keys (step, slot_block, epoch, index), `accumulation_steps` lists per optimizer step.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        total_steps: int,
        seed: int,
        start_step: int = 0,
        accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ):
        if min(batch_size, accumulation_steps, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"batch_size, accumulation_steps and world_size must be positive and rank below world_size, got "
                f"{batch_size}, {accumulation_steps}, {world_size} and rank {rank}"
            )
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step must be in 0..total_steps, got {start_step} of {total_steps}")
        self.num_images = num_images
        self.batch_size = batch_size
        self.total_steps = total_steps
        self.seed = seed
        self.start_step = start_step
        self.accumulation_steps = accumulation_steps
        self.rank = rank
        self.world_size = world_size
        if num_images < self.global_batch_size:
            raise ValueError(f"{num_images} images do not fill one global batch of {self.global_batch_size}")

    @property
    def global_batch_size(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.num_images // self.global_batch_size

    def __len__(self) -> int:
        return (self.total_steps - self.start_step) * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        current_epoch = None
        for step in range(self.start_step, self.total_steps):
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != current_epoch:
                current_epoch, order = epoch, epoch_order(self.num_images, self.seed, epoch)
            for micro_step in range(self.accumulation_steps):
                slot_block = micro_step * self.world_size + self.rank
                first = step_in_epoch * self.global_batch_size + slot_block * self.batch_size
                indices = order[first : first + self.batch_size].tolist()
                yield [(step, slot_block, epoch, index) for index in indices]
