# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Finds out what a source is and which local files it has, without opening them."""

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..files import read_json_object
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
from .notices import tell
from .paths import extension_of
from .splits import meanings_in, splits_among, words_of


@dataclass(frozen=True)
class ResolvedSource:
    """What a source is, before anything is opened.

    Args:
        kind: "digits", "hub", "saved" (a `save_to_disk` folder), "url", "image", ".parquet", ".tar" or ".arrow".
        files: the local shards by split.
        images: paths of the local images, with "/" between their parts, relative to `folder` if there is one. They are
            plain strings, because there may be millions.
        folder: the folder, if the source is one.
        metadata: the files of METADATA_NAMES in a folder of images.
        tables: files beside the images that may hold labels, but are not read because of their names.
        left_out: how many other files there are, by kind.
    """

    kind: str
    files: Mapping[str, list[Path]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    folder: Path | None = None
    metadata: tuple[Path, ...] = ()
    tables: tuple[Path, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def num_files(self) -> int:
        """How many images or shards there are."""
        return len(self.images) + sum(map(len, self.files.values()))

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
    if source == "digits" and path.exists():
        tell(
            "the data 'digits' are those of scikit-learn, not the 'digits' in this folder: for these write './digits'."
        )
    if source == "digits" or "://" in source:
        return ResolvedSource("digits" if source == "digits" else "url")
    if path.is_dir():
        return _resolve_folder(path)
    if path.is_file() or glob.has_magic(source):
        # A file or a glob is one split, whatever the names of the files are.
        matching = [str(path)] if path.is_file() else glob.iglob(str(path), recursive=True)
        found = _files_of_one_kind(source, sorted((Path(file).as_posix() for file in matching), key=_by_parts))
        if found.kind == "image":
            return ResolvedSource(found.kind, images=found.files, left_out=found.left_out)
        return ResolvedSource(found.kind, {"train": list(map(Path, found.files))}, left_out=found.left_out)
    if source.startswith("/path/to/"):  # in recipes for own images
        raise ValueError(f"--data is missing: {source!r} in the recipe stands for a folder or file of your own images")
    if _looks_like_a_path(source):
        raise ValueError(f"{source!r} is neither a file nor a folder on this machine")
    return ResolvedSource("hub")


def _resolve_folder(folder: Path) -> ResolvedSource:
    is_saved = (folder / "state.json").exists() and (folder / "dataset_info.json").exists()
    if is_saved or (folder / "dataset_dict.json").exists():
        return ResolvedSource("saved", folder=folder)
    found = _files_of_one_kind(str(folder), _visible_files(folder, "", (os.path.realpath(folder),)))
    if found.kind == "image":
        if found.files == ["curves.png"] and _is_model(folder):
            raise ValueError(f"{str(folder)!r} is a model directory, not a folder of photos")
        metadata, tables = (tuple(map(folder.joinpath, files)) for files in (found.metadata, found.tables))
        return ResolvedSource(found.kind, {}, found.files, folder, metadata, tables, found.left_out)
    by_split = _shards_by_split(folder, found.files)
    return ResolvedSource(found.kind, by_split, folder=folder, left_out=found.left_out)


def _is_model(folder: Path) -> bool:
    """Whether it is a directory of a model of Transformers."""
    try:
        return "model_type" in read_json_object(folder / "config.json")
    except (OSError, ValueError):
        return False


def _looks_like_a_path(source: str) -> bool:
    extensions = (*image_extensions(), *ARRAY_EXTENSIONS, *SHARD_BUILDERS)
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or source.endswith(extensions)


def _by_parts(path: str) -> str:
    """A key that sorts paths by the names of their folders, one after the other."""
    return path.replace("/", "\0")


def _visible_files(folder: Path, below: str, parents: tuple[str, ...]) -> Iterator[str]:
    """The files at any depth in `folder` / `below`, sorted, relative to `folder`. `below` is empty or ends in "/".

    Links to folders are followed, but not back to a folder above them.
    """
    names, folders = [], set()
    with os.scandir(folder / below) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in IGNORED_FOLDERS:
                continue
            names.append(entry.name)
            if _is_folder(entry):
                folders.add(entry.name)
    names.sort()
    for name in names:
        if name not in folders:
            yield below + name
        elif (real_path := os.path.realpath(folder / below / name)) not in parents:
            yield from _visible_files(folder, f"{below}{name}/", (*parents, real_path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: listed, so that it is counted as a bad image
        return False


@dataclass
class _Found:
    """The files of the one kind of data that a source has, and what lies beside them."""

    kind: str
    files: list[str]
    metadata: list[str]
    tables: list[str]
    left_out: Counter[str]


def _files_of_one_kind(source: str, files: Iterable[str]) -> _Found:
    kinds = {**dict.fromkeys(image_extensions(), "image"), **{extension: extension for extension in SHARD_BUILDERS}}
    by_kind: dict[str, list[str]] = {}
    for file in files:
        is_metadata = file.endswith(METADATA_NAMES) and os.path.basename(file) in METADATA_NAMES
        kind = "metadata" if is_metadata else kinds.get(extension_of(file), "other")
        by_kind.setdefault(kind, []).append(file)
    metadata, others = by_kind.pop("metadata", []), by_kind.pop("other", [])
    if not by_kind and (arrays := [file for file in others if extension_of(file) in ARRAY_EXTENSIONS]):
        by_kind["image"] = arrays
        others = [file for file in others if extension_of(file) not in ARRAY_EXTENSIONS]
    if not by_kind and (tables := [file for file in metadata if file.endswith(".parquet")]):
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


def _nothing_to_read(source: str, others: list[str]) -> str:
    if glob.has_magic(source) and all(map(os.path.isdir, others)):
        found = f"matches folders only, such as {others[0]!r}" if others else "matches no file"
        raise ValueError(
            f"{source!r} {found}; name a folder, or files, such as {os.path.join('photos', '**', '*.jpg')!r}"
        )
    if len(others) == 1 and is_archive(others[0]):
        return f"{source!r} is packed or compressed: unpack {os.path.basename(others[0])!r} first"
    kinds = count_kinds(others)
    listed = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(10))
    there = f"; it holds {listed}.{advice(kinds)}" if kinds else ""
    extensions = ", ".join((*image_extensions(), *ARRAY_EXTENSIONS))
    return f"{source!r} holds no images ({extensions}) and no .parquet, .tar or .arrow{there}"


def _shards_by_split(folder: Path, files: list[str]) -> dict[str, list[Path]]:
    if not splits_among(word for file in files for word in words_of(file)):
        return {"train": [folder / file for file in files]}
    by_split: dict[str, list[Path]] = {}
    without_split: list[Path] = []
    for file in files:
        found = meanings_in(file)
        (by_split.setdefault(found.pop(), []) if len(found) == 1 else without_split).append(folder / file)
    if without_split:
        raise ValueError(f"{str(folder)!r}: the split of {without_split[0].name!r} is unclear; name files with a glob")
    return by_split
