# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds the labels of a table and brings them into one of two forms.

- one label per image: `ClassLabel`, where -1 is no label;
- several: `List(ClassLabel)`, the classes of the image in ascending order; null is no label, an empty list no class.

Whole numbers become classes in their order, without the numbers between them that do not occur: 0, 1 and 255 are three
classes, called "0", "1" and "255". All splits together decide which numbers occur.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .notices import tell


Splits: TypeAlias = Mapping[str, datasets.Dataset]
_NAMES = ("label", "labels", "class", "cls", "fine_label")
_OTHER_NAMES = ("target", "targets", "category", "class_id", "class_name", "class_label", "label_id", "label_name")
_WORDS_OF_LABELS = {*_NAMES, *_OTHER_NAMES, "categories", "classes", "superclass"}  # in the name of a column
_MAX_NAMED = 10  # classes or columns in a message
_UNLABELLED = -1


class LabelError(ValueError):
    """There are no labels that a classifier can learn. The message says what there is instead."""


@dataclass
class Labels:
    """The labels of all splits.

    Args:
        names: of the classes.
        is_multiple: whether an image has a list of classes.
        ids: by split: the class id of every image, -1 for no label; or a list of them, None for no label.
    """

    names: list[str]
    is_multiple: bool
    ids: dict[str, list[Any]]

    def dataset(self, split: str) -> datasets.Dataset:
        """The labels of a split as a data set of one column, "label"."""
        label: Any = datasets.ClassLabel(names=self.names)
        feature = datasets.List(label) if self.is_multiple else label
        features = datasets.Features({"label": feature})
        table = pa.table({"label": self.ids[split]}, schema=features.arrow_schema)
        return datasets.Dataset(table, info=datasets.DatasetInfo(features=features))


def read_labels(splits: Splits, split: str, asked: str | None) -> Labels:
    """The labels of a table.

    Args:
        splits: all of them, because the classes must be the same in all.
        split: the one that must have labels.
        asked: the column of the labels; several with commas between them, each a class; or None.

    Raises:
        LabelError: if there are no labels, no columns at all, or they are of another kind.
        ValueError: if `asked` names no column of labels, or if several columns fit.
    """
    features = splits[split].features
    names = [name.strip() for name in asked.split(",")] if asked is not None and asked not in features else [asked]
    if len(set(names)) < len(names):
        raise ValueError(f"label_column {asked!r} names a column twice")
    if asked is not None and not features:
        raise LabelError(f"has no column {asked!r}: there is no column beside the images")
    if len(names) > 1:
        return _of_columns(splits, [str(name) for name in names])
    column = names[0] if asked is not None else label_column_of(features)
    if asked is None and column is not None:
        _tell_of_other_labels(features, column)
    if column is None:
        raise LabelError(f"has no labels: {_other_columns(splits, split)}")
    if column not in features or not _may_hold_labels(features[column]):
        raise ValueError(
            f"{column!r} is not a column of class ids or names; the columns are {describe_columns(features)}"
        )
    # A split may name its classes differently from the others; whoever compares two splits says so.
    named = _classes_in_schema(features[column])
    like = {name: table for name, table in splits.items() if _classes_in_schema(table.features.get(column)) == named}
    labels = _of_column(like, column)
    if not labels.names:
        raise LabelError(f"has no labels: the column {column!r} is empty")
    _tell_of_names(labels.names, column)
    return labels


def _tell_of_names(names: Sequence[str], column: str) -> None:
    """Tells of classes that may be one, and of a class that may be several."""
    alike: dict[str, str] = {}
    for name in names:
        other = alike.setdefault(unicodedata.normalize("NFC", name).strip().lower(), name)
        if other != name:
            tell(f"The classes {other!r} and {name!r} differ in spaces, capital letters or accents only.")
            break
    there = set(names)
    for name in names:
        parts = [part.strip() for part in re.split(r"[|;,]", name)]
        is_list = name.startswith("[") and name.endswith("]")
        if is_list or (len(parts) > 1 and there.issuperset(parts)):
            tell(
                f"The class {name!r} of the column {column!r} looks like several classes. Write lists instead of text"
                " if an image has several."
            )
            break


def label_column_of(features: datasets.Features) -> str | None:
    """The column that holds labels by its name and its type; None if there is none.

    Raises:
        ValueError: if several columns fit.
    """
    found = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    found = found or [name for name in _NAMES if name in features and _may_hold_labels(features[name])]
    if len(found) > 1:  # CIFAR-100: coarse_label and fine_label
        found = [name for name in found if name in _NAMES] or found
    if len(found) > 1:
        raise ValueError(f"several label columns {found}; choose one with label_column")
    others = [name for name in features if name.lower() in _OTHER_NAMES and _may_hold_labels(features[name])]
    return (found or others or [None])[0]


