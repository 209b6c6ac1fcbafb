# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Splits and classes of a folder of images, from the names of its folders.

Not by the `imagefolder` builder of `datasets`, which takes splits from file names (`test_1.jpg`).
What a folder means is found once for each folder, not for each image: there may be millions of images.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .kinds import IGNORED_FOLDERS
from .masks import refuse_masks
from .notices import tell
from .paths import parent_of, parents_of
from .splits import meanings_in, split_meaning, splits_among


_MOST_SPLITS = 4  # with more folders, names such as "bullet_train" and "test_tube" are those of classes
_NUMBER = re.compile(r"\d+")


@dataclass
class FolderLayout:
    """What the folders of a source mean.

    Args:
        splits: the images by name of the split, relative to the folder. A folder without splits is "train".
        classes: the class of every image, by split. Only splits in which every image lies in a class folder are here.
        strays: in the other splits, an image that lies beside class folders that hold most of the images.
        class_names: sorted, of all splits.
    """

    splits: dict[str, list[str]]
    classes: dict[str, list[str]] = field(default_factory=dict)
    strays: dict[str, str] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)


def layout_of(folder: Path, files: list[str]) -> FolderLayout:
    """Finds splits and classes.

    Args:
        folder: for messages, and to look at some images.
        files: the images, relative to `folder`.

    Raises:
        ValueError: if it is unclear which folders are splits, or if images are masks of others.
    """
    parents = parents_of(files)
    depth = _split_depth(folder, list(parents.values()))
    splits: dict[str, list[str]] = {}
    for file in files:
        splits.setdefault("train" if depth is None else parents[parent_of(file)][depth], []).append(file)
    first = 0 if depth is None else depth + 1
    refuse_masks(str(folder), files, lambda file: {"bytes": None, "path": str(folder / file)})
    layout = FolderLayout(splits)
    class_of = {parent: parts[first] for parent, parts in parents.items() if len(parts) > first}
    for split, paths in splits.items():
        names = [class_of[parent] for file in paths if (parent := parent_of(file)) in class_of]
        if len(names) == len(paths):
            layout.classes[split] = names
        elif len(set(names)) > 1 and 2 * len(names) > len(paths):
            layout.strays[split] = next(file for file in paths if parent_of(file) not in class_of)
    layout.class_names = sorted({name for names in layout.classes.values() for name in names})
    _tell_of_folders(folder, layout, first)
    return layout


def splits_in(files: Iterable[str]) -> list[str]:
    """Folders with the names of at least two different splits, anywhere in these paths; or none."""
    parents = parents_of(files).values()
    found = {meaning: part for parts in parents for part in parts if (meaning := split_meaning(part))}
    return sorted(found.values()) if len(found) > 1 else []


def _tell_of_folders(folder: Path, layout: FolderLayout, place: int) -> None:
    """Tells of class folders without an image, and of folders that are there twice, by a link."""
    parents = {split: folder.joinpath(*paths[0].split("/")[:place]) for split, paths in layout.splits.items()}
    _tell_of_twins(list(parents.values()) if place else [])
    for split in layout.classes if len(layout.class_names) > 1 else ():
        inside = sorted(path.name for path in parents[split].iterdir() if os.path.isdir(path))
        empty = [
            name
            for name in inside
            if name not in layout.class_names and name not in IGNORED_FOLDERS and name[0] != "."
        ]
        if empty:
            more = f" (nor do {len(empty) - 1:,} more)" if len(empty) > 1 else ""
            tell(f"{str(parents[split] / empty[0])!r} holds no image{more}, so it is no class.")
        _tell_of_twins([parents[split] / name for name in sorted(set(layout.classes[split]))])


def _tell_of_twins(folders: Sequence[Path]) -> None:
    """Tells of two folders that are one, because one is a link to the other."""
    seen: dict[str, Path] = {}
    for folder in folders:
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first != folder:
            tell(f"{str(folder)!r} and {str(first)!r} are the same folder, so their images are there twice.")


def _split_depth(folder: Path, parents: list[tuple[str, ...]]) -> int | None:
    """Which part of the paths is the split; None if there are no split folders. `parents` is of `parents_of`.

    A folder that holds all images may lie above the split folders, as in images/train and images/val.
    """
    depth = 0
    while True:
        tops = {parts[depth] if len(parts) > depth else "" for parts in parents}
        if splits_among(tops):
            _require_only_splits(folder, tops, parents[0][:depth])
            return depth
        if len(tops) > 1 or "" in tops:
            _refuse_hidden_splits(folder, parents, depth, tops)
            return None
        depth += 1


def _require_only_splits(folder: Path, tops: set[str], above: tuple[str, ...]) -> None:
    split_folders = splits_among(tops)
    others = sorted(tops - split_folders)
    if others:
        raise ValueError(
            f"{str(folder)!r} has split folders {sorted(split_folders)} beside other images (in {others[:5]}); keep"
            " only split folders, or, if these are classes, move them all into a folder"
            f" {os.path.join(folder, *above, 'train')!r}"
        )


def _refuse_hidden_splits(folder: Path, parents: list[tuple[str, ...]], depth: int, tops: set[str]) -> None:
    """Raises ValueError if folders further down look like splits, which would all be trained on."""
    meanings = {top: meanings_in(_NUMBER.sub(" ", top)) for top in tops}  # train80 and dev20
    named = sorted(top for top in tops if len(meanings[top]) == 1)
    few_or_all = len(tops) <= _MOST_SPLITS or len(named) == len(tops)  # train.X1 to train.X4 and val.X
    if len(set().union(*(meanings[top] for top in named))) > 1 and few_or_all:
        raise ValueError(
            f"{str(folder)!r}: {' and '.join(map(repr, named))} look like splits; call them train, validation and"
            " test, or, if they are classes, move them into a folder 'train'"
        )
    below: dict[tuple[str, ...], set[str]] = {}
    for parts in parents:
        for place in range(depth + 1, len(parts)):
            if split_meaning(parts[place]):
                below.setdefault(parts[:place], set()).add(parts[place])
    for above, words in below.items():
        names = splits_among(words)
        found_meanings = {split_meaning(name) for name in names}
        if len(found_meanings) > 1 or (names and len(above) == depth + 1 and found_meanings != {"train"}):
            found = os.path.join(*above, min(names))
            raise ValueError(
                f"{str(folder)!r} has split folders further down, such as {found!r}; name the folder above them,"
                f" such as {os.path.join(folder, *above)!r}"
            )
