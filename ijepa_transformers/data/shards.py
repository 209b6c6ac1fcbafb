# Copyright 2026 The ijepa-transformers authors. Licensed under the Apache License, Version 2.0.
"""Opens Parquet, tar (WebDataset) and Arrow shards, local or remote, without reading their images."""

import functools
import hashlib
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import datasets
import fsspec
import pyarrow.parquet as pq
from datasets.utils.file_utils import ArchiveIterable, xopen

from ..hub import HubUnreachable, hub_or_cache
from ..url_secrets import keep_secrets, with_secrets, without_secrets
from .contents import files_digest
from .decoding import StoredImage
from .finding import resolve
from .kinds import SHARD_BUILDERS
from .notices import LINK, expect_first, tell_of_first
from .remote import facts_of_urls, told_of_waiting, web_options, why_no_answer, why_not_there
from .sources import find_image_column
from .splits import choose_split
from .tars import (
    Member,
    images_of,
    problem_of_endings,
    require_one_ending,
    require_uncompressed,
    without_images,
)
from .unreadable import named_before, unreadable_files


_READ_ROWS = 64  # images that are read from a shard at once
_FOOTER_THREADS = 16
_TAR_END = 1024  # bytes
_LISTED_MEMBERS = 10_000  # of a tar, to explain an error
_MOST_FILES = 1_000_000  # that a URL with ranges names; the largest data sets have a few hundred thousand
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_NOT_FOUND = re.compile(r"Unable to find '(https?://[^']+)'")  # of `datasets`, whatever the server answers
_NO_SIZE = "Cannot seek streaming HTTP file"  # of fsspec
_ADVICE = (
    'leave streaming off, or pack the images into Parquet: datasets.load_dataset("imagefolder", data_dir=...), then '
    "to_parquet of `.shard(num_shards, index)` for every index"
)


@dataclass
class ImageStream:
    """The shards of one split, opened but not read.

    Args:
        source: as the user wrote it, for messages.
        names: path or URL of every shard, in a fixed order.
        dataset: streaming data set of `datasets` with one shard for each name.
        column: the column of the images, which are not decoded.
        kind: "parquet", "webdataset" (tar) or "arrow".
        known_images: number of images, if the description of the data set on the Hub says it.
    """

    source: str
    names: list[str]
    dataset: datasets.IterableDataset
    column: str
    kind: str
    known_images: int | None = None

    @property
    def num_shards(self) -> int:
        return len(self.names)

    @property
    def fingerprint(self) -> str:
        """Hash of the shards' file names in their order. A moved folder or a newly signed URL keeps it."""
        names = "\n".join(name.partition("?")[0].replace("\\", "/").rsplit("/", 1)[-1] for name in self.names)
        return hashlib.sha256(names.encode()).hexdigest()[:16]

    @functools.cached_property
    def contents(self) -> str:
        """What tells that the shards are still the same, for `have_changed`: their sizes, or bytes if all of them are
        small; of URLs what their servers say. It takes a request for each URL."""
        is_remote = any("://" in name for name in self.names)
        return str(facts_of_urls(self.names) or "") if is_remote else files_digest(self.names)

    def rows(self, shard: int, first_row: int = 0) -> Iterator[tuple[int, StoredImage | None]]:
        """Row number and encoded image of every row of a shard from `first_row` on.

        A Parquet file is read from the row group of `first_row` on, a tar file from its beginning.

        Raises:
            OSError: if the shard is missing or cannot be read. The message has its name and the row.
        """
        with unreadable_files():  # the error names the shard
            yield from self._rows(shard, first_row)

    def _rows(self, shard: int, first_row: int) -> Iterator[tuple[int, StoredImage | None]]:
        row = first_row
        try:
            if self.kind == "webdataset":
                _require_plain_tar(self.names[shard])
            for part, start in self._parts(shard, first_row):
                # Not iter(part): in the workers of a DataLoader it gives one worker all shards and the others none.
                batches = part.iter(batch_size=_READ_ROWS)
                values = (value for batch in batches for value in batch[self.column])
                for value in itertools.islice(values, row - start, None):
                    if value is None and self.kind == "webdataset":
                        _require_one_ending(self.names[shard])
                        raise ValueError(f"it has a sample without a member that ends in {self.column!r}")
                    yield row, value
                    row += 1
            if self.kind == "webdataset":
                _check_tar_end(self.names[shard])
        except Exception as error:  # pyarrow, tarfile, json and file systems raise errors of many classes
            if self.kind == "parquet" and _is_empty(self.names[shard]):
                return  # pyarrow raises an error for no rows
            problem = f"the shard {self.names[shard]!r} cannot be read from row {row} on"
            raise OSError(without_secrets(f"{problem}: {type(error).__name__}: {error}")) from error

    def _parts(self, shard: int, first_row: int) -> Iterator[tuple[datasets.IterableDataset, int]]:
        """Streaming data sets that together hold the rows from `first_row` on, with the number of their first row."""
        whole = self.dataset.shard(num_shards=self.num_shards, index=shard)
        if first_row == 0 or self.kind != "parquet":
            yield whole, 0
            return
        groups = whole.reshard()  # a shard for each row group
        start = 0
        for index, num_rows in enumerate(_row_group_sizes(self.names[shard])):
            if start + num_rows > first_row:
                yield groups.shard(num_shards=groups.num_shards, index=index), start
            start += num_rows


