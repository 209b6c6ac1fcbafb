# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds out what a source is and which local files it has, without opening them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .kinds import (
    ARRAY_EXTENSIONS,
    IGNORED_FOLDERS,
    METADATA_NAMES,
    SHARD_BUILDERS,
    advice,
    count_kinds,
    image_extensions,
    is_archive,
    may_hold_labels,
)
from .splits import meanings_in


@dataclass(frozen=True)
class ResolvedSource:
    """What a source is, before anything is opened.

    Args:
        kind: "digits", "hub", "saved" (a `save_to_disk` folder), "url", "image", ".parquet", ".tar" or ".arrow".
        files: the local files by split. Images of a folder are all in "train"; their paths say the split.
        folder: the folder, if the source is one.
        metadata: the files of METADATA_NAMES in a folder of images.
        tables: files beside the images that may hold labels, but are not read because of their names.
        left_out: how many other files there are, by kind.
    """

    kind: str
    files: Mapping[str, list[Path]] = field(default_factory=dict)
    folder: Path | None = None
    metadata: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)

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
    if not source.strip():
        raise ValueError(f"the name of the data is empty: {source!r}")
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
        found = _files_of_one_kind(source, files)
        return ResolvedSource(found.kind, {"train": found.files}, left_out=found.left_out)
    if _looks_like_a_path(source):
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine")
    return ResolvedSource("hub")


def _resolve_folder(folder: Path) -> ResolvedSource:
    is_saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    if is_saved or (folder / "dataset_dict.json").exists():
        return ResolvedSource("saved", folder=folder)
    found = _files_of_one_kind(str(folder), _visible_files(folder, (os.path.realpath(folder),)))
    if found.kind == "image":
        files, beside = {"train": found.files}, (tuple(found.metadata), tuple(found.tables))
        return ResolvedSource(found.kind, files, folder, *beside, found.left_out)
    by_split = _shards_by_split(folder, found.files)
    return ResolvedSource(found.kind, by_split, folder, left_out=found.left_out)


def _looks_like_a_path(source: str) -> bool:
    extensions = (*image_extensions(), *ARRAY_EXTENSIONS, *SHARD_BUILDERS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or source.endswith(extensions)


def _visible_files(folder: Path, parents: tuple[str, ...]) -> Iterator[Path]:
    """The files at any depth, sorted. Links to folders are followed, but not back to a folder above them."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith(".") or entry.name in IGNORED_FOLDERS:
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


@dataclass
class _Found:
    """The files of the one kind of data that a source has, and what lies beside them."""

    kind: str
    files: list[Path]
    metadata: list[Path]
    tables: list[Path]
    left_out: Counter[str]


def _files_of_one_kind(source: str, files: Iterable[Path]) -> _Found:
    extensions = image_extensions()
    by_kind: dict[str, list[Path]] = {}
    for file in files:
        extension = file.suffix.lower()
        kind = "metadata" if file.name in METADATA_NAMES else "image" if extension in extensions else extension
        by_kind.setdefault(kind if kind in ("metadata", "image", *SHARD_BUILDERS) else "other", []).append(file)
    metadata, others = by_kind.pop("metadata", []), by_kind.pop("other", [])
    if not by_kind and (arrays := [file for file in others if file.suffix.lower() in ARRAY_EXTENSIONS]):
        by_kind["image"] = arrays
        others = [file for file in others if file.suffix.lower() not in ARRAY_EXTENSIONS]
    if not by_kind and (tables := [file for file in metadata if file.suffix == ".parquet"]):
        by_kind[".parquet"] = tables  # shards that are called so
    if not by_kind:
        raise ValueError(_nothing_to_read(source, others))
    if len(by_kind) > 1:
        raise ValueError(
            f"{source!r} holds several kinds of data ({', '.join(by_kind)}); name one with a glob, such as "
            f"{os.path.join(source, '**', '*.parquet')!r}"
        )
    kind, chosen = by_kind.popitem()
    return _Found(kind, chosen, metadata, list(filter(may_hold_labels, others)), count_kinds(others))


def _nothing_to_read(source: str, others: list[Path]) -> str:
    if glob.has_magic(source) and all(map(os.path.isdir, others)):
        found = f"matches folders only, such as {str(others[0])!r}" if others else "matches no file"
        raise ValueError(
            f"{source!r} {found}; name a folder, or files, such as {os.path.join('photos', '**', '*.jpg')!r}"
        )
    if len(others) == 1 and is_archive(others[0]):
        return f"{source!r} is packed or compressed: unpack {others[0].name!r} first"
    kinds = count_kinds(others)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(10))
    there = f"; it holds {listed}.{advice(kinds)}" if kinds else ""
    extensions = ", ".join((*image_extensions(), *ARRAY_EXTENSIONS))
    return f"{source!r} holds no images ({extensions}) and no .parquet, .tar or .arrow{there}"


def _shards_by_split(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    by_split: dict[str, list[Path]] = {}
    without_split: list[Path] = []
    for file in files:
        found = meanings_in(str(file.relative_to(folder)))
        (by_split.setdefault(found.pop(), []) if len(found) == 1 else without_split).append(file)
    if without_split and by_split:
        raise ValueError(f"{str(folder)!r}: the split of {without_split[0].name!r} is unclear; name files with a glob")
    return by_split or {"train": without_split}
