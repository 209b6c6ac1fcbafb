# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens images: folders, Parquet and tar shards, Hub data sets and the digits of scikit-learn."""

import hashlib
import io
import itertools
import os
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ..arguments import DatasetArguments, require
from ..hub import HubUnreachable, hub_or_cache
from ..url_secrets import keep_secrets
from .cache import cache_errors_told
from .decoding import FILE_URI, BadImageError, OpenedImage, StoredImage, value_name
from .finding import ResolvedSource, resolve
from .folders import FolderLayout, layout_of, splits_in
from .kinds import SHARD_BUILDERS, left_out_sentence
from .labels import LabelError, describe_columns, is_value, label_column_of, read_labels
from .masks import refuse_masks
from .metadata import Metadata
from .notices import tell
from .paths import parents_of
from .splits import AUTO, OR, choose_split, split_meaning
from .tars import open_tars
from .unreadable import named_before, unreadable_files


_FOOTER_THREADS = 16
_IMAGE_FIELDS = ("bytes", "path")
_ROWS_AT_A_TIME = 100_000  # paths that are Python strings and in a table at the same time
_UNLABELLED_TAR = "has no labels: in a tar they are read from a .cls or a .json beside each image, not from folders"


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
              test; beside one of these also dev, eval, holdout) are optional, and may lie in one folder that holds all
              images. Class folders are optional too: if every image of a split lies in a sub-folder, and there are at
              least two, the first level names the class. File names never decide a split. A metadata.csv, .jsonl or
              .parquet beside the images gives them labels (`Metadata`). Files without the extension of an image are
              counted and left out; hidden files are ignored.
            - a folder, file or glob of .parquet, of .tar (WebDataset) or of .arrow files, or a `save_to_disk` folder.
              In a folder of shards the split is such a word in the path, if any.
            - otherwise the name of a data set on the Hub.
        split: "val", "valid", "dev" and "eval" mean "validation", "holdout" means "test". Files without a split are
            "train". "validation or test" is the first of the two that is there; "auto" means the same.
        config_name: the configuration of a Hub data set; other sources have none.
        image_column, label_column: needed only if several columns fit. `label_column` may name several columns of 0
            and 1, with commas between them; each is a class.
        cache_dir: where `datasets` keeps the Arrow files that it makes of Parquet files, tar shards and Hub data sets.

    Returns:
        A data set with the columns "image" (encoded bytes or a path, not decoded) and, if there are labels, "label"
        (see `labels.py`), with the same class ids in every split.

    Raises:
        ValueError: if the source, the split or a column is absent or ambiguous.
    """
    return _load(
        keep_secrets(os.fspath(source)), split, config_name, image_column, label_column, cache_dir, needs_labels=False
    )


def open_split(
    arguments: DatasetArguments, split: str, labels: Literal["required", "optional"] = "optional"
) -> datasets.Dataset:
    """Opens one split of the data of a command, see `load_image_dataset`.

    Raises:
        ValueError: as `load_image_dataset`; if the split is empty; or if it has no labels and they are required.
    """
    columns = arguments.image_column, arguments.label_column
    needs_labels = labels == "required"
    dataset = _load(arguments.data, split, arguments.data_config, *columns, None, needs_labels)
    require(len(dataset), f"The {split!r} split of {arguments.data!r} is empty.")
    return dataset


def available_split(arguments: DatasetArguments, asked: str) -> str:
    """The split that `asked` means in the data of a command. Nothing is opened unless it has the form "A or B", or is
    "auto".

    Raises:
        ValueError: as `choose_split`, or if the data cannot be opened.
    """
    if OR not in asked and asked != AUTO:
        return asked
    return choose_split(arguments.data, _open_source(arguments.data, arguments.data_config, None).splits, asked)


def split_to_judge_on(arguments: DatasetArguments, asked: str) -> str | None:
    """As `available_split`, but "auto" is None where the data have no validation and no test split, and this is told.

    Raises:
        ValueError: as `available_split`.
    """
    if asked != AUTO:
        return available_split(arguments, asked)
    splits = _open_source(arguments.data, arguments.data_config, None).splits
    if not {split_meaning(str(name)) for name in splits} & {"validation", "test"}:
        tell(f"{arguments.data!r} has no validation and no test split, so nothing is evaluated.")
        return None
    return choose_split(arguments.data, splits, asked)


def image_name(dataset: datasets.Dataset, index: int) -> str:
    """The file name or path of an image, for messages; its number if the source has no names."""
    return value_name(dataset[index]["image"]) or f"image {index}"


@dataclass
class _OpenedSource:
    """All splits of a source, and what is known about why they have no labels. It is surprising if a file beside the
    images may have them."""

    splits: dict[str, datasets.Dataset]
    why_unlabelled: str = ""
    is_surprising: bool = False


_opened: dict[tuple[str, str | None, str | os.PathLike | None], _OpenedSource] | None = None  # of `opened_once`


def _load(
    source: str,
    split: str,
    config_name: str | None,
    image_column: str | None,
    label_column: str | None,
    cache_dir: str | os.PathLike | None,
    needs_labels: bool,
) -> datasets.Dataset:
    opened = _open_source(source, config_name, cache_dir)
    name = choose_split(source, opened.splits, split)
    dataset = opened.splits[name].with_format(None)
    column = find_image_column(dataset, image_column)
    images = dataset.select_columns([column]).rename_columns({column: "image"})
    images = images.cast_column("image", datasets.Image(decode=False))
    try:
        others = {split: table.remove_columns(_without(table, column)) for split, table in opened.splits.items()}
        labels = read_labels(others, name, label_column).dataset(name)
    except LabelError as error:
        if needs_labels or label_column is not None:
            raise ValueError(f"The {split!r} split of {source!r} {opened.why_unlabelled or error}.") from None
        if opened.why_unlabelled and opened.is_surprising:
            tell(f"The {split!r} split of {source!r} {opened.why_unlabelled}.")
        return images
    return datasets.concatenate_datasets([images, labels], axis=1)


def _without(dataset: datasets.Dataset, column: str) -> list[str]:
    return [column] if column in dataset.column_names else []


@contextmanager
def opened_once() -> Iterator[None]:
    """Inside the block, a source whose second split is asked for is not listed and looked at again."""
    global _opened
    before, _opened = _opened, {}
    try:
        yield
    finally:
        _opened = before


def _open_source(source: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> _OpenedSource:
    if _opened is None:
        return _find_splits(source, config_name, cache_dir)
    key = source, config_name, cache_dir
    if key not in _opened:
        _opened[key] = _find_splits(source, config_name, cache_dir)
    return _opened[key]


def _find_splits(source: str, config_name: str | None, cache_dir: str | os.PathLike | None) -> _OpenedSource:
    resolved = resolve(source, config_name)
    if resolved.left_out:
        tell(left_out_sentence(source, resolved.num_files, resolved.left_out))
    if resolved.kind == "image":
        return _open_images(source, resolved)
    tables = _open_tables(source, resolved, config_name, cache_dir)
    is_bare = resolved.kind == ".tar" and all(len(table.column_names) == 1 for table in tables.values())
    return _OpenedSource(tables, _UNLABELLED_TAR if is_bare else "")


def _open_tables(
    source: str, resolved: ResolvedSource, config_name: str | None, cache_dir: str | os.PathLike | None
) -> dict[str, datasets.Dataset]:
    if resolved.kind == "digits":
        return _open_digits()
    if resolved.kind == "url":
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine; a URL needs streaming")
    if resolved.kind == "saved":
        saved = _open_saved(str(resolved.folder))
        return dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    if resolved.kind == ".tar":
        return open_tars(resolved.files, cache_dir)
    if resolved.kind in SHARD_BUILDERS:
        resolved = _without_empty_files(source, resolved)
        problem = f"the {resolved.kind} files of {source!r} cannot be read"
        builder, data_files = SHARD_BUILDERS[resolved.kind], resolved.data_files
        files = map(str, itertools.chain.from_iterable(resolved.files.values()))
        try:
            return _load_with_datasets(problem, files, path=builder, data_files=data_files, cache_dir=cache_dir)
        except ValueError as error:
            if resolved.kind == ".parquet" and (difference := _difference_of_types(resolved)):
                raise ValueError(f"{problem}: {difference}") from error
            raise
    problem = f"{source!r} is neither a file nor a folder on this machine, and it cannot be loaded from the Hub"
    return _load_with_datasets(problem, may_need_hub=True, path=source, name=config_name, cache_dir=cache_dir)


def _without_empty_files(source: str, resolved: ResolvedSource) -> ResolvedSource:
    """Leaves out Parquet files without rows, of which pyarrow raises an error, and tells of it.

    Raises:
        ValueError: if a split has no other file.
    """
    if resolved.kind != ".parquet":
        return resolved
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
        empty = {
            split: [file for file, is_empty in zip(files, pool.map(_has_no_rows, files), strict=True) if is_empty]
            for split, files in resolved.files.items()
        }
    for split, files in empty.items():
        if len(files) == len(resolved.files[split]):
            raise ValueError(f"the {split!r} split of {source!r} has no rows, only {str(files[0])!r}")
        if files:
            more = f" (nor do {len(files) - 1:,} more files)" if len(files) > 1 else ""
            tell(f"{str(files[0])!r} has no rows{more}.")
    kept = {split: [file for file in files if file not in empty[split]] for split, files in resolved.files.items()}
    return replace(resolved, files=kept)


def _difference_of_types(resolved: ResolvedSource) -> str | None:
    """A column that has two types in these Parquet files, in words."""
    first: dict[str, tuple[pa.DataType, Path]] = {}
    for file in itertools.chain.from_iterable(resolved.files.values()):
        try:
            schema = pq.read_schema(file)
        except (OSError, ValueError):  # damaged, which `datasets` says
            continue
        for field in schema:
            kind, other = first.setdefault(field.name, (field.type, file))
            if kind != field.type:
                return f"the column {field.name!r} is {kind} in {str(other)!r} and {field.type} in {str(file)!r}"
    return None


def _has_no_rows(file: Path) -> bool:
    try:
        return pq.read_metadata(file).num_rows == 0
    except (OSError, ValueError):  # damaged, which `datasets` says
        return False


def _open_saved(folder: str) -> datasets.Dataset | datasets.DatasetDict:
    try:
        return datasets.load_from_disk(folder)
    except Exception as error:  # of many classes
        raise ValueError(
            f"{folder!r} has the files of a save_to_disk folder, and cannot be opened: {type(error).__name__}: {error}"
        ) from error


def _load_with_datasets(
    problem: str, files: Iterable[str] = (), may_need_hub: bool = False, **arguments: Any
) -> dict[str, datasets.Dataset]:
    """`datasets.load_dataset`; `files` on this machine are tried if an error does not name one."""
    with cache_errors_told(arguments["cache_dir"]), unreadable_files() as unreadable:
        try:
            with hub_or_cache(arguments["path"]) if may_need_hub else nullcontext():
                return dict(datasets.load_dataset(**arguments))
        except HubUnreachable as error:
            raise ValueError(f"{problem}, because {error.reason}.") from error
        except Exception as error:  # `datasets` wraps the cause in errors of many classes
            reason = error.__cause__ or error
            raise ValueError(
                f"{problem}: {named_before(unreadable, files)}{type(reason).__name__}: {reason}"
            ) from error


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


# Folders of images


def _open_images(source: str, resolved: ResolvedSource) -> _OpenedSource:
    folder = resolved.folder
    if folder is None:
        _look_at_files(source, resolved.images)
        images = _image_paths(Path.cwd(), resolved.images)
        return _OpenedSource({"train": images}, "has no labels: it is a list of files, not a folder")
    layout = layout_of(folder, resolved.images)
    metadata = Metadata(folder, resolved.metadata)
    metadata.require_images(layout.splits)
    for file in metadata.empty:
        tell(f"{str(file)!r} has no row, so it gives no image a label.")
    return _OpenedSource(
        {split: _open_folder_split(folder, split, layout, metadata) for split in layout.splits},
        _why_unlabelled(layout, metadata, resolved.tables),
        bool(metadata.without_names or metadata.empty or resolved.tables),
    )


def _look_at_files(source: str, files: list[str]) -> None:
    """Raises ValueError if some of the files are masks of others; tells if their folders are several splits."""
    above = Path(os.path.commonpath([Path(parent).absolute() for parent in parents_of(files)]))
    inside = [Path(file).absolute().relative_to(above).as_posix() for file in files]
    refuse_masks(str(above), inside, lambda file: {"bytes": None, "path": str(above / file)})
    if splits := splits_in(inside):
        tell(f"{source!r} matches files of {' and '.join(map(repr, splits))}; all of them are one split, train.")


def _open_folder_split(folder: Path, split: str, layout: FolderLayout, metadata: Metadata) -> datasets.Dataset:
    """A split with the columns of its metadata. The classes that its folders name are another column, unless the
    metadata have labels."""
    paths = layout.splits[split]
    columns = metadata.columns(paths)
    has_classes = split in layout.classes and len(layout.class_names) > 1
    if columns is not None and has_classes and _has_labels(columns):
        tell(f"The labels of {str(folder)!r} are those of its metadata; its folders are not used.")
        has_classes = False
    labels = (layout.classes[split], layout.class_names) if has_classes else ()
    images = _image_paths(folder.absolute(), paths, *labels)
    if columns is None:
        return images
    free = [name for name in columns.column_names if name not in images.column_names]
    return datasets.concatenate_datasets([images, columns.select_columns(free)], axis=1)


def _has_labels(columns: datasets.Dataset) -> bool:
    try:
        return label_column_of(columns.features) is not None
    except ValueError:  # several columns fit
        return True


def _why_unlabelled(layout: FolderLayout, metadata: Metadata, tables: Sequence[Path]) -> str:
    if metadata.without_names:
        file, columns = next(iter(metadata.without_names.items()))
        shown = ", ".join(map(repr, columns[:10]))
        return f"has no labels: {str(file)!r} has no column file_name; its columns are {shown}"
    if metadata.empty:
        return f"has no labels: {str(metadata.empty[0])!r} has no row"
    if tables:
        others = f" (nor are {len(tables) - 1:,} more such files)" if len(tables) > 1 else ""
        return (
            f"has no labels: {str(tables[0])!r} is not read{others}. Labels are read from a metadata.csv or"
            " metadata.jsonl beside the images, with a column file_name (the path of each image from there) and a"
            " column label"
        )
    if layout.strays:
        stray = next(iter(layout.strays.values()))
        return f"has no labels, because {stray!r} lies beside the class folders; move it into one of them or away"
    if len(layout.class_names) == 1:
        return f"has only one class, the folder {layout.class_names[0]!r}; a classifier needs two"
    return ""


def _image_paths(
    folder: Path, files: list[str], labels: Sequence[str] = (), class_names: Sequence[str] = ()
) -> datasets.Dataset:
    """A table of image files, which are relative to a folder (absolute ones may be too), with their classes.

    It is made of Arrow columns: `Dataset.from_dict` would make a dictionary for each image.
    """
    features, start = _features(class_names), os.path.join(folder, "")
    images = [
        _path_column([_storable(os.path.join(start, file)) for file in files[first : first + _ROWS_AT_A_TIME]])
        for first in range(0, len(files), _ROWS_AT_A_TIME)
    ]
    columns: dict[str, Any] = {"image": pa.chunked_array(images, features.arrow_schema.field("image").type)}
    if class_names:
        ids = {name: number for number, name in enumerate(class_names)}
        columns["label"] = pa.array([ids[label] for label in labels], pa.int64())
    table = pa.table(columns, schema=features.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=_hash_of(table))


def _hash_of(table: pa.Table) -> str:
    """A fingerprint for `datasets`, which would make one from a copy of the whole table."""
    digest = hashlib.blake2b(str(table.schema).encode(), digest_size=8)
    for chunk in (chunk for column in table.columns for chunk in column.chunks):
        for buffer in filter(None, chunk.buffers()):
            digest.update(buffer)
    return digest.hexdigest()


def _path_column(paths: list[str]) -> pa.StructArray:
    """Images without bytes, as `datasets.Image` stores them."""
    return pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), pa.array(paths, pa.string())], _IMAGE_FIELDS)


def _storable(path: str) -> str:
    """The path, or a URI for a path with bytes that are not UTF-8, because Arrow stores UTF-8 only."""
    try:
        path.encode()
        return path
    except UnicodeEncodeError:
        return FILE_URI + urllib.parse.quote(os.fsencode(path))


# Columns of images


def find_image_column(dataset: datasets.Dataset | datasets.IterableDataset, asked: str | None) -> str:
    """The column `asked`, or the only one that holds images if `asked` is None.

    Raises:
        ValueError: if there is none, or several, or if `asked` does not hold images.
    """
    features = dataset.features
    if asked is not None:
        if asked not in features or not (_may_hold_images(features[asked]) or is_value(features[asked], "string")):
            raise ValueError(f"{asked!r} is not a column of images; the columns are {describe_columns(features)}")
        return asked
    found = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not found:
        candidates = {name: _problem_of_images(dataset, name) for name in features if _may_hold_images(features[name])}
        found = [name for name, reason in candidates.items() if reason is None]
        if len(candidates) == 1 and not found:
            name, reason = candidates.popitem()
            raise ValueError(f"no image column: none of the first values of {name!r} is an image ({reason})")
    if len(found) != 1:
        problem = f"several image columns {found}" if found else "no image column"
        raise ValueError(f"{problem}; choose one with image_column. The columns are {describe_columns(features)}")
    return found[0]


def _may_hold_images(feature: Any) -> bool:  # a feature may be a class of `datasets`, a dict or a list
    is_file = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Image) or is_file or is_value(feature, "binary")


def _problem_of_images(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> str | None:
    """Why none of the first ten values is an image; None if one starts like an image. Only headers are read."""
    reason = "there are none"
    for row in itertools.islice(dataset.select_columns([column]), 10):  # streams have no indices
        value: Any = row[column]
        try:
            stored = value if isinstance(value, dict) else {"bytes": value, "path": None}
            OpenedImage(cast(StoredImage, stored))
            return None
        except BadImageError as error:
            reason = error.reason
    return reason