def open_stream(
    source: str | os.PathLike,
    *,
    split: str = "train",
    config_name: str | None = None,
    image_column: str | None = None,
) -> ImageStream:
    """Opens shards for streaming: lists the files and reads the header of one. No image is decoded.

    Args:
        source: one of
            - a folder, file or glob of .parquet, .tar (WebDataset) or .arrow files, with splits as in
              `load_image_dataset`;
            - any URL or glob of URLs that fsspec opens, such as `hf://datasets/USER/NAME/**/*.parquet`,
              `s3://bucket/train-*.tar` or `https://host/train-{00000..00099}.tar`. The range in braces is for servers
              that cannot list files. All files of a URL are the split "train".
            - otherwise the name of a data set on the Hub, which must consist of such files.
        split, config_name, image_column: as in `load_image_dataset`.

    Raises:
        ValueError: if the source, the split or the column is absent or ambiguous, or if it cannot be streamed.
    """
    source = keep_secrets(os.fspath(source))
    with told_of_waiting():
        return _open_stream(source, split, config_name, image_column)


def _open_stream(source: str, split: str, config_name: str | None, image_column: str | None) -> ImageStream:
    arguments = _builder_arguments(source, config_name)
    is_of_hub = arguments["path"] == source or source.startswith("hf://")
    cache = hub_or_cache(source) if is_of_hub else nullcontext()
    with _as_value_error(f"{source!r} cannot be opened for streaming"), cache:
        builder = datasets.load_dataset_builder(**arguments)
    if builder.name not in SHARD_BUILDERS.values():
        raise ValueError(f"{source!r} cannot be streamed: its files are not .parquet, .tar or .arrow; {_ADVICE}")
    tars = builder.config.data_files if builder.name == "webdataset" else {}
    for names in tars.values():
        _check_local_tar(Path(names[0]))
    with _endings_told([str(names[0]) for names in tars.values()]):
        files = map(str, itertools.chain.from_iterable(builder.config.data_files.values()))
        with _links_told(builder), _as_value_error(f"the {builder.name} files of {source!r} cannot be read", files):
            for names in tars.values():
                _require_plain_tar(str(names[0]))
            splits = builder.as_streaming_dataset()
        chosen = choose_split(source, splits, split)
        column = find_image_column(splits[chosen], image_column)
    if builder.name == "parquet":
        # The column is known only after opening. It is set here, because a second opening would list all files again.
        builder.config.columns = [column]
        splits = builder.as_streaming_dataset()
    dataset = splits[chosen].select_columns([column]).cast_column(column, datasets.Image(decode=False))
    names = [str(name) for name in builder.config.data_files[chosen]]
    known = (builder.info.splits or {}).get(chosen)
    return ImageStream(source, names, dataset, column, builder.name, (known.num_examples or None) if known else None)


def count_images(stream: ImageStream) -> int | None:
    """Number of images, from the Hub or from the footers of all Parquet files; None for tar and Arrow files.

    Raises:
        OSError: if a footer cannot be read.
    """
    if stream.known_images is not None or stream.kind != "parquet":
        return stream.known_images
    with ThreadPoolExecutor(_FOOTER_THREADS) as pool:  # reading remote footers is mostly waiting
        return sum(map(sum, pool.map(_row_group_sizes, stream.names)))


