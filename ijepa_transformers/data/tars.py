# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens local tar files of images (WebDataset): all of their members are listed and checked before any is read.

A sample is an image with the members that are called like it but for the extension: `a/7.jpg`, `a/7.cls`. The images
may have different extensions, and dots in their names. `.cls` holds the label, `.json` other columns.
"""

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import pyarrow as pa

from .cache import cache_errors_told
from .decoding import MAX_FILE_BYTES, StoredImage
from .folders import splits_in
from .kinds import image_extensions
from .masks import refuse_masks
from .notices import counted, tell


IMAGES = "image"  # the column, if the images have several extensions
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_MAX_TEXT_BYTES = 2**20  # of a .cls or .json
_MAX_ROWS_AT_A_TIME = 100
_WRITTEN_BYTES = 2**28  # about so many bytes of images are in memory while they are converted
_BLOCK = 512


class Member(NamedTuple):
    """An ordinary file in a tar, or a link to one."""

    tar: str
    name: str
    start: int
    size: int
    target: str | None = None  # what it is a link to; start and size are those of this file

    @property
    def stem(self) -> str:
        """The path without its last extension."""
        return os.path.splitext(self.name)[0]

    @property
    def sample(self) -> str:
        """The path up to the first dot of the file's name, as WebDataset has it."""
        folder, name = os.path.split(self.name)
        return os.path.join(folder, name.partition(".")[0])

    @property
    def is_hidden(self) -> bool:
        """As `._7.jpg`, which macOS adds for each file."""
        return os.path.basename(self.name).startswith(".")

    @property
    def extensions(self) -> str:
        """All behind `sample`, in lower case, without the dot."""
        return self.name[len(self.sample) + 1 :].lower()


def images_of(members: Iterable[Member]) -> list[Member]:
    """The members that are images by their names."""
    extensions = image_extensions()
    return [member for member in members if member.name.lower().endswith(extensions) and not member.is_hidden]


def without_images(name: str, members: Iterable[Member]) -> str:
    """A sentence about a tar in which no member is an image."""
    found = ", ".join(sorted({member.name.rpartition(".")[2] for member in members})[:10])
    return f"{name!r} holds no images; the extensions of its files are {found}"


def problem_of_endings(name: str, members: Iterable[Member]) -> str | None:
    """Why `datasets` cannot stream the images of a tar: what follows the first dot of a name is their column there."""
    images = images_of(members)
    endings = list(dict.fromkeys(member.name[len(member.sample) + 1 :] for member in images))
    if len(endings) < 2 or len(image_columns(images)) > 1:
        return None
    shown = ", ".join(map(repr, endings[:5])) + (", ..." if len(endings) > 5 else "")
    return (
        f"{name!r} cannot be streamed, because names in it differ behind their first dot: {shown}. Leave"
        " streaming off, or write the images with one ending"
    )


def require_one_ending(path: Path) -> None:
    """Raises ValueError if `datasets` cannot stream the images of a tar, because their names end differently or some
    are links."""
    members = list_members(path)
    problem = problem_of_endings(str(path), members)
    if problem is not None:
        raise ValueError(problem)
    _check_names(str(path), [member for member in members if member.name.lower().endswith(image_extensions())])
    for member in members:
        if member.target is not None and member.name.lower().endswith(image_extensions()):
            raise ValueError(
                f"{str(path)!r} cannot be streamed, because {member.name!r} in it is a link to {member.target!r}."
                " Leave streaming off, or write the images themselves"
            )


def open_tars(files: Mapping[str, Sequence[Path]], cache_dir: str | os.PathLike | None) -> dict[str, datasets.Dataset]:
    """The splits of tar files: a column of images, and perhaps others.

    Raises:
        ValueError: if a file is compressed, cut off, damaged or empty, holds no images, or a member is too large.
    """
    return {split: _open_split(paths, cache_dir) for split, paths in files.items()}


def require_uncompressed(name: str, start: bytes) -> None:
    """Raises ValueError if a tar file, which begins with these bytes, is compressed."""
    for magic, kind in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise ValueError(f"{name!r} is compressed ({kind}): unpack it first, because it cannot be read in parts")


def list_members(path: Path) -> list[Member]:
    """The ordinary files of a tar, and the links to them.

    Raises:
        ValueError: if it is compressed, cut off, damaged or empty.
    """
    name = str(path.absolute())
    with open(path, "rb") as file:
        require_uncompressed(name, file.read(8))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                headers = list(_checked(tar))
                end = tar.offset
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{name!r} is cut off or damaged: {error}") from error
        file.seek(end)
        members = _members(name, headers)
        _check_end(name, file.read(2**20), members)
    return members


