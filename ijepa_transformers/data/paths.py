# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Paths of images as plain strings with "/" between their parts: a `Path` for each of a million images is slow."""

import os
from collections.abc import Iterable


def extension_of(path: str) -> str:
    """The extension in lower case, such as ".jpg"; an empty string if there is none."""
    return "" if path.endswith(".") else os.path.splitext(path)[1].lower()


def stem_of(path: str) -> str:
    """The name of the file without its extension."""
    name = path.rpartition("/")[2]
    return name if name.endswith(".") else os.path.splitext(name)[0]


def parent_of(path: str) -> str:
    """The folder of a file, without a "/" at its end; an empty string for the topmost folder."""
    return path.rpartition("/")[0]


def parents_of(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The folders of these files, in the order of the files, each with the names of all folders down to it."""
    return {parent: tuple(parent.split("/")) if parent else () for parent in dict.fromkeys(map(parent_of, paths))}