def _tell_of_other_labels(features: datasets.Features, taken: str) -> None:
    """Tells which column is taken if others may hold labels too, such as `coarse_label` beside `fine_label`."""
    others = [
        name
        for name, feature in features.items()
        if name != taken
        and _may_hold_labels(feature)
        and (isinstance(feature, datasets.ClassLabel) or _is_called_labels(name))
    ]
    if others:
        shown = ", ".join(map(repr, others[:_MAX_NAMED])) + (", ..." if len(others) > _MAX_NAMED else "")
        columns = f"the column {shown} may" if len(others) == 1 else f"the columns {shown} may"
        tell(f"The labels are those of the column {taken!r}; {columns} hold labels too (--label_column {others[0]}).")


def _is_called_labels(name: str) -> bool:
    words = re.split(r"[ ._-]+", name.lower())
    return name.lower() in _WORDS_OF_LABELS or bool(_WORDS_OF_LABELS & {words[0], words[-1]})


def _other_columns(splits: Splits, split: str) -> str:
    """What the columns are, and which of them can be labels."""
    dataset = splits[split]
    if not dataset.features:
        return "there is no column beside the images, and no class folders"
    other_type = [name for name in dataset.features if name.lower() in (*_NAMES, *_OTHER_NAMES)]
    unusable = [name for name in other_type if not _may_hold_labels(dataset.features[name])]
    if unusable:
        return (
            f"the column {unusable[0]!r} is of the type {getattr(dataset.features[unusable[0]], 'dtype', 'nested')};"
            " classes are whole numbers, names, truth values, or lists of these"
        )
    flags = [name for name in dataset.features if _is_zero_or_one(dataset, name)]
    sentence = f"the columns are {describe_columns(dataset.features)}; name one with label_column"
    if len(flags) > 1:
        sentence += f", or columns of 0 and 1 with commas between them, each a class: --label_column {','.join(flags)}"
    return sentence


def describe_columns(features: Mapping[str, Any]) -> str:
    """Names and types of columns."""
    return ", ".join(f"{name} ({getattr(feature, 'dtype', 'nested')})" for name, feature in features.items())


# Kinds of columns


def is_value(feature: Any, *kinds: str) -> bool:
    """Whether a feature of `datasets` is a plain value of one of these kinds, such as "int" or "string"."""
    return isinstance(feature, datasets.Value) and feature.dtype.removeprefix("large_").startswith(kinds)


def _inner(feature: Any) -> Any:
    """The feature of the entries of a list; None if it is no list."""
    if isinstance(feature, datasets.List | datasets.LargeList):
        return feature.feature
    return feature[0] if isinstance(feature, list) and len(feature) == 1 else None


def _classes_in_schema(feature: Any) -> list[str] | None:
    """The names of the classes, if the table itself has them."""
    feature = _inner(feature) or feature
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _may_hold_labels(feature: Any) -> bool:
    feature = feature if _inner(feature) is None else _inner(feature)
    return isinstance(feature, datasets.ClassLabel) or is_value(feature, "int", "uint", "string", "bool", "float")


def _is_zero_or_one(dataset: datasets.Dataset, column: str) -> bool:
    feature = dataset.features[column]
    return is_value(feature, "int", "uint", "bool", "float") and set(_distinct(dataset, column)) <= {0, 1}