def _checked(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar. `tarfile` goes back where a size is negative, and would not end."""
    for header in tar:
        if header.size < 0:
            raise tarfile.ReadError(f"the size of {header.name!r} is negative")
        yield header


def _members(name: str, headers: Sequence[tarfile.TarInfo]) -> list[Member]:
    """The ordinary files, and the links to them. A link to a file that is not in the tar is told and left out."""
    files = {_path(header.name): header for header in headers if header.isreg()}
    links = {_path(header.name): _target(header) for header in headers if header.issym() or header.islnk()}
    members, lost = [], []
    for header in headers:
        is_link = header.issym() or header.islnk()
        file = files.get(_end_of(_path(header.name), links)) if is_link else header
        if file is not None and file.isreg():
            if file.issparse():
                raise ValueError(f"{header.name!r} in {name!r} is stored as a sparse file: pack it without tar -S")
            target = header.linkname if is_link else None
            members.append(Member(name, header.name, file.offset_data, file.size, target))
        elif is_link and header.name.lower().endswith(image_extensions()):
            lost.append(header)
    twice = [path for path, count in Counter(member.name for member in members).items() if count > 1]
    if twice:
        number = "1 name is" if len(twice) == 1 else f"{len(twice):,} names are"
        tell(f"{number} in {name!r} several times, such as {twice[0]!r}; all of these files are read.")
    if lost:
        number = "1 link is" if len(lost) == 1 else f"{len(lost):,} links are"
        shown = f"{lost[0].name!r} to {lost[0].linkname!r}"
        tell(f"{number} left out of {name!r}, because no such file is in it: {shown}{', ...' if lost[1:] else ''}")
    return members


def _end_of(place: str, links: Mapping[str, str]) -> str:
    """Where links lead. Any place of a circle of links will do, because no file is there."""
    seen = set()
    while place in links and place not in seen:
        seen.add(place)
        place = links[place]
    return place


def _path(name: str) -> str:
    return os.path.normpath(name)


def _target(link: tarfile.TarInfo) -> str:
    """The path in the tar that a link names. A symbolic one counts from its own folder."""
    folder = os.path.dirname(link.name) if link.issym() else ""
    return _path(os.path.join(folder, link.linkname))


def _check_end(name: str, rest: bytes, members: list[Member]) -> None:
    """A tar ends in two empty blocks. `tarfile` does not notice if they are missing."""
    last = f"its last whole member is {members[-1].name!r}" if members else "it has no whole member"
    if len(rest) < _BLOCK:
        raise ValueError(f"{name!r} is cut off: it has no end mark, and {last}")
    if any(rest[:_BLOCK]):
        raise ValueError(f"{name!r} is damaged behind {members[-1].name!r}" if members else f"{name!r} is no tar file")
    if any(rest):
        raise ValueError(f"{name!r} goes on behind its end mark, and {last}; are these several tar files in one?")
    if not members:
        raise ValueError(f"{name!r} is empty: it holds no files")


def image_columns(images: Sequence[Member]) -> dict[str, list[Member]]:
    """The columns of images: one for each kind of extensions if samples have several images; else one.

    In `7.left.jpg` and `7.right.jpg`, several for each number, the columns are "left.jpg" and "right.jpg". But
    `photo.v1.jpg`, `photo.v2.jpg` have dots in their names: each is a sample of its own.
    """
    kinds: dict[str, list[Member]] = {}
    for member in images:
        kinds.setdefault(member.extensions, []).append(member)
    several_in_a_sample = max(Counter(member.sample for member in images).values(), default=0) > 1
    are_columns = all(1 < len(members) == len({m.sample for m in members}) for members in kinds.values())
    if several_in_a_sample and are_columns:
        return kinds
    return {next(iter(kinds)) if len(kinds) == 1 else IMAGES: list(images)}


def _open_split(paths: Sequence[Path], cache_dir: str | os.PathLike | None) -> datasets.Dataset:
    members = [member for path in paths for member in list_members(path)]
    images = images_of(members)
    if not images:
        raise ValueError(without_images(str(paths[0]), members))
    too_large = [member for member in images if member.size > MAX_FILE_BYTES]
    if too_large:
        name, size = too_large[0].name, too_large[0].size
        raise ValueError(f"{name!r} in {too_large[0].tar!r} has {size:,} bytes, more than {MAX_FILE_BYTES:,}")
    columns = image_columns(images)
    if len(columns) == 1:
        _check_names(str(paths[0]), images)
    return _convert(columns, members, cache_dir)


def _check_names(name: str, images: Sequence[Member]) -> None:
    """Raises ValueError if images are masks of others, or of different splits."""
    by_path = {PurePosixPath(image.name).as_posix(): image for image in images}
    if splits := splits_in(by_path):
        raise ValueError(
            f"{name!r} has the folders {' and '.join(map(repr, splits))}, and a tar file is one split: unpack it, or"
            " make a tar file of each"
        )

    def read(path: str) -> StoredImage:
        return {"bytes": _content(by_path[path]), "path": None}

    refuse_masks(name, list(by_path), read, is_folder=False)


def _convert(
    columns: Mapping[str, Sequence[Member]], members: Sequence[Member], cache_dir: str | os.PathLike | None
) -> datasets.Dataset:
    """The samples as an Arrow file of `datasets`, made once for the same members of unchanged files."""
    samples = _samples(columns)
    others = _other_columns(members, [next(filter(None, sample)) for sample in samples])
    times = tuple((tar, os.stat(tar).st_mtime_ns) for tar in dict.fromkeys(member.tar for member in members))
    largest = max(member.size for found in columns.values() for member in found)
    features = datasets.Features(dict.fromkeys(columns, datasets.Image(decode=False)))
    with cache_errors_told(cache_dir):
        dataset = datasets.Dataset.from_generator(
            _read_samples,
            features=datasets.Features({**features, **datasets.Features.from_arrow_schema(others.schema)}),
            cache_dir=None if cache_dir is None else str(cache_dir),
            gen_kwargs={"columns": tuple(columns), "samples": tuple(samples), "others": others, "times": times},
            writer_batch_size=max(1, min(_MAX_ROWS_AT_A_TIME, _WRITTEN_BYTES // max(largest, 1))),
        )
    assert isinstance(dataset, datasets.Dataset)
    return dataset


def _samples(columns: Mapping[str, Sequence[Member]]) -> list[tuple[Member | None, ...]]:
    """The images of each sample, one for each column."""
    if len(columns) == 1:
        return [(member,) for members in columns.values() for member in members]
    by_sample: dict[tuple[str, str], list[Member | None]] = {}
    for place, members in enumerate(columns.values()):
        for member in members:
            by_sample.setdefault((member.tar, member.sample), [None] * len(columns))[place] = member
    return list(map(tuple, by_sample.values()))


def _read_samples(
    columns: Sequence[str], samples: Sequence[tuple], others: pa.Table, times: tuple
) -> Iterator[dict[str, Any]]:
    del times  # of the files; `datasets` converts again if they change
    for sample, values in zip(samples, others.to_pylist() or [{}] * len(samples), strict=True):
        yield {**values, **dict(zip(columns, map(_stored, sample), strict=True))}


def _stored(member: Member | None) -> dict[str, Any] | None:
    # A name that is not UTF-8 is no text for Arrow.
    return member and {"bytes": _content(member), "path": os.fsencode(member.name).decode("utf-8", "backslashreplace")}


def _content(member: Member) -> bytes:
    with open(member.tar, "rb") as file:
        file.seek(member.start)
        return file.read(member.size)


def _other_columns(members: Sequence[Member], images: Sequence[Member]) -> pa.Table:
    """The labels of .cls and the values of .json beside each image."""
    places = {(image.tar, name): row for row, image in enumerate(images) for name in (image.sample, image.stem)}
    columns: dict[str, list[Any]] = {}
    broken = []
    for member in members:
        row = places.get((member.tar, member.stem))
        extension = member.name.rpartition(".")[2].lower()
        if row is None or extension not in ("cls", "json") or member.size > _MAX_TEXT_BYTES:
            continue
        found = _values(member, extension)
        if found is None:
            broken.append(member.name)
        for name, value in (found or {}).items():
            columns.setdefault(name, [None] * len(images))[row] = value
    if broken:
        tell(f"{counted(len(broken), '.json file')} of {members[0].tar!r} cannot be read, such as {broken[0]!r}.")
    return pa.table({name: array for name, values in columns.items() if (array := _array(name, values)) is not None})


def _values(member: Member, extension: str) -> dict[str, Any] | None:
    """The columns of a .cls or .json; None for a .json that cannot be read."""
    text = _content(member).decode("utf-8", "replace").strip()
    try:
        value = json.loads(text)
    except ValueError:
        value = None if extension == "json" else text
    if extension == "cls":
        return {"cls": value}
    return value if isinstance(value, dict) else None


def _array(name: str, values: list[Any]) -> pa.Array | None:
    """A column; classes of several types are names. None, and this is told, for other values of several types."""
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError):
        if name == "cls":
            return pa.array([None if value is None else str(value) for value in values])
        tell(f"{name!r} in the .json files of the tar has values of several types, or too large ones; it is left out.")
        return None