def _builder_arguments(source: str, config_name: str | None) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset_builder` for this source."""
    resolved = resolve(source, config_name)
    if resolved.kind == "hub":
        return {"path": source, "name": config_name}
    if resolved.kind == "url":
        kind, urls = _files_of_url(source, with_secrets(source))
        if problem := why_no_answer(urls["train"][0]):
            raise ValueError(without_secrets(f"{source!r} cannot be opened for streaming: {problem}"))
        options = {urls["train"][0].partition("://")[0]: web_options(urls["train"][0])}
        web = {"storage_options": options} if any(options.values()) else {}
        return {"path": SHARD_BUILDERS[kind], "data_files": urls, **web}
    if resolved.kind == "saved":
        raise ValueError(f"{source!r} is a save_to_disk folder, which opens at once: leave streaming off")
    if resolved.kind not in SHARD_BUILDERS:
        raise ValueError(f"{source!r} cannot be streamed: it holds single images; {_ADVICE}")
    return {"path": SHARD_BUILDERS[resolved.kind], "data_files": resolved.data_files}


def _files_of_url(source: str, whole: str) -> tuple[str, dict[str, list[str]]]:
    """The kind and the files of a URL, which has a public form, for messages, and a whole one."""
    path = source.partition("?")[0] if source.startswith("http") else source  # for other schemes, ? is part of a glob
    kinds = [extension for extension in SHARD_BUILDERS if path.lower().endswith(extension)]
    if not kinds:
        example = source.rstrip("/") + "/**/*.parquet"
        raise ValueError(f"{source!r} does not end in .parquet, .tar or .arrow; name the files, such as {example!r}")
    _check_ranges(source)
    return kinds[0], {"train": _expand_ranges(whole)}


def _check_ranges(url: str) -> None:
    """Raises ValueError if a range goes down, or if there are too many files."""
    num_files = 1
    for first, last in _RANGE.findall(url):
        if int(first) > int(last):
            raise ValueError(
                f"{url!r}: the range {{{first}..{last}}} goes down, so it names no file; write {{{last}..{first}}}"
            )
        num_files *= int(last) - int(first) + 1
    if num_files > _MOST_FILES:
        raise ValueError(f"{url!r} names {num_files:,} files, more than {_MOST_FILES:,}")


def _expand_ranges(url: str) -> list[str]:
    """`a-{08..10}.tar` -> `a-08.tar`, `a-09.tar`, `a-10.tar`."""
    found = _RANGE.search(url)
    if found is None:
        return [url]
    first, last = found.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in _expand_ranges(url[: found.start()] + number + url[found.end() :])]


@contextmanager
def _as_value_error(problem: str, files: Iterable[str] = ()) -> Iterator[None]:
    try:
        with unreadable_files() as unreadable:
            yield
    except HubUnreachable as error:
        raise ValueError(f"{problem}, because {error.reason}.") from error
    except Exception as error:  # `datasets` wraps the cause in errors of many classes
        reason = error.__cause__ or error
        where = named_before(unreadable, files)
        told = _told_of_server(str(reason)) or f"{where}{type(reason).__name__}: {' '.join(str(reason).split())}"
        raise ValueError(without_secrets(f"{problem}: {told}")) from error


def _told_of_server(reason: str) -> str | None:
    """What a web server does wrong, if that is the reason of an error."""
    if _NO_SIZE in reason:
        return "the server does not tell the size of the file, so no part of it can be read; .tar files need none"
    found = _NOT_FOUND.search(reason)
    return why_not_there(found[1]) if found else None


def _row_group_sizes(name: str) -> list[int]:
    """Rows in each row group of a Parquet file."""
    try:
        with fsspec.open(name, "rb", **web_options(name)) as file:
            metadata = pq.read_metadata(file)
    except Exception as error:
        problem = f"the footer of {name!r} cannot be read: {type(error).__name__}: {error}"
        raise OSError(without_secrets(problem)) from error
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def _is_empty(name: str) -> bool:
    """Whether a Parquet file can be read and has no rows."""
    try:
        return not sum(_row_group_sizes(name))
    except OSError:
        return False


def _require_plain_tar(name: str) -> None:
    """Raises ValueError for a compressed tar, of which `datasets` would unpack whole members into memory."""
    with fsspec.open(name, "rb", **web_options(name)) as file:
        require_uncompressed(name, file.read(8))


class _Archive(ArchiveIterable):
    """The files of a streamed tar. Links are told, which `datasets` leaves out without a word."""

    @classmethod
    def _iter_from_urlpath(cls, urlpath: str, download_config: Any = None) -> Iterator[tuple[str, IO[bytes] | None]]:
        with xopen(urlpath, "rb", download_config=download_config, block_size=0) as file:
            tar = tarfile.open(fileobj=file, mode="r|*")  # noqa: SIM115
            for header in tar:
                if header.issym() or header.islnk():
                    tell_of_first(
                        LINK,
                        f"{header.name!r} in {urlpath!r} is a link to {header.linkname!r}. Links in tar files are left"
                        " out when streaming. Others are not told of.",
                    )
                elif header.isreg() and not os.path.basename(header.name).startswith((".", "__")):
                    yield header.name, tar.extractfile(header)
                tar.members = []  # type: ignore[attr-defined]  # which would grow


@contextmanager
def _links_told(builder: datasets.DatasetBuilder) -> Iterator[None]:
    """Inside, the builder opens tar files as `_Archive`."""
    expect_first(LINK)
    split_generators = builder._split_generators

    def with_archives(manager: Any) -> Any:
        manager.iter_archive = functools.partial(_Archive.from_urlpath, download_config=manager.download_config)
        return split_generators(manager)

    builder._split_generators = with_archives
    try:
        yield
    finally:
        del builder._split_generators  # a builder with a local function cannot be sent to another process


def _check_local_tar(path: Path) -> None:
    """Raises ValueError if a tar on this machine is not whole, or has images that cannot be streamed."""
    if path.is_file():
        require_one_ending(path)


@functools.lru_cache(maxsize=16)
def _first_members(name: str) -> list[Member]:
    with fsspec.open(name, "rb", **web_options(name)) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        return [Member(name, info.name, 0, info.size) for info in itertools.islice(tar, _LISTED_MEMBERS)]


def _problem_of_endings(name: str) -> str | None:
    """A sentence if the images of a tar differ in what follows the first dot of their names, which is their column."""
    return problem_of_endings(name, _first_members(name))


def _problem_of_others(name: str, error: ValueError) -> str | None:
    """A sentence if a tar holds no images, or if what lies beside them is the reason of an error: `datasets` decodes a
    .cls as a number and a .json as JSON."""
    members = _first_members(name)
    if not images_of(members):
        return without_images(name, members)
    found = {member.name.rpartition(".")[2].lower() for member in members} & {"cls", "cls2", "json", "jsn"}
    if found and any(sign in str(error) for sign in ("JSONDecodeError", "invalid literal for int")):
        kinds = " or ".join(f".{kind}" for kind in sorted(found))
        wrapped = error.__cause__ or error
        return (
            f"{name!r} cannot be streamed, because a {kinds} beside an image cannot be read"
            f" ({wrapped.__cause__ or wrapped}). Leave streaming off, or write the images alone"
        )
    return None


def _require_one_ending(name: str) -> None:
    problem = _problem_of_endings(name)
    if problem is not None:
        raise ValueError(problem)


@contextmanager
def _endings_told(tars: Sequence[str]) -> Iterator[None]:
    """Explains an error of `datasets` by the names in these tars, if they are its reason."""
    try:
        yield
    except ValueError as error:
        for name in tars:
            try:
                problem = _problem_of_endings(name) or _problem_of_others(name, error)
            except Exception:  # it cannot be read, of which the error speaks
                problem = None
            if problem is not None:
                raise ValueError(problem) from error
        raise


def _check_tar_end(name: str) -> None:
    """Raises ValueError if a tar file is cut off. tarfile does not notice: it takes the end of the file for the end of
    the archive."""
    try:
        with fsspec.open(name, "rb", **web_options(name)) as file:
            file.seek(-_TAR_END, os.SEEK_END)
            end = file.read()
    except Exception:  # the web server sends whole files only. All images were read, so this is not an error.
        return
    if any(end):
        raise ValueError(f"the file is cut off, because a tar file ends in {_TAR_END:,} zero bytes")