def _arrow(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    """A column, without reading the images beside it."""
    table = dataset.select_columns([column]).with_format("arrow")[:]
    return table[column]


def _distinct(dataset: datasets.Dataset, column: str) -> list[Any]:
    return [value for value in pc.unique(_arrow(dataset, column)).to_pylist() if value is not None]


# Labels of one column


def _of_column(splits: Splits, column: str) -> Labels:
    having = {split: dataset for split, dataset in splits.items() if column in dataset.features}
    feature = next(iter(having.values())).features[column]
    inner = _inner(feature)
    values = {split: _arrow(dataset, column).to_pylist() for split, dataset in having.items()}
    if inner is not None:
        return _of_lists(column, inner, values)
    if isinstance(feature, datasets.ClassLabel):
        names, ids = list(feature.names), {number: number for number in range(feature.num_classes)}
    else:
        names, ids = _classes(column, feature, values)
    _require_known(column, names, ids, {value for found in values.values() for value in found})
    known = {split: [ids.get(value, _UNLABELLED) for value in found] for split, found in values.items()}
    return Labels(names, False, known)


def _require_known(column: str, names: Sequence[str], ids: Mapping[Any, int], values: Iterable[Any]) -> None:
    """Raises LabelError for a number of a `ClassLabel` that has no name."""
    unknown = [value for value in values if type(value) is int and value != _UNLABELLED and value not in ids]
    if unknown:
        raise LabelError(
            f"has no labels: the column {column!r} holds the class id {min(unknown)}, and names {len(names):,} classes"
        )


def _classes(column: str, feature: Any, values: Mapping[str, Sequence[Any]]) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and the class id of each value."""
    distinct = {value for found in values.values() for value in found if value is not None and value == value}
    if is_value(feature, "bool"):
        return ["False", "True"], {False: 0, True: 1}
    if is_value(feature, "string"):
        names = sorted(name for name in distinct if name.strip())
        num_empty = sum(value is not None and not value.strip() for found in values.values() for value in found)
        if num_empty and names:
            images = "image has an empty string" if num_empty == 1 else "images have an empty string"
            tell(f"{num_empty:,} {images} in the column {column!r}, which means no label.")
        if not names:
            raise LabelError(f"has no labels: the column {column!r} is empty")
        return names, {name: number for number, name in enumerate(names)}
    return _classes_of_numbers(column, distinct)


def _classes_of_numbers(column: str, distinct: Iterable[float]) -> tuple[list[str], dict[Any, int]]:
    """As `_classes`, for whole numbers. -1 means unlabelled, as everywhere in `datasets`."""
    is_finite = all(map(np.isfinite, map(float, distinct)))
    fractions = sorted(value for value in distinct if _is_no_class(value)) if is_finite else None
    if fractions is None or fractions:
        shown = "infinite numbers" if fractions is None else f"numbers such as {fractions[0]:g}"
        raise LabelError(f"has no labels: the column {column!r} holds {shown}, and classes are whole numbers or names")
    numbers = sorted({int(value) for value in distinct} - {_UNLABELLED})
    if numbers and numbers[0] < _UNLABELLED:
        raise ValueError(f"the class ids in column {column!r} must be -1 or more, got {numbers[0]}")
    if len(numbers) == 1 and _UNLABELLED in distinct:
        raise LabelError(
            f"has only one class, {numbers[0]}: -1 in the column {column!r} means no label. If it is a class, write 0"
        )
    if numbers != list(range(len(numbers))):
        shown = ", ".join(map(str, numbers[:_MAX_NAMED])) + (", ..." if len(numbers) > _MAX_NAMED else "")
        tell(
            f"the numbers in column {column!r} have gaps: {shown}. Only numbers that occur are classes:"
            f" {len(numbers):,}, called by their numbers."
        )
    return [str(number) for number in numbers], {number: place for place, number in enumerate(numbers)}


def _is_no_class(value: float) -> bool:
    """Whether a number has a fraction, or is a float that no longer tells neighbouring whole numbers apart."""
    return value != int(value) or (isinstance(value, float) and abs(value) > 2**53)


# Several labels per image


def _of_lists(column: str, inner: Any, values: Mapping[str, Sequence[Any]]) -> Labels:
    lists = [entry for found in values.values() for entry in found if entry is not None]
    numeric = is_value(inner, "int", "uint", "bool", "float")
    if numeric:
        _refuse_unclear(column, lists)
    if numeric and _are_vectors(lists):
        names = [str(place) for place in range(len(lists[0]))]
        places = {split: list(map(_places_of_ones, found)) for split, found in values.items()}
        return _one_if_always_one(column, Labels(names, True, places))
    if isinstance(inner, datasets.ClassLabel):
        names, ids = list(inner.names), {number: number for number in range(inner.num_classes)}
    else:
        names, ids = _classes(
            column, inner, {split: [v for e in found for v in e or ()] for split, found in values.items()}
        )
    _require_known(column, names, ids, {value for entry in lists for value in entry})
    known = {
        split: [None if entry is None else sorted({ids[value] for value in entry if value in ids}) for entry in found]
        for split, found in values.items()
    }
    return _one_if_always_one(column, Labels(names, True, known))


def _are_vectors(lists: Sequence[Sequence[float]]) -> bool:
    """Whether the lists have an entry of 0 or 1 for every class, as [0, 1, 0], and are not lists of class ids."""
    lengths = {len(entry) for entry in lists}
    return len(lengths) == 1 and lengths.pop() > 1 and all(value in (0, 1) for entry in lists for value in entry)


def _refuse_unclear(column: str, lists: Sequence[Sequence[float]]) -> None:
    """Raises LabelError for lists of -1, 0 and 1 that are neither an entry for every class nor class ids."""
    values = {value for entry in lists for value in entry}
    lengths = sorted({len(entry) for entry in lists})
    if values == {-1, 0, 1} and len(lengths) == 1 and lengths[0] > 1:
        raise LabelError(
            f"has no labels: the lists in the column {column!r} hold 1, 0 and -1; write 1 and 0 for every class"
        )
    if values == {0, 1} and len(lengths) > 1 and any(len(set(entry)) < len(entry) for entry in lists):
        raise LabelError(
            f"has no labels: the lists in the column {column!r} hold 0 and 1, but have from {lengths[0]} to"
            f" {lengths[-1]} entries; write one for every class"
        )


def _places_of_ones(entry: Sequence[float] | None) -> list[int] | None:
    return None if entry is None else [place for place, value in enumerate(entry) if value]


def _one_if_always_one(column: str, labels: Labels) -> Labels:
    """The labels with one class per image, if every image has exactly one."""
    entries = [entry for found in labels.ids.values() for entry in found if entry is not None]
    if not entries or any(len(entry) != 1 for entry in entries):
        return labels
    tell(f"every image has exactly one class in {column!r}, so there is one label per image.")
    ids = labels.ids.items()
    single = {split: [_UNLABELLED if entry is None else entry[0] for entry in found] for split, found in ids}
    return Labels(labels.names, False, single)


def _of_columns(splits: Splits, columns: list[str]) -> Labels:
    """The labels of columns of 0 and 1, each a class."""
    ids: dict[str, list[Any]] = {}
    for split, dataset in splits.items():
        for column in columns:
            if column not in dataset.features or not _is_zero_or_one(dataset, column):
                raise ValueError(
                    f"{column!r} is not a column of 0 and 1; the columns are {describe_columns(dataset.features)}"
                )
        rows = zip(*(_arrow(dataset, column).to_pylist() for column in columns), strict=True)
        ids[split] = [None if None in row else _places_of_ones(row) for row in rows]
    return _one_if_always_one(",".join(columns), Labels(columns, True, ids))


# Opened labels


def has_several(dataset: datasets.Dataset) -> bool:
    """Whether an image of a data set of `load_image_dataset` has a list of classes."""
    return "label" in dataset.features and _inner(dataset.features["label"]) is not None


def class_names(dataset: datasets.Dataset) -> list[str]:
    """The names of the classes of a labelled data set of `load_image_dataset`."""
    feature = dataset.features["label"]
    return list((_inner(feature) or feature).names)


def labels_of(dataset: datasets.Dataset) -> np.ndarray:
    """Class ids (images,), int64; -1 for an image without a label (-1 or null in the data set).

    Raises:
        ValueError: if an image has several labels.
    """
    if has_several(dataset):
        raise ValueError("an image has a list of labels here, and this needs one label per image")
    return np.array([_UNLABELLED if label is None else label for label in dataset["label"][:]], dtype=np.int64)


def require_equal_classes(one: datasets.Dataset, other: datasets.Dataset, *splits: str) -> None:
    """Raises ValueError if two splits number their classes differently. `splits` are their names."""
    if class_names(one) != class_names(other):
        first, second = splits
        raise ValueError(f"The splits {first!r} and {second!r} number their classes differently; use one data set.")


def several_labels_of(dataset: datasets.Dataset) -> np.ndarray:
    """For each image and class whether it is one of the image's (images, classes), float32; a row of NaN for an image
    without a label."""
    rows = np.zeros((len(dataset), len(class_names(dataset))), dtype=np.float32)
    for row, entry in zip(rows, dataset["label"][:], strict=True):
        row[slice(None) if entry is None else entry] = np.nan if entry is None else 1
    return rows


def label_array(dataset: datasets.Dataset) -> np.ndarray:
    """`several_labels_of` if images have lists of classes, else `labels_of`."""
    return several_labels_of(dataset) if has_several(dataset) else labels_of(dataset)


def class_counts(dataset: datasets.Dataset) -> np.ndarray:
    """Images of each class (classes,)."""
    if has_several(dataset):
        return np.nansum(several_labels_of(dataset), axis=0).astype(np.int64)
    labels = labels_of(dataset)
    return np.bincount(labels[labels >= 0], minlength=len(class_names(dataset)))


def num_unlabelled(dataset: datasets.Dataset) -> int:
    """How many images have no label."""
    labels = label_array(dataset)
    return int(np.isnan(labels[:, 0]).sum() if labels.ndim == 2 else (labels < 0).sum())


def _printable(name: str) -> str:
    """A name on one line: of a folder that has a line break in its name, with the escape sequence."""
    return name if name.isprintable() else repr(name)


def describe_classes(dataset: datasets.Dataset) -> str:
    """The classes with their numbers of images, as "2 classes: cat (12), dog (8)". Empty classes are named."""
    names, counts = [_printable(name) for name in class_names(dataset)], class_counts(dataset).tolist()
    shown = [f"{name} ({count:,})" for name, count in zip(names, counts, strict=True)][:_MAX_NAMED]
    more = f" and {len(names) - _MAX_NAMED:,} more" if len(names) > _MAX_NAMED else ""
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    without = f"; {len(empty):,} without an image: {', '.join(empty[:_MAX_NAMED])}" if empty else ""
    each = ", several per image" if has_several(dataset) else ""
    return f"{len(names):,} classes{each}: {', '.join(shown)}{more}{without}"
